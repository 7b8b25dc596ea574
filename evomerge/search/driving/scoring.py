"""Candidates that are being scored: what is known of each, what is missing, and what is recorded.

How many items each candidate is scored on is decided in ``generation.py``, which compares a whole generation, and in
``steady.py``, where no candidate waits for another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evomerge.optimizers import Grid
from evomerge.optimizers.elites import UNKNOWN, Bounds, cells_of
from evomerge.search.driving.candidates import Candidate, Proposals
from evomerge.search.driving.dispatch import Dispatcher, Pending, feed_of, write_log
from evomerge.search.estimation.items import ItemOrder, item_order, plain_order
from evomerge.search.estimation.prediction import Predictions
from evomerge.search.estimation.racing import surely_better, verdicts
from evomerge.search.estimation.scores import ScoreTable, estimate, missing_tasks, to_answers, uses_by_name
from evomerge.search.estimation.screening import Screener
from evomerge.search.preparing.setup import Counts, MeasureInfo, ObjectiveInfo, Setup
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured
from evomerge.store import Estimate, RaceEnd, Store
from evomerge.store.events import Stale
from evomerge.store.rows import Status


class CandidateScoring(ABC):
    """The common part of both ways of scoring; the dispatcher's recorder.

    Args:
        logs: folder for the logs of failed attempts.

    Attributes:
        baselines_first: whether the baselines must be told before anything else is asked for.
    """

    baselines_first: bool

    def __init__(self, setup: Setup, store: Store, dispatcher: Dispatcher, logs: Path) -> None:
        self._setup = setup
        self._store = store
        self._dispatcher = dispatcher
        self._logs = logs
        self._rungs = setup.rungs
        self._orders: list[ItemOrder] = [plain_order(evaluator.search_items) for evaluator in setup.evaluators]
        self._open: dict[int, Candidate] = {}
        self._by_recipe: dict[str, int] = {}
        self._elite_tables: dict[int, ScoreTable] = {}
        self._wanted: dict[int, Counts] = {}  # for each candidate that is being scored
        self.recent: deque[Candidate] = deque(maxlen=0)  # recently told, if new ones are compared with them
        self.predictions = Predictions(setup)
        self.screening = Screener(setup.screen, setup.seed) if setup.screen is not None else None

    @abstractmethod
    def run(self, proposals: Proposals) -> bool:
        """Score proposed candidates until the budget is spent; False if a stop came first."""

    def score_baselines(self, baselines: Sequence[Candidate]) -> bool:
        """Score every baseline on all items; False if a stop came first."""
        self.begin(baselines)
        return self._score_all([(c, self._setup.all_counts()) for c in baselines])

    def learn(self, candidates: Sequence[Candidate], *, baselines: bool) -> None:
        """Learn from told candidates: from now on their scores answer for their recipes.

        Baselines' scores also determine the order of items.
        """
        for c in candidates:
            self._open.pop(c.number, None)
            self._wanted.pop(c.number, None)
            if c.same_as is None and c.status in ("done", "eliminated"):
                self._by_recipe[c.recipe_hash] = c.number
        if baselines and self._setup.racing is not None:
            self._learn_items([c for c in candidates if c.status != "failed"])
        elif self.predictions.learns:  # others never read these scores
            full = [c.number for c in candidates if c.status == "done" and c.eligible]
            self.predictions.take([self._recorded_table(number) for number in full], self._orders)
        self._learn_screen(candidates)

    def _learn_screen(self, candidates: Sequence[Candidate]) -> None:
        if self.screening is None:
            return
        screen, target = self.screening.info, self._setup.objectives[self.screening.info.objective]
        known = {c.number: c.objectives for c in candidates}
        screened = {n: estimates[screen.name].mean for n, estimates in known.items() if screen.name in estimates}
        scored = {
            n: -target.loss(estimates[target.name].mean) for n, estimates in known.items() if target.name in estimates
        }
        self.screening.remember(screened, scored)

    def _learn_items(self, baselines: Sequence[Candidate]) -> None:
        """Order items by the baselines' scores, and choose the best baseline as predictor."""
        if not baselines:
            return
        tables = [self._recorded_table(c.number) for c in baselines]
        for evaluator in self._setup.counts():
            # Among measures on one evaluator, the one with the most items decides, and of those the first.
            measures = [m for m in self._setup.measures if m.evaluator == evaluator]
            measure = max(measures, key=lambda m: m.items)
            scores = np.array([table.values(measure) for table in tables], dtype=np.float64)
            self._orders[evaluator] = item_order(scores, self._setup.seed + evaluator)
        first = self._setup.objectives[0]
        losses = [first.loss(c.objectives[first.name].mean) for c in baselines]
        self.predictions.take_baselines(tables, tables[int(np.argmin(losses))], self._orders)

    def begin(self, candidates: Sequence[Candidate]) -> None:
        """Add candidates that were asked for; those of an interrupted search with their existing scores."""
        self._open |= {c.number: c for c in candidates}
        for c in candidates:
            if c.same_as is None and not c.table.is_empty:
                self._by_recipe[c.recipe_hash] = c.number

    def _pending(self, candidate: Candidate, counts: Counts) -> Pending | None:
        """The missing items of a candidate as a job; None if nothing is missing, or nothing more will be scored."""
        if candidate.finished:
            return None
        self._wanted[candidate.number] = counts
        self._learn_from_same(candidate, counts)
        tasks = missing_tasks(candidate.table, self._orders, counts)
        if not tasks:
            return None
        number, attempt = candidate.number, candidate.attempts + 1
        return Pending(number, attempt, candidate.recipe, candidate.recipe_hash, tasks, candidate.faults)

    def _score_all(self, wanted: Sequence[tuple[Candidate, Counts]]) -> bool:
        """Score each candidate on its items; False if a stop came first."""
        all_pending = (self._pending(c, counts) for c, counts in wanted)
        return self._dispatcher.run(feed_of([pending for pending in all_pending if pending is not None]), self)

    def _learn_from_same(self, candidate: Candidate, counts: Counts) -> bool:
        """Copy the scores of an earlier candidate with the same recipe; whether they are all that is wanted.

        Only what is wanted is copied: the earlier one may be scored further than this one needs.
        """
        same_as = self._by_recipe.get(candidate.recipe_hash)
        if same_as is None or same_as == candidate.number:
            return False
        known = self._table_of_number(same_as)
        for evaluator, count in counts.items():
            candidate.table.take(self._setup, known, evaluator, self._orders[evaluator].positions[:count])
        if missing_tasks(candidate.table, self._orders, counts):
            return False
        candidate.same_as = same_as
        if self._is_full(candidate.table):
            candidate.status, candidate.objectives = "cached", self._estimates(candidate.table, len(self._rungs) - 1)
            candidate.eligible = self._setup.violation(candidate.objectives) == 0.0
            self._store.record_cached(candidate.number, same_as, candidate.objectives, eligible=candidate.eligible)
        return True

    # Deciding -----------------------------------------------------------------------------------------------------

    def _judge(
        self, candidates: Sequence[Candidate], rung: int, keep: int, *, others: Collection[Candidate] = ()
    ) -> None:
        """End the race of candidates at this rung whose place among them and the ``others`` is clear."""
        racing = [c for c in (*others, *candidates) if c.reached >= 0]
        if not racing:
            return
        better = self._better([c.table for c in racing], [c.reached for c in racing])
        masks = verdicts(better, keep)
        ours = {c.number for c in candidates}
        for c, eliminated, settled in zip(racing, masks.eliminated, masks.settled, strict=True):
            if c.number in ours and not c.out and c.reached == rung:
                c.out = "eliminated" if eliminated else "settled" if settled else ""

    def _judge_niches(
        self, candidates: Sequence[Candidate], rung: int, elites: Grid, *, others: Collection[Candidate] = ()
    ) -> None:
        """End the race of candidates at this rung that surely are not the best of their niche.

        If a candidate may be in several niches, because its features are estimates, each must have a better one.
        """
        racing = [c for c in (*others, *candidates) if c.reached >= 0]
        boxes = [elites.box(self._bounds(c, elites)) for c in racing]
        rivals = list(elites.rivals(boxes))
        boxes += [[range(at, at + 1) for at in niche] for _, niche in rivals]
        tables = [*(c.table for c in racing), *(self._elite_table(number) for number, _ in rivals)]
        reached = [*(c.reached for c in racing), *(len(self._rungs) - 1 for _ in rivals)]
        better = self._better(tables, reached)
        niches = [next(cells_of(box)) if all(len(bins) == 1 for bins in box) else None for box in boxes]
        ours = {c.number for c in candidates}
        for at, c in enumerate(racing):
            if c.number in ours and not c.out and c.reached == rung:
                taken = {niches[i] for i in np.flatnonzero(better[:, at])} - {None}
                if math.prod(map(len, boxes[at])) <= len(taken) and taken.issuperset(cells_of(boxes[at])):
                    c.out = "eliminated"

    def _elite_table(self, number: int) -> ScoreTable:
        """The scores of an elite, which never change; recently used ones are cached."""
        if number not in self._elite_tables:
            self._elite_tables[number] = self._recorded_table(number)
        return self._elite_tables[number]

    def _bounds(self, candidate: Candidate, elites: Grid) -> Bounds:
        """The bounds of a candidate's features, by the rung that it reached; empty for a front."""
        if not elites.axes:
            return ()
        assert self._setup.racing is not None  # without it every value is exact, and this is not called
        estimates = self._estimates(candidate.table, candidate.reached)
        reach = float(special.ndtri((1 + self._setup.racing.confidence) / 2))
        bounds = []
        for feature in self._setup.features:
            value = estimates.get(feature.name)
            if value is None or math.isnan(value.mean):
                bounds.append(UNKNOWN)
            elif value.n >= feature.items:
                bounds.append((value.mean, value.mean))
            elif value.stderr is None:
                bounds.append(UNKNOWN)
            else:
                bounds.append((value.mean - reach * value.stderr, value.mean + reach * value.stderr))
        return bounds

    def _better(self, tables: Sequence[ScoreTable], reached: Sequence[int]) -> NDArray[np.bool_]:
        """Which candidate is surely better than which: bool [tables, tables], on the lower rung of each pair."""
        rungs = np.array(reached)
        better = np.zeros((len(tables), len(tables)), dtype=np.bool_)
        for level in sorted(set(reached)):
            there = np.flatnonzero(rungs >= level)
            lower = np.minimum(rungs[there][:, None], rungs[there][None, :]) == level
            block = better[np.ix_(there, there)]
            block[lower] = self._compare([tables[i] for i in there.tolist()], level)[lower]
            better[np.ix_(there, there)] = block
        return better

    def _compare(self, tables: Sequence[ScoreTable], level: int) -> NDArray[np.bool_]:
        """Which candidate is surely better than which on the items of a rung: bool [tables, tables]."""
        assert self._setup.racing is not None  # without it there is one rung, and nothing to compare before it
        samples, losses = [], []
        for objective in self._setup.objectives:
            items = self._items(objective, level)
            samples.append(self._orders[objective.evaluator].sample(items, objective.items))
            losses.append(np.array([_losses_on(table, objective, items) for table in tables]))
        better = surely_better(losses, samples, self._setup.racing.confidence)
        feasible = np.array([self._setup.violation(self._estimates(table, level)) == 0.0 for table in tables])
        return np.asarray(better & (feasible[:, None] | ~feasible[None, :]))

    def _losses(self, candidate: Candidate) -> list[float]:
        """A candidate's losses on the items of the rung that it reached; inf if it violates a constraint."""
        estimates = self._estimates(candidate.table, candidate.reached)
        if self._setup.violation(estimates) > 0.0:
            return [math.inf] * len(self._setup.objectives)
        return [o.loss(estimates[o.name].mean) for o in self._setup.objectives]

    def _leads(self, candidate: Candidate, rivals: Grid) -> bool:
        """Whether a candidate is feasible and no rival is as good in every objective, by current estimates."""
        ours = self._losses(candidate)
        return bool(np.isfinite(ours).all()) and rivals.takes(ours, self._bounds(candidate, rivals))

    # The end ------------------------------------------------------------------------------------------------------

    def conclude(self, candidates: Sequence[Candidate]) -> list[RaceEnd]:
        """Estimate the objectives of candidates that were not scored on every item; how their races ended."""
        outcomes = []
        for c in candidates:
            if not c.finished:
                c.objectives = self._estimates(c.table, c.reached)
                status: Status = "eliminated" if c.is_eliminated else "done" if c.same_as is None else "cached"
                c.status = status
                outcomes.append(RaceEnd(c.number, status, c.objectives, eligible=False, same_as=c.same_as))
        return outcomes

    def _estimates(self, table: ScoreTable, rung: int) -> dict[str, Estimate]:
        """A candidate's estimates from the items up to a rung; -1 means the screen only."""
        estimates: dict[str, Estimate | None] = {}
        if rung >= 0:
            seen = table.within(self._setup, self._orders, self._rungs[rung])
            for m in self._setup.measures:
                estimates[m.name] = estimate(m, seen, self._orders[m.evaluator], self.predictions.of(m))
        if (screen := self._setup.screen) is not None:
            estimates[screen.name] = estimate(screen, table, self._orders[screen.evaluator], None)
        return {name: value for name, value in estimates.items() if value is not None}

    # Scores -------------------------------------------------------------------------------------------------------

    def _items(self, measure: MeasureInfo, rung: int) -> NDArray[np.int32]:
        """The positions of a measure's items at a rung."""
        positions = self._orders[measure.evaluator].positions[: self._rungs[rung][measure.evaluator]]
        return positions[positions < measure.items]

    def _covers(self, candidate: Candidate, rung: int) -> bool:
        return not missing_tasks(candidate.table, self._orders, self._rungs[rung])

    def _is_full(self, table: ScoreTable) -> bool:
        return not missing_tasks(table, self._orders, self._rungs[-1])

    def _table_of_number(self, number: int) -> ScoreTable:
        """The scores of a candidate, open or told."""
        return self._open[number].table if number in self._open else self._recorded_table(number)

    def _recorded_table(self, number: int) -> ScoreTable:
        return ScoreTable.of(self._setup, self._store.scores(number, "search"))

    def told_table(self, candidate: Candidate) -> ScoreTable:
        """The scores that a told candidate had: of an earlier duplicate's scores only those that it copied."""
        table = self._recorded_table(candidate.number)
        if candidate.same_as is None:
            return table
        known = candidate.objectives
        counts = dict(self._screen_counts())
        for rung, rungs in enumerate(self._rungs):
            wanted = {m.name: len(self._items(m, rung)) for m in self._setup.measures}
            if all(name in known and known[name].n >= count for name, count in wanted.items()):
                counts |= {evaluator: max(count, counts.get(evaluator, 0)) for evaluator, count in rungs.items()}
        return table.within(self._setup, self._orders, counts)

    def _screen_counts(self) -> Counts:
        screen = self._setup.screen
        return {} if screen is None else {screen.evaluator: screen.items}

    def item_losses(self, candidate: Candidate) -> list[NDArray[np.float32]]:
        """A told candidate's losses item by item: for each objective float32 [items], NaN if not scored."""
        table = self.told_table(candidate)
        values = [(o.maximise, table.values(o)) for o in self._setup.objectives]
        return [-scores if maximise else scores for maximise, scores in values]

    def _of(self, number: int) -> Candidate:
        return self._open[number]

    # What the dispatcher reports ----------------------------------------------------------------------------------

    def answer(self, pending: Pending) -> bool:
        return self._learn_from_same(self._of(pending.number), self._wanted[pending.number])

    def dispatched(self, pending: Pending) -> None:
        self._of(pending.number).attempts = pending.attempt
        self._store.record_dispatch(pending.number, pending.attempt, "")

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        assert isinstance(result, Measured)  # no candidate's job is a descent
        c, table = self._of(finished.candidate), ScoreTable()
        for task, metrics in zip(pending.tasks, result.scores, strict=True):
            table.add(self._setup, task.evaluator, task.indices, metrics)
        table.update(self._setup, c.table)
        scores = table.scores(self._setup)
        timings = {p: c.timings.get(p, 0.0) + result.timings.get(p, 0.0) for p in [*c.timings, *result.timings]}
        attempt, answers = (c.number, finished.attempt), to_answers(self._setup, result, pending.tasks)
        uses = uses_by_name(self._setup, result, pending.tasks)
        if not self._is_full(table):
            if not self._store.record_rung(
                *attempt, scores, timings, finished.worker, answers=answers, change=result.change, uses=uses
            ):
                return
        else:
            objectives = self._estimates(table, len(self._rungs) - 1)
            eligible = self._setup.violation(objectives) == 0.0
            if not self._store.record_result(
                *attempt,
                scores,
                timings,
                objectives,
                finished.worker,
                eligible=eligible,
                answers=answers,
                change=result.change,
                uses=uses,
            ):
                return
            c.status, c.objectives, c.eligible = "done", objectives, eligible
        c.table, c.timings, c.same_as = table, timings, None
        self._by_recipe[c.recipe_hash] = c.number

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        log = write_log(self._logs, finished, failure, "c")
        what = {"reason": failure.reason, "message": failure.message, "log": log, "worker": finished.worker}
        self._store.record_failure(finished.candidate, finished.attempt, what, final=final)
        if final:
            self._of(finished.candidate).status = "failed"

    def atomically(self) -> AbstractContextManager[None]:
        return self._store.atomically()

    def late(self, finished: Finished) -> None:
        self._store.record_event(Stale(candidate=finished.candidate, attempt=finished.attempt))


def _losses_on(table: ScoreTable, objective: ObjectiveInfo, items: NDArray[np.int32]) -> NDArray[np.float64]:
    """A candidate's losses on some items: float64 [items]."""
    values = table.values(objective)[items].astype(np.float64)
    return -values if objective.maximise else values
