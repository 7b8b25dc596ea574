"""The optimizer interface, and helpers that all optimizers here share."""

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
        losses: one per objective, lower is better; all inf if the candidate failed.
        features: one per feature of the search, in order; NaN if unknown.
        items: the per-item losses of each objective, float32 [items], NaN for items that were not scored; empty
            unless the optimizer ``wants_items``.
        feasible: the candidate was scored and, as far as is known, meets the search's constraints.
        complete: the candidate was scored on every item, not estimated from a subset as in a race.
    """

    genome: Genome
    losses: Sequence[float]
    features: Sequence[float] = ()
    items: Sequence[NDArray[np.float32]] = ()
    feasible: bool = True
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Best:
    """The best ``count`` candidates of a generation, by rank."""

    count: int


@dataclass(frozen=True, slots=True)
class Refinement:
    """One refinement step of a coarse-to-fine search: parameters that were tied become independent.

    Attributes:
        told: how many candidates the optimizer had learnt from by then.
        numbers: how many parameters are free from then on.
        finest: how many parameters are free once none are tied.
        places: the places that were split.
    """

    told: int
    numbers: int
    finest: int
    places: tuple[str, ...]


Keeps = Best | Literal["niches", "all"]
"""Candidates that a race must score fully, as the optimizer learns from them: the best, each niche's best, or all."""


class Optimizer(Protocol):
    """Proposes genomes to score and learns from their losses.

    Optimizers are deterministic: two optimizers built with the same arguments and given the same asks and tells return
    the same genomes, bit for bit, in any process and whatever happens to the global random generators. Resuming a
    search relies on this.
    """

    @property
    def population(self) -> int:
        """How many genomes the next generation holds. It may change between generations."""
        ...

    @property
    def keeps(self) -> Keeps:
        """Which candidates the optimizer learns from, in the pending generation or, if none is pending, the next one.

        Racing stops scoring candidates that are surely not among them, so the losses of those are estimates from a few
        items; their order among each other should matter little or not at all.
        """
        ...

    @property
    def wants_items(self) -> bool:
        """Whether observations must include ``items``, which are read from the store for each candidate."""
        ...

    @property
    def favourite(self) -> Genome | None:
        """The optimizer's current best guess; None if it has none, or none that is not also a candidate.

        Under noise, the mean of a distribution is a better estimate than its best sample, which is mostly lucky. Racing
        scores the favourite beside each generation, but does not tell the optimizer the result.
        """
        ...

    @property
    def refined(self) -> Sequence[Refinement]:
        """The refinement steps so far, in order; empty if no parameters are tied."""
        ...

    @property
    def stopped(self) -> str | None:
        """Why no further generation is worth scoring, or None. ``ask`` still answers afterwards."""
        ...

    def ask(self, n: int) -> list[Genome]:
        """Return ``n`` new genomes inside the bounds: float64 [n_parameters], whole numbers for int and choice."""
        ...

    def tell(self, observations: Sequence[Observation]) -> None:
        """Learn from scored genomes.

        Observations may arrive in any order, and a generation may arrive in parts. Genomes inside the bounds that were
        never asked for (baselines, points from elsewhere) are allowed, also before the first ask.
        """
        ...

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        """Repeat a recorded ask when a search is resumed, and return its genomes for the caller to compare.

        This leaves the optimizer in the same state as ``ask(len(genomes))``. If asking is expensive (seconds per
        genome), the recorded genomes are adopted and returned, and there is nothing to compare.
        """
        ...


OPTIMIZER_MEMBERS = tuple(name for name in vars(Optimizer) if not name.startswith("_"))
"""The names of all members that an optimizer must have."""


class Settings(BaseModel):
    """An optimizer's section of the search file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ties: ClassVar[bool] = False
    """Whether the optimizer can tie parameters at first, and so search from coarse to fine."""

    name: str

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        """Reject settings that cannot work with this space, number of objectives and features. Accepts all by default.

        Raises:
            InputError: naming ``place`` (``optimizer``) and a hint.
        """

    def warm(self) -> Self:
        """The settings for a search that tells the optimizer good genomes before its first ask; unchanged by default.

        Only defaults may change, never values that the user gave.
        """
        return self

    def at_gains(self) -> Self:
        """The settings for a search whose sources are yet to be selected; unchanged by default.

        Values that the user gave do not change.
        """
        return self

    def at_shares(self, shares: Mapping[str, float]) -> Self:
        """The settings after selection, given a good starting weight for each selected source; unchanged by default."""
        return self

    def within(self, candidates: int | None, *, tied: bool = False) -> Self:
        """The settings for a budget of ``candidates``, or None if the budget does not count them; unchanged by default.

        This is called once, when a search file is read, and the result is recorded, so that changing the budget later
        does not change the search.

        Args:
            candidates: the budget.
            tied: the search goes from coarse to fine.

        Raises:
            InputError: naming ``optimizer``; the settings depend on such a budget, and there is none.
        """
        return self

    def learns(self, parameters: Sequence[Parameter], candidates: int | None) -> str:
        """For the plan, what can be learnt about the parameters with this many candidates; empty by default."""
        return ""

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Optimizer:
        """Create the optimizer. All of its random numbers are derived from ``seed`` (0 or more).

        ``features`` are those of the search; observations will have a value for each. Most optimizers ignore them.
        """
        raise NotImplementedError


MAX_POPULATION = 100_000
"""A whole generation is held in memory, and a search of a year has fewer candidates than this."""


def check_population(population: int | None, least: int, place: str) -> None:
    """Reject a population smaller than ``least`` or larger than ``MAX_POPULATION``.

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
    """A generator that depends only on this key, for example (search seed, number of the ask).

    It is a RandomState because numpy has frozen its streams; those of Generator may change between releases.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def one_thread() -> AbstractContextManager[Any]:
    """Limit linear algebra (and OpenMP, which torch uses in the gp sampler) to one thread.

    The number of threads changes the order of additions, so a search resumed on a machine with more cores would differ
    in the last bits (seen with 100 parameters and a full covariance matrix). At these sizes one thread is also ten
    times faster.
    """
    context: AbstractContextManager[Any] = _libraries(len(sys.modules)).limit(limits=1)
    return context


@lru_cache(maxsize=1)
def _libraries(modules: int) -> ThreadpoolController:
    """The loaded libraries that use threads; the lookup (1 ms) is repeated once more modules have been imported."""
    return ThreadpoolController()
