"""The Transformer of the paper and nothing else; nothing here knows data files or ranks."""
