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
from evomerge.report.screen import CHANGE, cell, cells, change_column, further_titles, gain_cell, gain_title, p_text
from evomerge.report.search_status import SearchStatus
from evomerge.store import CandidateRow, SearchRecord

SPLITS = {"search": "search split", "held_out": "held-out split"}


def top_table(rows: Sequence[CandidateRow], known: SearchStatus, record: SearchRecord, *, best: bool) -> FittedTable:
    """Candidates with their scores on the search split, and on the held-out split if they were scored there.

    Args:
        best: whether they are the best ones, whose gains matter more than their status.
    """
    shown = [known.entry(row, record) for row in rows]
    ids = [entry.id for entry in shown]
    values = [cells(entry, known) for entry in shown]
    titles = [*known.numbers, *further_titles(known)]
    parameters = [
        Column(column.title, [column.text(row.genome) for row in rows], right=True)
        for column in columns_of(record.parameters)
    ]
    columns = [
        Column("candidate", ids),
        Column("origin", [origin_text(entry.origin, entry.label) for entry in shown]),
        *parameters,
        Column("status", [status_text(row, known) for row in rows]),
        *(Column(title, [texts[i] for texts in values], right=True) for i, title in enumerate(titles)),
        *change_column(shown, known),
        Column("front", ["front" if row.on_front else "" for row in rows]),
    ]
    held_out = _held_out_columns(ids, known) if known.confirmed else []
    columns += held_out
    marks = named([row.label for row in rows])
    narrower = [without(column.title) for column in reversed(parameters)]
    if best:
        return FittedTable(columns, [without("status"), without("front"), marks, without(CHANGE), terse, *narrower])
    gone = [without(column.title) for column in reversed(held_out)]
    return FittedTable(columns, [*gone, without("front"), marks, without(CHANGE), terse, *narrower])


def _held_out_columns(ids: Sequence[str], known: SearchStatus) -> list[Column]:
    """The scores of candidates on the held-out split, and their gains there."""
    columns = []
    for name in known.numbers:
        confirmed = [known.confirmed_entry(id_) for id_ in ids]
        there = [None if entry is None else entry.value(name) for entry in confirmed]
        gains = {entry.id: gain_cell(entry, known, name) for entry in known.confirmed}
        columns.append(Column(f"{name} held out", ["" if v is None else cell(v) for v in there], right=True))
        title = f"{gain_title(known, name)} there"
        columns.append(Column(title, [gains.get(id_, "") for id_ in ids], right=True))
    return columns


def origin_text(origin: str, label: str) -> str:
    """The origin of a candidate: "source maths"; only the name for a baseline whose name already says it."""
    return label if label and origin not in (SOURCE, EARLIER_WINNER) else f"{origin} {label}".strip()


def comparison_table(comparisons: Sequence[Comparison], a: str, b: str) -> Table:
    """Two candidates compared, with a row for each quantity and a column for each split."""
    splits = list(dict.fromkeys(row.split for row in comparisons))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    a, b = (f"candidate {name}" if name in {row.objective for row in comparisons} else name for name in (a, b))
    for split in splits:
        table.add_column(SPLITS[split], justify="right")
    for number, objective in enumerate(dict.fromkeys(row.objective for row in comparisons)):
        if number:
            table.add_row()
        table.add_row(objective, style="bold")
        by = {row.split: row for row in comparisons if row.objective == objective}
        columns = [_texts(by[split], a, b) if split in by else {} for split in splits]
        for title in next(column for column in columns if column):
            table.add_row(f"  {title}", *(column.get(title, "") for column in columns))
    return table


def _texts(row: Comparison, a: str, b: str) -> dict[str, str]:
    """A comparison as texts by title."""
    texts = {
        a: f"{row.a:.3f}",
        b: f"{row.b:.3f}",
        f"{a} better by": f"{row.difference:+.3f}",
        f"{row.confidence:.0%} interval": interval_text(row.low, row.high),
    }
    if row.better_a is not None:
        texts |= {
            "p": p_text(row.p),
            f"items that {a} won": str(row.better_a),
            f"items that {b} won": str(row.better_b),
        }
    return texts | {"items in all": str(row.n)}


@dataclass(frozen=True)
class Listed:
    """A search in a list: its name, its status, the scores of the best and of the best source on the search split, or
    once there is a winner its scores and gains on held-out items.

    Values are texts, empty if there is none yet.
    """

    name: str
    state: str
    candidates: str
    objective: str
    best: str
    best_source: str
    gain: str


def searches_table(searches: Sequence[Listed]) -> FittedTable:
    """Searches with their status."""
    columns = [
        Column("search", [search.name for search in searches]),
        Column("state", [search.state for search in searches]),
        Column("candidates", [search.candidates for search in searches], right=True),
        Column("objective", [search.objective for search in searches]),
        Column("best", [search.best for search in searches], right=True),
        Column("best source", [search.best_source for search in searches], right=True),
    ]
    if any(search.gain for search in searches):
        columns.append(Column("gain on held-out items", [search.gain for search in searches], right=True))
    steps = [without("objective"), without("best source"), without("gain on held-out items")]
    return FittedTable(columns, [terse, *steps])
