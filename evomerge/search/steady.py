"""Scoring without a barrier: each candidate goes its own way up the rungs, and no worker waits for another.

A candidate is compared with those that were told last, as many as two generations hold, where a generation would
compare its own. What is decided depends on who was there by then, so two runs of such a search differ; what has been
told is replayed in the order in which it was told.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from evomerge.search.dispatch import Dispatcher, Pending
from evomerge.search.jobs import Failed, Finished, Measured
from evomerge.search.scoring import Candidate, Scoring
from evomerge.search.setup import Counts, Setup
from evomerge.store import Store

RECENT = 2
"""Generations' worth of told candidates that a new one is compared with."""


class SteadyScoring(Scoring):
    """Scores candidates one by one.

    Attributes:
        back: candidates of which an attempt has just ended, for the driver to take up again.
    """

    def __init__(self, setup: Setup, store: Store, dispatcher: Dispatcher, logs: Path, population: int) -> None:
        super().__init__(setup, store, dispatcher, logs)
        self._screened: deque[Candidate] = deque(maxlen=population)
        self.back: deque[Candidate] = deque()
        self.recent = deque(maxlen=RECENT * population)

    def run(self, feed: Callable[[], Pending | None]) -> bool:
        """Score whatever the feed gives until it gives nothing; False when a stop came first."""
        return self._dispatcher.run(feed, self)

    def next_job(self, candidate: Candidate, incumbents: Sequence[Sequence[float]], keep: float) -> Pending | None:
        """What is to be scored next of a candidate; None when it is known as well as it needs to be.

        Args:
            incumbents: losses of the candidates on the front.
            keep: the share of candidates that the optimizer learns from.
        """
        while not candidate.finished:
            counts = self._next_counts(candidate, incumbents)
            if counts is None:
                return None
            if (pending := self._pending(candidate, counts)) is not None:
                return pending
            if candidate.status == "failed":
                return None
            self._arrive(candidate, counts, keep)
        return None

    def _next_counts(self, candidate: Candidate, incumbents: Sequence[Sequence[float]]) -> Counts | None:
        """The items of a candidate's next rung, the screen's first; None at the end of its way."""
        if candidate.step == 0:
            return None if candidate.reached == len(self._rungs) - 1 else self._setup.all_counts()
        screen = self._setup.screen
        if screen is not None and candidate.reached < 0 and math.isnan(self._screen_mean(candidate)):
            return {screen.evaluator: screen.items}
        if candidate.is_eliminated:
            return None
        rung = candidate.reached + 1
        if rung < self._setup.ordinary_rungs and not candidate.out:
            return self._rungs[rung]
        challenges = 0 < rung < len(self._rungs) and self._leads(candidate, [*incumbents, *self._recent_losses()])
        return self._rungs[rung] if challenges else None

    def _arrive(self, candidate: Candidate, counts: Counts, keep: float) -> None:
        """A candidate has all scores of a rung, or of the screen: whether it goes on is decided."""
        if candidate.step == 0:
            candidate.reached = len(self._rungs) - 1
            return
        if counts not in self._rungs:
            self._screen(candidate)
            return
        candidate.reached += 1
        if candidate.reached < min(self._setup.ordinary_rungs, len(self._rungs) - 1):
            others = [c for c in self.recent if c.reached >= 0]
            keep_of = round(keep * (len(others) + 1))
            if 0 < keep_of <= len(others):
                self._judge([*others, candidate], candidate.reached, keep_of)

    def _screen(self, candidate: Candidate) -> None:
        """Leave out a candidate that is among the poorest by the screen of those that came last."""
        self._screened.append(candidate)
        if self.screening is not None and len(self._screened) == self._screened.maxlen:
            means = {c.number: self._screen_mean(c) for c in self._screened}
            if candidate.number in self.screening.poorest(means):
                candidate.out = "screened"

    def _screen_mean(self, candidate: Candidate) -> float:
        """The mean of the screen's metric; NaN until all of its items are scored."""
        assert self._setup.screen is not None  # asked only where there is one
        return float(candidate.sheet.values(self._setup.screen).mean(dtype="float64"))

    def _recent_losses(self) -> list[list[float]]:
        return [c.losses for c in self.recent if c.losses is not None and c.out != "screened"]

    def learn(self, told: Sequence[Candidate], *, landmarks: bool) -> None:
        super().learn(told, landmarks=landmarks)
        self.recent.extend(c for c in told if c.status != "failed" and not landmarks)

    # What the dispatcher reports ----------------------------------------------------------------------------------

    def answer(self, pending: Pending) -> bool:
        answered = super().answer(pending)
        if answered:
            self.back.append(self._of(pending.number))
        return answered

    def measured(self, pending: Pending, finished: Finished, result: Measured) -> None:
        super().measured(pending, finished, result)
        self.back.append(self._of(finished.candidate))

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        super().failed(finished, failure, final=final)
        if final:
            self.back.append(self._of(finished.candidate))
