"""Items with the answers of candidates: the question, the right answer, and each candidate's answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evomerge.printable import printable
from evomerge.report.prompts import text_lines
from evomerge.store import SearchRow, Store
from evomerge.store.record import Measure

_QUESTIONS = ("prompt", "question", "problem", "query", "instruction", "input", "text")
"""Common names of the field with the question, most likely first."""

_LONGEST_TITLE = 24


@dataclass(frozen=True)
class Answered:
    """One candidate on one item: its score, its answer if answers were kept, and whether a drawing was kept."""

    score: float
    answer: str | None
    drawn: bool = False


@dataclass(frozen=True)
class ItemAnswers:
    """An item that candidates were scored on.

    Attributes:
        number: its position in the split.
        text: the question; None if it was not kept.
        right: the right answer; None if there is none.
        answered: the results of each candidate, in order.
        pictures: the hashes of its pictures.
    """

    number: int
    text: str | None
    right: str | None
    answered: tuple[Answered, ...]
    pictures: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether candidates scored differently on it."""
        return len({result.score for result in self.answered}) > 1


def items_of(store: Store, candidates: Sequence[int], split: str, measure: Measure) -> list[ItemAnswers]:
    """The items of a split on which all the candidates were scored in a measure, in order."""
    sides: list[dict[int, Answered]] = []
    for number in candidates:
        answers = store.answers(number, split).get(measure.version, {})
        recorded = next((s for s in store.scores(number, split) if s.evaluator == measure.version), None)
        items = [] if recorded is None else recorded.items.tolist()
        scores = [] if recorded is None else recorded.metrics[measure.metric].tolist()
        drawn = store.drawn(number, split, measure.version)
        sides.append(
            {item: Answered(score, answers.get(item), item in drawn) for item, score in zip(items, scores, strict=True)}
        )
    texts = dict(enumerate(store.item_texts(measure.version, split)))
    pictures = dict(enumerate(store.item_pictures(measure.version, split)))
    shared = sorted(set.intersection(*(set(side) for side in sides)))
    return [
        ItemAnswers(item, text, right or None, tuple(side[item] for side in sides), pictures.get(item, ()))
        for item in shared
        for text, right in [texts.get(item, (None, None))]
    ]


def are_records(search: SearchRow, measure: str) -> bool:
    """Whether the items of a measure are records, like those of a Python function, whose texts are JSON."""
    kinds = ("objectives", "constraints", "features")
    measures = {name: settings for kind in kinds for name, settings in (search.settings.get(kind) or {}).items()}
    return bool(measures.get(measure, {}).get("evaluator") == "python")


def fields_of(text: str) -> list[tuple[str, str]]:
    """The fields of an item whose text is a JSON object, starting with the likely question; empty for other texts."""
    try:
        content = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return []
    if not isinstance(content, dict):
        return []
    fields = [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in content.items()
    ]
    question = next((name for name in _QUESTIONS if isinstance(content.get(name), str)), None)
    return sorted(fields, key=lambda field: field[0] != question)


def item_lines(item: ItemAnswers, names: Sequence[str], *, records: bool = False) -> Iterator[str]:
    """An item for a terminal.

    Args:
        names: the names of the candidates.
        records: whether the text is a record, whose fields are shown separately.
    """
    scores = ", ".join(f"{name} {result.score:.3f}" for name, result in zip(names, item.answered, strict=True))
    yield f"item {item.number}: {scores}"
    fields = fields_of(item.text) if records and item.text is not None else []
    asked: Sequence[tuple[str, str | None]] = fields or [("asked", item.text or None)]
    answers = zip(names, (result.answer for result in item.answered), strict=True)
    texts = [*asked, ("right", item.right), *answers]
    shown = [(printable(title, _LONGEST_TITLE), text) for title, text in texts if text is not None]
    width = max((len(title) for title, _ in shown), default=0)
    for title, text in shown:
        yield from text_lines(f"{title:{width}}", text)
