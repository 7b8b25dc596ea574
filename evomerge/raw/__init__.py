"""Checkpoints of no transformers architecture: flat tables of tensors, and image models among them."""
