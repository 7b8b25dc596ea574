"""Running a driver in this process: the heavy half of the commands that run a search.

Torch, transformers and the evaluators are imported here, so `run` imports this only after its own checks.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from rich.console import Console

from evomerge.checkpoints.checks import check_finite
from evomerge.commands.calibrating import calibrate
from evomerge.commands.changed import check_changed
from evomerge.commands.controlling import control_winner
from evomerge.commands.copying import Copying
from evomerge.commands.failing import failure_code, recorded
from evomerge.commands.fitting import fit
from evomerge.commands.observe import missing_lines
from evomerge.commands.selecting import select
from evomerge.commands.souping import with_soups
from evomerge.errors import InputError
from evomerge.merging.measured.evidence import Evidence
from evomerge.observers import Observers
from evomerge.report.fit import check_fit
from evomerge.report.live import LiveScreen
from evomerge.report.screen import duration, panel
from evomerge.report.selection import selection_of, selection_tables
from evomerge.report.status import status_of
from evomerge.search.driving.confirm import Confirmation
from evomerge.search.driving.control import GRACE_S, Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.driving.ending import Ending
from evomerge.search.driving.progress import Progress
from evomerge.search.opening.artifacts import Artifacts, check_artifacts
from evomerge.search.opening.session import (
    as_recorded,
    begin_again,
    contents_of,
    create_search,
    fingerprints_of,
    make_pool,
    recipe_of,
)
from evomerge.search.opening.start import recorded_start, with_start
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.measured import with_measures
from evomerge.search.preparing.prepare import Prepared, prepare
from evomerge.search.preparing.setup import StartPoint
from evomerge.search.settings.folder import EVIDENCE_NAME, LOGS_NAME, has_store
from evomerge.search.settings.rebudget import reread_budget
from evomerge.search.settings.resuming import is_same_search, record_resumed
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.workers.building import check_devices
from evomerge.search.workers.bus_errors import explain_bus_errors
from evomerge.store import Store, acquire
from evomerge.store.events import TeamChosen

INTERRUPTED = 130


def drive_new(folder: Path, prepared: Prepared, console: Console) -> int:
    """Start a search in a new folder and drive it to its end; returns the exit code."""
    known = fingerprints_of(prepared)
    with (
        Copying(folder, console) as copying,
        closing(make_pool(prepared, folder, known["sources"])) as pool,
        create_search(folder, prepared, known) as store,
    ):
        artifacts = copying.start(prepared.file)
        with acquire(store), recorded(store):
            code = _search(folder, prepared, store, pool, artifacts, console)
    return copying.exit_code(code)


def drive_resumed(folder: Path, prepared: Prepared, store: Store, copying: Copying, console: Console) -> int:
    """Resume a search whose lease is held; returns the exit code."""
    if begin_again(folder, store, prepared):
        console.print("nothing had been scored yet: the search starts over with its file as it is now", style="dim")
    with closing(make_pool(prepared, folder, store.search().record.files)) as pool:
        artifacts = copying.start(prepared.file)
        if not check_changed(folder, prepared, store, pool, console):
            return INTERRUPTED
        record_resumed(folder, store, prepared.file)
        return _search(folder, prepared, store, pool, artifacts, console)


def drive_confirmation(folder: Path, prepared: Prepared, store: Store, copying: Copying, console: Console) -> int:
    """Confirm a search whose lease is held; returns the exit code."""
    with closing(make_pool(prepared, folder, store.search().record.files)) as pool:
        artifacts = copying.start(prepared.file)
        if not check_changed(folder, prepared, store, pool, console):
            return INTERRUPTED
        with _session(folder, prepared, store, pool, artifacts, console) as drive:
            done = _confirm(prepared, drive)
        done = done and control_winner(folder, prepared, store, pool, console)
    console.print(panel(status_of(store)))
    return 0 if done else INTERRUPTED


def drive_team(
    folder: Path, prepared: Prepared, store: Store, copying: Copying, console: Console, chosen: TeamChosen
) -> bool:
    """Score a team of a search whose lease is held on the held-out split; False if it was stopped first."""
    with closing(make_pool(prepared, folder, store.search().record.files)) as pool:
        artifacts = copying.start(prepared.file)
        if not check_changed(folder, prepared, store, pool, console):
            return False
        with _session(folder, prepared, store, pool, artifacts, console) as drive:
            store.record_event(chosen)
            rows = [
                *map(store.candidate, chosen.candidates),
                *(row for row in store.candidates(step=0) if row.status == "done"),
            ]
            return Confirmation(drive).score(rows, lambda row: recipe_of(row, prepared.file.sources))


def drive_selection(folder: Path, prepared: Prepared, console: Console) -> bool:
    """Only select among the sources of a search, which is created in a new folder; False if it was stopped first."""
    known = fingerprints_of(prepared)
    with (
        closing(make_pool(prepared, folder, known["sources"])) as pool,
        create_search(folder, prepared, known) as store,
        acquire(store),
    ):
        return select(folder, prepared, store, pool, console) is not None


def open_all(
    file: SearchFile,
    folder: Path | None = None,
    *,
    begins: bool = True,
    start: tuple[StartPoint, ...] | None = None,
) -> Prepared:
    """Open and check everything that a search file names.

    Args:
        folder: the folder of the search, if there is one.
        begins: whether nothing has been scored yet, so that evaluators must be tried out.
        start: what was taken from earlier searches; if None, it is read from them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for observer in file.observers:
        observer.check()
    if file.artifacts is not None:
        check_artifacts(file.artifacts, file.name, folder)
    prepared = with_start(prepare(file, tries=begins and file.pool == "in_process"), start)
    check_devices(file)
    check_fit(prepared)
    for source in prepared.sources.values():
        check_finite(source)
    return prepared


