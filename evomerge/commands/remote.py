"""The commands that show and control searches through a server (``--server URL``)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Literal

from rich.table import Table

from evomerge.printable import without_nan
from evomerge.report.consoles import make_console
from evomerge.report.entries import Entry, value_text
from evomerge.report.screen import panel, ranked, resume_lines
from evomerge.report.search_status import SearchStatus, preference_of, with_scalar
from evomerge.search.settings.rebudget import bounds_of
from evomerge.service.bodies import CandidateSummary
from evomerge.service.client import Client

_WATCH_S = 1.0
_ENDED = ("finished", "stopped", "cancelled", "failed", "interrupted")


def status(url: str, search: str, *, as_json: bool, watch: bool) -> None:
    """Print the status of a search; with ``watch``, keep updating it until the search ends."""
    with Client(url) as client:
        current = client.status(search)
        if as_json:
            print(current.model_dump_json(indent=2))
            return
        console = make_console()
        console.print(panel(current))
        while watch and current.state not in _ENDED:
            time.sleep(_WATCH_S)
            current = client.status(search)
            console.print(panel(current))
        for line in resume_lines(current, search, "--server", url):
            console.print(line, soft_wrap=True)


def send_command(url: str, search: str, word: Literal["pause", "resume", "stop", "cancel"]) -> None:
    """Send a command to a search."""
    with Client(url) as client:
        print(client.send_command(search, word), file=sys.stderr)


def resume(url: str, search: str, overrides: Sequence[str]) -> None:
    """Resume a search, with a new budget if one is given."""
    hint = "Through a server only the bounds under budget can be set."
    bounds = bounds_of(overrides, hint)
    with Client(url) as client:
        answer = (
            client.change_budget(search, resume=True, **bounds) if bounds else client.send_command(search, "resume")
        )
    print(answer, file=sys.stderr)


def top(url: str, search: str, k: int | None, *, as_json: bool) -> None:
    """Print the k best of a search by the scalarisation or the first objective, or all in the order asked."""
    with Client(url) as client:
        known = client.status(search)
        first, way = next(iter(known.directions.items()))
        rows: list[CandidateSummary] = []
        sorts = k is not None and known.scalar is None  # the server cannot sort by a scalarisation
        wanted = {"sort": first, "order": "desc" if way == "maximize" else "asc"} if sorts else {}
        for row in client.candidates(search, **wanted):
            if k is None or (row.eligible and row.same_as is None):
                rows.append(row)
            if sorts and len(rows) == k:
                break
    entries = {row.id: _entry(row, known) for row in rows}
    if k is not None and known.scalar is not None:
        best = {entry.id: place for place, entry in enumerate(ranked(list(entries.values()), known))}
        rows = sorted((row for row in rows if row.id in best), key=lambda row: best[row.id])[:k]
    rows = [row.model_copy(update={"scalar": _scalar(entries[row.id])}) for row in rows]
    if as_json:
        print(json.dumps(without_nan([row.model_dump() for row in rows]), indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("candidate", "origin", "status", *known.numbers, "front"):
        table.add_column(title)
    for row in rows:
        values = [entries[row.id].value(name) for name in known.numbers]
        texts = ["" if value is None else value_text(value) for value in values]
        origin = f"{row.origin} {row.label}".strip()
        table.add_row(row.id, origin, row.status, *texts, "front" if row.on_front else "")
    make_console().print(table)


def _entry(row: CandidateSummary, known: SearchStatus) -> Entry:
    """A candidate on the search split, with the value of the scalarisation."""
    values = {name: row.objectives[name] for name in known.directions if name in row.objectives}
    plain = Entry(id=row.id, label=row.label, origin=row.origin, objectives=values)
    return with_scalar(plain, known.scalar, preference_of(known.directions, known.scalarisation))


def _scalar(entry: Entry) -> float | None:
    return None if entry.scalar is None else entry.scalar.mean
