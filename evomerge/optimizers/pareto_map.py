"""MAP: a quadratic model of each objective predicts the Pareto front, and points of that front are scored.

Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (ICLR 2025, arXiv
2406.07529): the metric of each task is assumed to be quadratic in the weights of the sources, the coefficients are
fitted to random merges, and the Pareto front is that of the quadratics, found without scoring anything. Here the
quadratics are fitted again at every ask to all candidates told so far, and are used only while their cross-validated
predictions are good. Otherwise, children of the candidates on the known front are scored instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import RandomState
from pydantic import Field

from evomerge.errors import InputError
from evomerge.front import nondominated
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Keeps, Observation, Settings, check_population, one_thread
from evomerge.optimizers.elites import Feature
from evomerge.optimizers.quadratic import Quadratic, Vector, terms
from evomerge.optimizers.variation import Population, iso_line

MAX_PARAMETERS = 10
"""A quadratic of ten parameters has 66 coefficients, each of which needs more than one candidate."""

SPARE = 1.5
"""Candidates per coefficient before the first fit: with fewer, leave-one-out errors mean little."""

_SAMPLED = 4096
"""Number of points of the box sampled to find the front of the quadratics, and then again near that front."""

_ISO, _LINE = 0.05, 0.2


class MapSettings(Settings):
    """The settings of MAP.

    ``least_explained`` is the share of the variance that the quadratic of every objective must explain to be used, each
    candidate being predicted by the quadratic fitted to the others.
    """

    name: Literal["map"]
    population: int = 16
    least_explained: float = Field(default=0.3, ge=0, le=1)

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 2, place)
        if len(parameters) > MAX_PARAMETERS:
            problem = f"map takes at most {MAX_PARAMETERS} parameters, and the search space has {len(parameters):,}"
            hint = "Take fewer sources and `granularity: model`, or use nsga2 or gp."
            raise InputError(place, problem, hint)

    def learns(self, parameters: Sequence[Parameter], candidates: int | None) -> str:
        n = len(parameters)
        return f"a quadratic of each objective, of {terms(n)} coefficients, from {first_fit(n)} candidates on"

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Map:
        return Map(self, parameters, seed)


def first_fit(parameters: int) -> int:
    """How many candidates must be known before quadratics of this many parameters are first fitted."""
    return math.ceil(SPARE * terms(parameters))


class Map(Population):
    """One search by MAP."""

    wants_items = False
    keeps: Keeps = "all"  # the fit uses every loss

    def __init__(self, settings: MapSettings, parameters: Sequence[Parameter], seed: int) -> None:
        super().__init__(settings.population, parameters, seed)
        self._settings = settings
        self._first_fit = first_fit(len(parameters))
        self._known: list[Observation] = []  # feasible ones only; the losses of others are made up
        self._tried: dict[bytes, Vector] = {}  # asked for or told, as points of the unit box

    def ask(self, n: int) -> list[Genome]:
        genomes = super().ask(n)
        self._try(genomes)
        return genomes

    def tell(self, observations: Sequence[Observation]) -> None:
        self._try([o.genome for o in observations])
        self._known += [o for o in observations if o.feasible and all(map(math.isfinite, o.losses))]

    def _try(self, genomes: Sequence[Genome]) -> None:
        self._tried |= {genome.tobytes(): self._box.unit(genome) for genome in genomes}

    def _children(self, random: RandomState, n: int) -> Vector | None:
        if len(self._known) < self._first_fit:
            return None
        units = np.array([self._box.unit(o.genome) for o in self._known])
        losses = np.array([o.losses for o in self._known], dtype=np.float64)
        best = units[nondominated(losses)]
        with one_thread():
            model = Quadratic.fit(units, losses)
            if model.explained.min() < self._settings.least_explained:
                return self._varied(random, best, n)
            sampled = random.random_sample((_SAMPLED, units.shape[1]))
            front = sampled[nondominated(model.values(sampled))]
            sampled = np.concatenate([sampled, self._varied(random, front, _SAMPLED)])
            tried = model.values(np.array(list(self._tried.values())))
            return sampled[spread_over_fronts(model.values(sampled), tried, n)]

    def _varied(self, random: RandomState, best: Vector, n: int) -> Vector:
        one, other = best[random.randint(len(best), size=(2, n))]
        return iso_line(random, one, other, _ISO, _LINE)


def spread_over_fronts(losses: Vector, tried: Vector, n: int) -> list[int]:
    """Choose ``n`` points of the front, each as far as possible from those tried or chosen; then of the next front.

    Args:
        losses: float64 [points, objectives].
        tried: float64 [candidates, objectives], of points that need not be scored again.
    """
    chosen: list[int] = []
    left = np.arange(len(losses))
    while len(chosen) < n:
        on_front = nondominated(losses[left])
        front, left = left[on_front], left[~on_front]
        low, high = losses[front].min(axis=0), losses[front].max(axis=0)
        width = np.where(high > low, high - low, 1.0)
        distances = np.full(len(front), math.inf)
        for point in [*tried, *losses[chosen]]:
            distances = np.minimum(distances, np.linalg.norm((losses[front] - point) / width, axis=1))
        for _ in range(min(n - len(chosen), len(front))):
            at = int(distances.argmax())
            chosen.append(int(front[at]))
            distances = np.minimum(distances, np.linalg.norm((losses[front] - losses[front[at]]) / width, axis=1))
            distances[at] = -math.inf
    return chosen