def reopen(folder: Path, store: Store, file: SearchFile) -> Prepared:
    """Open everything that a recorded search names again; it must be unchanged if anything was scored."""
    begun = store.has_scores()
    # The earlier searches may be gone; they are read again only if the search starts over.
    start = recorded_start(store) if begun or is_same_search(file, store) else None
    prepared = open_all(file, folder, begins=not begun, start=start)
    return as_recorded(store, prepared) if begun else prepared


def _evidence(folder: Path, store: Store) -> Evidence:
    """The evidence about the sources, in the folder of the search."""
    return Evidence(folder.absolute() / EVIDENCE_NAME, contents_of(store.search().record.files))


def _search(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, artifacts: Artifacts | None, console: Console
) -> int:
    """Select sources, measure and fit what the search needs, drive it, and score the control; returns the exit code."""
    chosen = select(folder, prepared, store, pool, console)
    if chosen is None:
        return INTERRUPTED
    if chosen is not prepared and (selection := selection_of(store)) is not None:
        console.print(*selection_tables(selection), sep="\n")
    with ExitStack() as own:
        if chosen is not prepared:
            pool = own.enter_context(closing(make_pool(chosen, folder, store.search().record.files)))
        code = _measured(folder, chosen, store, pool, artifacts, console)
        if code == 0 and not control_winner(folder, chosen, store, pool, console):
            return INTERRUPTED
    return code


def _measured(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, artifacts: Artifacts | None, console: Console
) -> int:
    """Measure and fit what the search needs, and drive it; the exit code."""
    prepared = with_measures(prepared, store, _evidence(folder, store))
    with_mixes = with_soups(folder, prepared, store, pool, console)
    if with_mixes is None:
        return INTERRUPTED
    prepared = with_mixes
    if not (calibrate(folder, prepared, store, pool, console) and fit(folder, prepared, store, pool, console)):
        return INTERRUPTED
    return _drive(folder, prepared, store, pool, artifacts, console)


def _drive(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, artifacts: Artifacts | None, console: Console
) -> int:
    """Search, confirm, and print how it ended and how to continue; returns the exit code."""
    code, how, bound = INTERRUPTED, "resume", ""
    try:
        with recorded(store), _session(folder, prepared, store, pool, artifacts, console) as drive:
            ending = Driver(drive).run()
            if ending.state == "finished" and _confirm(prepared, drive):
                code, how, bound = 0, "continue with more", ending.bound
        console.print(panel(status_of(store)))
        code = code or failure_code(store)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code, how = 2, "once that is fixed, resume"
    except KeyboardInterrupt:
        Ending("interrupted").record(store)
    except Exception:
        traceback.print_exc()
        code = 1
    if has_store(folder) and (code or bound):  # an optimizer that has stopped would ask for nothing more
        more = f" --set {bound}=N" if bound else ""
        console.print(f"{how}: evomerge resume {shlex.quote(str(folder))}{more}", soft_wrap=True)
    return code


def _confirm(prepared: Prepared, drive: Drive) -> bool:
    began = time.monotonic()
    confirmation = Confirmation(drive)
    done = confirmation.run(lambda row: recipe_of(row, prepared.file.sources))
    if confirmation.items:
        took = duration(time.monotonic() - began)
        print(f"confirmation: {confirmation.models} models, {confirmation.items:,} held-out items in {took}")
    return done


@contextmanager
def _session(
    folder: Path, prepared: Prepared, store: Store, pool: Pool, artifacts: Artifacts | None, console: Console
) -> Iterator[Drive]:
    """Handle signals and commands, show the screen, and run the observers while open."""
    if prepared.file.pool == "in_process":
        what = "a file in use was truncated, or its disk is failing"
        explain_bus_errors(f"error: {what}. Put it back and resume: evomerge resume {shlex.quote(str(folder))}")
    control = Control(store.take_commands, reread=lambda: reread_budget(folder, store))
    progress = Progress(lambda: time.monotonic() - control.paused_s())
    screen = LiveScreen(console, lambda: status_of(store), pool.state, progress)
    observers = Observers(store, folder, prepared.file.observers)
    try:
        with closing(observers), screen, control.signals(screen.say, lambda: _end_at_once(folder, store)):
            yield Drive(
                prepared.setup,
                store,
                pool,
                control,
                logs=folder / LOGS_NAME,
                idle=_idle(store, pool, control, screen, observers, artifacts),
                attempt_s=prepared.file.attempt_hours * 3600,
                check=prepared.untouched.check,
                progress=progress,
            )
    finally:
        for line in missing_lines(folder, prepared.file.observers, observers.faults):
            console.print(line, style="yellow", soft_wrap=True, markup=False)


def _end_at_once(folder: Path, store: Store) -> None:
    """End this process immediately. The records are consistent at any time."""
    # It may wait for a server that is away.
    writing = threading.Thread(target=Ending("interrupted").record, args=(store,), daemon=True)
    writing.start()
    writing.join(GRACE_S)
    print(f"resume: evomerge resume {shlex.quote(str(folder))}", flush=True)
    os._exit(INTERRUPTED)


def _idle(
    store: Store, pool: Pool, control: Control, screen: LiveScreen, observers: Observers, artifacts: Artifacts | None
) -> Callable[[], None]:
    """What to do while waiting: record a pause in the store, draw the screen, run the observers."""
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
