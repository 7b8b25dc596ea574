"""Evomerge: evolutionary search for the best way to merge existing language models."""

from evomerge.transformers_imports import leave_out_unused

__version__ = "0.1.0"

leave_out_unused()
