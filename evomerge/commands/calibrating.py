"""Before a search begins or goes on: each source's run over the calibration texts, as a job of the pool."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console

from evomerge.errors import InputError
from evomerge.report.screen import duration
from evomerge.search.driving.control import Control
from evomerge.search.driving.dispatch import Dispatcher, Pending, feed_of, write_log
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.settings.folder import LOGS_NAME
from evomerge.search.work.deadlines import Deadlines
from evomerge.search.work.jobs import Failed, Finished, Measured
from evomerge.store import Store
from evomerge.store.events import Calibrated


def calibrate(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> bool:
    """Have every source run over the calibration texts, where a method needs it. The caller holds the lease.

    What was recorded before is found by the workers, so that a resumed search loses next to no time here.

    Returns:
        False when a stop came first.

    Raises:
        InputError: a source cannot be run.
    """
    recipes = [baseline.recipe for baseline in prepared.setup.space.baselines()]
    made_by = next((recipe for recipe in recipes if recipe.calibration is not None), None)
    if prepared.calibration is None or made_by is None:
        return True
    names = list(prepared.sources)
    texts = len(prepared.calibration.texts)
    console.print(f"calibrating: {texts} texts through {len(names)} sources", style="dim")
    started = time.monotonic()
    pending = [
        Pending(-1 - n, 1, made_by, f"calibration of {name}", (), calibrates=name) for n, name in enumerate(names)
    ]
    dispatcher = Dispatcher(
        pool, Control(store.take_commands), prepared.setup.attempts, lambda: None,
        Deadlines(prepared.file.attempt_hours * 3600), check=prepared.untouched.check,
    )  # fmt: skip
    if not dispatcher.run(feed_of(pending), _Recording(folder / LOGS_NAME, names)):
        return False
    store.record_event(Calibrated(digest=prepared.calibration.digest, texts=texts, sources=names))
    console.print(f"calibrated in {duration(time.monotonic() - started)}", style="dim")
    return True


class _Recording:
    """Hears how the runs go."""

    def __init__(self, logs: Path, names: Sequence[str]) -> None:
        self._logs = logs
        self._names = names

    def answer(self, pending: Pending) -> bool:
        return False

    def dispatched(self, pending: Pending) -> None: ...

    def measured(self, pending: Pending, finished: Finished, result: Measured) -> None: ...

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        if final:
            name = self._names[-1 - finished.candidate]
            log = write_log(self._logs, finished, failure, "calibration")
            hint = f"See {log} in the search's folder." if log else ""
            raise InputError("calibration", f"source {name} cannot be run over the texts: {failure.message}", hint)

    def at_once(self) -> AbstractContextManager[None]:
        return nullcontext()

    def late(self, finished: Finished) -> None: ...
