"""The commands that look at searches, and tell them what to do, through a server (``--server URL``)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Literal

from rich.table import Table

from evomerge.report.screen import make_console, panel
from evomerge.search.settings.rebudget import bounds_of
from evomerge.service.bodies import CandidateSummary
from evomerge.service.client import Client

_WATCH_S = 1.0
_ENDED = ("finished", "stopped", "cancelled", "failed", "interrupted")


def status(url: str, search: str, *, as_json: bool, watch: bool) -> None:
    """Where a search stands; with ``watch``, again and again until it ends."""
    with Client(url) as client:
        found = client.status(search)
        if as_json:
            print(found.model_dump_json(indent=2))
            return
        console = make_console()
        console.print(panel(found))
        while watch and found.state not in _ENDED:
            time.sleep(_WATCH_S)
            found = client.status(search)
            console.print(panel(found))


def tell(url: str, search: str, word: Literal["pause", "resume", "stop", "cancel"]) -> None:
    """Give a search a word."""
    with Client(url) as client:
        print(client.tell(search, word), file=sys.stderr)


def resume(url: str, search: str, overrides: Sequence[str]) -> None:
    """Go on with a search, with another budget where one is given."""
    mend = "Through a server only budget.candidates, budget.hours and budget.patience can be set."
    bounds = bounds_of(overrides, mend)
    with Client(url) as client:
        told = client.change_budget(search, resume=True, **bounds) if bounds else client.tell(search, "resume")
    print(told, file=sys.stderr)


def top(url: str, search: str, k: int | None, *, as_json: bool) -> None:
    """The k best by the first objective of a search, or all in the order asked."""
    with Client(url) as client:
        names = list(client.status(search).directions.items())
        first, way = names[0]
        rows: list[CandidateSummary] = []
        wanted = {} if k is None else {"sort": first, "order": "desc" if way == "maximize" else "asc"}
        for row in client.candidates(search, **wanted):
            if k is None or (row.eligible and row.same_as is None):
                rows.append(row)
            if k is not None and len(rows) == k:
                break
    if as_json:
        print(json.dumps([row.model_dump() for row in rows], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("candidate", "origin", "status", *(name for name, _ in names), "front"):
        table.add_column(title)
    for row in rows:
        values = [row.objectives[name].text if name in row.objectives else "" for name, _ in names]
        origin = f"{row.origin} {row.label}".strip()
        table.add_row(row.id, origin, row.status, *values, "front" if row.on_front else "")
    make_console().print(table)
