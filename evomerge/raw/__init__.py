"""Checkpoints without a transformers architecture: flat tables of tensors, including image models."""
