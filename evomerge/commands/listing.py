"""The command that lists searches: of a folder, of a Ray cluster, of a server."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from evomerge.errors import InputError
from evomerge.report.lists import Listed, searches_table
from evomerge.report.screen import make_console
from evomerge.search.folder import is_search
from evomerge.service.drivers import Drivers
from evomerge.service.root import Root
from evomerge.store import Store, summaries
from evomerge.store.rows import Estimate


def list_folder(place: str) -> None:
    """The searches of a folder, or of a database by its URL; those that began last first.

    Raises:
        InputError: there is no such folder, or it is itself that of a search.
    """
    root = Root.of(place, Path("searches"))
    if root.database is None and is_search(root.folder):
        raise InputError(place, "is the folder of a search, not one of searches", f"Look: evomerge status {place}")
    if root.database is None and root.folder.exists() and not root.folder.is_dir():
        raise InputError(place, "is not a folder")
    found: list[tuple[float, Listed]] = []
    faults: list[str] = []
    drivers = Drivers(root)
    for name in root.names():
        try:
            with root.store(name) as store:
                began = store.search().created_at
                found.append((began, _listed(store, name, drivers.look(name, store).state)))
        except InputError as error:
            found.append((0.0, Listed(name, "cannot be opened", "", "", "", "")))
            faults.append(str(error))
    console = make_console()
    if not found:
        console.print(f"no search is in {place} yet; to start one: evomerge search FILE")
        return
    found.sort(key=lambda each: each[0], reverse=True)
    console.print(searches_table([row for _, row in found]))
    for fault in faults:
        print(fault, file=sys.stderr)


def _listed(store: Store, name: str, state: str) -> Listed:
    """A search in a few light queries, however many candidates it has."""
    search = store.search()
    first, budget = search.fingerprints["objectives"][0], search.settings["budget"]["candidates"]
    objective, maximise = first["name"], first["maximise"]
    best = summaries.best(store, objective, maximise=maximise)
    known = [row.objectives.get(objective) for row in summaries.landmarks(store) if row.origin == "source"]
    sources = [value for value in known if value is not None and not math.isnan(value["mean"])]
    top = (max if maximise else min)(sources, key=lambda value: value["mean"], default=None)
    of = f" of {budget}" if budget else ""
    shown = "" if best is None else _text(best.objectives[objective])
    return Listed(
        name, state, f"{sum(store.counts().values())}{of}", objective, shown, "" if top is None else _text(top)
    )


def _text(value: Estimate) -> str:
    return f"{value['mean']:.3f} ± {value['stderr']:.3f}"


def list_jobs(address: str) -> None:
    """The searches whose drivers are jobs of a Ray cluster."""
    from evomerge.search.launch import running

    with _silent():
        found = running(address)
    table = Table(box=None, pad_edge=False)
    for title in ("search", "state", "folder", "job"):
        table.add_column(title)
    for row in found:
        table.add_row(row.name, row.status, row.folder, row.job)
    console = make_console()
    console.print(table if found else f"no search runs as a job of the cluster at {address}")


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing goes to stderr while open: Ray warns there, below Python, of what its exceptions say as well."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
