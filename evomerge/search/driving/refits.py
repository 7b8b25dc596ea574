"""Refits: fitted numbers are found once for all candidates. At the end of a search they are fitted again for each of
the best, which makes new candidates that are scored like all others.
"""

from __future__ import annotations

from pathlib import Path

from evomerge.genome import Refitting
from evomerge.recipes.base import Recipe, read_recipe
from evomerge.search.driving.dispatch import Dispatcher, NonCandidateRecorder, Pending, feed_of, write_log
from evomerge.search.estimation.preference import Preference, ranked
from evomerge.search.preparing.setup import Setup
from evomerge.search.work.jobs import Descended, Failed, Finished, FitNumbers, Measured
from evomerge.store import CandidateRow, Store


class Refits:
    """Fits the best candidates again at the end of a search.

    Attributes:
        are_asked: whether nothing was asked for since the last refits, so there is nothing to refit.
    """

    def __init__(self, space: Refitting, setup: Setup, store: Store, dispatcher: Dispatcher, logs: Path) -> None:
        self._space, self._setup, self._store = space, setup, store
        self._dispatcher, self._logs = dispatcher, logs
        self._sources = dict(next(iter(setup.space.baselines())).recipe.sources)
        self._known: set[str] = set()
        self.are_asked = False

    @property
    def reserved(self) -> int:
        """How many candidates of the budget are reserved for refits."""
        return 0 if self.are_asked else self._space.refits

    def chosen(self, room: int) -> dict[str, Recipe]:
        """The refitted recipes of the best candidates, by candidate id; no recipe that existed before.

        Args:
            room: the largest number of them, in addition to the space's own limit.
        """
        count = min(room, self._space.refits)
        preference = Preference.of_setup(self._setup)
        looked_at = count + 2 * len(self._known) + len(self._store.candidates(step=0))
        found: dict[str, Recipe] = {}
        for row in ranked(self._store, preference, looked_at):
            recipe = self._space.refitted(read_recipe(row.recipe, self._sources))
            if recipe is not None and recipe.hash not in self._known and len(found) < count:
                self._known.add(recipe.hash)
                found[row.id] = recipe
        return found

    def fit(self, recipes: dict[str, Recipe]) -> bool:
        """Fit the fitted parts of these recipes; False if a stop came first."""
        jobs = (
            Pending(-1 - n, 1, recipe, f"fit of {name}", (), instead=FitNumbers())
            for n, (name, recipe) in enumerate(recipes.items())
        )
        return self._dispatcher.run(feed_of(jobs), _Run(self._logs))

    def replayed(self, rows: list[CandidateRow]) -> list[Recipe]:
        """The recorded refits: candidates told later may have changed the ranks."""
        recipes = [read_recipe(row.recipe, self._sources) for row in rows]
        self._known |= {recipe.hash for recipe in recipes}
        self.are_asked = True
        return recipes


class _Run(NonCandidateRecorder):
    """The ``Recorder`` of fits. A fit that fails is tried again when its candidate is scored, which then reports it."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None: ...

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        write_log(self._logs, finished, failure, "refit")
