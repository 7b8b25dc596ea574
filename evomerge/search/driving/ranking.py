"""The losses that the optimizer is told: one for each objective, in an order that holds whatever was measured.

Candidates that meet the constraints and were not eliminated come first, by their estimates. Those that a race or the
screen eliminated come next, then those that violate a constraint (Deb, "An efficient constraint handling method for
genetic algorithms", CMAME 186, 2000), the smallest violation first, and failed ones last, as inf.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.search.driving.candidates import Candidate
from evomerge.search.estimation.screening import Screener
from evomerge.search.preparing.setup import Setup

Losses = NDArray[np.float64]
"""One loss for each objective."""


class Ranking:
    """Assigns losses to successive generations, and remembers the range of feasible candidates' losses."""

    def __init__(self, setup: Setup, screening: Screener | None) -> None:
        self._setup = setup
        self._screening = screening
        self._best = np.full(len(setup.objectives), math.inf)
        self._worst = np.full(len(setup.objectives), -math.inf)

    def rank(self, generation: Sequence[Candidate], recent: Collection[Candidate] = ()) -> None:
        """Set candidates' losses from their estimates: for a generation, or one candidate and recently told ones."""
        own = {c.number: self._own(c) for c in generation if c.status != "failed"}
        floor = self._floor(generation, own, recent) if any(c.is_eliminated for c in generation) else np.empty(0)
        for c in generation:
            if c.status == "failed":
                c.losses = [math.inf] * len(self._setup.objectives)
            elif c.is_eliminated:
                c.losses = self._after(own[c.number], floor)
            else:
                c.losses = own[c.number].tolist()
        self.remember(generation)
        for c in generation:
            if c.number in own and not self._is_feasible(c):
                c.losses = self._beyond(self._setup.violation(c.objectives))

    def _floor(
        self, generation: Sequence[Candidate], own: Mapping[int, Losses], recent: Collection[Candidate]
    ) -> Losses:
        """The worst kept losses, where those of eliminated candidates begin."""
        kept = [own[c.number] for c in generation if c.number in own and self._is_kept(c)]
        kept += [np.array(c.losses) for c in recent if self._is_kept(c)]
        return np.asarray(np.max(kept, axis=0) if kept else np.where(np.isfinite(self._worst), self._worst, 0.0))

    def remember(self, generation: Sequence[Candidate]) -> None:
        """Remember a generation that was ranked before, as on resume."""
        for c in generation:
            if c.losses is not None and np.isfinite(c.losses).all() and self._is_feasible(c):
                self._best = np.minimum(self._best, c.losses)
                self._worst = np.maximum(self._worst, c.losses)

    def _own(self, candidate: Candidate) -> Losses:
        """A candidate's losses from its own estimates; NaN if it has none."""
        estimates = [candidate.objectives.get(o.name) for o in self._setup.objectives]
        losses = [
            math.nan if value is None else o.loss(value.mean)
            for o, value in zip(self._setup.objectives, estimates, strict=True)
        ]
        if self._screening is not None and all(math.isnan(loss) for loss in losses):
            screen = self._screening.info
            target = self._setup.objectives[screen.objective]
            losses[screen.objective] = target.loss(self._screening.predict(candidate.objectives[screen.name].mean))
        return np.array(losses, dtype=np.float64)

    def _after(self, own: Losses, floor: Losses) -> list[float]:
        """The losses of an eliminated candidate. With one objective it ranks behind all that were kept.

        With several it keeps its own: it was found to be dominated, but no single number says by how much. What was not
        measured counts as the worst that was kept.
        """
        own = np.where(np.isnan(own), floor, own)
        return [float(loss) for loss in (np.maximum(own, floor) if len(own) == 1 else own)]

    def _beyond(self, violation: float) -> list[float]:
        """The losses of an infeasible candidate: behind every feasible one so far, by its violation."""
        worst = np.where(np.isfinite(self._worst), self._worst, 0.0)
        spread = np.where(np.isfinite(self._worst - self._best), self._worst - self._best, 0.0)
        return [float(loss) for loss in worst + np.where(spread > 0, spread, 1.0) * (1.0 + violation)]

    def _is_kept(self, candidate: Candidate) -> bool:
        return not candidate.is_eliminated and self._is_feasible(candidate)

    def _is_feasible(self, candidate: Candidate) -> bool:
        return self._setup.violation(candidate.objectives) == 0.0
