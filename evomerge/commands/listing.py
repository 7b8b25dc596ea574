"""The command list: the searches of a folder, a Ray cluster, or a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from evomerge.errors import InputError
from evomerge.report.consoles import make_console
from evomerge.report.entries import gap_text, value_text
from evomerge.report.lists import Listed, searches_table
from evomerge.search.estimation.preference import BEST
from evomerge.search.settings.folder import is_search
from evomerge.service.bodies import CandidateName, SearchSummary
from evomerge.service.client import Client
from evomerge.service.drivers import Drivers
from evomerge.service.root import Root
from evomerge.service.summary import summaries_of


def list_folder(place: str) -> None:
    """List the searches of a folder, or of a database by its URL, newest first.

    Raises:
        InputError: there is no such folder, or it is the folder of a single search.
    """
    root = Root.of(place, Path("searches"))
    if root.database is None and is_search(root.folder):
        raise InputError(
            place, "is the folder of one search, not a folder of searches", f"See: evomerge status {place}"
        )
    if root.database is None and root.folder.exists() and not root.folder.is_dir():
        raise InputError(place, "is not a folder")
    _print(list(summaries_of(root, Drivers(root))), f"no search is in {place} yet; to start one: evomerge search FILE")


def list_server(url: str) -> None:
    """List the searches of a server."""
    with Client(url) as client:
        _print(client.searches(), f"{url} has no searches yet")


def _print(searches: Sequence[SearchSummary], none: str) -> None:
    make_console().print(searches_table([_listed(search) for search in searches]) if searches else none)
    for search in searches:
        if search.state == "unreadable":
            print(search.why, file=sys.stderr)


def _listed(search: SearchSummary) -> Listed:
    objectives = [objective.name for objective in search.objectives]
    of = f" of {search.budget.candidates}" if search.budget.candidates else ""
    best, source = (_text(candidate, objectives) for candidate in (search.best, search.best_source))
    best = f"{search.best_role} {best}" if best and search.best_role != BEST else best
    held_out, gain = _confirmed(search)
    what = ", ".join(objectives) if search.scalar is None else f"{search.scalar.name} of {', '.join(objectives)}"
    return Listed(search.name, search.state, f"{search.counts.asked}{of}", what, held_out or best, source, gain)


def _confirmed(search: SearchSummary) -> tuple[str, str]:
    """The held-out scores of the winner, or of the knee of a front, and the gain of a winner."""
    pick = search.confirmed
    if pick is None:
        return "", ""
    values = [value_text(value) for value in pick.values.values()]
    role = "winner" if pick.role == BEST else pick.role
    gains = [f"{gap_text(gap)} over {gap.to}" for gap in pick.all_gains.values() if pick.role == BEST]
    return f"{role} {_joined(values, pick.scalar is not None)}", "".join(gains[:1])  # the gain that decides


def _joined(texts: Sequence[str], has_scalar: bool) -> str:
    """Join the texts of the objectives, with that of the scalarisation first."""
    return f"{texts[0]} ({', '.join(texts[1:])})" if has_scalar and texts else ", ".join(texts)


def _text(candidate: CandidateName | None, objectives: Sequence[str]) -> str:
    """The scores of a candidate in each objective."""
    if candidate is None:
        return ""
    values = [value_text(candidate.objectives[name]) for name in objectives if name in candidate.objectives]
    return _joined([*([] if candidate.scalar is None else [f"{candidate.scalar:.3f}"]), *values],
                   candidate.scalar is not None)  # fmt: skip


def list_jobs(address: str) -> None:
    """List the searches whose drivers are jobs of a Ray cluster."""
    from evomerge.search.clusters.launch import running

    with _silent():
        jobs = running(address)
    table = Table(box=None, pad_edge=False)
    for title in ("search", "state", "folder", "job"):
        table.add_column(title)
    for row in jobs:
        table.add_row(row.name, row.status, row.folder, row.job)
    console = make_console()
    console.print(table if jobs else f"no search runs as a job of the cluster at {address}")


@contextmanager
def _silent() -> Iterator[None]:
    """Silence stderr at the descriptor level, because Ray prints warnings there that its exceptions repeat."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
