"""Before a search begins or goes on: what of its models is fitted to right answers, as jobs of the pool."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from evomerge.commands.outside import OutsideJobs
from evomerge.errors import InputError
from evomerge.genome import Baseline
from evomerge.report.screen import duration
from evomerge.search.driving.dispatch import Pending
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.work.jobs import Descended, Failed, Finished, FitNumbers, Measured
from evomerge.store import Store
from evomerge.store.events import Fitted

_TOLD_S = 2.0
"""A fit that is known already, or shared with one before, takes less, and nothing is said of it."""


def fit(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> bool:
    """Have that fitted which baselines are made by. What is fitted alike for several is fitted once.

    The caller holds the lease. What was fitted before is found by the workers, so that a resumed search loses next to
    no time here.

    Returns:
        False when a stop came first.

    Raises:
        InputError: something cannot be fitted.
    """
    split = prepared.file.fit_split
    marks = [mark for mark in prepared.setup.space.baselines() if mark.recipe.is_fitted]
    if split is None or not marks:
        return True
    console.print(f"fitting: {split.section.steps} steps on {split.count} items", style="dim")
    started = time.monotonic()
    jobs = (
        Pending(-1 - n, 1, mark.recipe, f"fit of {mark.label}", (), instead=FitNumbers())
        for n, mark in enumerate(marks)
    )
    if not _Fits(folder, prepared, store, marks, console).run(pool, jobs):
        return False
    store.record_event(Fitted(digest=split.digest, items=split.count, steps=split.section.steps, baselines=len(marks)))
    console.print(f"fitted in {duration(time.monotonic() - started)}", style="dim")
    return True


class _Fits(OutsideJobs):
    """The fit of each baseline that is made by one, which leaves evidence behind and no scores."""

    log_prefix = "fit"

    def __init__(
        self, folder: Path, prepared: Prepared, store: Store, marks: Sequence[Baseline], console: Console
    ) -> None:
        super().__init__(folder, prepared, store)
        self._marks, self._console = marks, console

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        """Say what is done: fits take minutes, and nothing else is to be seen meanwhile."""
        if isinstance(result, Measured) and (seconds := result.timings.get("fit", 0.0)) >= _TOLD_S:
            label = self._marks[-1 - finished.candidate].label
            self._console.print(f"fit of {label}: {duration(seconds)}", style="dim")

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        label = self._marks[-1 - finished.candidate].label
        hint = f"See {log} in the search's folder." if log else ""
        return InputError("fit", f"the baseline {label} cannot be fitted: {failure.message}", hint)
