"""Which candidates' answers the store keeps, if it keeps only those of the best."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence

from evomerge.search.driving.candidates import Candidate
from evomerge.search.driving.kept import Kept


class BestAnswers:
    """Tracks the best candidates: the baselines, the front, the elites, and the first few by each objective.

    Args:
        best: how many by each objective.
        objectives: how many of these there are.
    """

    def __init__(self, best: int, objectives: int) -> None:
        self._best = best
        self._ranked: list[list[tuple[float, int]]] = [[] for _ in range(objectives)]  # losses, the least first
        self._baselines: set[int] = set()
        self._answered_by: dict[int, int] = {}  # for cached candidates: the one whose scores they took
        self.kept: set[int] = set()

    def take(self, candidates: Sequence[Candidate], kept: Kept) -> list[int]:
        """Add told candidates; returns those whose answers to search items are no longer kept."""
        for c in candidates:
            if c.same_as is not None:
                self._answered_by[c.number] = c.same_as
            if c.step == 0:
                self._baselines.add(c.number)
            for ranked, loss in zip(self._ranked, c.losses or (), strict=False):
                if math.isfinite(loss):
                    insort(ranked, (loss, c.number))
                    del ranked[self._best :]
        before = self.kept | {c.number for c in candidates}
        best = {number for ranked in self._ranked for _, number in ranked}
        wanted = best | self._baselines | kept.front.niches.keys() | kept.elites.niches.keys()
        self._answered_by = {number: other for number, other in self._answered_by.items() if number in wanted}
        self.kept = wanted | set(self._answered_by.values())
        return sorted(before - self.kept)
