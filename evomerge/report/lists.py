"""The tables of `evomerge top`, `compare` and `list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from evomerge.report.candidate import status_text
from evomerge.report.comparing import Comparison
from evomerge.report.entries import EARLIER_WINNER, SOURCE, interval_text
from evomerge.report.fitting import Column, FittedTable, named, terse, without
from evomerge.report.parameters import columns_of
from evomerge.report.screen import cell, cells, further_titles, gain_cell, gain_title, p_text
from evomerge.report.status import SearchStatus
from evomerge.store import CandidateRow, SearchRecord

SPLITS = {"search": "search split", "held_out": "held-out split"}


def top_table(rows: Sequence[CandidateRow], known: SearchStatus, record: SearchRecord, *, best: bool) -> FittedTable:
    """Candidates with what they are worth on the search split, and on the held-out split where they were scored.

    Args:
        best: whether they are the best ones, whose gains matter more than what became of them.
    """
    shown = [known.entry(row, record) for row in rows]
    ids = [each.id for each in shown]
    values = [cells(each, known) for each in shown]
    titles = [*known.numbers, *further_titles(known)]
    parameters = [
        Column(each.title, [each.text(row.genome) for row in rows], right=True)
        for each in columns_of(record.parameters)
    ]
    columns = [
        Column("candidate", ids),
        Column("origin", [origin_text(each.origin, each.label) for each in shown]),
        *parameters,
        Column("status", [status_text(row, known) for row in rows]),
        *(Column(title, [texts[i] for texts in values], right=True) for i, title in enumerate(titles)),
        Column("front", ["front" if row.on_front else "" for row in rows]),
    ]
    held_out = _held_out_columns(ids, known) if known.confirmed else []
    columns += held_out
    marks = named([row.label for row in rows])
    narrower = [without(column.title) for column in reversed(parameters)]
    if best:
        return FittedTable(columns, [without("status"), without("front"), marks, terse, *narrower])
    gone = [without(column.title) for column in reversed(held_out)]
    return FittedTable(columns, [*gone, without("front"), marks, terse, *narrower])


def _held_out_columns(ids: Sequence[str], known: SearchStatus) -> list[Column]:
    """What candidates are worth on the held-out split, and what they gain there."""
    columns = []
    for name in known.numbers:
        confirmed = [known.confirmed_entry(each) for each in ids]
        there = [None if each is None else each.value(name) for each in confirmed]
        gains = {found.id: gain_cell(found, known, name) for found in known.confirmed}
        columns.append(Column(f"{name} held out", ["" if v is None else cell(v) for v in there], right=True))
        title = f"{gain_title(known, name)} there"
        columns.append(Column(title, [gains.get(each, "") for each in ids], right=True))
    return columns


def origin_text(origin: str, label: str) -> str:
    """Where a candidate comes from: "source maths"; a landmark whose name says it has no word more."""
    return label if label and origin not in (SOURCE, EARLIER_WINNER) else f"{origin} {label}".strip()


def comparison_table(found: Sequence[Comparison], a: str, b: str) -> Table:
    """Two candidates with each other: quantities below each other, and a column for each split."""
    splits = list(dict.fromkeys(row.split for row in found))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    a, b = (f"candidate {name}" if name in {row.objective for row in found} else name for name in (a, b))
    for split in splits:
        table.add_column(SPLITS[split], justify="right")
    for number, objective in enumerate(dict.fromkeys(row.objective for row in found)):
        if number:
            table.add_row()
        table.add_row(objective, style="bold")
        by = {row.split: row for row in found if row.objective == objective}
        told = [_told(by[split], a, b) if split in by else {} for split in splits]
        for title in next(each for each in told if each):
            table.add_row(f"  {title}", *(each.get(title, "") for each in told))
    return table


def _told(row: Comparison, a: str, b: str) -> dict[str, str]:
    """A comparison as titles and texts."""
    told = {
        a: f"{row.a:.3f}",
        b: f"{row.b:.3f}",
        f"{a} better by": f"{row.difference:+.3f}",
        f"{row.confidence:.0%} interval": interval_text(row.low, row.high),
    }
    if row.better_a is not None:
        told |= {
            "p": p_text(row.p),
            f"items that {a} won": str(row.better_a),
            f"items that {b} won": str(row.better_b),
        }
    return told | {"items in all": str(row.n)}


@dataclass(frozen=True)
class Listed:
    """A search in a list: what it is called, where it stands, what the best and the best source are worth on the search
    split, or once there is a winner what that is worth and gains on held-out items.

    Values are texts; empty where there is none yet.
    """

    name: str
    state: str
    candidates: str
    objective: str
    best: str
    best_source: str
    gain: str


def searches_table(found: Sequence[Listed]) -> FittedTable:
    """Searches with where each stands."""
    columns = [
        Column("search", [each.name for each in found]),
        Column("state", [each.state for each in found]),
        Column("candidates", [each.candidates for each in found], right=True),
        Column("objective", [each.objective for each in found]),
        Column("best", [each.best for each in found], right=True),
        Column("best source", [each.best_source for each in found], right=True),
    ]
    if any(each.gain for each in found):
        columns.append(Column("gain on held-out items", [each.gain for each in found], right=True))
    steps = [without("objective"), without("best source"), without("gain on held-out items")]
    return FittedTable(columns, [terse, *steps])
