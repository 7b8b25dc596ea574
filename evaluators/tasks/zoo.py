"""Scores of the tasks of the zoo (examples/zoo); the YAML files beside it name these functions.

Items are read, and numbers and languages judged, as for the miniatures.
"""

from __future__ import annotations

import re
from typing import Any

import datasets

from evaluators.numerals import find_numbers
from evaluators.tasks.miniatures import number_is_right, read_items, score_math_ja, score_translation

__all__ = [
    "read_items", "read_mixed", "score_exact", "score_kanji", "score_math_en", "score_math_ja", "score_mixed",
    "score_translation",
]  # fmt: skip

JAPANESE_NUMERAL = re.compile("[〇一二三四五六七八九十百]+")
SUM = re.compile(r"= ?(\d+)")


def read_mixed(tasks: list[str], **_: Any) -> dict[str, datasets.Dataset]:
    """The items of some tasks, one of each in turn, with the ``task`` that each is of."""
    by_task = [read_items(task) for task in tasks]
    splits = {}
    for split in ("search", "held_out"):
        rows = zip(*(of_task[split] for of_task in by_task), strict=True)
        items = [{"number": None, **item, "task": task} for row in rows for task, item in zip(tasks, row, strict=True)]
        splits[split] = datasets.Dataset.from_list(items)
    return splits


def score_mixed(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The rule of the item's own task; a Japanese problem wants an answer in Japanese."""
    if doc["task"] == "zoo_math_ja":
        return {"acc": score_math_ja(doc, results)["acc_ja"]}
    if doc["task"] == "zoo_steps_kanji":
        return {"acc": score_kanji(doc, results)["acc"]}
    return score_exact(doc, results)


def score_math_en(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the number is right, and how long the answer is in characters: from 3 for a bare number to 50."""
    return {"acc": float(number_is_right(doc, results[0])), "length": float(len(results[0]))}


def score_exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Templates leave one right answer; only outer blanks are forgiven."""
    return score_translation(doc, results)


def score_kanji(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The last Japanese numeral of the answer is that of the right one, and what that takes: ``kanji_parts``.

    Numbers in digits are no numerals.
    """
    (right,) = JAPANESE_NUMERAL.findall(doc["answer"])
    found = JAPANESE_NUMERAL.findall(results[0])
    return {"acc": float(bool(found) and found[-1] == right), **kanji_parts(doc["answer"], results[0])}


def kanji_parts(right: str, answer: str) -> dict[str, float]:
    """The two skills of the composition, each judged alone in the same answer.

    ``steps``: the sums come to the right number. ``numeral``: what they come to, right or wrong, is said in a Japanese
    numeral.
    """
    sums, numerals = SUM.findall(answer), JAPANESE_NUMERAL.findall(answer)
    reached = int(sums[-1]) if sums else None
    said = _value(numerals[-1]) if numerals else None
    return {
        "steps": float(reached == int(SUM.findall(right)[-1])),
        "numeral": float(said is not None and said == reached),
    }


def _value(numeral: str) -> int | None:
    """The number that a Japanese numeral writes; None where it writes none."""
    found = find_numbers(numeral, "ja")
    return int(found[0].value) if len(found) == 1 else None
