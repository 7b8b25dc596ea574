"""Adapters taken out of models: the difference of a fine-tune, or of a found merge, from its base as a LoRA."""
