"""Refits: what is fitted of models is fitted once for all candidates; at the end of a search it is fitted anew to the
best of them, each of which is a new candidate then, scored as all are.
"""

from __future__ import annotations

from pathlib import Path

from evomerge.genome import Refitting
from evomerge.recipes.base import Recipe, read_recipe
from evomerge.search.driving.dispatch import Dispatcher, OfNoCandidate, Pending, feed_of, write_log
from evomerge.search.estimation.preference import Preference, ranked
from evomerge.search.preparing.setup import Setup
from evomerge.search.work.jobs import Descended, Failed, Finished, FitNumbers, Measured
from evomerge.store import CandidateRow, Store


class Refits:
    """What is fitted anew at the end of a search.

    Attributes:
        are_asked: whether nothing was asked for since the last time, so that there is nothing to fit anew.
    """

    def __init__(self, space: Refitting, setup: Setup, store: Store, dispatcher: Dispatcher, logs: Path) -> None:
        self._space, self._setup, self._store = space, setup, store
        self._dispatcher, self._logs = dispatcher, logs
        self._sources = dict(next(iter(setup.space.baselines())).recipe.sources)
        self._known: set[str] = set()
        self.are_asked = False

    @property
    def reserved(self) -> int:
        """How many candidates of the budget are kept for what is yet to be fitted anew."""
        return 0 if self.are_asked else self._space.refits

    def chosen(self, room: int) -> dict[str, Recipe]:
        """The recipes of the best candidates, fitted anew, by the id of each candidate; none that there was before.

        Args:
            room: how many there may be at most, beside what the space says.
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
        """Fit what these recipes have that is fitted; False when a stop came first."""
        jobs = (
            Pending(-1 - n, 1, recipe, f"fit of {name}", (), instead=FitNumbers())
            for n, (name, recipe) in enumerate(recipes.items())
        )
        return self._dispatcher.run(feed_of(jobs), _Run(self._logs))

    def replayed(self, rows: list[CandidateRow]) -> list[Recipe]:
        """What was asked for, as it was recorded: candidates that were told later may have other ranks."""
        recipes = [read_recipe(row.recipe, self._sources) for row in rows]
        self._known |= {recipe.hash for recipe in recipes}
        self.are_asked = True
        return recipes


class _Run(OfNoCandidate):
    """Fits, as a ``Recorder``. One that fails is tried again when its candidate is scored, which says so then."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None: ...

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        write_log(self._logs, finished, failure, "refit")
