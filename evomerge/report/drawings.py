"""What candidates drew for the same items, side by side: sources and other baselines, and the chosen candidates."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from evomerge.inference.pictures import data_url
from evomerge.report.items import fields_of
from evomerge.report.search_status import SearchStatus
from evomerge.store import Store
from evomerge.store.record import Measure
from evomerge.store.rows import number_of

Split = Literal["search", "held_out"]

_SPLITS: tuple[Split, ...] = ("held_out", "search")

_LONGEST_TITLE = 60


@dataclass(frozen=True)
class Drawing:
    """A thumbnail of a picture that was made with a candidate.

    Attributes:
        item: its position in the split.
    """

    candidate: int
    split: Split
    measure: Measure
    item: int


Address = Callable[[Drawing], str]
"""The URL of a drawing on a page."""


@dataclass(frozen=True)
class DrawnItem:
    """A picture in the grid; ``address`` is empty if there is none."""

    address: str
    score: str


@dataclass(frozen=True)
class DrawnRow:
    """A candidate with its drawings for the items."""

    id: str
    label: str
    roles: list[str]
    items: list[DrawnItem]


@dataclass(frozen=True)
class DrawingGrid:
    """Candidates by items.

    Attributes:
        measure: the objective whose scores are below the pictures.
        held_out: whether the items are from the held-out split.
        titles: a short title of each item.
    """

    measure: str
    held_out: bool
    titles: list[str]
    rows: list[DrawnRow]


def drawing_grid(store: Store, status: SearchStatus, address: Address) -> DrawingGrid | None:
    """The grid for the first objective with drawings, on held-out items if there is a confirmation.

    None if nothing was drawn, as in most searches.
    """
    rows = dict(_rows(status))
    for measure in store.search().record.objectives:
        for split in _SPLITS:
            grid = _grid(store, rows, split, measure, address)
            if grid is not None:
                return grid
    return None


def embedded(store: Store) -> Address:
    """Drawings embedded in a self-contained page."""

    images = cache(store.drawings)  # reads all drawings of a candidate at once, because they are requested item by item

    def address(drawing: Drawing) -> str:
        return data_url(images(drawing.candidate, drawing.split)[drawing.measure.version][drawing.item])

    return address


def _rows(status: SearchStatus) -> Iterator[tuple[str, tuple[str, list[str]]]]:
    """The labels and roles of the baselines, then of the chosen candidates, by id."""
    roles: dict[str, list[str]] = {}
    for pick in status.picks:
        roles.setdefault(pick.id, []).append(pick.role)
    for baseline in status.baselines:
        yield baseline.id, (baseline.label, roles.get(baseline.id, []))
    for pick in status.picks:
        yield pick.id, (pick.label, roles[pick.id])
    if status.best is not None and status.best.id not in roles:
        yield status.best.id, (status.best.label, ["best in search"])


def _grid(
    store: Store, rows: dict[str, tuple[str, list[str]]], split: Split, measure: Measure, address: Address
) -> DrawingGrid | None:
    drawn = {name: store.drawn(number_of(name), split, measure.version) for name in rows}
    items = sorted(set().union(*drawn.values()))
    if not items:
        return None
    found = []
    for name, (label, roles) in rows.items():
        if not drawn[name]:
            continue
        scores = _scores(store, number_of(name), split, measure)
        cells = [
            DrawnItem(
                address(Drawing(number_of(name), split, measure, item)) if item in drawn[name] else "",
                f"{scores[item]:.3f}" if item in scores else "",
            )
            for item in items
        ]
        found.append(DrawnRow(name, label, roles, cells))
    texts = store.item_texts(measure.version, split)
    titles = [_title(item, texts[item][0] if item < len(texts) else "") for item in items]
    return DrawingGrid(measure.name, split == "held_out", titles, found)


def _title(item: int, text: str) -> str:
    """The first field of an item, which is most likely to be its question."""
    fields = fields_of(text)
    return textwrap.shorten(fields[0][1] if fields else text, _LONGEST_TITLE, placeholder=" …") or f"item {item}"


def _scores(store: Store, number: int, split: Split, measure: Measure) -> dict[int, float]:
    recorded = next((s for s in store.scores(number, split) if s.evaluator == measure.version), None)
    if recorded is None:
        return {}
    return dict(zip(recorded.items.tolist(), recorded.metrics[measure.metric].tolist(), strict=True))
