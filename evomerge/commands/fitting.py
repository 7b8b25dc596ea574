"""Before a search starts or resumes: fitting numbers of its models to right answers, as jobs of the pool."""

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

_REPORTED_S = 2.0
"""Shorter fits are not reported: they were already known, or shared with an earlier one."""


def fit(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> bool:
    """Fit the numbers that baselines need. A fit that several baselines share is done once.

    The caller holds the lease. Workers find the results of earlier fits, so that a resumed search loses almost no time
    here.

    Returns:
        False if the search was stopped first.

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
    """The fits of baselines, which produce evidence but no scores."""

    log_prefix = "fit"

    def __init__(
        self, folder: Path, prepared: Prepared, store: Store, marks: Sequence[Baseline], console: Console
    ) -> None:
        super().__init__(folder, prepared, store)
        self._marks, self._console = marks, console

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        """Print each finished fit: fits take minutes, and nothing else is shown meanwhile."""
        if isinstance(result, Measured) and (seconds := result.timings.get("fit", 0.0)) >= _REPORTED_S:
            label = self._marks[-1 - finished.candidate].label
            self._console.print(f"fit of {label}: {duration(seconds)}", style="dim")

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        label = self._marks[-1 - finished.candidate].label
        hint = f"See {log} in the search's folder." if log else ""
        return InputError("fit", f"the baseline {label} cannot be fitted: {failure.message}", hint)
