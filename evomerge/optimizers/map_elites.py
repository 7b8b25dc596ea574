"""MAP-Elites: keeps the best candidate of every niche, and varies these.

Mouret & Clune, "Illuminating search spaces by mapping elites" (arXiv 1504.04909), with the iso + line variation of
Vassiliades & Mouret, "Discovering the elite hypervolume by leveraging interspecies correlation" (GECCO 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Keeps, Observation, Settings, check_population, random_state
from evomerge.optimizers.cma_es import Box
from evomerge.optimizers.elites import Feature, Grid
from evomerge.optimizers.variation import iso_line


class MapElitesSettings(Settings):
    """What the search file says of MAP-Elites.

    ``iso`` and ``line`` are of the variation (``variation.py``), in units of the parameters' ranges. (The paper's
    ``iso`` of 0.01 is for many thousands of candidates.)
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


class MapElites:
    """One search by MAP-Elites. Its first generation is random; baselines are elites like all others."""

    favourite: Genome | None = None
    stopped: str | None = None
    wants_items = False
    refined = ()  # no numbers are tied
    keeps: Keeps = "niches"

    def __init__(
        self, settings: MapElitesSettings, parameters: Sequence[Parameter], seed: int, features: Sequence[Feature]
    ) -> None:
        self.population = settings.population
        self._settings = settings
        self._box = Box(parameters)
        self._seed = seed
        self._asks = self._asked = self._told = 0
        self._grid = Grid(tuple(features))
        self._units: dict[int, Genome] = {}  # the elites, as points of the unit box, in the order told

    def ask(self, n: int) -> list[Genome]:
        if n < 1:
            return []
        self._asks += 1
        random = random_state(self._seed, self._asks)
        size = self._box.low.size
        self._asked += n
        if self._asked <= self.population or not self._units:
            return [self._box.genome(unit) for unit in random.random_sample((n, size))]
        elites = np.array(list(self._units.values()))
        one, other = elites[random.randint(len(elites), size=(2, n))]
        children = iso_line(random, one, other, self._settings.iso, self._settings.line)
        return [self._box.genome(unit) for unit in children]

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        return self.ask(len(genomes))

    def tell(self, observations: Sequence[Observation]) -> None:
        new = dict(enumerate(observations, self._told))
        self._told += len(new)
        self._grid = self._grid.extend({number: o for number, o in new.items() if o.feasible})
        units = self._units | {number: self._box.unit(o.genome) for number, o in new.items()}
        self._units = {number: units[number] for number in self._grid.niches}
