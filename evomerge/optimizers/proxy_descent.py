"""Search by gradient descent on the proxy alone; the optimizer itself only asks for averages of the points reached.

Steps on a few items each wander because the items are drawn at random; the average of their last points wanders less
(Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", SIAM Journal on Control and Optimization
30, 1992).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Best, Observation, Refinement, Settings, check_population, random_state
from evomerge.optimizers.cma_es import Box, Vector
from evomerge.optimizers.elites import Feature

ANY = 0.2
"""How often an int or a choice, for which the proxy has no derivative, is drawn again at random."""

AVERAGED = 4
"""How many of the latest points of descents are averaged: two generations of them."""


class ProxyDescentSettings(Settings):
    """Scores the points of the search's ``proxy``, and beside them ``population`` points around their mean.

    The latter vary by ``sigma``, a fraction of each parameter's range; now and then an int or a choice takes any value.
    """

    name: Literal["proxy_descent"]
    population: int = Field(default=1)
    sigma: float = Field(default=0.02, gt=0, le=1 / 3)

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 1, place)

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> ProxyDescent:
        return ProxyDescent(self, parameters, seed)


class ProxyDescent:
    """One search by descent on the proxy.

    Genomes that are told without having been asked for, after the first ask, are taken to be points of descents. Until
    there are any, the best genome told so far, by the sum of its losses, is used in place of their mean.
    """

    keeps = Best(1)
    wants_items = False
    refined: Sequence[Refinement] = ()
    stopped: str | None = None

    def __init__(self, settings: ProxyDescentSettings, parameters: Sequence[Parameter], seed: int) -> None:
        self.population = settings.population
        self._sigma = settings.sigma
        self._box = Box(parameters)
        self._seed = seed
        self._asks = 0
        self._own: set[bytes] = set()
        self._mean = self._box.unit(np.array([p.default for p in parameters], dtype=np.float64))
        self._points: deque[Vector] = deque(maxlen=AVERAGED)
        self._least = np.inf

    @property
    def favourite(self) -> Genome:
        """The mean of the latest points."""
        return self._box.genome(self._mean)

    def ask(self, n: int) -> list[Genome]:
        self._asks += 1
        state, shape = random_state(self._seed, self._asks), (max(n, 0), self._mean.size)
        units = np.clip(self._mean + self._sigma * state.standard_normal(shape), 0.0, 1.0)
        anew = (self._box.values > 0) & (state.random_sample(shape) < ANY)
        genomes = [self._box.genome(unit) for unit in np.where(anew, state.random_sample(shape), units)]
        self._own.update(genome.tobytes() for genome in genomes)
        return genomes

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        return self.ask(len(genomes))

    def tell(self, observations: Sequence[Observation]) -> None:
        for observation in observations:
            loss, unit = float(sum(observation.losses)), self._box.unit(observation.genome)
            if observation.genome.tobytes() not in self._own and self._asks and np.isfinite(loss):
                self._points.append(unit)
            elif not self._points and loss < self._least:
                self._least, self._mean = loss, unit
        if self._points:
            self._mean = np.mean(self._points, axis=0)
