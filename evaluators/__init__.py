"""Evaluators, one per file. To add one, write a file here or declare an entry point ``evomerge.evaluators``."""

from __future__ import annotations

from evaluators.base import EvaluatorSettings
from evomerge.plugins import find_class


def evaluator_settings(kind: str, place: str) -> type[EvaluatorSettings]:
    """The settings class of the evaluator of this kind; InputError if there is none."""
    return find_class("evomerge.evaluators", kind, place, EvaluatorSettings)
