"""Items with what candidates wrote, item by item: what was asked, what is right, and what each says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evomerge.report.prompts import text_lines
from evomerge.store import Store
from evomerge.store.record import Measure


@dataclass(frozen=True)
class Answered:
    """A candidate at one item: its score, and its answer where answers were kept."""

    score: float
    answer: str | None


@dataclass(frozen=True)
class Item:
    """An item that candidates were scored on.

    Attributes:
        number: its place in the split.
        text: what it asks; None where that was not kept.
        right: the right answer; None where there is none.
        answered: by each of the candidates, in order.
    """

    number: int
    text: str | None
    right: str | None
    answered: tuple[Answered, ...]

    @property
    def differs(self) -> bool:
        """Whether candidates scored differently on it."""
        return len({result.score for result in self.answered}) > 1


def items_of(store: Store, candidates: Sequence[int], split: str, measure: Measure) -> list[Item]:
    """The items of a split that all the candidates were scored on in a measure, in order."""
    sides: list[dict[int, Answered]] = []
    for number in candidates:
        answers = store.answers(number, split).get(measure.version, {})
        recorded = next((s for s in store.scores(number, split) if s.evaluator == measure.version), None)
        items = [] if recorded is None else recorded.items.tolist()
        scores = [] if recorded is None else recorded.metrics[measure.metric].tolist()
        sides.append({item: Answered(score, answers.get(item)) for item, score in zip(items, scores, strict=True)})
    texts = dict(enumerate(store.item_texts(measure.version, split)))
    shared = sorted(set.intersection(*(set(side) for side in sides)))
    return [
        Item(item, text, right or None, tuple(side[item] for side in sides))
        for item in shared
        for text, right in [texts.get(item, (None, None))]
    ]


def item_lines(item: Item, names: Sequence[str]) -> Iterator[str]:
    """An item for a terminal; ``names`` are those of the candidates."""
    scores = ", ".join(f"{name} {result.score:.3f}" for name, result in zip(names, item.answered, strict=True))
    yield f"item {item.number}: {scores}"
    width = max(len(name) for name in ("asked", "right", *names))
    if item.text is not None:
        yield from text_lines(f"{'asked':{width}}", item.text)
    if item.right is not None:
        yield from text_lines(f"{'right':{width}}", item.right)
    for name, result in zip(names, item.answered, strict=True):
        if result.answer is not None:
            yield from text_lines(f"{name:{width}}", result.answer)
