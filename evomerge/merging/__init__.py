"""Merge methods, and the making of merged models from recipes."""

from __future__ import annotations

from evomerge.merging.plans import Method
from evomerge.merging.registry import METHODS, find_method

__all__ = ["METHODS", "Method", "find_method"]
