"""Before a search starts or resumes: running sources over the calibration texts, as jobs of the pool."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from evomerge.blends import observed
from evomerge.commands.outside import OutsideJobs
from evomerge.errors import InputError
from evomerge.recipes.base import Recipe
from evomerge.report.screen import duration
from evomerge.search.driving.dispatch import Pending
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.work.jobs import Calibrate, Failed, Finished
from evomerge.store import Store
from evomerge.store.events import Calibrated


def calibrate(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> bool:
    """Run those sources over the calibration texts for which a method or a step needs it.

    The caller holds the lease. Workers find the results of earlier runs, so that a resumed search loses almost no time
    here.

    Returns:
        False if the search was stopped first.

    Raises:
        InputError: a source cannot be run.
    """
    recipes = [baseline.recipe for baseline in prepared.setup.space.baselines()]
    made_by = next((recipe for recipe in recipes if _runs_of(recipe, prepared)), None)
    settings = prepared.file.calibration
    if prepared.calibration is None or settings is None or made_by is None:
        return True
    names, texts = _runs_of(made_by, prepared), settings.prompts
    through = f"{len(names)} sources" if len(names) > 1 else names[0]
    console.print(f"calibrating: {texts} texts through {through}", style="dim")
    started = time.monotonic()
    runs = (
        Pending(-1 - n, 1, made_by, f"calibration of {name}", (), instead=Calibrate(name))
        for n, name in enumerate(names)
    )
    if not _SourceRuns(folder, prepared, store, names).run(pool, runs):
        return False
    store.record_event(Calibrated(digest=prepared.calibration.digest, texts=texts, sources=names))
    console.print(f"calibrated in {duration(time.monotonic() - started)}", style="dim")
    return True


def _runs_of(recipe: Recipe, prepared: Prepared) -> list[str]:
    """The sources whose runs a recipe needs in the same way as all candidates do."""
    needs = observed([recipe], prepared.sources)
    return [name for name, of_source in needs.items() if of_source != {"merged_inputs"}]


class _SourceRuns(OutsideJobs):
    """The runs of sources over the texts, which produce evidence but no scores."""

    log_prefix = "calibration"

    def __init__(self, folder: Path, prepared: Prepared, store: Store, names: Sequence[str]) -> None:
        super().__init__(folder, prepared, store)
        self._names = names

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        name = self._names[-1 - finished.candidate]
        hint = f"See {log} in the search's folder." if log else ""
        return InputError("calibration", f"source {name} cannot be run over the texts: {failure.message}", hint)
