"""Raw text to batches; nothing here knows the model, a network or a whole Config."""
