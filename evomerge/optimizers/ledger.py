"""What an optimizer that learns by generations keeps of the genomes that it gave and of the losses that it was told."""

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
"""The number of a genome that was never asked for."""


@dataclass(frozen=True, slots=True)
class ScoredGenome(Generic[Point]):
    """A scored genome: its number in the order of asking, the algorithm's own point, and its losses [objectives]."""

    number: int
    point: Point
    losses: NDArray[np.float64]


class Ledger(Generic[Point]):
    """Matches results with the points that were asked for; what was not asked for, or not any more, is foreign.

    Args:
        scalars: sees every loss.
        point: makes the algorithm's point of a foreign genome.
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
        """What was asked for and told since ``close``, by number: the order in which workers finish plays no part."""
        return sorted(self._results, key=lambda result: result.number)

    def give(self, genome: Genome, point: Point) -> int:
        """Note that a genome is asked for; its number."""
        self._out[genome.tobytes()].append((self._given, point))
        self._given += 1
        return self._given - 1

    def receive(self, observations: Sequence[Observation]) -> int:
        """Enter observations; how many of ``results`` there are now. Foreign genomes that failed teach nothing.

        Raises:
            ValueError: a foreign genome is not of the search space, or there are not as many losses as objectives.
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
        """End a generation: what was told has been learnt from."""
        self._results.clear()
        self.foreign.clear()

    def forget(self) -> None:
        """What is still out belongs to a distribution that is no more; told later, it is foreign."""
        self._out.clear()
