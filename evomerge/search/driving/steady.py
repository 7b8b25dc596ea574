"""Scoring without a barrier: each candidate climbs the rungs independently, and no worker waits for another.

A candidate is compared with the most recently told ones, as many as two generations hold, where a generation would
compare its own. Decisions depend on which candidates were told by then. So with several workers, which finish in no
fixed order, two runs of such a search differ.

A decision is made once. The decision to continue is recorded with the attempt that follows, and the end of a race with
the tell. A new driver takes up open candidates in the order in which the old one would have come to them. So an
interrupted search continues as it would have; if only one job runs at a time, it equals the uninterrupted search.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evomerge.optimizers import Best, Grid
from evomerge.optimizers.elites import Point
from evomerge.search.driving.candidates import Candidate, Proposals
from evomerge.search.driving.dispatch import Dispatcher, Pending
from evomerge.search.driving.scoring import CandidateScoring
from evomerge.search.preparing.setup import Counts, Setup
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured
from evomerge.store import EventRow, Store
from evomerge.store.events import Ask, Dispatch, Failure, RaceDecision

RECENT = 2
"""How many generations' worth of told candidates a new one is compared with."""

SCREEN = -1
"""Stands for the screen's items instead of a rung."""

_ENDS = ("rung", "result", "cached", "failure")  # events after which the driver returns to a candidate


