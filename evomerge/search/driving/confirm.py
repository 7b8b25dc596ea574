"""Confirmation: the choice among the best, made on items that the search never saw.

The best of many noisy scores is mostly luck: of 1,000 equally good candidates, the best looks 4 points better than it
is on 1,069 items. So a shortlist is frozen first, and then scored on the held-out split beside every baseline. More of
the best may be scored there to plot how far search scores drop; that happens after the winner is named.

The objective decides, or the scalarisation of several. Several without one have no winner: the best at each and
the knee are recorded. The winner must meet the constraints there too. If no model does, it is the one that violates
them least, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from evomerge.errors import InputError
from evomerge.recipes.base import Recipe
from evomerge.search.driving.dispatch import Pending, feed_of, write_log
from evomerge.search.driving.drive import Drive
from evomerge.search.estimation.preference import BEST, Preference, ranked
from evomerge.search.estimation.scores import to_answers, to_scores
from evomerge.search.estimation.statistics import mean_and_error
from evomerge.search.settings.sections import Confirm
from evomerge.search.work.deadlines import Deadlines
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured
from evomerge.store import CandidateRow, Estimate, Store
from evomerge.store.events import Chosen, ConfirmFailed, Confirming, Shortlist, Stale, State, Winner

_OURS = ("confirming", "paused")  # states that belong to the confirmation, not to the search


class Confirmation:
    """Scores the shortlist and the baselines on the held-out split."""

    def __init__(self, drive: Drive) -> None:
        self._setup = drive.setup
        self._store = drive.store
        self._logs = drive.logs
        self._meter = drive.meter
        self._last_failure = self._last_log = ""
        self._tasks = self._setup.tasks("held_out")
        self._preference = Preference.of_setup(self._setup)
        self._dispatcher = drive.dispatcher(Deadlines(drive.attempt_s))
        self._progress = self._dispatcher.progress
        self.models = self.items = 0  # that were scored in this run

    def run(self, recipe_of: Callable[[CandidateRow], Recipe]) -> bool:
        """Score what has no held-out scores yet; True once the choice is made, False if a stop came first.

        ``recipe_of`` gives a candidate's recipe with its sources' references.
        """
        return self._held(lambda: self._confirm(recipe_of))

    def _held(self, act: Callable[[], bool]) -> bool:
        """Run ``act`` in the state "confirming", then restore the search's state."""
        why = self._store.search().why
        states = [event.read(State).state for event in self._store.events(kinds=("state",))]
        before = next((state for state in reversed(states) if state not in _OURS), "created")
        self._store.set_state("confirming", why=why)
        try:
            return act()
        finally:
            self._store.set_state(before, why=why, worker_time=self._meter.read())

    def score(self, rows: Iterable[CandidateRow], recipe_of: Callable[[CandidateRow], Recipe]) -> bool:
        """Score candidates that lack held-out scores; False if a stop came first. Nothing is chosen."""
        return self._held(lambda: self._score(rows, recipe_of))

    def _confirm(self, recipe_of: Callable[[CandidateRow], Recipe]) -> bool:
        shortlist, drawn = self._freeze()
        baselines = _baselines(self._store)
        rows = {row.number: row for row in [*baselines, *shortlist]}
        if not self._score(rows.values(), recipe_of):
            return False
        wanted = shortlist or baselines
        if wanted and not any(self._is_scored(row.number) for row in wanted):
            problem = f"no candidate could be scored on the held-out split: {self._last_failure}"
            raise InputError("confirm", problem, f"See {self._last_log}." if self._last_log else "")
        # A baseline may win: a search that found nothing better than a source must not name something worse.
        self._choose([row.number for row in rows.values() if self._is_scored(row.number)])
        return self._score(drawn, recipe_of)

    def _choose(self, contenders: Sequence[int]) -> None:
        """Record what the held-out split chooses: the winner if there is one, otherwise the choices of a front."""
        if not contenders:
            return
        estimates = [self._held_out(number) for number in contenders]
        misses = np.array([self._setup.violation(by_measure) for by_measure in estimates])
        among = self._preference.losses(estimates)
        kept = np.flatnonzero(misses == misses.min())
        chosen = {role: contenders[kept[at]] for role, at in self._preference.choose(among[kept], among).items()}
        feasible = bool(misses.min() == 0.0)
        if BEST in chosen:
            self._store.record_event(Winner(candidate=chosen[BEST], feasible=feasible))
        else:
            self._store.record_event(Chosen(chosen=chosen, feasible=feasible))

    def _score(self, rows: Iterable[CandidateRow], recipe_of: Callable[[CandidateRow], Recipe]) -> bool:
        """Score what has no held-out scores yet; False if a stop came first."""
        todo = [
            # A cached candidate's scores are those of the one that answered it.
            Pending(row.number if row.same_as is None else row.same_as, 1, recipe_of(row), row.recipe_hash, self._tasks)
            for row in rows
            if not self._is_scored(row.number)
        ]
        items = len(todo) * sum(len(task.indices) for task in self._tasks)
        self._progress.begin(lambda: items - self._progress.done, models=len(todo), items=items)
        return self._dispatcher.run(feed_of(todo), self)

    def _freeze(self) -> tuple[list[CandidateRow], list[CandidateRow]]:
        """Record what will be scored before any held-out item is scored: the shortlist, and what is only plotted."""
        shortlist, drawn = _wanted(self._store, self._preference, self._setup.confirm)
        numbers = [row.number for row in shortlist], [row.number for row in drawn]
        self._store.record_event(Shortlist(candidates=numbers[0], drawn=numbers[1]))
        return shortlist, drawn

    def _held_out(self, number: int) -> dict[str, Estimate]:
        """A model's estimates on the held-out split, by objective and constraint."""
        by_version = {scores.evaluator: scores.metrics for scores in self._store.scores(number, "held_out")}
        return {
            m.name: mean_and_error(by_version[self._setup.evaluators[m.evaluator].version][m.metric])
            for m in self._setup.measures
        }

    def _is_scored(self, number: int) -> bool:
        return _is_scored(self._store, number, (self._setup.evaluators[e].version for e in self._setup.counts()))

    # What the dispatcher reports -----------------------------------------------------------------------------------

    def answer(self, pending: Pending) -> bool:
        return self._is_scored(pending.number)

    def dispatched(self, pending: Pending) -> None:
        self._store.record_event(Confirming(candidate=pending.number, attempt=pending.attempt))

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        assert isinstance(result, Measured)  # no candidate's job is a descent
        self._progress.models_done += 1
        self.models += 1
        self.items += sum(len(task.indices) for task in pending.tasks)
        scores = to_scores(self._setup, result, pending.tasks)
        answers = to_answers(self._setup, result, pending.tasks)
        self._store.record_scores(finished.candidate, finished.attempt, scores, answers=answers)

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        self._last_failure = failure.message
        self._last_log = log = write_log(self._logs, finished, failure, "confirm-c")
        self._store.record_event(
            ConfirmFailed(
                candidate=finished.candidate, reason=failure.reason, message=failure.message, log=log, final=final
            )
        )

    def atomically(self) -> AbstractContextManager[None]:
        return self._store.atomically()

    def late(self, finished: Finished) -> None:
        self._store.record_event(Stale(candidate=finished.candidate, attempt=finished.attempt))


