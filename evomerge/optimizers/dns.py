"""Dominated novelty search: keeps the candidates that are most different from all better ones.

Bahlous-Boldi, Faldor, Grillotti, Janmohamed, Coiffard, Spector & Cully, "Dominated Novelty Search: Rethinking Local
Competition in Quality-Diversity" (arXiv 2502.00593), algorithm 1: the population and its children are ranked by the
mean distance to the k nearest fitter candidates, and the highest-ranked stay. There is no grid and no range to choose.

A candidate's behaviour is described by the features of the search or, if there are none, by the items that it solves,
as in AC/DC (arXiv 2604.14969): the distance to a fitter candidate is the share of items that the candidate solves and
the fitter one does not, each item weighted by how many others fail it. When items are used, half of them determine
fitness and the other half novelty, unless ``cross_fit`` is off (``solved.py``).
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
from evomerge.optimizers.variation import Population, iso_line

Vector = NDArray[np.float64]


class DnsSettings(Settings):
    """The settings of dominated novelty search.

    ``capacity`` is the number of candidates that stay, and ``neighbours`` the k of the mean distance. ``iso`` and
    ``line`` control the variation (``variation.py``), in units of the parameters' ranges.
    """

    name: Literal["dns"]
    population: int = 16
    capacity: int = Field(default=32, ge=2, le=10_000)
    neighbours: int = Field(default=3, ge=1, le=1000)
    iso: float = Field(default=0.05, ge=0, le=1)
    line: float = Field(default=0.2, ge=0, le=10)
    cross_fit: bool = True

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 2, place)

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Dns:
        return Dns(self, parameters, seed, features)


class Dns(Population):
    """One dominated novelty search."""

    keeps: Keeps = "all"

    def __init__(
        self, settings: DnsSettings, parameters: Sequence[Parameter], seed: int, features: Sequence[Feature]
    ) -> None:
        super().__init__(settings.population, parameters, seed)
        self.wants_items = not features
        self._settings = settings
        self._low = np.array([feature.low for feature in features])
        self._width = np.array([feature.high - feature.low for feature in features])
        self._members: list[Observation] = []  # in the order told
        self._units = np.empty((0, len(parameters)))

    def _children(self, random: RandomState, n: int) -> Vector | None:
        if not self._members:
            return None
        one, other = self._units[random.randint(len(self._units), size=(2, n))]
        return iso_line(random, one, other, self._settings.iso, self._settings.line)

    def tell(self, observations: Sequence[Observation]) -> None:
        members = self._members + [o for o in observations if o.feasible and self._is_known(o)]
        if len(members) == len(self._members):
            return
        if len(members) > self._settings.capacity:
            novelty = self._novelty(members)
            order = np.argsort(-novelty, kind="stable")[: self._settings.capacity]  # on ties the earlier stays
            members = [members[number] for number in sorted(order.tolist())]
        self._members = members
        self._units = np.array([self._box.unit(o.genome) for o in members])

    def _is_known(self, observation: Observation) -> bool:
        """Whether a candidate's features or items are known, so that it can be compared with others."""
        has_losses = all(map(math.isfinite, observation.losses))
        return has_losses and (self.wants_items or all(map(math.isfinite, observation.features)))

    def _novelty(self, members: Sequence[Observation]) -> Vector:
        """How different each member is from the fitter ones: float64 [members]."""
        if self.wants_items:
            table = solved([losses_of(o) for o in members])
            judged, described = halves(table.shape[1], cross_fit=self._settings.cross_fit)
            return dominated_novelty(
                -table[:, judged].mean(axis=1), skill_distances(table[:, described]), self._settings.neighbours
            )
        places = (np.array([o.features for o in members]) - self._low) / self._width
        distances = np.linalg.norm(places[:, None] - places, axis=2)
        losses = np.array([sum(o.losses) for o in members])
        return dominated_novelty(losses, distances, self._settings.neighbours)


def dominated_novelty(losses: Vector, distances: Vector, neighbours: int) -> Vector:
    """The mean distance to the ``neighbours`` nearest fitter members; inf for the fittest: float64 [members].

    If two members have equal losses, the first counts as the fitter one, so that duplicates are not both the fittest.

    Args:
        losses: float64 [members], lower is fitter.
        distances: float64 [members, members], from each to each.
    """
    novelty = np.full(len(losses), np.inf)
    order = np.argsort(losses, kind="stable")
    for rank, member in enumerate(order.tolist()):
        if rank:
            nearest = np.sort(distances[member, order[:rank]])[:neighbours]
            novelty[member] = nearest.mean()
    return novelty


def skill_distances(table: Vector) -> Vector:
    """The directed distance between members: the share of items that one solves and the other does not, by difficulty.

    Args:
        table: float64 [members, items], how far each member solves each item.

    Returns:
        float64 [members, members]; not symmetric. An item is weighted by the number of members that fail it.
    """
    difficulty = 1.0 - table.mean(axis=0)
    difficulty[table.max(axis=0, initial=0.0) == 0] = 0.0  # an item that nobody solves distinguishes nobody
    weights = difficulty / (difficulty.sum() or 1.0)
    return np.array([np.maximum(row - table, 0.0) @ weights for row in table])
