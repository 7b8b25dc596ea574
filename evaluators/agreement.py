"""Compares MGSM's two scorers: both grade the same answers, and differences are shown.

    python -m evaluators.mgsm ANSWERS.jsonl --language ja

Each line of the file is a JSON object with ``response``, a model's answer, and the right number as ``answer_number`` or
at the end of ``answer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from evaluators.language import language_detector
from evaluators.mgsm import right_answer, verdict
from evaluators.numbers import answer_number, last_number_sakana
from evaluators.numerals import Language
from evomerge.errors import InputError
from evomerge.json_lines import read_lines

_TAIL = 80  # how many characters of an answer are shown, from its end


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and its verdicts: whether the number is right, and whether both number and language are."""

    place: str
    answer: str
    right: Decimal
    sakana: tuple[bool, bool]
    exact: tuple[bool, bool]


@dataclass(frozen=True)
class Table:
    """How many answers both scorers count as right, how many only one of them, and how many neither."""

    both: int
    sakana_alone: int
    exact_alone: int
    neither: int

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (1960): agreement beyond chance, 1 if perfect; None if all verdicts are the same."""
        n = self.both + self.sakana_alone + self.exact_alone + self.neither
        sakana, exact = self.both + self.sakana_alone, self.both + self.exact_alone
        chance = sakana * exact + (n - sakana) * (n - exact)
        return None if chance == n * n else ((self.both + self.neither) * n - chance) / (n * n - chance)


def agreement(file: Path, language: Language) -> list[JudgedAnswer]:
    """The verdicts of both scorers on each answer of a file. Sakana's reads numbers the same way in every language.

    Raises:
        InputError: a file or a line that cannot be read, one without a response, or no line at all.
    """
    detector = language_detector()
    graded = []
    for line in read_lines(file):
        answer = line.fields.get("response")
        if not isinstance(answer, str):
            hint = 'Write a line such as {"response": "The answer is 2.", "answer_number": 2}.'
            raise InputError(line.place, "has no text in its field 'response'", hint)
        right = right_answer(line)
        sakana, exact = (verdict(answer, right, scorer, language, detector) for scorer in ("sakana", "exact"))
        graded.append(JudgedAnswer(line.place, answer, right, sakana, exact))
    if not graded:
        raise InputError(str(file), "holds no answers")
    return graded


def tables(graded: Sequence[JudgedAnswer]) -> tuple[Table, Table]:
    """The table for the verdicts on numbers, and that for the verdicts on numbers and languages."""
    first, second = (
        Table(
            both=sum(g.sakana[i] and g.exact[i] for g in graded),
            sakana_alone=sum(g.sakana[i] and not g.exact[i] for g in graded),
            exact_alone=sum(g.exact[i] and not g.sakana[i] for g in graded),
            neither=sum(not g.sakana[i] and not g.exact[i] for g in graded),
        )
        for i in (0, 1)
    )
    return first, second


def report(graded: Sequence[JudgedAnswer], language: Language) -> Iterator[str]:
    """A report as lines of text: what each scorer counts as right, the tables, and each answer they differ on."""
    yield f"{len(graded)} answers     sakana   exact |   both  sakana alone  exact alone  neither |  kappa"
    for name, t in zip(("acc", f"acc_{language}"), tables(graded), strict=True):
        kappa = "none" if t.kappa is None else f"{t.kappa:.3f}"
        yield (
            f"{name:<{len(str(len(graded))) + 10}}{t.both + t.sakana_alone:9}{t.both + t.exact_alone:8} |{t.both:7}"
            f"{t.sakana_alone:14}{t.exact_alone:13}{t.neither:9} |{kappa:>7}"
        )
    for item in graded:
        if item.sakana == item.exact:
            continue
        read = f"sakana reads {last_number_sakana(item.answer)}, exact {answer_number(item.answer, language)}"
        tail = " ".join(item.answer.split())[-_TAIL:]
        yield f"{item.place}: {item.right} is right; {read}: ...{tail}"
