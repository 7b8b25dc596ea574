"""Having the candidates of one generation scored: rung by rung, those that cannot matter left out.

Who goes on is decided by scores alone, never by the order in which they come, and a decision at a rung reads no score
beyond it. So a search that was interrupted in a generation decides all over again, from what was recorded, and comes to
the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Genome
from evomerge.recipe import Recipe
from evomerge.search.dispatch import Dispatcher, Pending, write_log
from evomerge.search.items import ItemOrder, item_order, plain_order
from evomerge.search.jobs import Failed, Finished, Measured
from evomerge.search.prediction import Predictions
from evomerge.search.racing import surely_better, verdicts
from evomerge.search.scores import Sheet, estimate, missing_tasks
from evomerge.search.screening import Screening
from evomerge.search.setup import Counts, ObjectiveInfo, Setup
from evomerge.store import Estimate, Outcome, Store
from evomerge.store.front import nondominated
from evomerge.store.rows import Status


@dataclass
class Candidate:
    """A candidate of the generation that is being scored.

    ``reached`` is the last rung that it was scored at; ``out`` says why it left the race, if it did. ``twin`` is an
    earlier candidate of the same recipe, whose scores are its own.
    """

    number: int
    genome: Genome | None
    recipe: Recipe
    recipe_hash: str
    text: str = ""
    attempts: int = 0
    faults: int = 0
    status: Status = "asked"
    twin: int | None = None
    sheet: Sheet = field(default_factory=Sheet)
    timings: dict[str, float] = field(default_factory=dict)
    reached: int = -1
    out: str = ""
    objectives: Mapping[str, Estimate] = field(default_factory=dict)
    eligible: bool = False
    losses: list[float] | None = None

    @property
    def is_eliminated(self) -> bool:
        """Too poor for the optimizer to learn more of it than that."""
        return self.out in ("eliminated", "screened")

    @property
    def finished(self) -> bool:
        """No more of it will be scored, and the store says so already."""
        return self.status in ("done", "cached", "failed")


class Scoring:
    """Scores one generation after another; the dispatcher's recorder.

    Args:
        logs: folder for the logs of failed attempts.
    """

    def __init__(self, setup: Setup, store: Store, dispatcher: Dispatcher, logs: Path) -> None:
        self._setup = setup
        self._store = store
        self._dispatcher = dispatcher
        self._logs = logs
        self._rungs = setup.rungs
        self._orders: list[ItemOrder] = [plain_order(each.search_items) for each in setup.evaluators]
        self._generation: list[Candidate] = []
        self._twins: dict[str, int] = {}
        self._wanted: dict[int, Counts] = {}  # of each candidate that is being scored
        self.predictions = Predictions(setup)
        self.screening = Screening(setup.screen, setup.seed) if setup.screen is not None else None

    # One generation -----------------------------------------------------------------------------------------------

    def score_landmarks(self, landmarks: list[Candidate]) -> bool:
        """Score every landmark on all items; False when a stop came first."""
        self._begin(landmarks)
        return self._score((c, self._setup.all_counts()) for c in landmarks)

    def learn(self, generation: Sequence[Candidate], *, landmarks: bool) -> None:
        """Take a generation that has been told: its scores answer for its recipes from now on.

        Of landmarks also the order of items, by what their scores tell of each.
        """
        for c in generation:
            if c.twin is None and c.status in ("done", "eliminated"):
                self._twins[c.recipe_hash] = c.number
        full = [c for c in generation if c.status in ("done", "cached") and c.eligible]
        if landmarks and self._setup.racing is not None:
            self._learn_items([c for c in generation if c.status != "failed"])
        else:
            self.predictions.take([self._recorded_sheet(c.number) for c in full if c.twin is None], self._orders)
        if self.screening is not None:
            screen, target = self.screening.info, self._setup.objectives[self.screening.info.objective]
            self.screening.remember(
                {c.number: c.objectives[screen.name]["mean"] for c in generation if screen.name in c.objectives},
                {
                    c.number: -target.loss(c.objectives[target.name]["mean"])
                    for c in generation
                    if target.name in c.objectives
                },
            )

    def _learn_items(self, landmarks: Sequence[Candidate]) -> None:
        """Put items in order by the landmarks' scores, and take the best landmark to predict scores by."""
        if not landmarks:
            return
        sheets = [self._recorded_sheet(c.number) for c in landmarks]
        for evaluator in self._setup.counts():
            # Of measures on one evaluator the one with the most items, and of those the first, says how they differ.
            measures = [m for m in self._setup.measures if m.evaluator == evaluator]
            measure = max(measures, key=lambda m: m.items)
            scores = np.array([sheet.values(measure) for sheet in sheets], dtype=np.float64)
            self._orders[evaluator] = item_order(scores, self._setup.seed + evaluator)
        first = self._setup.objectives[0]
        losses = [first.loss(c.objectives[first.name]["mean"]) for c in landmarks]
        self.predictions.take_landmarks(sheets, sheets[int(np.argmin(losses))], self._orders)

    def score(self, generation: list[Candidate], incumbents: Sequence[Sequence[float]], keep: int) -> bool:
        """Score a generation as far as is needed to rank it; False when a stop came first.

        Args:
            incumbents: losses of the candidates on the front before this generation.
            keep: how many of the generation the optimizer learns from.
        """
        self._begin(generation)
        if self.screening is not None and not self._screen(self.screening, generation):
            return False
        ordinary = self._setup.ordinary_rungs
        for rung, counts in enumerate(self._rungs[:ordinary]):
            racing = [c for c in generation if not c.out]
            if not self._score((c, counts) for c in racing):
                return False
            self._reach(racing, rung)
            if rung < len(self._rungs) - 1 and keep < len(generation):
                self._judge(rung, keep)
        return ordinary == len(self._rungs) or self._challenge(incumbents)

    def _begin(self, generation: list[Candidate]) -> None:
        self._generation = generation
        for c in generation:
            c.reached, c.out = -1, ""
            if c.twin is None and not c.sheet.is_empty:  # scored before an interruption
                self._twins[c.recipe_hash] = c.number

    def _score(self, wanted: Iterable[tuple[Candidate, Counts]]) -> bool:
        todo = []
        for c, counts in wanted:
            if c.finished:
                continue
            self._wanted[c.number] = counts
            self._learn_from_twin(c, counts)
            if tasks := missing_tasks(c.sheet, self._orders, counts):
                todo.append(Pending(c.number, c.attempts + 1, c.recipe, c.recipe_hash, tasks, c.faults))
        return self._dispatcher.run(todo, self)

    def _learn_from_twin(self, candidate: Candidate, counts: Counts) -> bool:
        """Take what an earlier candidate of the same recipe scored; whether that is all that is wanted.

        Not more than is wanted: its twin may be scored further while this one is not, and must not pull it along.
        """
        twin = self._twins.get(candidate.recipe_hash)
        if twin is None or twin == candidate.number:
            return False
        known = self._sheet_of_number(twin)
        for evaluator, count in counts.items():
            candidate.sheet.take(self._setup, known, evaluator, self._orders[evaluator].positions[:count])
        if missing_tasks(candidate.sheet, self._orders, counts):
            return False
        candidate.twin = twin
        if self._is_full(candidate.sheet):
            candidate.status, candidate.objectives = "cached", self._estimates(candidate.sheet, len(self._rungs) - 1)
            candidate.eligible = self._setup.violation(candidate.objectives) == 0.0
            self._store.record_cached(candidate.number, twin, candidate.objectives, eligible=candidate.eligible)
        return True

    def _reach(self, candidates: Sequence[Candidate], rung: int) -> None:
        for c in candidates:
            if self._covers(c, rung):
                c.reached = rung
            else:
                c.out = "failed"

    # Deciding -----------------------------------------------------------------------------------------------------

    def _screen(self, screening: Screening, generation: list[Candidate]) -> bool:
        """Score a generation by the screen; what it finds too poor leaves the race. False when a stop came first."""
        screen = screening.info
        if not self._score((c, {screen.evaluator: screen.items}) for c in generation):
            return False
        values = {c.number: float(c.sheet.values(screen).mean(dtype=np.float64)) for c in generation}
        dropped = screening.poorest({number: mean for number, mean in values.items() if not math.isnan(mean)})
        for c in generation:
            if c.number in dropped:
                c.out = "screened"
        return True

    def _judge(self, rung: int, keep: int) -> None:
        """Let those whose place is clear leave the race."""
        field_ = [c for c in self._generation if c.reached >= 0]
        if not field_:
            return
        better = np.zeros((len(field_), len(field_)), dtype=np.bool_)
        reached = np.array([c.reached for c in field_])
        for level in sorted(set(reached.tolist())):
            # A pair is compared on the items of the lower rung of the two.
            there = np.flatnonzero(reached >= level)
            lower = np.minimum(reached[there][:, None], reached[there][None, :]) == level
            block = better[np.ix_(there, there)]
            block[lower] = self._compare([field_[i] for i in there], level)[lower]
            better[np.ix_(there, there)] = block
        found = verdicts(better, keep)
        for c, eliminated, settled in zip(field_, found.eliminated, found.settled, strict=True):
            if not c.out and c.reached == rung:
                c.out = "eliminated" if eliminated else "settled" if settled else ""

    def _compare(self, candidates: Sequence[Candidate], level: int) -> NDArray[np.bool_]:
        """Who is surely better than whom on the items of a rung: bool [candidates, candidates]."""
        assert self._setup.racing is not None  # without it there is one rung, and nothing to compare before it
        samples, losses = [], []
        for objective in self._setup.objectives:
            items = self._items(objective, level)
            samples.append(self._orders[objective.evaluator].sample(items, objective.items))
            losses.append(np.array([_losses_on(c.sheet, objective, items) for c in candidates]))
        better = surely_better(losses, samples, self._setup.racing.confidence)
        feasible = np.array([self._setup.violation(self._estimates(c.sheet, level)) == 0.0 for c in candidates])
        return np.asarray(better & (feasible[:, None] | ~feasible[None, :]))

    def _challenge(self, incumbents: Sequence[Sequence[float]]) -> bool:
        """Score the best of a generation on more items for as long as it looks better than the incumbents.

        The best of many estimates is too good, and only a candidate that was scored on every item may take an
        incumbent's place (Hutter, Hoos & Leyton-Brown, SMAC, LION 2011, procedure Intensify).
        """
        last = len(self._rungs) - 1
        open_ = [c for c in self._generation if c.out in ("", "settled") and 0 <= c.reached < last]
        losses = np.array([self._losses(c) for c in open_]).reshape(len(open_), len(self._setup.objectives))
        best = [open_[i] for i in np.flatnonzero(nondominated(losses))]
        challengers = [c for c in best if self._leads(c, incumbents)]
        while challengers:
            if not self._score((c, self._rungs[c.reached + 1]) for c in challengers):
                return False
            challengers = [c for c in challengers if self._covers(c, c.reached + 1)]
            for c in challengers:
                c.reached += 1
            challengers = [c for c in challengers if c.reached < last and self._leads(c, incumbents)]
        return True

    def _losses(self, candidate: Candidate) -> list[float]:
        """What a candidate's losses are by the items of the rung that it reached; inf where it misses a constraint."""
        found = self._estimates(candidate.sheet, candidate.reached)
        if self._setup.violation(found) > 0.0:
            return [math.inf] * len(self._setup.objectives)
        return [o.loss(found[o.name]["mean"]) for o in self._setup.objectives]

    def _leads(self, candidate: Candidate, incumbents: Sequence[Sequence[float]]) -> bool:
        """Whether a candidate is feasible and no incumbent is as good in every objective, by what is known now."""
        ours = np.array(self._losses(candidate))
        return bool(np.isfinite(ours).all()) and not any((np.array(theirs) <= ours).all() for theirs in incumbents)

    # Ending a generation ------------------------------------------------------------------------------------------

    def conclude(self, generation: Sequence[Candidate]) -> list[Outcome]:
        """Estimate what each candidate is worth that was not scored on every item, and say how its race ended."""
        outcomes = []
        for c in generation:
            if not c.finished:
                c.objectives = self._estimates(c.sheet, c.reached)
                status: Status = "eliminated" if c.is_eliminated else "done" if c.twin is None else "cached"
                c.status = status
                outcomes.append(Outcome(c.number, status, c.objectives, eligible=False, same_as=c.twin))
        return outcomes

    def _estimates(self, sheet: Sheet, rung: int) -> dict[str, Estimate]:
        """What a candidate is worth by the items up to a rung; by the screen alone for -1."""
        found: dict[str, Estimate | None] = {}
        if rung >= 0:
            seen = sheet.within(self._setup, self._orders, self._rungs[rung])
            for m in self._setup.measures:
                found[m.name] = estimate(m, seen, self._orders[m.evaluator], self.predictions.of(m))
        if (screen := self._setup.screen) is not None:
            found[screen.name] = estimate(screen, sheet, self._orders[screen.evaluator], None)
        return {name: value for name, value in found.items() if value is not None}

    # Scores -------------------------------------------------------------------------------------------------------

    def _items(self, objective: ObjectiveInfo, rung: int) -> NDArray[np.int32]:
        """The positions of an objective's items at a rung."""
        positions = self._orders[objective.evaluator].positions[: self._rungs[rung][objective.evaluator]]
        return positions[positions < objective.items]

    def _covers(self, candidate: Candidate, rung: int) -> bool:
        return not missing_tasks(candidate.sheet, self._orders, self._rungs[rung])

    def _is_full(self, sheet: Sheet) -> bool:
        return not missing_tasks(sheet, self._orders, self._rungs[-1])

    def _sheet_of_number(self, number: int) -> Sheet:
        """The scores of a candidate, of this generation or an earlier one."""
        for c in self._generation:
            if c.number == number:
                return c.sheet
        return self._recorded_sheet(number)

    def _recorded_sheet(self, number: int) -> Sheet:
        return Sheet.of(self._setup, self._store.scores(number, "search"))

    def _of(self, number: int) -> Candidate:
        return self._generation[number - self._generation[0].number]

    # What the dispatcher reports ----------------------------------------------------------------------------------

    def answer(self, pending: Pending) -> bool:
        return self._learn_from_twin(self._of(pending.number), self._wanted[pending.number])

    def dispatched(self, pending: Pending) -> None:
        self._of(pending.number).attempts = pending.attempt
        self._store.record_dispatch(pending.number, pending.attempt, "")

    def measured(self, pending: Pending, finished: Finished, result: Measured) -> None:
        c, sheet = self._of(finished.candidate), Sheet()
        for task, metrics in zip(pending.tasks, result.scores, strict=True):
            sheet.add(self._setup, task.evaluator, task.indices, metrics)
        sheet.update(self._setup, c.sheet)
        scores = sheet.scores(self._setup)
        timings = {p: c.timings.get(p, 0.0) + result.timings.get(p, 0.0) for p in [*c.timings, *result.timings]}
        attempt = (c.number, finished.attempt)
        if not self._is_full(sheet):
            if not self._store.record_rung(*attempt, scores, timings, finished.worker):
                return
        else:
            objectives = self._estimates(sheet, len(self._rungs) - 1)
            eligible = self._setup.violation(objectives) == 0.0
            if not self._store.record_result(*attempt, scores, timings, objectives, finished.worker, eligible=eligible):
                return
            c.status, c.objectives, c.eligible = "done", objectives, eligible
        c.sheet, c.timings, c.twin = sheet, timings, None
        self._twins[c.recipe_hash] = c.number

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        log = write_log(self._logs, finished, failure, "c")
        what = {"reason": failure.reason, "message": failure.message, "log": log, "worker": finished.worker}
        self._store.record_failure(finished.candidate, finished.attempt, what, final=final)
        if final:
            self._of(finished.candidate).status = "failed"

    def late(self, finished: Finished) -> None:
        self._store.record_event("stale", {"candidate": finished.candidate, "attempt": finished.attempt})


def _losses_on(sheet: Sheet, objective: ObjectiveInfo, items: NDArray[np.int32]) -> NDArray[np.float64]:
    """A candidate's losses on some items: float64 [items]."""
    values = sheet.values(objective)[items].astype(np.float64)
    return -values if objective.maximise else values
