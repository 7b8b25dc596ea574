"""The commands that run a search: validate, search, resume, confirm."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evomerge.checkpoints.checks import check_finite
from evomerge.errors import InputError
from evomerge.objects import Storage, is_url
from evomerge.observers import Observers
from evomerge.report.plan import plan
from evomerge.report.screen import Screen, make_console, panel
from evomerge.report.status import status_of
from evomerge.search.artifacts import Artifacts, check_artifacts, copy_url, fetch
from evomerge.search.claim import Claim
from evomerge.search.confirm import Confirmation
from evomerge.search.control import Control
from evomerge.search.deadlines import Deadlines
from evomerge.search.driver import Driver
from evomerge.search.folder import LOGS_NAME, open_store
from evomerge.search.pools.base import Pool
from evomerge.search.prepare import Prepared, prepare
from evomerge.search.rebudget import bounds_of, change_budget, reread_budget
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
    prepared = _prepared(file, folder)
    console = make_console()
    console.print(plan(prepared))
    # What is left is copied last of all, when the lease is released and no worker waits for it.
    with ExitStack() as last, closing(make_pool(prepared, folder)) as pool, create_search(folder, prepared) as store:
        artifacts = last.enter_context(_copying(folder, file, console))
        with acquire(store):
            return _drive(folder, prepared, store, pool, artifacts, console)


def resume(place: str | Path, overrides: Sequence[str], into: Path | None = None) -> int:
    """Go on with a search; the exit code. A driver that is at work is given another budget, or woken, instead.

    Args:
        place: the search's folder, or the URL of its copy in object storage, which is fetched first.
        into: with a URL, the folder to make.
    """
    console = make_console()
    folder = _local(str(place), into, console)
    with ExitStack() as last, open_store(folder) as store:
        if current_holder(store) is not None and (overrides or store.search().state == "paused"):
            _tell_driver(folder, store, overrides, console)
            return 0
        with acquire(store):  # first of all, so that a second driver is refused before it has cost anything
            prepared = _reopened(folder, store, overrides)
            with closing(make_pool(prepared, folder)) as pool:
                artifacts = last.enter_context(_copying(folder, prepared.file, console))
                record_resumed(folder, store, prepared.file)
                return _drive(folder, prepared, store, pool, artifacts, console)


def _tell_driver(folder: Path, store: Store, overrides: Sequence[str], console: Console) -> None:
    """Give a driver at work another budget, and wake it if it is paused."""
    bounds = bounds_of(overrides, "While a driver is at work only its budget can be changed; stop it first.")
    if bounds:
        change_budget(folder, store, bounds)
        store.request_command("reread")
        console.print(f"gave the driver of {folder} another budget")
    if store.search().state == "paused":
        store.request_command("resume")
        console.print(f"told the driver of {folder} to go on")


def _local(place: str, into: Path | None, console: Console) -> Path:
    """The folder of a search; one that is named by the URL of its copy is fetched, unless it was before."""
    if not is_url(place):
        if into is not None:
            raise InputError("--dir", "is where to put a search that is named by a URL", "Leave it out.")
        return Path(place)
    storage = Storage(place, "DIR")
    folder = into or Path("searches") / storage.name
    if not Claim(storage, folder).is_ours():
        refuse_existing(folder)
        fetch(place, folder)
        console.print(f"fetched into {folder}", style="dim")
    return folder


def confirm(folder: Path) -> int:
    """Score the front and the best on the held-out split; the exit code."""
    console = make_console()
    with ExitStack() as last, open_store(folder) as store, acquire(store):
        prepared = _reopened(folder, store, ())
        with closing(make_pool(prepared, folder)) as pool:
            artifacts = last.enter_context(_copying(folder, prepared.file, console))
            with _session(folder, prepared, store, pool, artifacts, console) as session:
                done = _confirm(folder, prepared, store, pool, *session)
        console.print(panel(status_of(store)))
    return 0 if done else INTERRUPTED


def _drive(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, artifacts: Artifacts | None, console: Console
) -> int:
    """Search, confirm, and say how it ended and, last of all, how to go on; the exit code."""
    code = INTERRUPTED
    try:
        with _session(folder, prepared, store, pool, artifacts, console) as (control, idle):
            driver = Driver(
                prepared.setup, store, pool, control, logs=folder / LOGS_NAME, idle=idle, deadlines=_deadlines(prepared)
            )
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
    prepared = _prepared(resumed_file(folder, store, overrides), folder)
    check_unchanged(store, prepared)
    return prepared


def _confirm(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, control: Control, idle: Callable[[], None]
) -> bool:
    confirmation = Confirmation(
        prepared.setup, store, pool, control, logs=folder / LOGS_NAME, idle=idle, deadlines=_deadlines(prepared)
    )
    return confirmation.run(lambda row: recipe_of(row, prepared.file.sources))


def _deadlines(prepared: Prepared) -> Deadlines:
    return Deadlines(prepared.file.attempt_hours * 3600)


@contextmanager
def _copying(folder: Path, file: SearchFile, console: Console) -> Iterator[Artifacts | None]:
    """Copy the folder to object storage while open, where the search file says so, and all that is left at the end."""
    if file.artifacts is None:
        yield None
        return
    artifacts = Artifacts(copy_url(file.artifacts, file.name), folder)
    artifacts.take()
    artifacts.start()
    try:
        yield artifacts
    finally:
        with console.status(f"copying what is left to {artifacts.url}"):
            artifacts.close()
        if artifacts.is_complete:
            console.print(f"copied; to go on elsewhere: evomerge resume {shlex.quote(artifacts.url)}", soft_wrap=True)
        else:
            again = f"evomerge resume {shlex.quote(str(folder))}"
            console.print(f"the copy at {artifacts.url} is not complete; to try again: {again}", soft_wrap=True)


@contextmanager
def _session(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, artifacts: Artifacts | None, console: Console
) -> Iterator[tuple[Control, Callable[[], None]]]:
    """Hear signals and commands, show the screen and tell observers while open; gives what to do while waiting."""
    control = Control(store.take_commands, reread=lambda: reread_budget(folder, store))
    screen = Screen(console, lambda: status_of(store), pool.state)
    observers = Observers(store, folder, prepared.file.observers)
    with closing(observers), screen, control.signals(screen.say):
        yield control, _idle(store, pool, control, screen, observers, artifacts)


def _idle(
    store: Store, pool: Pool, control: Control, screen: Screen, observers: Observers, artifacts: Artifacts | None
) -> Callable[[], None]:
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
        if artifacts is not None:
            artifacts.poll(store)

    return idle


def _prepared(file: SearchFile, folder: Path | None = None) -> Prepared:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for observer in file.observers:
        observer.check()
    if file.artifacts is not None:
        check_artifacts(file.artifacts, file.name, folder)
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
