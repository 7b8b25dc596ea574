"""Evomerge: evolutionary search for the best way to merge language models that already exist."""

__version__ = "0.1.0"
