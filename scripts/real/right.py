"""An evaluator: whether answers to the items of scripts/real/skills.py are right, each in the format of its skill."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence


def right(items: Sequence[Mapping[str, str]], generate: Callable[..., list[str]]) -> list[float]:
    """1 for a right answer and 0 for any other, in the order of the items."""
    answers = generate([item["question"] for item in items], max_new_tokens=40, stop=["\n"])
    return [float(is_right(item["skill"], item["value"], answer)) for item, answer in zip(items, answers, strict=True)]


def is_right(skill: str, value: str, answer: str) -> bool:
    """Whether an answer gives a value in exactly the format of its skill."""
    answer = answer.strip()
    if skill == "sums":
        match = re.fullmatch(r".*The answer is (-?\d+)\.", answer)
        return match is not None and match[1] == value
    if skill == "json":
        try:
            return bool(json.loads(answer) == {"answer": value})
        except ValueError:
            return False
    return answer == f"Verdict: {value}"