class SteadyScoring(CandidateScoring):
    """Scores candidates one by one.

    Attributes:
        back: candidates whose attempt has just ended, to be handled next.
    """

    def __init__(self, setup: Setup, store: Store, dispatcher: Dispatcher, logs: Path, population: int) -> None:
        super().__init__(setup, store, dispatcher, logs)
        self._screened: deque[Candidate] = deque(maxlen=population)
        self.back: deque[Candidate] = deque()
        self.recent = deque(maxlen=RECENT * population)
        self._told_last: deque[Candidate] = deque(maxlen=RECENT * population)
        # A race needs them to order items, and a start from an earlier search needs their scores.
        self.baselines_first = setup.racing is not None or bool(setup.start)

    def run(self, proposals: Proposals) -> bool:
        """Score a new candidate whenever a worker is free, until the budget is spent; False if a stop came first."""
        self.take_up(proposals.waiting, proposals.asked_after)
        return self._dispatcher.run(partial(self._feed, proposals), self)

    def _feed(self, proposals: Proposals) -> Pending | None:
        """The next rung of a candidate that came back, or a new candidate; finished ones are told."""
        while True:
            if self.back:
                candidate = self.back.popleft()
            elif proposals.is_spent or proposals.is_starting:
                return None
            else:
                candidate, *others = proposals.ask(1)
                self.begin([candidate, *others])
                self.back.extend(others)
            keeps, population = proposals.optimizer.keeps, proposals.optimizer.population
            share = keeps.count / population if isinstance(keeps, Best) else None if keeps == "niches" else 1.0
            pending = self.next_job(candidate, proposals.rivals, share)
            if pending is not None:
                return pending
            proposals.tell([candidate])

    def next_job(self, candidate: Candidate, rivals: Grid, keep: float | None) -> Pending | None:
        """The next job of a candidate; None if it is scored as far as needed.

        Args:
            rivals: the front, or the elites of each niche if the optimizer keeps those.
            keep: the share of candidates that the optimizer learns from; None if it keeps niches.
        """
        while not candidate.finished:
            counts = self._wanted.get(candidate.number) or self._next_counts(candidate, rivals)
            if counts is None:
                return None
            if (pending := self._pending(candidate, counts)) is not None:
                return pending
            if candidate.status == "failed":
                return None
            self._wanted.pop(candidate.number, None)
            self._arrive(candidate, counts, rivals, keep)
        return None

    def _next_counts(self, candidate: Candidate, rivals: Grid) -> Counts | None:
        """The items of a candidate's next rung, the screen's first; None after the last."""
        if candidate.step == 0:
            return None if candidate.reached == len(self._rungs) - 1 else self._setup.all_counts()
        screen = self._setup.screen
        if screen is not None and candidate.reached < 0 and math.isnan(self._screen_mean(candidate)):
            return self._screen_counts()
        if candidate.is_eliminated:
            return None
        rung = candidate.reached + 1
        if rung < self._setup.ordinary_rungs and not candidate.out:
            return self._rungs[rung]
        if not 0 < rung < len(self._rungs):
            return None
        if not rivals.axes:  # the niche of recently told candidates may not be known
            rivals = rivals.extend(self._recent_points())
        return self._rungs[rung] if self._leads(candidate, rivals) else None

    def _arrive(self, candidate: Candidate, counts: Counts, rivals: Grid, keep: float | None) -> None:
        """Decide whether a candidate that has all scores of a rung, or of the screen, goes on."""
        if candidate.step == 0:
            candidate.reached = len(self._rungs) - 1
            return
        if counts not in self._rungs:
            self._screen(candidate)
            return
        candidate.reached += 1
        if candidate.reached < min(self._setup.ordinary_rungs, len(self._rungs) - 1):
            others = [c for c in self.recent if c.reached >= 0]
            if keep is None:
                self._judge_niches([candidate], candidate.reached, rivals, others=others)
                return
            keep_of = round(keep * (len(others) + 1))
            if 0 < keep_of <= len(others):
                self._judge([candidate], candidate.reached, keep_of, others=others)

    def _screen(self, candidate: Candidate) -> None:
        """Reject a candidate that is among the lowest of recent ones by the screen."""
        self._screened.append(candidate)
        if self.screening is not None and len(self._screened) == self._screened.maxlen:
            means = {c.number: self._screen_mean(c) for c in self._screened}
            if candidate.number in self.screening.poorest(means):
                candidate.out = "screened"

    def _screen_mean(self, candidate: Candidate) -> float:
        """The mean of the screen's metric; NaN until all of its items are scored."""
        assert self._setup.screen is not None  # asked only where there is one
        return float(candidate.table.values(self._setup.screen).mean(dtype="float64"))

    def _recent_points(self) -> dict[int, Point]:
        return {c.number: Point(c.losses) for c in self.recent if c.losses is not None and c.out != "screened"}

    def learn(self, candidates: Sequence[Candidate], *, baselines: bool) -> None:
        super().learn(candidates, baselines=baselines)
        self.recent.extend(c for c in candidates if c.status != "failed" and not baselines)
        self._told_last.extend(c for c in candidates if not baselines)

    # After an interruption ----------------------------------------------------------------------------------------

    def take_up(self, open_: Sequence[Candidate], asked_after: int) -> None:
        """Continue where the previous driver was, after everything told has been replayed.

        Args:
            open_: the candidates that were asked for and are not told yet.
            asked_after: the seq of an event before all of their asks.
        """
        for c in self.recent:
            c.table = self.told_table(c)
            c.reached = max((rung for rung in range(len(self._rungs)) if self._covers(c, rung)), default=-1)
            if c.status == "eliminated":
                c.out = "eliminated" if c.reached >= 0 else "screened"
        self.begin(open_)
        events = self._store.events(since=asked_after, kinds=("ask", "dispatch", *_ENDS))
        dispatched = {e.candidate: e.read(Dispatch) for e in events if e.kind == "dispatch"}
        decided = {n: race for n, dispatch in dispatched.items() if n in self._open and (race := dispatch.decided)}
        for c in open_:
            if c.number in decided:
                self._decide_again(c, decided[c.number])
        self._remember_screened([c for c in open_ if c.number in decided and decided[c.number].rung != SCREEN])
        self.back = deque(_as_queued(open_, events))

    def _decide_again(self, candidate: Candidate, decided: RaceDecision) -> None:
        """Restore what was decided about a candidate when it was last sent to a worker."""
        candidate.reached, candidate.out, rung = decided.reached, decided.out, decided.rung
        if rung != SCREEN:
            self._learn_from_same(candidate, self._screen_counts())
        if candidate.reached >= 0:
            self._learn_from_same(candidate, self._rungs[candidate.reached])
        self._wanted[candidate.number] = self._screen_counts() if rung == SCREEN else self._rungs[rung]

    def _remember_screened(self, open_: Sequence[Candidate]) -> None:
        """Restore the candidates that reached the screen last: ``open_`` ones that passed it, and told ones."""
        if self._setup.screen is not None:
            for c in self._told_last:
                c.table = self.told_table(c)
            screened = [c for c in (*self._told_last, *open_) if not math.isnan(self._screen_mean(c))]
            # With one job at a time they come in the order in which they are asked for.
            self._screened.extend(sorted(screened, key=lambda c: c.number))

    # What the dispatcher reports ----------------------------------------------------------------------------------

    def dispatched(self, pending: Pending) -> None:
        c = self._of(pending.number)
        counts = self._wanted[c.number]
        rung = self._rungs.index(counts) if counts in self._rungs else SCREEN
        decided = None if c.step == 0 else RaceDecision(reached=c.reached, out=c.out, rung=rung)
        c.attempts = pending.attempt
        self._store.record_dispatch(pending.number, pending.attempt, "", decided)

    def answer(self, pending: Pending) -> bool:
        answered = super().answer(pending)
        if answered:
            self.back.append(self._of(pending.number))
        return answered

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        super().measured(pending, finished, result)
        self.back.append(self._of(finished.candidate))

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        super().failed(finished, failure, final=final)
        if final:
            self.back.append(self._of(finished.candidate))


def _as_queued(open_: Sequence[Candidate], events: Sequence[EventRow]) -> list[Candidate]:
    """Candidates in the order in which the driver would come to them: first those at a worker, in the order sent,
    then the others, in the order in which they were asked for or came back.
    """
    places: dict[int | None, tuple[bool, int]] = {}  # for each candidate: whether it waits, and since which event
    for event in events:
        if event.kind == "ask":
            places |= dict.fromkeys(event.read(Ask).candidates, (True, event.seq))
        elif event.kind == "dispatch" or (event.kind == "failure" and not event.read(Failure).final):
            places[event.candidate] = (False, event.seq)
        else:
            places[event.candidate] = (True, event.seq)
    return sorted(open_, key=lambda c: (places[c.number], c.number))
