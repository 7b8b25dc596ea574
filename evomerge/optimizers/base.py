"""The contract of an optimizer, and what every optimizer here shares."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.elites import Feature


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """A scored genome.

    Attributes:
        genome: float64 [n_parameters].
        losses: one for each objective, lower is better; all inf where the candidate failed.
        features: one for each feature of the search, in their order; NaN where it is not known.
        items: for each objective the losses item by item, float32 [items], NaN where an item was not scored; empty
            unless the optimizer ``wants_items``.
        feasible: it was scored, and keeps the search's constraints as far as is known.
        complete: it was scored on every item, and not estimated from some, as a race does.
    """

    genome: Genome
    losses: Sequence[float]
    features: Sequence[float] = ()
    items: Sequence[NDArray[np.float32]] = ()
    feasible: bool = True
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Best:
    """Of a generation the best ``count`` by rank."""

    count: int


@dataclass(frozen=True, slots=True)
class Refinement:
    """A step of a search from coarse to fine: numbers that were tied in a place are not any more.

    Attributes:
        told: candidates that were learnt from until then.
        numbers: how many are free from then on.
        finest: how many are when none is tied any more.
        places: that came apart.
    """

    told: int
    numbers: int
    finest: int
    places: tuple[str, ...]


Keeps = Best | Literal["niches", "all"]
"""What a race must not drop, because the optimizer learns from it: some of the best, the best of each niche, or all."""


class Optimizer(Protocol):
    """Gives genomes to score and learns from their losses.

    Deterministic: two optimizers built with the same arguments and given the same asks and tells give the same genomes,
    bit for bit, in any process and whatever the global random generators do meanwhile. That is what resume rests on.
    """

    @property
    def population(self) -> int:
        """How many genomes the next generation holds. It may change between generations."""
        ...

    @property
    def keeps(self) -> Keeps:
        """What is learnt from: of the generation that is out, or else of the next.

        Racing ends the scoring of candidates that surely are not of this, so their own losses are then estimates from
        few items; how they are ordered among each other should matter little or not at all.
        """
        ...

    @property
    def wants_items(self) -> bool:
        """Whether observations are to have ``items``; these are read from the store for each candidate."""
        ...

    @property
    def favourite(self) -> Genome | None:
        """The genome that the optimizer believes in most now; None where it has no such thing, or none of its own.

        Under noise the mean of a distribution is better than the best of its samples, which is mostly lucky. Racing has
        it scored beside each generation. It is not told.
        """
        ...

    @property
    def refined(self) -> Sequence[Refinement]:
        """What came apart so far, in order; nothing where no numbers are tied."""
        ...

    @property
    def stopped(self) -> str | None:
        """Why no further generation is worth scoring, or None. ``ask`` still answers afterwards."""
        ...

    def ask(self, n: int) -> list[Genome]:
        """Give ``n`` new genomes inside the bounds: float64 [n_parameters], whole numbers for int and choice."""
        ...

    def tell(self, observations: Sequence[Observation]) -> None:
        """Take scored genomes.

        The order is free, a generation may come in parts, and genomes inside the bounds that were never asked for
        (baselines, points of another source) are welcome, also before the first ask.
        """
        ...

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        """Make a recorded ask again, for resume, and return what it gives; the caller compares.

        The optimizer is left as ``ask(len(genomes))`` would leave it. Where asking is dear (seconds a genome), the
        recorded genomes are taken as they are, and there is nothing to compare.
        """
        ...


OPTIMIZER_MEMBERS = tuple(name for name in vars(Optimizer) if not name.startswith("_"))
"""What an optimizer must have."""


class Settings(BaseModel):
    """What the search file says of an optimizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ties: ClassVar[bool] = False
    """Whether it ties numbers at first, and so can search from coarse to fine."""

    name: str

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        """Refuse settings that cannot work on this space, number of objectives and features. By default, none.

        Raises:
            InputError: naming ``place`` (``optimizer``) and the hint.
        """

    def warm(self) -> Self:
        """These settings for a search that is told of good genomes before its first ask; by default the same.

        What was said stays as it is: only defaults may be others.
        """
        return self

    def at_gains(self) -> Self:
        """These settings for a search whose sources are yet to be chosen; by default the same.

        What was said stays as it is.
        """
        return self

    def at_shares(self, shares: Mapping[str, float]) -> Self:
        """These settings once they are chosen, and with them how much of each is a good start; by default the same."""
        return self

    def within(self, candidates: int | None, *, tied: bool = False) -> Self:
        """These settings for a budget of so many candidates, or of none that counts them; by default the same.

        ``tied`` says that the search goes from coarse to fine.

        Done once, when a search file is read; what comes of it is recorded, so that another budget later is no other
        search.

        Raises:
            InputError: naming ``optimizer``; they hang on such a budget, and there is none.
        """
        return self

    def learns(self, parameters: Sequence[Parameter], candidates: int | None) -> str:
        """What is learnt of parameters with so many candidates, for a plan; by default nothing is said."""
        return ""

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Optimizer:
        """Make the optimizer; every random number that it will draw follows from ``seed`` (0 or more).

        ``features`` are those of the search, which observations then have. Most optimizers look at none.
        """
        raise NotImplementedError


MAX_POPULATION = 100_000
"""Every generation is in memory at once; a search of a year has fewer candidates."""


def check_population(population: int | None, least: int, place: str) -> None:
    """Refuse a population smaller than ``least``, or larger than ``MAX_POPULATION``.

    Raises:
        InputError: naming ``place.population``.
    """
    if population is not None and population < least:
        raise InputError(f"{place}.population", f"is {population}", f"Give {least} or more, or leave it out.")
    if population is not None and population > MAX_POPULATION:
        raise InputError(f"{place}.population", f"is {population}", f"Give at most {MAX_POPULATION}, or leave it out.")


def default_population(parameters: int) -> int:
    """lambda = 4 + floor(3 ln n): Hansen, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772, eq. (48)."""
    return 4 + math.floor(3 * math.log(max(parameters, 1)))


def random_state(*key: int) -> np.random.RandomState:
    """A generator for this key alone, such as (search seed, number of the ask).

    RandomState, because numpy has frozen its streams for good; those of Generator may change between releases.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def one_thread() -> AbstractContextManager[Any]:
    """Hold linear algebra (and OpenMP, which the gp sampler's torch uses) to one thread.

    Two threads add in another order than one, so a search resumed on a machine with more cores would drift in the last
    bits (seen at 100 parameters with a full covariance matrix). At these sizes one thread is also the quicker, tenfold.
    """
    context: AbstractContextManager[Any] = _libraries(len(sys.modules)).limit(limits=1)
    return context


@lru_cache(maxsize=1)
def _libraries(modules: int) -> ThreadpoolController:
    """The libraries with threads that are loaded, looked up again (1 ms) when modules have been imported since."""
    return ThreadpoolController()
