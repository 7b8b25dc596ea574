"""Descents: where the gradient of a proxy leads, proposed beside what the optimizer asks for.

The proxy is smooth and knows nothing of how answers are graded: followed too far, it leads away from what is wanted,
and on the way to something better it may lead through something worse. So it decides nothing. It is first followed from
the best baseline, or from the method's defaults if that is no point of the space, or if several are best at something.
Its points are scored like any candidate, and it is followed from its last point as long as it leads to a new best one
now and then. If it has not for a while, it starts again from the best candidate at half the rate; if no candidate of
the search is better than the sources yet, from the best of its own points. At the lowest rate it stops once its points
do not improve any more, and at any rate if the objectives surely disagree with it (``estimation/agreement.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from evomerge.front import extend_front
from evomerge.genome import Genome
from evomerge.search.driving.candidates import PROXY, START, Candidate
from evomerge.search.driving.dispatch import Dispatcher, NonCandidateRecorder, Pending, feed_of, write_log
from evomerge.search.estimation.agreement import Agreement, fitted_values
from evomerge.search.preparing.setup import ProxyInfo, Setup
from evomerge.search.work.jobs import Descend, Descended, Failed, Finished, Measured
from evomerge.store import Store
from evomerge.store.events import Descent, DescentFailed

PATIENCE = 4
"""Generations that the proxy is followed without a new best candidate, including those whose descent failed."""

HALVINGS = 3
"""How often its rate is halved before it rests; a best candidate from elsewhere wakes it."""


class Descents:
    """Where the proxy is followed from, and how fast.

    All of it follows from what was told, so that a resumed search knows the same.

    Attributes:
        rate: of the next descent; None while the proxy rests.
        agreement: with the objectives.
    """

    def __init__(self, proxy: ProxyInfo, setup: Setup, store: Store, dispatcher: Dispatcher, logs: Path) -> None:
        self._proxy = proxy
        self._setup = setup
        self._store = store
        self._dispatcher = dispatcher
        self._logs = logs
        self.rate: float | None = proxy.rate
        self._lowest = proxy.rate / 2**HALVINGS
        self._at: Genome | None = None
        self._vain = 0  # generations since the last that found a new best candidate, or since the last start
        self._idle = 0  # generations since the points of descents improved
        self._best: Genome | None = None  # the newest candidate on the front that is a point of the space
        self._reached: Mapping[int, Sequence[float]] = {}  # the front of the points of descents: losses by number
        self._farthest: Genome | None = None  # the newest point on it
        self._points: Sequence[Genome] = ()
        self.agreement = Agreement()
        descents = (event.read(Descent) for event in store.events(kinds=("descent",)))
        # Of the proxy, at the points of each step.
        self._values: dict[int, Sequence[float]] = {descent.step: descent.at for descent in descents}

    def prepare(self, step: int) -> bool:
        """Work out the points to propose at a step; False when a stop came first."""
        if self._at is None or self.rate is None:
            return True
        proxy, half = self._proxy, self._proxy.steps // 2
        descend = Descend(
            self._at, proxy.evaluator, range(proxy.items), proxy.drawn, (half, proxy.steps), self.rate,
            self._setup.seed + step, measures=self._setup.space_measures,
        )  # fmt: skip
        recipe, run = self._setup.space.decode(self._at), _Run(self._store, self._logs, step, descend)
        pending = Pending(-step, 1, recipe, f"descent of step {step}", (), instead=descend)
        if not self._dispatcher.run(feed_of([pending]), run):
            return False
        self._points = run.points
        self._values[step] = run.values
        return True

    def points(self) -> Sequence[Genome]:
        """The points that were prepared last, each once."""
        points, self._points = self._points, ()
        return points

    def take(self, candidates: Sequence[Candidate], front: Collection[int]) -> None:
        """Take the candidates that are told of a step, and the front with them."""
        path = [c for c in candidates if c.origin == PROXY]
        new = [c for c in candidates if c.number in front and c.genome is not None]
        if new:
            self._best = new[-1].genome
        if any(c.origin == START for c in candidates):
            self._at = self._best
        elif self._at is None:  # these are the baselines
            defaults = [c.genome for c in candidates if c.origin == "default" and c.genome is not None]
            best = {tuple(c.losses or ()) for c in candidates if c.number in front}
            self._at = defaults[0] if defaults and (len(best) > 1 or not new) else self._best
        elif self.rate is not None:
            if path:
                self._at = path[-1].genome
                self._audit(path)
            self._vain = 0 if any(c.number in front for c in path) else self._vain + 1
            self._compare(path)
            if self._vain >= PATIENCE:
                self._begin_again()
        elif new:
            self.rate, self._at, self._vain = self._lowest, self._best, 0

    def _compare(self, path: Sequence[Candidate]) -> None:
        """Compare the points of a step with those of all descents before."""
        self._reached = extend_front(self._reached, {c.number: c.losses for c in path if c.losses})
        better = [c.genome for c in path if c.number in self._reached]
        self._idle = 0 if better else self._idle + 1
        self._farthest = better[-1] if better else self._farthest

    def _audit(self, path: Sequence[Candidate]) -> None:
        """Compare what was scored of the points of a step with what the proxy was there."""
        for candidate, value in zip(path, self._values.get(path[0].step, ()), strict=False):
            self.agreement.add(value, candidate.losses or ())

    def _begin_again(self) -> None:
        assert self.rate is not None  # there was a descent
        self._at, self._vain = self._farthest if self._best is None else self._best, 0
        is_last = self.agreement.is_low or (self.rate <= self._lowest and self._idle >= PATIENCE)
        self.rate = None if is_last else max(self.rate / 2, self._lowest)


class _Run(NonCandidateRecorder):
    """One descent, as a ``Recorder``; it fails for itself alone."""

    def __init__(self, store: Store, logs: Path, step: int, descend: Descend) -> None:
        self._store, self._logs, self._step, self._descend = store, logs, step, descend
        self.points: Sequence[Genome] = ()
        self.values: Sequence[float] = ()

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        assert isinstance(result, Descended)
        self.points, self.values = result.points, fitted_values(result.losses, self._descend.keep)
        steps = len(result.losses)
        gradient = [None if np.isnan(slope) else slope for slope in result.gradient.tolist()]
        self._store.record_event(
            Descent(
                step=self._step, steps=steps, rate=float(self._descend.rate), passes=steps * self._descend.items,
                proxy=(float(result.losses[0]), float(result.losses[-1])), gradient=gradient,
                seconds=sum(result.timings.values()), worker=finished.worker, at=list(self.values),
            )
        )  # fmt: skip

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        log = write_log(self._logs, finished, failure, "descent")
        if final:
            self._store.record_event(DescentFailed(step=self._step, why=failure.message, log=log))
