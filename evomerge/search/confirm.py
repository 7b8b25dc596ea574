"""Confirmation: the choice among the best, made on items that the search never saw.

The best of many noisy scores is mostly luck: of 1,000 equally good candidates, the best looks 4 points better than it
is on 1,069 items. So a shortlist is frozen first, and then scored on the held-out split beside every landmark.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evomerge.errors import InputError
from evomerge.recipe import Recipe
from evomerge.search.control import Control
from evomerge.search.dispatch import Dispatcher, Pending
from evomerge.search.driver import write_log
from evomerge.search.jobs import Failed, Finished, Measured
from evomerge.search.pools.base import Pool
from evomerge.search.scores import to_scores
from evomerge.search.setup import Setup
from evomerge.search.statistics import mean_and_error
from evomerge.store import CandidateRow, Store

_OURS = ("confirming", "paused")  # states that say nothing of the search that is being confirmed


class Confirmation:
    """Scores the shortlist and the landmarks on the held-out split; the caller holds the store's lease."""

    def __init__(
        self,
        setup: Setup,
        store: Store,
        pool: Pool,
        control: Control,
        *,
        logs: Path,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._setup = setup
        self._store = store
        self._logs = logs
        self._last_failure = ""
        self._tasks = setup.tasks("held_out")
        self._dispatcher = Dispatcher(pool, control, setup.attempts, idle)

    def run(self, recipe_of: Callable[[CandidateRow], Recipe]) -> bool:
        """Score what has no held-out scores yet; True when the winner is named, False when a stop came first.

        ``recipe_of`` gives a candidate's recipe with its sources' references.
        """
        why = self._store.search().why
        states = [event.payload["state"] for event in self._store.events(kinds=("state",))]
        before = next((state for state in reversed(states) if state not in _OURS), "created")
        self._store.set_state("confirming", why=why)
        try:
            return self._confirm(recipe_of)
        finally:
            self._store.set_state(before, why=why)

    def _confirm(self, recipe_of: Callable[[CandidateRow], Recipe]) -> bool:
        shortlist = self._freeze()
        landmarks = [row for row in self._store.candidates(step=0) if row.status in ("done", "cached")]
        rows = {row.number: row for row in [*landmarks, *shortlist]}
        todo = [
            # A cached candidate's scores are those of the one that answered it.
            Pending(row.number if row.same_as is None else row.same_as, 1, recipe_of(row), row.recipe_hash)
            for row in rows.values()
            if not self._is_scored(row.number)
        ]
        if not self._dispatcher.run(todo, self._tasks, self):
            return False
        if shortlist and not any(self._is_scored(row.number) for row in shortlist):
            raise InputError("confirm", f"no candidate could be scored on the held-out split: {self._last_failure}")
        # A landmark may win: a search that found nothing better than a source must not name something worse.
        if winners := [row for row in rows.values() if self._is_scored(row.number)]:
            self._store.record_event("winner", {"candidate": max(winners, key=self._held_out_value).number})
        return True

    def _freeze(self) -> list[CandidateRow]:
        """The front and the best by the first objective, written down before any held-out item is scored.

        A landmark on the front is scored anyway and is no find of the search; of equal recipes the first is taken.
        """
        first = self._setup.objectives[0]
        top = self._setup.confirm.top
        landmarks = len(self._store.candidates(step=0))
        best = self._store.best(first.name, maximise=first.maximise, k=top + landmarks)
        finds = [row for row in best if row.step > 0][:top]
        found = {row.recipe_hash: row for row in reversed([*self._store.front(), *finds]) if row.step > 0}
        shortlist = sorted(found.values(), key=lambda row: row.number)
        self._store.record_event("shortlist", {"candidates": [row.number for row in shortlist]})
        return shortlist

    def _held_out_value(self, row: CandidateRow) -> float:
        """The first objective on the held-out split, so that more is better."""
        first = self._setup.objectives[0]
        version = self._setup.evaluators[first.evaluator].version
        (scores,) = [s for s in self._store.scores(row.number, "held_out") if s.evaluator == version]
        return -first.loss(mean_and_error(scores.metrics[first.metric])["mean"])

    def _is_scored(self, number: int) -> bool:
        found = {scores.evaluator for scores in self._store.scores(number, "held_out")}
        return all(evaluator.version in found for evaluator in self._setup.evaluators)

    # What the dispatcher reports -----------------------------------------------------------------------------------

    def answer(self, pending: Pending) -> bool:
        return self._is_scored(pending.number)

    def dispatched(self, pending: Pending) -> None:
        self._store.record_event("confirm", {"candidate": pending.number, "attempt": pending.attempt})

    def measured(self, finished: Finished, result: Measured) -> None:
        scores = to_scores(self._setup, result, self._tasks)
        self._store.record_scores(finished.candidate, finished.attempt, scores)

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        self._last_failure = failure.message
        log = write_log(self._logs, finished, failure, "confirm-c")
        payload = {"candidate": finished.candidate, "reason": failure.reason, "message": failure.message, "log": log}
        self._store.record_event("confirm failed", payload | {"final": final})

    def late(self, finished: Finished) -> None:
        self._store.record_event("stale", {"candidate": finished.candidate, "attempt": finished.attempt})
