"""Train the Transformer of "Attention Is All You Need", from raw text to translation."""

__version__ = "0.1.0"
