"""Scoring a generation as a whole: rung by rung, leaving out candidates that cannot matter.

Decisions depend on scores alone, never on the order in which they arrive, and a decision at a rung reads no score
beyond it. So an interrupted search makes all decisions of the generation again from the record, with the same
results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.front import nondominated
from evomerge.optimizers import Best, Grid, Keeps
from evomerge.optimizers.elites import cells_of
from evomerge.search.driving.candidates import Candidate, Proposals
from evomerge.search.driving.scoring import CandidateScoring
from evomerge.search.estimation.screening import Screener


class GenerationScoring(CandidateScoring):
    """Scores one generation after another."""

    baselines_first = True

    def run(self, proposals: Proposals) -> bool:
        """Score generation after generation until the budget is spent; False if a stop came first."""
        optimizer = proposals.optimizer
        while True:
            if generation := proposals.waiting:
                if not self.score(generation, proposals.rivals, optimizer.keeps):
                    return False
                proposals.tell(generation)
            if proposals.is_spent:
                return True
            if not proposals.prepare():
                return False
            proposals.ask(optimizer.population)

    def score(self, generation: list[Candidate], rivals: Grid, keeps: Keeps) -> bool:
        """Score a generation as far as needed to rank it; False if a stop came first.

        Args:
            rivals: the front before this generation, or the elites of each niche if the optimizer keeps those.
            keeps: which candidates of the generation the optimizer learns from.
        """
        self.begin(generation)
        if self.screening is not None and not self._screen(self.screening, generation):
            return False
        ordinary = self._setup.ordinary_rungs
        for rung, counts in enumerate(self._rungs[:ordinary]):
            racing = [c for c in generation if not c.out]
            if not self._score_all([(c, counts) for c in racing]):
                return False
            self._reach(racing, rung)
            if rung < len(self._rungs) - 1:
                self._decide(generation, rung, rivals, keeps)
        return ordinary == len(self._rungs) or self._challenge(generation, rivals)

    def _decide(self, generation: Sequence[Candidate], rung: int, rivals: Grid, keeps: Keeps) -> None:
        if keeps == "niches":
            self._judge_niches(generation, rung, rivals)
        elif isinstance(keeps, Best) and keeps.count < len(generation):
            self._judge(generation, rung, keeps.count)

    def _reach(self, candidates: Sequence[Candidate], rung: int) -> None:
        for c in candidates:
            if self._covers(c, rung):
                c.reached = rung
            else:
                c.out = "failed"

    def _screen(self, screening: Screener, generation: list[Candidate]) -> bool:
        """Score a generation by the screen; those that it ranks too low leave the race. False if a stop came first."""
        screen = screening.info
        if not self._score_all([(c, {screen.evaluator: screen.items}) for c in generation]):
            return False
        values = {c.number: float(c.table.values(screen).mean(dtype=np.float64)) for c in generation}
        dropped = screening.poorest({number: mean for number, mean in values.items() if not math.isnan(mean)})
        for c in generation:
            if c.number in dropped:
                c.out = "screened"
        return True

    def _challenge(self, generation: Sequence[Candidate], rivals: Grid) -> bool:
        """Score the best of a generation on more items as long as it looks better than its rivals.

        The best of many estimates is too high, and only a candidate that was scored on every item may take a rival's
        place (Hutter, Hoos & Leyton-Brown, SMAC, LION 2011, procedure Intensify).
        """
        last = len(self._rungs) - 1
        open_ = [c for c in generation if c.out in ("", "settled") and 0 <= c.reached < last]
        challengers = [c for c in self._best(open_, rivals) if self._leads(c, rivals)]
        while challengers:
            if not self._score_all([(c, self._rungs[c.reached + 1]) for c in challengers]):
                return False
            challengers = [c for c in challengers if self._covers(c, c.reached + 1)]
            for c in challengers:
                c.reached += 1
            challengers = [c for c in challengers if c.reached < last and self._leads(c, rivals)]
        return True

    def _best(self, candidates: Sequence[Candidate], rivals: Grid) -> list[Candidate]:
        """The front of candidates by current estimates; those that may be in several niches are compared with none."""
        losses = np.array([self._losses(c) for c in candidates]).reshape(-1, len(self._setup.objectives))
        boxes = [rivals.box(self._bounds(c, rivals)) for c in candidates]
        niches = [next(cells_of(box)) if all(len(bins) == 1 for bins in box) else None for box in boxes]
        best = np.isfinite(losses).all(axis=1) & np.array([niche is None for niche in niches], dtype=np.bool_)
        for niche in set(niches) - {None}:
            there = np.flatnonzero([other == niche for other in niches])
            best[there] = nondominated(losses[there])
        return [candidates[i] for i in np.flatnonzero(best).tolist()]
