"""CycleQD: one archive per task, in which that task is the quality and the others define niches, used in turn.

Kuroki, Nakamura, Akiba & Tang, "Agent Skill Acquisition for Large Language Models via CycleQD" (ICLR 2025, arXiv
2410.14735). In the archive of task q a niche is a bin of the scores of all other tasks, and holds the best candidate in
q (section 3.1). Generations cycle through the archives. Parents are drawn by how good they are in all tasks (section
3.3); a child is the weighted mean of two parents, with weights near 1, which may extrapolate beyond them (section
3.2.1). The paper's mutation scales singular values of a child's change and has no counterpart in a genome; instead,
children get noise along each parameter.

Bins span 85% of the weakest to 115% of the best of the candidates known before the first generation, which in a search
are the sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Keeps, Observation, Settings, check_population
from evomerge.optimizers.elites import Feature, Niche
from evomerge.optimizers.variation import Population

Vector = NDArray[np.float64]

_BEYOND = 0.15
"""How far the bins extend beyond the sources' losses, as a fraction of these."""

_MIN, _MAX = 0.5, 0.8
"""The range that scores are scaled to before parents are drawn by their product."""


class CycleQdSettings(Settings):
    """The settings of CycleQD.

    ``bins`` is the number of bins per task, ``spread`` the standard deviation of the weights of the two parents, and
    ``iso`` that of the noise, in units of the parameters' ranges.
    """

    name: Literal["cycle_qd"]
    population: int = 16
    bins: int = Field(default=15, ge=2, le=1000)
    spread: float = Field(default=0.3, ge=0, le=10)
    iso: float = Field(default=0.03, ge=0, le=1)

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 2, place)
        if objectives < 2:
            problem = "cycle_qd takes tasks in turn, and the search has one objective"
            raise InputError(place, problem, "Give more objectives, or take map_elites or dns.")

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> CycleQd:
        return CycleQd(self, parameters, objectives, seed)


class CycleQd(Population):
    """One search by CycleQD."""

    wants_items = False
    keeps: Keeps = "all"

    def __init__(self, settings: CycleQdSettings, parameters: Sequence[Parameter], objectives: int, seed: int) -> None:
        super().__init__(settings.population, parameters, seed)
        self._settings = settings
        self._objectives = objectives
        self._first: list[Observation] = []  # candidates told before the bins are known
        self._axes: tuple[Feature, ...] = ()
        self._archives: list[dict[Niche, Observation]] = [{} for _ in range(objectives)]

    def ask(self, n: int) -> list[Genome]:
        if n > 0 and not self._axes:
            self._lay_out()
        return super().ask(n)

    def _children(self, random: RandomState, n: int) -> Vector | None:
        archive = self._archives[(self._asks - 1) % self._objectives]
        elites = [archive[niche] for niche in sorted(archive)]
        if not elites:
            return None
        units = np.array([self._box.unit(o.genome) for o in elites])
        chances = _chances(np.array([o.losses for o in elites]))
        one, other = (random.choice(len(elites), size=n, p=chances) for _ in range(2))
        weights = np.abs(1.0 + self._settings.spread * random.standard_normal((2, n, 1))) + 1e-9
        children = (weights[0] * units[one] + weights[1] * units[other]) / weights.sum(axis=0)
        children += self._settings.iso * random.standard_normal(children.shape)
        return np.asarray(np.clip(children, 0.0, 1.0))

    def tell(self, observations: Sequence[Observation]) -> None:
        known = [o for o in observations if o.feasible and all(map(math.isfinite, o.losses))]
        if not self._axes:
            self._first += known
            return
        for observation in known:
            self._place(observation)

    def _lay_out(self) -> None:
        """Divide the losses of each task into bins by the candidates known so far, if there are at least two."""
        if len(self._first) < 2:
            return
        losses = np.array([o.losses for o in self._first])
        low, high = losses.min(axis=0), losses.max(axis=0)
        low, high = low - _BEYOND * np.abs(low), high + _BEYOND * np.abs(high)
        wide = np.where(high > low, high, low + 1.0)
        ends = zip(low.tolist(), wide.tolist(), strict=True)
        self._axes = tuple(Feature(f"task {number}", *end, self._settings.bins) for number, end in enumerate(ends))
        for observation in self._first:
            self._place(observation)
        self._first = []

    def _place(self, observation: Observation) -> None:
        """Put a candidate into every archive in whose niche it is the best; on ties the earlier candidate stays."""
        bins = [axis.bin(loss) for axis, loss in zip(self._axes, observation.losses, strict=True)]
        for task, archive in enumerate(self._archives):
            niche = tuple(bin_ for number, bin_ in enumerate(bins) if number != task)
            if niche not in archive or observation.losses[task] < archive[niche].losses[task]:
                archive[niche] = observation


def _chances(losses: Vector) -> Vector:
    """The probability of each elite to be a parent: the product of its scaled scores in all tasks: float64 [elites]."""
    low, high = losses.min(axis=0), losses.max(axis=0)
    good = (high - losses) / np.where(high > low, high - low, 1.0)
    weights = np.prod(_MIN + (_MAX - _MIN) * good, axis=1)
    return np.asarray(weights / weights.sum())
