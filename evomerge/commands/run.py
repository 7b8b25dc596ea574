"""The commands that run a search: validate, search, resume, confirm."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evomerge.checkpoints.checks import check_finite
from evomerge.errors import InputError
from evomerge.observers import Observers
from evomerge.report.plan import plan
from evomerge.report.screen import Screen, make_console, panel
from evomerge.report.status import status_of
from evomerge.search.confirm import Confirmation
from evomerge.search.control import Control
from evomerge.search.driver import Driver
from evomerge.search.folder import LOGS_NAME, open_store
from evomerge.search.pools.base import Pool
from evomerge.search.prepare import Prepared, prepare
from evomerge.search.search_file import SearchFile, load_search_file
from evomerge.search.session import (
    check_unchanged,
    create_search,
    make_pool,
    recipe_of,
    record_resumed,
    refuse_existing,
    resumed_file,
)
from evomerge.search.worker import choose_device
from evomerge.store import Store, acquire, current_holder

INTERRUPTED = 130


def validate(path: Path, overrides: Sequence[str]) -> None:
    """Open and check everything that a search file names, and print the plan."""
    console = make_console()
    console.print(plan(_prepared(load_search_file(path, overrides))))
    console.print("valid", style="green")


def search(path: Path, folder: Path | None, overrides: Sequence[str]) -> int:
    """Start a search; the exit code."""
    file = load_search_file(path, overrides)
    folder = folder or Path("searches") / file.name
    refuse_existing(folder)
    prepared = _prepared(file)
    console = make_console()
    console.print(plan(prepared))
    with closing(make_pool(prepared, folder)) as pool, create_search(folder, prepared) as store, acquire(store):
        return _drive(folder, prepared, store, pool, console)


def resume(folder: Path, overrides: Sequence[str]) -> int:
    """Go on with a search; the exit code. A driver that is paused is woken instead."""
    console = make_console()
    with open_store(folder) as store:
        if current_holder(store) is not None and store.search().state == "paused":
            if overrides:
                raise InputError("--set", "a paused search is only woken", "Stop it first to change its settings.")
            store.request_command("resume")
            console.print(f"told the driver of {folder} to go on")
            return 0
        with acquire(store):  # first of all, so that a second driver is refused before it has cost anything
            prepared = _reopened(folder, store, overrides)
            with closing(make_pool(prepared, folder)) as pool:
                record_resumed(folder, store, prepared.file)
                return _drive(folder, prepared, store, pool, console)


def confirm(folder: Path) -> int:
    """Score the front and the best on the held-out split; the exit code."""
    console = make_console()
    with open_store(folder) as store, acquire(store):
        prepared = _reopened(folder, store, ())
        with closing(make_pool(prepared, folder)) as pool, _session(folder, prepared, store, pool, console) as session:
            done = _confirm(folder, prepared, store, pool, *session)
        console.print(panel(status_of(store)))
    return 0 if done else INTERRUPTED


def _drive(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> int:
    """Search, confirm, and say how it ended and, last of all, how to go on; the exit code."""
    code = INTERRUPTED
    try:
        with _session(folder, prepared, store, pool, console) as (control, idle):
            driver = Driver(prepared.setup, store, pool, control, logs=folder / LOGS_NAME, idle=idle)
            ending = driver.run()
            if ending == "finished" and _confirm(folder, prepared, store, pool, control, idle):
                code = 0
        console.print(panel(status_of(store)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        store.set_state("cancelled", why="interrupted twice")
    except Exception:
        traceback.print_exc()
        code = 1
    how, more = ("go on with more", f" --set {_spent(store)}=N") if code == 0 else ("resume", "")
    console.print(f"{how}: evomerge resume {shlex.quote(str(folder))}{more}", soft_wrap=True)
    return code


def _spent(store: Store) -> str:
    """The part of the budget that ended the search."""
    why = store.search().why
    return "budget.hours" if "hours" in why else "budget.patience" if "front" in why else "budget.candidates"


def _reopened(folder: Path, store: Store, overrides: Sequence[str]) -> Prepared:
    """Everything that a recorded search names, opened again and seen to be unchanged."""
    prepared = _prepared(resumed_file(folder, store, overrides))
    check_unchanged(store, prepared)
    return prepared


def _confirm(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, control: Control, idle: Callable[[], None]
) -> bool:
    confirmation = Confirmation(prepared.setup, store, pool, control, logs=folder / LOGS_NAME, idle=idle)
    return confirmation.run(lambda row: recipe_of(row, prepared.file.sources))


@contextmanager
def _session(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console
) -> Iterator[tuple[Control, Callable[[], None]]]:
    """Hear signals and commands, show the screen and tell observers while open; gives what to do while waiting."""
    control = Control(store.take_commands)
    screen = Screen(console, lambda: status_of(store), pool.state)
    observers = Observers(store, folder, prepared.file.observers)
    with closing(observers), screen, control.signals(screen.say):
        yield control, _idle(store, pool, control, screen, observers)


def _idle(store: Store, pool: Pool, control: Control, screen: Screen, observers: Observers) -> Callable[[], None]:
    """What to do while waiting: show a pause to those who read the store, draw the screen, tell observers."""
    paused_from = ""

    def idle() -> None:
        nonlocal paused_from
        if control.paused and not paused_from:
            paused_from = store.search().state
            store.set_state("paused")
        elif paused_from and not control.paused:
            store.set_state(paused_from)
            paused_from = ""
        screen.draw()
        observers.poll(pool.state)

    return idle


def _prepared(file: SearchFile) -> Prepared:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for observer in file.observers:
        observer.check()
    prepared = prepare(file)
    if file.pool == "in_process":
        choose_device(file.device)
    for source in prepared.sources.values():
        check_finite(source)
    return prepared


def list_jobs(address: str) -> None:
    """The searches whose drivers are jobs of a Ray cluster."""
    from evomerge.search.launch import running

    table = Table(box=None, pad_edge=False)
    for title in ("search", "state", "folder", "job"):
        table.add_column(title)
    for row in running(address):
        table.add_row(row.name, row.status, row.folder, row.job)
    make_console().print(table)
