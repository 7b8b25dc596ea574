"""The making of merged models from recipes."""
