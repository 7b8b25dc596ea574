"""Evaluators: one a file. A new one is a file here, or an entry point ``evomerge.evaluators`` of a package."""

from __future__ import annotations

from typing import cast

from evaluators.base import EvaluatorSettings
from evomerge.plugins import find_plugin


def evaluator_settings(kind: str, place: str) -> type[EvaluatorSettings]:
    """The settings class of the evaluator of this kind; InputError when there is none."""
    return cast(type[EvaluatorSettings], find_plugin("evomerge.evaluators", kind, place, "evaluator"))
