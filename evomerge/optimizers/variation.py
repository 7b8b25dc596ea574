"""The base of optimizers that keep a population: a random first generation, then children of the kept candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Observation, random_state
from evomerge.optimizers.cma_es import Box

Vector = NDArray[np.float64]


class Population(ABC):
    """An optimizer (``base.Optimizer``) whose candidates are children of candidates that it was told.

    Baselines are kept like all others.

    Args:
        population: the size of a generation.
        seed: determines all random numbers, together with the number of the ask.
    """

    favourite: Genome | None = None
    stopped: str | None = None
    refined = ()  # no parameters are tied

    def __init__(self, population: int, parameters: Sequence[Parameter], seed: int) -> None:
        self.population = population
        self._box = Box(parameters)
        self._seed = seed
        self._asks = self._asked = 0

    def ask(self, n: int) -> list[Genome]:
        """See ``Optimizer``."""
        if n < 1:
            return []
        self._asks += 1
        self._asked += n
        random = random_state(self._seed, self._asks)
        units = None if self._asked <= self.population else self._children(random, n)
        if units is None:
            units = random.random_sample((n, len(self._box.low)))
        return [self._box.genome(unit) for unit in units]

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        """See ``Optimizer``."""
        return self.ask(len(genomes))

    @abstractmethod
    def tell(self, observations: Sequence[Observation]) -> None:
        """See ``Optimizer``."""

    @abstractmethod
    def _children(self, random: RandomState, n: int) -> Vector | None:
        """New points of the unit box, float64 [n, parameters]; None, without drawing, while too few are known."""


def iso_line(random: RandomState, one: Vector, other: Vector, iso: float, line: float) -> Vector:
    """Children of pairs of parents: noise along each parameter, and a step along the line through both.

    one + iso N(0, I) + line N(0, 1) (other - one): Vassiliades & Mouret, "Discovering the elite hypervolume by
    leveraging interspecies correlation" (GECCO 2018, arXiv 1804.03906), equation 1.

    Args:
        one, other: float64 [children, parameters], points of the unit box.

    Returns:
        float64 [children, parameters], clipped to the box.
    """
    noise = iso * random.standard_normal(one.shape)
    steps = line * random.standard_normal((len(one), 1)) * (other - one)
    return np.clip(one + noise + steps, 0.0, 1.0)
