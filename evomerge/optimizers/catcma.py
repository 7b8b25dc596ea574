"""CatCMA with Margin for mixed real, int and choice parameters, from the library ``cmaes`` through ask and tell.

Reals and ints are sampled from one Gaussian, and each choice from a categorical distribution. Every int and choice
keeps mutating at a low rate, the margin, after everything else has converged. Hamano et al., CatCMA with Margin for
Single- and Multi-Objective Mixed-Variable Black-Box Optimization, arXiv:2504.07884.

As in ``cma_es``, the library is given the *ranks* of a generation, never its losses: its penalty for reals outside the
box is scaled by the spread of the losses, which is undefined if one of them is infinite.

This file uses private attributes: ``_v_raw`` of the library's solutions, and ``_z_lim``, ``_mean``, ``_sigma``, ``_A``,
``_C``, ``_Delta``, ``_mu``, ``_param_sum`` and ``_eigen_decomposition`` of its optimizer. The project therefore pins
the library to one minor release.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import (
    Best,
    Observation,
    Refinement,
    Settings,
    check_population,
    default_population,
    one_thread,
)
from evomerge.optimizers.cma_es import SMALLEST_STEP, Box, warm_defaults
from evomerge.optimizers.elites import Feature
from evomerge.optimizers.ledger import Ledger
from evomerge.optimizers.scalarisation import Scalarisation, Scalars, check_scalarisation

MAX_GAUSSIAN = 1_000
"""Reals plus ints. Their covariance matrix is always full; with 1,000, a generation of 24 takes three seconds."""

Vector = NDArray[np.float64]


class CatCmaSettings(Settings):
    """CatCMA with Margin (Hamano et al., arXiv:2504.07884).

    ``population`` defaults to 4 + floor(3 ln n). The search starts at each parameter's ``default``, or at the ``best``
    genome told before the first ask. Reals and ints start with a step size of ``sigma``, a fraction of each range. A
    choice, or an int with two values, starts with ``default_probability`` on the starting value, and the other values
    share the rest. Akiba et al. (arXiv:2403.13187) start the layers of a path two steps above zero, which corresponds
    to a probability of 0.977; 0.5 gives each of two values the same chance.
    """

    name: Literal["catcma"]
    population: int | None = None
    sigma: float = Field(default=1 / 6, gt=0, le=1 / 3)
    x0: Literal["default", "best"] = "default"
    default_probability: float = Field(default=0.9, ge=0.5, lt=1)
    scalarisation: Scalarisation | None = None

    def warm(self) -> Self:
        return self.model_copy(update=warm_defaults(self))

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 4, place)
        gaussian = sum(p.kind != "choice" for p in parameters)
        if gaussian > MAX_GAUSSIAN:
            raise InputError(
                place,
                f"catcma takes at most {MAX_GAUSSIAN:,} reals and ints, and the search space has {gaussian:,}",
                "Use cma (or nsga2 for several objectives), or a coarser search space.",
            )
        check_scalarisation(self.scalarisation, objectives, self.name, place)

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> CatCma:
        return CatCma(self, parameters, objectives, seed)


class CatCma:
    """One search by CatCMA with Margin.

    A generation is ``population`` genomes, from one ask or several, all sampled from the current distribution. All
    other genomes that are told are foreign: baselines, genomes asked for beyond a generation, and late results of the
    previous generation. The best foreign genome replaces the worst of the generation, but only if it would be a parent,
    that is, if it is better than the worst of the better half. This is as if one sample had landed there. Its reals and
    ints are first moved towards the mean, to the length of a typical sample (Hansen, Injecting External Solutions Into
    CMA-ES, arXiv:1110.4181), so it cannot blow up the step size; the step of the choices has a fixed length whatever
    the parents are. A bad foreign genome changes nothing.
    """

    favourite: Genome | None = None
    wants_items = False
    refined: Sequence[Refinement] = ()
    stopped: str | None = None

    def __init__(self, settings: CatCmaSettings, parameters: Sequence[Parameter], objectives: int, seed: int) -> None:
        self._settings = settings
        self._box = Box(parameters)
        self._seed = seed
        self._asks = 0
        self._scalars = Scalars(settings.scalarisation, objectives)
        # A point is a solution of the library: the raw Gaussian sample, and the choices one-hot.
        self._ledger: Ledger[Any] = Ledger(self._scalars, lambda genome: self._solution(self._box.unit(genome)))
        self.population = settings.population or default_population(len(parameters))
        self._divide([p.kind for p in parameters])
        self._start(self._box.unit(np.array([p.default for p in parameters], dtype=np.float64)))

    @property
    def keeps(self) -> Best:
        """The better half, which has positive weights; of the rest only the order matters."""
        return Best(int(self._es._mu))

    def ask(self, n: int) -> list[Genome]:
        if n < 1:
            return []
        self._begin_at_best()
        self._asks += 1
        with _quiet():
            self._es.reseed_rng(int(np.random.SeedSequence((self._seed, self._asks)).generate_state(1)[0]))
            solutions = [self._es.ask() for _ in range(n)]
        genomes = [self._genome(solution) for solution in solutions]
        for genome, solution in zip(genomes, solutions, strict=True):
            self._ledger.give(genome, solution)
        return genomes

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        return self.ask(len(genomes))

    def tell(self, observations: Sequence[Observation]) -> None:
        if self._ledger.receive(observations) >= self.population:
            self._learn()

    def _divide(self, kinds: Sequence[str]) -> None:
        """Decide how each parameter is sampled; parameters with a single value are not sampled at all."""
        values, varies = self._box.values, self._box.high > self._box.low
        chosen = varies & ((np.array(kinds) == "choice") | (values == 2))  # as the library recommends for two values
        real = varies & (values == 0)
        if not varies.any():
            real[0] = True  # the library needs something to search
        self._choices = np.flatnonzero(chosen)
        self._reals = np.flatnonzero(real)
        self._ints = np.flatnonzero(varies & ~chosen & ~real)
        self._gaussian = np.concatenate([self._reals, self._ints])
        self._counts = values[self._choices].astype(np.int64)

    def _begin_at_best(self) -> None:
        """Start at the best genome told so far, if the settings say so and nothing has been asked for yet."""
        told = self._ledger.foreign
        if self._settings.x0 == "best" and self._asks == 0 and told:
            best = told[int(self._scalars.of([t.losses for t in told]).argmin())].point
            unit = np.full(self._box.low.size, 0.5)  # the value kept by parameters that are not sampled
            if self._gaussian.size:
                unit[self._gaussian] = best._v_raw
            if self._choices.size:
                unit[self._choices] = (best.c.argmax(axis=1) + 0.5) / self._counts
            self._start(unit)

    def _start(self, default: Vector) -> None:
        with _quiet():
            from cmaes import CatCMAwM  # type: ignore[import-untyped]  # half a second, for scipy's distributions

        space: dict[str, Any] = {}
        if self._reals.size:
            space["x_space"] = [[0.0, 1.0]] * self._reals.size
        if self._ints.size:
            parts = [int(count) for count in self._box.values[self._ints]]
            space["z_space"] = [((np.arange(count) + 0.5) / count).tolist() for count in parts]
        if self._gaussian.size:
            space |= {
                "mean": default[self._gaussian],
                "cov": np.eye(self._gaussian.size),
                "sigma": self._settings.sigma,
            }
        if self._choices.size:
            usual, others = self._settings.default_probability, 1 - self._settings.default_probability
            among = np.arange(self._counts.max()) < self._counts[:, None]
            space["c_space"] = self._counts.tolist()
            space["cat_param"] = np.where(
                self._one_hot(default), usual, among * others / np.maximum(self._counts - 1, 1)[:, None]
            )
        with _quiet():
            self._es = CatCMAwM(**space, population_size=self.population)
        if self._ints.size:
            # For ints with fewer values than the widest one, the library pads its threshold table with thresholds that
            # separate the highest value from itself; an int that reached it would stop mutating.
            highest = np.array([1 - 1 / count for count in parts])
            self._es._z_lim = np.minimum(self._es._z_lim, highest[:, None])

    def _one_hot(self, unit: Vector) -> NDArray[np.bool_]:
        """The choices of a point of the unit box, one-hot: bool [choices, largest number of values]."""
        taken = np.floor(unit[self._choices] * self._counts)
        one_hot: NDArray[np.bool_] = np.arange(self._counts.max()) == taken[:, None]
        return one_hot

    def _genome(self, solution: Any) -> Genome:
        unit = np.full(self._box.low.size, 0.5)
        if self._reals.size:
            unit[self._reals] = solution.x
        if self._ints.size:
            unit[self._ints] = solution.z
        if self._choices.size:
            unit[self._choices] = (solution.c.argmax(axis=1) + 0.5) / self._counts
        return self._box.genome(unit)

    def _solution(self, unit: Vector) -> Any:
        """The solution that the library would have returned had it sampled this point of the unit box."""
        return self._es.Solution(
            c=self._one_hot(unit) if self._choices.size else None,
            _v_raw=unit[self._gaussian] if self._gaussian.size else None,
        )

    def _learn(self) -> None:
        results = self._ledger.results
        generation, foreign = results[: self.population], [*self._ledger.foreign, *results[self.population :]]
        scalars = self._scalars.of([t.losses for t in generation])
        order = np.argsort(scalars, kind="stable")
        ranked = [generation[i].point for i in order]
        with _quiet():
            if foreign:
                others = self._scalars.of([t.losses for t in foreign])
                first = int(np.argmin(others))
                if others[first] < scalars[order[self.population // 2 - 1]]:
                    place = int(np.searchsorted(scalars[order], others[first], side="right"))
                    ranked.insert(place, self._near(foreign[first].point))
                    ranked.pop()
            self._es.tell([(solution, float(rank)) for rank, solution in enumerate(ranked)])
            self._hold_steps()
        self._ledger.close()
        self._ledger.forget()

    def _near(self, solution: Any) -> Any:
        """Move a solution towards the mean, to at most the length of a typical sample (arXiv:1110.4181)."""
        if not self._gaussian.size:
            return solution
        es, n = self._es, self._gaussian.size
        basis, widths = es._eigen_decomposition()
        away = solution._v_raw - es._mean
        length = float(np.linalg.norm(basis.T @ (away / (es._sigma * es._A)) / widths))
        usual = math.sqrt(n) + 2 * n / (n + 2)
        return es.Solution(c=solution.c, _v_raw=es._mean + away * min(1.0, usual / max(length, usual)))

    def _hold_steps(self) -> None:
        """Stop if all parameters are reals and have converged; otherwise keep reals able to follow a mutation."""
        es = self._es
        if self._choices.size:
            # Below this its rate beta exceeds 1, and soon 2, where it computes the root of 2 - beta, which is NaN.
            es._Delta = max(es._Delta, 1 / math.sqrt(es._param_sum))
        if not self._reals.size:
            return
        spread = np.sqrt(np.diag(es._C))[: self._reals.size] * es._A[: self._reals.size]
        largest = float(es._sigma * spread.max())
        if largest < SMALLEST_STEP:
            es._sigma *= SMALLEST_STEP / largest
            if self._gaussian.size == self._reals.size and not self._choices.size:
                self.stopped = f"catcma has converged: every step is below {SMALLEST_STEP:g} of its parameter's range"


@contextmanager
def _quiet() -> Iterator[None]:
    """Use one thread and silence numpy's warnings (the library divides by zero and handles it afterwards)."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
