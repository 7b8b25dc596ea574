"""Answers that are either right or wrong as a whole, such as those to short questions about pictures."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from evaluators.answers import AnswersEvaluator, AnswersSettings, Question
from evaluators.item_files import fill
from evomerge.errors import InputError
from evomerge.json_lines import Line

_ENDS = " .。．!！"


class ExactMatchSettings(AnswersSettings):
    """The settings of prompts and their right answers."""

    kind: Literal["exact_match"] = "exact_match"

    def known_metrics(self) -> Collection[str]:
        return ("exact_match",)

    def build(self) -> ExactMatchEvaluator:
        """Read the items and fill the templates.

        Raises:
            InputError: a file or a line that cannot be read, a missing field, an empty right answer, an empty split, or
                an item that is in both splits.
        """
        return ExactMatchEvaluator(self)


class ExactMatchEvaluator(AnswersEvaluator):
    """Prompts with right answers; ``exact_match`` is 1 if the answer equals the right one after ``plain``, else 0."""

    def __init__(self, settings: ExactMatchSettings) -> None:
        self._answer = settings.answer
        super().__init__(settings, "exact_match", ["exact_match 1", unicodedata.unidata_version])

    def _question(self, line: Line) -> Question:
        reference = fill("answer", self._answer, line)
        if not plain(reference):
            raise InputError(line.place, f"its answer {reference!r} is empty", "Leave the item out.")
        return replace(super()._question(line), reference=reference)

    def _grade(self, answered: Sequence[tuple[Question, str]]) -> list[float]:
        return [float(plain(item.reference) == plain(answer)) for item, answer in answered]


def plain(text: str) -> str:
    """Normalise case, outer whitespace, a final full stop, character width (NFKC) and kinds of whitespace."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(_ENDS)
