"""Evaluators: one a file. A new one is a file here, or an entry point ``evomerge.evaluators`` of a package."""

from __future__ import annotations

from evaluators.base import EvaluatorSettings
from evomerge.plugins import find_class


def evaluator_settings(kind: str, place: str) -> type[EvaluatorSettings]:
    """The settings class of the evaluator of this kind; InputError when there is none."""
    return find_class("evomerge.evaluators", kind, place, EvaluatorSettings)
