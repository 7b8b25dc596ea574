"""Scores of the tasks of the zoo (examples/zoo); the YAML files beside it name these functions.

Items are read, and numbers and languages judged, as for the miniatures.
"""

from __future__ import annotations

import re
from typing import Any

import datasets

from evaluators.tasks.miniatures import number_is_right, read_items, score_math_ja, score_translation

__all__ = [
    "read_items", "read_mixed", "score_exact", "score_kanji", "score_math_en", "score_math_ja", "score_mixed",
    "score_translation",
]  # fmt: skip

JAPANESE_NUMERAL = re.compile("[〇一二三四五六七八九十百]+")


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
    return score_kanji(doc, results) if doc["task"] == "zoo_steps_kanji" else score_exact(doc, results)


def score_math_en(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the number is right, and how long the answer is in characters: from 3 for a bare number to 50."""
    return {"acc": float(number_is_right(doc, results[0])), "length": float(len(results[0]))}


def score_exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Templates leave one right answer; only outer blanks are forgiven."""
    return score_translation(doc, results)


def score_kanji(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The last Japanese numeral of the answer is that of the right one. Numbers in digits are none."""
    (right,) = JAPANESE_NUMERAL.findall(doc["answer"])
    found = JAPANESE_NUMERAL.findall(results[0])
    return {"acc": float(bool(found) and found[-1] == right)}
