"""Tasks that need several skills at once, compared with the tasks of each skill: how a merge combines skills."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel

from evomerge.report.entries import SOURCE, Entry
from evomerge.store import Estimate

MAX_ROWS = 10


class CompositionRow(BaseModel):
    """The values of a model in a composition and in its parts.

    ``product`` is the product of the parts, the expected value of the composition if the skills were independent; None
    if the parts are not shares.
    """

    id: str
    label: str
    origin: str
    value: Estimate
    parts: dict[str, Estimate]
    product: float | None


class Composition(BaseModel):
    """A composition with the models that are best at it or at a part, best first, and a conclusion."""

    name: str
    parts: list[str]
    split: Literal["search", "held_out"]
    rows: list[CompositionRow]
    sentence: str


def compositions_of(
    wanted: Mapping[str, tuple[str, ...]],
    directions: Mapping[str, str],
    entries: Mapping[str, Entry],
    *,
    held_out: bool,
) -> Iterator[Composition]:
    """The results of each composition.

    Args:
        wanted: the names of the objectives that are its parts, by composition.
        directions: the directions of all objectives.
        entries: models by id, on the held-out split or on the search split.
    """
    for name, parts in wanted.items():
        rows = [row for entry in entries.values() if (row := _row(entry, name, parts, directions)) is not None]
        if not rows:
            continue
        sign = -1.0 if directions[name] == "maximize" else 1.0
        rows.sort(key=lambda row: sign * row.value.mean)
        kept = {row.id for row in [*rows[:MAX_ROWS], *_best_at(parts, directions, rows)]}
        split: Literal["search", "held_out"] = "held_out" if held_out else "search"
        yield Composition(
            name=name, parts=list(parts), split=split, rows=[row for row in rows if row.id in kept],
            sentence=_sentence(name, rows),
        )  # fmt: skip


def _row(entry: Entry, name: str, parts: tuple[str, ...], directions: Mapping[str, str]) -> CompositionRow | None:
    value, known = entry.value(name), {part: entry.value(part) for part in parts}
    found = {part: estimate for part, estimate in known.items() if estimate is not None}
    if value is None or len(found) < len(parts):
        return None
    means = [estimate.mean for estimate in found.values()]
    shares = all(directions[part] == "maximize" for part in parts) and all(0 <= mean <= 1 for mean in means)
    return CompositionRow(
        id=entry.id, label=entry.label, origin=entry.origin, value=value, parts=found,
        product=math.prod(means) if shares else None,
    )  # fmt: skip


def _best_at(
    parts: tuple[str, ...], directions: Mapping[str, str], rows: list[CompositionRow]
) -> Iterator[CompositionRow]:
    """The source that is best at each part."""
    sources = [row for row in rows if row.origin == SOURCE]
    for part in parts if sources else ():
        sign = 1.0 if directions[part] == "maximize" else -1.0
        yield max(sources, key=lambda row: sign * row.parts[part].mean)


def _sentence(name: str, rows: list[CompositionRow]) -> str:
    best, source = rows[0], next((row for row in rows if row.origin == SOURCE), None)
    beside = "; ".join(f"{part} {estimate.mean:.3f}" for part, estimate in best.parts.items())
    expected = "" if best.product is None or len(best.parts) == 1 else f", whose product is {best.product:.3f}"
    called = f"{best.id} {best.label}".strip()
    alone = "" if source is None or source is best else f" No source alone is better than {source.value.mean:.3f}."
    return f"{name} needs several skills at once: {called} has {best.value.mean:.3f}, beside {beside}{expected}.{alone}"
