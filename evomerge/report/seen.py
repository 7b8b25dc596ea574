"""A candidate's answers about pictures, for a self-contained page."""

from __future__ import annotations

from typing import NamedTuple

from evomerge.inference.pictures import data_url
from evomerge.report.items import ItemAnswers, items_of
from evomerge.store import Store

_MAX = 8


class SeenItem(NamedTuple):
    """An item with its pictures, as ``data:`` URLs, and a candidate's score and answer."""

    number: int
    measure: str
    pictures: list[str]
    text: str
    right: str
    score: float
    answer: str


def seen_items(store: Store, candidate: int) -> list[SeenItem]:
    """The first items with pictures of the first objective that has any; held-out items if it was confirmed."""
    for measure in store.search().record.objectives:
        for split in ("held_out", "search"):
            items = [item for item in items_of(store, [candidate], split, measure) if item.pictures]
            if items:
                return [_seen(store, item, measure.name) for item in items[:_MAX]]
    return []


def _seen(store: Store, item: ItemAnswers, measure: str) -> SeenItem:
    images = [image for picture in item.pictures if (image := store.thumbnail(picture)) is not None]
    (answered,) = item.answered
    texts = (item.text or "", item.right or "")
    return SeenItem(
        item.number, measure, [data_url(image) for image in images], *texts, answered.score, answered.answer or ""
    )
