"""M2N2: competition for items, mates that solve what a parent does not, and a split point between two parents.

Abrantes, Lange & Tang, "Competition and Attraction Improve Model Fusion" (GECCO 2025, arXiv 2508.16204). The credit for
an item is shared among all who solve it (section 3.2: f_i = sum_j s_ij / z_j, where z_j is the sum of s_ij over i), so
candidates that solve rarely solved items stay. A mate is drawn by what it would add (section 3.3: the sum over items of
max(s_Bj - s_Aj, 0) / z_j). A child takes one parent's numbers before a random point of the genome and the other's after
it, both mixed by a random ratio (section 3.1; the paper does this to all weights of two models, here it is done to
their genomes, whose numbers go from the first layer to the last). With ``cross_fit`` half of the items decide which
candidates stay and the other half which mates suit them (``solved.py``). Without it, all items decide both, which keeps
fewer lucky candidates (docs/diversity.md).

Merging merges can never leave the span of their parents, and a search begins with few, so children also get noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field

from evomerge.genome import Parameter
from evomerge.optimizers.base import Keeps, Observation, Settings, check_population
from evomerge.optimizers.elites import Feature
from evomerge.optimizers.solved import halves, losses_of, solved
from evomerge.optimizers.variation import Population

Vector = NDArray[np.float64]

_EPSILON = 1e-9


class M2n2Settings(Settings):
    """The settings of M2N2.

    ``capacity`` is the number of candidates that stay, and ``iso`` the standard deviation of the noise, in units of the
    parameters' ranges.
    """

    name: Literal["m2n2"]
    population: int = 16
    capacity: int = Field(default=16, ge=2, le=10_000)
    iso: float = Field(default=0.03, ge=0, le=1)
    cross_fit: bool = False

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 2, place)

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> M2n2:
        return M2n2(self, parameters, seed)


class M2n2(Population):
    """One search by M2N2."""

    wants_items = True
    keeps: Keeps = "all"

    def __init__(self, settings: M2n2Settings, parameters: Sequence[Parameter], seed: int) -> None:
        super().__init__(settings.population, parameters, seed)
        self._settings = settings
        self._members: list[Observation] = []  # in the order told

    def _children(self, random: RandomState, n: int) -> Vector | None:
        if len(self._members) < 2:
            return None
        table = solved([losses_of(o) for o in self._members])
        judged, described = halves(table.shape[1], cross_fit=self._settings.cross_fit)
        credit = shared_credit(table[:, judged])
        units = np.array([self._box.unit(o.genome) for o in self._members])
        children = []
        for _ in range(n):
            one = _drawn(random, credit)
            other = _drawn(random, attraction(table[:, described], one))
            children.append(self._child(random, units[one], units[other]))
        return np.array(children)

    def _child(self, random: RandomState, one: Vector, other: Vector) -> Vector:
        ratio, split = random.random_sample(), random.randint(len(one) + 1)
        shares = np.where(np.arange(len(one)) < split, ratio, 1.0 - ratio)
        noise = self._settings.iso * random.standard_normal(len(one))
        return np.clip(shares * one + (1.0 - shares) * other + noise, 0.0, 1.0)

    def tell(self, observations: Sequence[Observation]) -> None:
        self._members += [o for o in observations if o.feasible and all(map(math.isfinite, o.losses))]
        if len(self._members) <= self._settings.capacity:
            return
        table = solved([losses_of(o) for o in self._members])
        judged, _ = halves(table.shape[1], cross_fit=self._settings.cross_fit)
        kept = survivors(table[:, judged], self._settings.capacity)
        self._members = [self._members[number] for number in kept]


def shared_credit(table: Vector) -> Vector:
    """Each member's credit for the items that it solves, shared with all who solve them: float64 [members]."""
    return np.asarray((table / (table.sum(axis=0) + _EPSILON)).sum(axis=1))


def attraction(table: Vector, one: int) -> Vector:
    """What each member would add to member ``one``: float64 [members]."""
    shares = table / (table.sum(axis=0) + _EPSILON)
    return np.asarray(np.maximum(shares - shares[one], 0.0).sum(axis=1))


def survivors(table: Vector, count: int) -> list[int]:
    """The ``count`` members that stay. One at a time, the one with the least credit goes and the rest share its credit.

    On ties the latest is removed.
    """
    kept = list(range(len(table)))
    while len(kept) > count:
        credit = shared_credit(table[kept])
        least = np.flatnonzero(credit <= credit.min() + _EPSILON)
        kept.pop(int(least[-1]))
    return kept


def _drawn(random: RandomState, weights: Vector) -> int:
    """Draw an index in proportion to the weights; uniformly if all are zero."""
    total = weights.sum()
    return int(random.choice(len(weights), p=weights / total if total > 0 else None))
