"""Bookkeeping for optimizers that learn by generations: the genomes they gave out and the losses they were told."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Genome
from evomerge.optimizers.base import Observation
from evomerge.optimizers.scalarisation import Scalars

Point = TypeVar("Point")

FOREIGN = -1
"""The number of a genome that nobody asked for."""


@dataclass(frozen=True, slots=True)
class ScoredGenome(Generic[Point]):
    """A scored genome: its number in the order of asking, the algorithm's own point, and its losses [objectives]."""

    number: int
    point: Point
    losses: NDArray[np.float64]


class Ledger(Generic[Point]):
    """Matches results with the points that were asked for; all other results, and outdated ones, are foreign.

    Args:
        scalars: sees every loss.
        point: converts a foreign genome to the algorithm's point.
    """

    def __init__(self, scalars: Scalars, point: Callable[[Genome], Point]) -> None:
        self._scalars = scalars
        self._point = point
        self._given = 0
        self._out: defaultdict[bytes, deque[tuple[int, Point]]] = defaultdict(deque)
        self._results: list[ScoredGenome[Point]] = []
        self.foreign: list[ScoredGenome[Point]] = []

    @property
    def results(self) -> list[ScoredGenome[Point]]:
        """Results told since ``close`` for points that were asked for, by number, not by the order of completion."""
        return sorted(self._results, key=lambda result: result.number)

    def give(self, genome: Genome, point: Point) -> int:
        """Record that a genome is asked for, and return its number."""
        self._out[genome.tobytes()].append((self._given, point))
        self._given += 1
        return self._given - 1

    def receive(self, observations: Sequence[Observation]) -> int:
        """Record observations and return how many ``results`` there are now. Foreign genomes that failed are ignored.

        Raises:
            ValueError: a foreign genome is outside the search space, or the number of losses is wrong.
        """
        for observation in observations:
            genome, losses = observation.genome, self._scalars.see(observation.losses)
            waiting = self._out.get(genome.tobytes())
            if waiting:
                self._results.append(ScoredGenome(*waiting.popleft(), losses))
                if not waiting:
                    del self._out[genome.tobytes()]
            elif np.isfinite(losses[0]):
                self.foreign.append(ScoredGenome(FOREIGN, self._point(genome), losses))
        return len(self._results)

    def close(self) -> None:
        """End a generation: its results have been learnt from."""
        self._results.clear()
        self.foreign.clear()

    def forget(self) -> None:
        """Treat all pending genomes as foreign when they are told, since the distribution they came from is gone."""
        self._out.clear()
