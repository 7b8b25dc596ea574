"""CMA-ES with restarts, from the library ``cma`` (pycma) through ask and tell.

pycma is given the *ranks* of a generation, never its losses. CMA-ES itself uses only the ranks, but pycma's termination
tests look at losses and are wrong here: they end a run whose first merges are all broken or all equal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

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
    random_state,
)
from evomerge.optimizers.coarse_to_fine import Parts, are_tied
from evomerge.optimizers.elites import Feature
from evomerge.optimizers.ledger import Ledger
from evomerge.optimizers.scalarisation import Scalarisation, Scalars, check_scalarisation

FULL_COVARIANCE_UP_TO = 50
"""Largest number of parameters with a full covariance matrix: 50 have 1,275 covariances, about one per candidate."""

MIN_POPULATION = 3

GENERATIONS = 12
"""How many generations ``population: auto`` divides a budget into. Measured with answers to 100 items per candidate, on
spheres, ellipsoids (condition number 100, axis-aligned and rotated) and sums over layers (like one source's weights),
with 8 to 200 parameters and 300 and 1,000 candidates: the mean gets further with 10 to 15 generations than with more,
smaller ones. With 100 parameters and 1,000 candidates it covers 0.76 of the distance on an ellipsoid, against 0.44 with
the default population, whose mean drifts with the noise."""

SMALLEST_STEP = 1e-4
"""Step size, as a fraction of each range, below which a search has converged; bfloat16 cannot resolve such weights."""

LARGEST_STEP = 1 / 3
"""Upper limit on every step size, as a fraction of each range (pycma's own bound)."""

INTEGER_STEP = 0.2
"""Lower limit on the standard deviation of an int or choice, in values: it mutates at 1% or more (pycma's bound)."""

WARM_STEP = 0.1
"""First step size, as a fraction of each range, if the search starts at a good genome: alpha of Nomura et al., Warm
Starting CMA-ES for Hyperparameter Optimization, AAAI 2021 (arXiv:2012.06932)."""

Vector = NDArray[np.float64]


def warm_defaults(settings: Settings) -> dict[str, Any]:
    """The defaults of ``x0`` and ``sigma`` that change when good genomes are told before the first ask."""
    defaults = {"x0": "best", "sigma": WARM_STEP}
    return {key: value for key, value in defaults.items() if key not in settings.model_fields_set}


class StrategySettings(Settings):
    """Settings shared by the optimizers that drive pycma."""

    name: str
    population: int | Literal["auto"] | None = None
    sigma: float = Field(default=1 / 6, gt=0, le=1 / 3)
    x0: Literal["centre", "default", "best", "gains"] | dict[str, FiniteFloat] = "centre"
    restarts: int = Field(default=0, ge=0, le=1000)

    def warm(self) -> Self:
        return self.model_copy(update=warm_defaults(self))

    def at_gains(self) -> Self:
        return self if "x0" in self.model_fields_set else self.model_copy(update={"x0": "gains"})

    def at_shares(self, shares: Mapping[str, float]) -> Self:
        return self.model_copy(update={"x0": dict(shares)}) if self.x0 == "gains" else self

    def start(self, parameters: Sequence[Parameter]) -> list[float] | None:
        """The starting point; None for the middle of every range."""
        if self.x0 in ("centre", "best"):
            return None
        shares = self.x0 if isinstance(self.x0, dict) else {}
        return [shares.get(p.share_of, p.default) for p in parameters]

    def size(self, parameters: int) -> int:
        """How many points a generation has with this many parameters."""
        return self.population if isinstance(self.population, int) else default_population(parameters)

    def check_strategy(
        self, mix: Scalarisation | None, parameters: Sequence[Parameter], objectives: int, place: str
    ) -> None:
        """Reject a population, a starting point or a scalarisation that cannot work.

        Raises:
            InputError: naming ``place`` (``optimizer``) and the hint.
        """
        check_population(None if self.population == "auto" else self.population, MIN_POPULATION, place)
        check_scalarisation(mix, objectives, self.name, place)
        known = {p.share_of for p in parameters} - {""}
        if isinstance(self.x0, dict) and (unknown := sorted(self.x0.keys() - known)):
            problem = f"no weight is of {unknown[0]}"
            hint = f"The sources with weights are {', '.join(sorted(known))}." if known else ""
            raise InputError(f"{place}.x0", problem, hint or "Say centre, default or best.")
        for parameter, value in zip(parameters, self.start(parameters) or (), strict=False):
            if not parameter.low <= value <= parameter.high:
                problem = f"begins at {value:g}, and {parameter.name} goes from {parameter.low:g} to {parameter.high:g}"
                raise InputError(f"{place}.x0", problem, "Begin within its bounds, or widen them.")


class CmaSettings(StrategySettings):
    """CMA-ES (Hansen, arXiv:1604.00772) on the unit box.
    ``population`` defaults to 4 + floor(3 ln n). With ``auto`` the budget is divided into 12 generations, each large
    enough to average out the noise of scores, and no covariances are learnt unless ``diagonal`` says so. ``sigma`` is
    the first step size as a fraction of each parameter's range. The search starts at the ``centre`` of the box, at each
    parameter's ``default``, at the ``best`` genome told before its first ask (baselines, and candidates of an earlier
    search: ``start_from``), at weights given per source with every other parameter at its default, or at the weights
    that the selection of sources derives from their ``gains``. Each of the ``restarts`` starts at a random point with
    twice the population after a run has converged (IPOP: Auger & Hansen, CEC 2005). ``diagonal`` learns a step size for
    each parameter but no covariances (sep-CMA-ES: Ros & Hansen, PPSN 2008); None means diagonal above 50 parameters.
    """

    ties: ClassVar[bool] = True

    name: Literal["cma"]
    population: int | Literal["auto"] | None = None
    diagonal: bool | None = None
    scalarisation: Scalarisation | None = None

    def within(self, candidates: int | None, *, tied: bool = False) -> Self:
        if self.population != "auto" and not (tied and self.population is None and candidates is not None):
            return self
        if candidates is None:
            problem = "is auto, which divides a number of candidates, and the budget has none"
            raise InputError("optimizer.population", problem, "Give budget.candidates, or a number here.")
        # Covariances never paid off: with 300 to 3,000 candidates as above, they lost up to 0.1 of the distance up to
        # 40 parameters and made no difference beyond; nor did VD-CMA, VkD-CMA or diagonal acceleration (dd-CMA) help.
        diagonal = True if self.diagonal is None else self.diagonal
        population = max(MIN_POPULATION, candidates // GENERATIONS)
        return self.model_copy(update={"population": population, "diagonal": diagonal})

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        self.check_strategy(self.scalarisation, parameters, objectives, place)
        if are_tied(parameters):
            for key, given in (("restarts", self.restarts), ("diagonal", self.diagonal is False)):
                if given:
                    problem = "does not go with granularity adaptive: parts come apart in one run, and no covariances"
                    raise InputError(f"{place}.{key}", f"{problem} are learnt", "Leave it out.")

    def learns(self, parameters: Sequence[Parameter], candidates: int | None) -> str:
        n = len(parameters)
        if are_tied(parameters):
            parts = Parts(parameters)
            first = f"{parts.count} numbers for the whole model at first, of {n}"
            if candidates is None:
                return first
            population = self.size(n)  # parameters untied after the last generation are not searched
            return f"{first}, and {parts.expected(candidates - population, population)} by the end of the budget"
        if self.is_diagonal(n):
            return f"{n} step sizes, and no covariances"
        return f"{n * (n + 1) // 2:,} variances and covariances"

    def is_diagonal(self, parameters: int) -> bool:
        """Whether no covariances are learnt for this many parameters."""
        return parameters > FULL_COVARIANCE_UP_TO if self.diagonal is None else self.diagonal

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Cma:
        return Cma(self, parameters, objectives, seed)


class Box:
    """The map between genomes and the unit box: [0, 1] per parameter, divided into equal cells for int and choice."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.low = np.array([p.low for p in parameters], dtype=np.float64)
        self.high = np.array([p.high for p in parameters], dtype=np.float64)
        whole = np.array([p.kind != "real" for p in parameters])
        self.values = np.where(whole, self.high - self.low + 1, 0)  # number of values of an int or choice; 0 for a real

    def genome(self, unit: Vector) -> Genome:
        """The genome of a point of the unit box."""
        real = self.low + unit * (self.high - self.low)
        whole = self.low + np.floor(unit * self.values)
        # The clip fixes the last bit of a real and the upper edge of an int; + 0.0 turns -0.0 into 0.0.
        return np.clip(np.where(self.values > 0, whole, real), self.low, self.high) + 0.0

    def unit(self, genome: Genome) -> Vector:
        """The point of the unit box that represents a genome: the middle of its cell for int and choice.

        Raises:
            ValueError: the genome has the wrong length or lies outside the bounds.
        """
        if genome.shape != self.low.shape or not np.all((self.low <= genome) & (genome <= self.high)):
            raise ValueError("the genome is not a point of this search space")
        real = (genome - self.low) / np.where(self.high > self.low, self.high - self.low, 1.0)
        whole = (genome - self.low + 0.5) / np.maximum(self.values, 1)
        return np.where(self.values > 0, whole, real)


class _Normal:
    """Standard normal numbers for pycma, which by default uses numpy's global generator; other code may reseed that."""

    def reseed(self, *key: int) -> None:
        self._state = random_state(*key)

    def __call__(self, *shape: int) -> Vector:
        return self._state.standard_normal(shape)


class Strategy:
    """pycma on the unit box, one run after another: it learns from ranks, and restarts after it has converged.

    Attributes:
        population: how many points the next generation has.
        stopped: why no further generation is worth scoring, or None.
    """

    def __init__(
        self,
        settings: StrategySettings,
        parameters: Sequence[Parameter],
        box: Box,
        seed: int,
        diagonal: bool,
        parts: Parts | None = None,
    ) -> None:
        self._settings = settings
        self._box = box
        self._parts = parts
        self._seed = seed
        self._diagonal = diagonal
        self._normal = _Normal()
        self._asks = 0
        self._was_asked = False  # since the last tell
        self._restarts = 0
        self._made: Any = None
        self.stopped: str | None = None
        start = settings.start(parameters)
        x0 = np.full(len(parameters), 0.5) if start is None else box.unit(np.array(start, dtype=np.float64))
        self._start(x0 if parts is None else parts.point(x0), settings.size(len(parameters)))

    def begin_at_best(self, units: Sequence[Vector], scalars: Vector) -> None:
        """Start at the best of these points, if the settings say so and nothing has been asked for yet."""
        if self._settings.x0 == "best" and self._asks == 0 and len(units):
            self._start(units[int(scalars.argmin())], self.population)

    @property
    def parents(self) -> int:
        """How many of the best points of a generation the mean moves to: half (arXiv:1604.00772, table 1)."""
        return self.population // 2

    @property
    def mean(self) -> Vector:
        """The mean of the distribution: a point of the unit box, or of the tied space (``Parts``)."""
        with quiet():
            mean = np.asarray(self._es.result.xfavorite, dtype=np.float64)
        return np.clip(mean, 0.0 if self._parts is None else self._parts.low(len(mean)), 1.0)

    def ask(self, n: int) -> list[Vector]:
        """Return ``n`` points of the unit box, or of the tied space."""
        self._asks += 1
        strategy = self._es
        self._normal.reseed(self._seed, self._asks)
        with quiet():
            units: list[Vector] = strategy.ask(n)
        self._was_asked = True
        return units

    def tell(self, units: Sequence[Vector], scalars: Vector, foreign: Sequence[Vector], others: Vector) -> bool:
        """Learn from a generation, in the order of sampling, and return whether a new run has begun.

        The best of the ``foreign`` points, whose scalars are ``others``, joins the generation if it would be a parent.
        """
        points = list(units)
        if others.size and others.min() < np.median(scalars):
            points.append(foreign[int(others.argmin())])
            scalars = np.append(scalars, others.min())
        # Ranks must be distinct: an unstable sort orders equal losses differently on different processors.
        ranks = np.argsort(np.argsort(scalars, kind="stable"), kind="stable")
        with quiet():
            if not self._was_asked:  # possible without a barrier; pycma begins an iteration only when asked
                self._es.ask(1)
            self._es.tell(points, ranks.astype(np.float64).tolist())
            self._was_asked = False
            if self._es.N == 1:  # with one parameter pycma cannot keep the step size within its own limits, and raises
                (step,), (least,) = self._es.stds, self._least_step
                self._es.sigma *= min(max(step, least), LARGEST_STEP) / step
            reason = self._converged()
        if reason and self._restarts < self._settings.restarts:
            self._restarts += 1
            x0 = random_state(self._seed, self._asks, self._restarts).random_sample(self._box.low.size)
            self._start(x0, 2 * self.population)
            return True
        if reason:
            self.stopped = reason
        return False

    def refine(self, steps: Vector) -> None:
        """Continue in the larger space after parts were split: in the new directions the mean is 0, with these steps.

        Mean and step sizes of the others are kept. Evolution paths, which cover a few generations, start from zero.
        """
        mean, known = np.append(self.mean, np.zeros(len(steps))), np.asarray(self._es.stds, dtype=np.float64)
        self.stopped = None
        self._start(mean, self.population, np.append(known, self._settings.sigma * steps))

    def inject(self, unit: Vector) -> None:
        """Make the first point of the next generation lie towards this one, at the length of a typical sample."""
        with quiet():
            self._es.inject([self._es.boundary_handler.inverse(unit)])

    def _converged(self) -> str | None:
        limit = np.maximum(SMALLEST_STEP, 1.01 * self._least_step)
        name = self._settings.name
        if np.all(self._es.stds <= limit):
            return f"{name} has converged: every step is below {SMALLEST_STEP:g} of its parameter's range"
        if reasons := self._es.stop():
            return f"{name} has stopped: {', '.join(reasons)}"
        return None

    def _start(self, x0: Vector, population: int, steps: Vector | None = None) -> None:
        """Begin a run at a point, with equal step sizes in all directions unless ``steps`` are given."""
        self._x0, self._steps, self.population = x0, steps, population
        self._made = None
        self._was_asked = False
        values = self._box.values if self._parts is None else self._box.values[self._parts.kinds]
        self._least_step = np.where(values > 1, INTEGER_STEP / np.maximum(values, 1), 0.0)

    @property
    def _es(self) -> Any:
        """pycma, created lazily: a plan only needs the size of a generation."""
        if self._made is None:
            self._made = self._strategy()
        return self._made

    def _strategy(self) -> Any:
        with quiet():
            import cma  # takes over half a second, and warns if matplotlib is absent
            from cma.sigma_adaptation import CMAAdaptSigmaCSA

        x0, steps = self._x0, self._steps
        options: dict[str, Any] = {
            "popsize": self.population,
            "bounds": [0, 1] if self._parts is None else [self._parts.low(x0.size).tolist(), [1] * x0.size],
            "BoundaryHandler": cma.BoundTransform,
            "CMA_diagonal": self._diagonal,
            "minstd": self._least_step.tolist() if x0.size > 1 else 0,
            "maxstd": LARGEST_STEP if x0.size > 1 else math.inf,
            "randn": self._normal,
            "seed": math.nan,
            # pycma's choices for 300 parameters and for small populations require mirrored pairs of samples, in order.
            "AdaptSigma": CMAAdaptSigmaCSA,
            "CMA_mirrors": 0,
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "signals_filename": None,
        }
        sigma = self._settings.sigma
        if steps is not None:
            sigma = float(steps.max())
            options["CMA_stds"] = (steps / sigma).tolist()
        with quiet():
            return cma.CMAEvolutionStrategy(x0.tolist(), sigma, options | _NEVER)


class Cma:
    """One search by CMA-ES.

    Genomes that were never asked for, such as baselines told before the first ask, join the generation being told: only
    the best of them, and only if it would be a parent. pycma shortens the step to it to the length of a typical sample
    (Hansen, Injecting External Solutions Into CMA-ES, arXiv:1110.4181). A good source thus pulls the mean towards it,
    but cannot blow up the step size, as asking for exactly that genome would in many dimensions, and a bad one changes
    nothing. The search starts where its settings say.

    If parameters have places, they are tied at first and split as the number of candidates allows (``Parts``). Genomes
    asked for before a split are still learnt from after it. Foreign genomes are projected to the closest tied point.
    """

    wants_items = False

    def __init__(self, settings: CmaSettings, parameters: Sequence[Parameter], objectives: int, seed: int) -> None:
        self._box = Box(parameters)
        self._scalars = Scalars(settings.scalarisation, objectives)
        self._ledger = Ledger(self._scalars, self._point)
        self._parts = Parts(parameters) if are_tied(parameters) else None
        diagonal = self._parts is not None or settings.is_diagonal(len(parameters))
        self._strategy = Strategy(settings, parameters, self._box, seed, diagonal, self._parts)

    @property
    def population(self) -> int:
        return self._strategy.population

    @property
    def keeps(self) -> Best:
        """The points that the mean moves to; of the others only the order matters, as directions to avoid."""
        return Best(self._strategy.parents)

    @property
    def favourite(self) -> Genome:
        """The mean of the distribution, the best estimate available under noise (Hansen, arXiv:1604.00772, B.1)."""
        return self._genome(self._strategy.mean)

    @property
    def refined(self) -> Sequence[Refinement]:
        return () if self._parts is None else self._parts.refined

    @property
    def stopped(self) -> str | None:
        return self._strategy.stopped

    def ask(self, n: int) -> list[Genome]:
        if n < 1:
            return []
        told = self._ledger.foreign
        self._strategy.begin_at_best([t.point for t in told], self._scalars.of([t.losses for t in told]))
        points = self._strategy.ask(n)
        genomes = [self._genome(point) for point in points]
        for genome, point in zip(genomes, points, strict=True):
            self._ledger.give(genome, point)
        return genomes

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        return self.ask(len(genomes))

    def tell(self, observations: Sequence[Observation]) -> None:
        if self._ledger.receive(observations) >= self.population:
            self._learn()

    def _learn(self) -> None:
        results, foreign = self._ledger.results, self._ledger.foreign
        restarted = self._strategy.tell(
            [self._of_now(t.point) for t in results],
            self._scalars.of([t.losses for t in results]),
            [self._of_now(t.point) for t in foreign],
            self._scalars.of([t.losses for t in foreign]),
        )
        self._ledger.close()
        if restarted:
            self._ledger.forget()
        if self._parts is not None:
            steps = self._parts.learn(len(results), self.population, converged=self.stopped is not None)
            if steps is not None:
                self._strategy.refine(steps)

    def _genome(self, point: Vector) -> Genome:
        return self._box.genome(point if self._parts is None else self._parts.unit(point))

    def _point(self, genome: Genome) -> Vector:
        unit = self._box.unit(genome)
        return unit if self._parts is None else self._parts.point(unit)

    def _of_now(self, point: Vector) -> Vector:
        """Convert a point that may date from before a split."""
        return point if self._parts is None else self._parts.padded(point)


# Termination criteria that look at losses (which are meaningless as ranks) or count generations (the budget does that),
# and tolx, which _converged replaces.
_NEVER: dict[str, Any] = {
    "tolfun": 0,
    "tolfunhist": 0,
    "tolfunrel": 0,
    "tolflatfitness": math.inf,
    "tolstagnation": 0,
    "tolxstagnation": False,
    "tolx": 0,
    "maxiter": math.inf,
    "maxfevals": math.inf,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Use one thread and silence pycma's advice (on unusual population sizes, plots and large values)."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