def is_confirmed(store: Store, confirm: Confirm, preference: Preference, versions: Collection[str]) -> bool:
    """Whether a confirmation has nothing to do: everything is scored, and the choice is made.

    Args:
        versions: of the evaluators that models are judged by.
    """
    events = store.events(kinds=("shortlist", "winner", "confirmed"))
    if not events or events[-1].kind == "shortlist":
        return False
    shortlist, drawn = _wanted(store, preference, confirm)
    last = next(event for event in reversed(events) if event.kind == "shortlist").read(Shortlist)
    if last.candidates != [row.number for row in shortlist] or last.drawn != [row.number for row in drawn]:
        return False
    return all(_is_scored(store, row.number, versions) for row in (*_baselines(store), *shortlist, *drawn))


def _wanted(store: Store, preference: Preference, confirm: Confirm) -> tuple[list[CandidateRow], list[CandidateRow]]:
    """What a confirmation scores besides the baselines: the shortlist, and what is only plotted.

    The shortlist is the front and the best of the search; of equal recipes the first is taken. Plotted are the best by
    what decides, or by each objective if nothing does, for the plots of the winner's curse.
    """
    finds = [*store.front(), *_best(store, preference, confirm.top)]
    by_recipe = {row.recipe_hash: row for row in reversed(finds) if _is_find(row)}
    shortlist = sorted(by_recipe.values(), key=lambda row: row.number)
    most = [row for part in preference.parts for row in _best(store, part, confirm.drawn)]
    return shortlist, list({row.number: row for row in most if row.recipe_hash not in by_recipe}.values())


def _best(store: Store, preference: Preference, count: int) -> list[CandidateRow]:
    """The best of what the search found, best first."""
    baselines = len(store.candidates(step=0))
    return [row for row in ranked(store, preference, count + baselines) if _is_find(row)][:count]


def _baselines(store: Store) -> list[CandidateRow]:
    """Those that have scores."""
    return [row for row in store.candidates(step=0) if row.status in ("done", "cached")]


def _is_scored(store: Store, number: int, versions: Iterable[str]) -> bool:
    """Whether a candidate has held-out scores from all these evaluators; the screen's are not needed."""
    return {scores.evaluator for scores in store.scores(number, "held_out")}.issuperset(versions)


def _is_find(row: CandidateRow) -> bool:
    """Whether the search found it: baselines are scored anyway, and must not take a place on the shortlist."""
    return row.step > 0
