"""MAP-Elites: keeps the best candidate of every niche, and creates variations of them.

Mouret & Clune, "Illuminating search spaces by mapping elites" (arXiv 1504.04909), with the iso + line variation of
Vassiliades & Mouret, "Discovering the elite hypervolume by leveraging interspecies correlation" (GECCO 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import RandomState
from pydantic import Field

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Keeps, Observation, Settings, check_population
from evomerge.optimizers.elites import Feature, Grid
from evomerge.optimizers.variation import Population, Vector, iso_line


class MapElitesSettings(Settings):
    """The settings of MAP-Elites.

    ``iso`` and ``line`` control the variation (``variation.py``), in units of the parameters' ranges. (The paper's
    ``iso`` of 0.01 is meant for many thousands of candidates.)
    """

    name: Literal["map_elites"]
    population: int = 16
    iso: float = Field(default=0.05, ge=0, le=1)
    line: float = Field(default=0.2, ge=0, le=10)

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 2, place)
        if not features:
            problem = "map_elites keeps the best candidate of every niche, and the search has no features"
            raise InputError(place, problem, "Add `features`, or use another optimizer.")

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> MapElites:
        return MapElites(self, parameters, seed, features)


class MapElites(Population):
    """One search by MAP-Elites."""

    wants_items = False
    keeps: Keeps = "niches"

    def __init__(
        self, settings: MapElitesSettings, parameters: Sequence[Parameter], seed: int, features: Sequence[Feature]
    ) -> None:
        super().__init__(settings.population, parameters, seed)
        self._settings = settings
        self._told = 0
        self._grid = Grid(tuple(features))
        self._units: dict[int, Genome] = {}  # the elites, as points of the unit box, in the order told

    def _children(self, random: RandomState, n: int) -> Vector | None:
        if not self._units:
            return None
        elites = np.array(list(self._units.values()))
        one, other = elites[random.randint(len(elites), size=(2, n))]
        return iso_line(random, one, other, self._settings.iso, self._settings.line)

    def tell(self, observations: Sequence[Observation]) -> None:
        new = dict(enumerate(observations, self._told))
        self._told += len(new)
        # An estimate from a subset of items is often lucky; a candidate that leads its niche by one is scored on all.
        self._grid = self._grid.extend({number: o for number, o in new.items() if o.feasible and o.complete})
        units = self._units | {number: self._box.unit(o.genome) for number, o in new.items()}
        self._units = {number: units[number] for number in self._grid.niches}
