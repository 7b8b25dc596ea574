"""The tables of `evomerge top`, `compare` and `list`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from evomerge.report.candidate import status_text
from evomerge.report.comparing import Comparison
from evomerge.report.entries import candidate_id, entry
from evomerge.report.fitting import Column, FittedTable, named, terse, without
from evomerge.report.screen import cell, cells, constraint_titles, gain_title, gap_text, p_text
from evomerge.report.status import SearchStatus
from evomerge.store import CandidateRow

SPLITS = {"search": "search split", "held_out": "held-out split"}


def top_table(
    rows: Sequence[CandidateRow], known: SearchStatus, fingerprints: Mapping[str, Any], *, best: bool
) -> FittedTable:
    """Candidates with what they are worth on the search split, and on the held-out split where they were scored.

    Args:
        best: whether they are the best ones, whose gains matter more than what became of them.
    """
    first = next(iter(known.directions))
    ids = [candidate_id(row.number) for row in rows]
    values = [cells(entry(row, fingerprints), known) for row in rows]
    titles = [*known.directions, *constraint_titles(known)]
    columns = [
        Column("candidate", ids),
        Column("origin", [f"{row.origin} {row.label}".strip() for row in rows]),
        Column("status", [status_text(row, known) for row in rows]),
        *(Column(title, [texts[i] for texts in values], right=True) for i, title in enumerate(titles)),
        Column("front", ["front" if row.on_front else "" for row in rows]),
    ]
    held_out, gain = f"{first} held out", f"{gain_title(known)} there"
    if known.confirmed:
        confirmed = {found.id: gap_text(found, known) for found in known.confirmed}
        there = [known.confirmed_values(name).get(first) for name in ids]
        columns.append(Column(held_out, ["" if v is None else cell(v) for v in there], right=True))
        columns.append(Column(gain, [confirmed.get(name, "") for name in ids], right=True))
    marks = named([row.label for row in rows])
    if best:
        return FittedTable(columns, [without("status"), without("front"), marks, terse])
    return FittedTable(columns, [without(gain), without(held_out), without("front"), marks, terse])


def comparison_table(found: Sequence[Comparison], a: str, b: str) -> Table:
    """Two candidates with each other: quantities below each other, and a column for each split."""
    splits = list(dict.fromkeys(row.split for row in found))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
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
    return {
        a: f"{row.a:.3f}",
        b: f"{row.b:.3f}",
        f"{a} better by": f"{row.difference:+.3f}",
        f"{row.confidence:.0%} interval": f"[{row.low:+.3f}, {row.high:+.3f}]",
        "p": p_text(row.p),
        f"items that {a} won": str(row.better_a),
        f"items that {b} won": str(row.better_b),
        "items in all": str(row.n),
    }


@dataclass(frozen=True)
class Listed:
    """A search in a list: what it is called, where it stands, and its first objective of the best and the best source.

    Values are texts; empty where there is none yet.
    """

    name: str
    state: str
    candidates: str
    objective: str
    best: str
    best_source: str


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
    return FittedTable(columns, [terse, without("objective"), without("best source")])
