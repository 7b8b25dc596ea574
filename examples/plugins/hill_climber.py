"""An optimizer: steps around the best genome so far.

A (1 + 8) evolution strategy with a fixed step, the simplest optimizer that learns from results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers import Best, Feature, Keeps, Observation
from evomerge.optimizers.base import Settings, random_state
from evomerge.optimizers.cma_es import Box


class HillClimberSettings(Settings):
    """``step`` is the standard deviation of a step, as a fraction of each parameter's range."""

    name: Literal["hill_climber"]
    step: float = Field(default=0.1, gt=0, le=1)

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        if objectives > 1:
            raise InputError(place, f"hill_climber takes one objective, and the search has {objectives}")

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> HillClimber:
        return HillClimber(self.step, Box(parameters), seed)


class HillClimber:
    """One climb. Its first generation is random, unless it was told baselines before."""

    population = 8
    favourite: Genome | None = None
    stopped: str | None = None
    refined = ()  # no numbers are tied
    wants_items = False
    keeps: Keeps = Best(1)

    def __init__(self, step: float, box: Box, seed: int) -> None:
        self._step, self._box, self._seed, self._asks = step, box, seed, 0
        self._best: Observation | None = None

    def ask(self, n: int) -> list[Genome]:
        self._asks += 1
        random = random_state(self._seed, self._asks)
        size = len(self._box.low)
        if self._best is None:
            return [self._box.genome(unit) for unit in random.random_sample((n, size))]
        units = self._box.unit(self._best.genome) + self._step * random.standard_normal((n, size))
        return [self._box.genome(unit) for unit in units.clip(0.0, 1.0)]

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        return self.ask(len(genomes))

    def tell(self, observations: Sequence[Observation]) -> None:
        known = [o for o in (self._best, *observations) if o is not None and o.feasible]
        self._best = min(known, key=lambda o: o.losses[0], default=None)
