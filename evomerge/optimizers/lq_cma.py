"""lq-CMA-ES: CMA-ES that scores part of each generation and takes the ranks of the rest from a quadratic model.

Hansen, "A Global Surrogate Assisted CMA-ES" (GECCO 2019), with the model of the library ``cma``,
``cma.fitness_models.LQModel``. The loop around it is the library's ``SurrogatePopulation.__call__`` (its Algorithm 1),
split where it evaluates the function, so that it fits ask and tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Best, Observation, Refinement
from evomerge.optimizers.cma_es import Box, Strategy, StrategySettings, Vector, quiet
from evomerge.optimizers.elites import Feature
from evomerge.optimizers.ledger import FOREIGN, Ledger
from evomerge.optimizers.scalarisation import Scalarisation, Scalars

MAX_PARAMETERS = 40
"""The full model of n parameters has n (n + 3) / 2 + 1 coefficients: 861 for 40, about one per candidate of a search.
With more parameters, a search ends before its model has interactions, and each ask and tell takes seconds."""

# The constants of SurrogatePopulationSettings and LQModelSettings in cma.fitness_models.
MIN_SHARE = 0.02  # min_evals_percent: of a generation, scored regardless of the model
FIRST_POINTS = 3 / 0.75  # minimum_model_size / truncation_ratio: points needed before the model is used
GOOD_TAU = 0.85  # tau_truth_threshold: a sufficient Kendall's tau between the model and the true losses
MIN_FOR_TAU = 15  # n_for_tau: the least number of points that tau is computed over
GROWTH = 0.5  # 1, 2, 3, 5, 8, 12, ... of a generation are scored until the model is good enough


class LqCmaSettings(StrategySettings):
    """lq-CMA-ES (Hansen, GECCO 2019), for up to 40 parameters.

    ``population`` is the size of the generation that CMA-ES learns from, 4 + floor(3 ln n) unless given; most of it is
    never scored. ``sigma``, ``x0`` and ``restarts`` are as for ``cma``; a restart begins with an empty model.
    """

    name: Literal["lq_cma"]
    population: int | None = None
    scalarisation: Scalarisation | None = None

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        self.check_strategy(self.scalarisation, parameters, objectives, place)
        n = len(parameters)
        if n > MAX_PARAMETERS:
            raise InputError(
                place,
                f"lq_cma takes at most {MAX_PARAMETERS} parameters, and the search space has {n:,}: its model would "
                f"have {n * (n + 3) // 2 + 1:,} coefficients to learn, each from at least one candidate",
                "Use cma, or a coarser search space.",
            )

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> LqCma:
        return LqCma(self, parameters, objectives, seed)


@dataclass(frozen=True, slots=True)
class _Sample:
    place: int  # its position in the generation; FOREIGN for a genome that was never asked for
    unit: Vector


class LqCma:
    """One search by lq-CMA-ES.

    A whole generation of CMA-ES is sampled at once. Its best ``population`` genomes according to the model are asked
    for; when their losses are told, they are added to the model. If the model then orders the latest points as their
    losses do (Kendall's tau of 0.85 or more), CMA-ES is told the whole generation, ordered by the model, and the
    model's optimum becomes the first point of the next generation. Otherwise half as many again are asked for.

    Baselines and other foreign genomes enter the model too, and as in ``cma`` the best of them joins the generation if
    it would be a parent. For an int or a choice the model sees the middle of its cell of the box. A failed candidate
    enters the model with the worst loss in it, and CMA-ES ranks it last: if the model left it out, a region where all
    merges break would be asked for again and again.
    """

    favourite: Genome | None = None
    wants_items = False
    refined: Sequence[Refinement] = ()

    def __init__(self, settings: LqCmaSettings, parameters: Sequence[Parameter], objectives: int, seed: int) -> None:
        self._box = Box(parameters)
        self._scalars = Scalars(settings.scalarisation, objectives)
        self._ledger = Ledger(self._scalars, lambda genome: _Sample(FOREIGN, self._box.unit(genome)))
        self._strategy = Strategy(settings, parameters, self._box, seed, diagonal=False)
        self._model = _Model(self._strategy.population, self._scalars)
        self._samples: list[_Sample] = []  # the generation; empty before it is sampled
        self._given: list[int] = []  # positions in the generation, in the order of asking
        self._learnt: dict[int, Vector] = {}  # losses by position
        self._goal = 0  # how many of the generation to score before the model is judged

    @property
    def population(self) -> int:
        """How many more to score before the model is judged; 1 if all of those are pending."""
        goal = self._reachable_goal() if self._samples else self._first_goal()
        return max(1, goal - len(self._given))

    @property
    def keeps(self) -> Best:
        """The better half of the pending candidates: the model weighs losses by rank, the worst least."""
        out = len(self._given) - len(self._ledger.results)
        return Best(max(1, (out or self.population) // 2))

    @property
    def stopped(self) -> str | None:
        return self._strategy.stopped

    def ask(self, n: int) -> list[Genome]:
        if n < 1:
            return []
        if not self._samples:
            told = self._ledger.foreign
            self._strategy.begin_at_best([t.point.unit for t in told], self._scalars.of([t.losses for t in told]))
            self._goal = self._first_goal()
            self._sample(self._strategy.population)
        if (beyond := n - (len(self._samples) - len(self._given))) > 0:
            self._sample(beyond)
        waiting = [s for s in self._samples if s.place not in self._given]
        values = self._model.values([self._cell(s.unit) for s in waiting])
        genomes = []
        for i in np.argsort(values, kind="stable")[:n]:
            genomes.append(self._box.genome(waiting[i].unit))
            self._ledger.give(genomes[-1], waiting[i])
            self._given.append(waiting[i].place)
        return genomes

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        return self.ask(len(genomes))

    def tell(self, observations: Sequence[Observation]) -> None:
        known = len(self._ledger.foreign)
        scored = self._ledger.receive(observations)
        self._model.add([(t.point.unit, t.losses) for t in self._ledger.foreign[known:]])
        if self._samples and scored >= self._reachable_goal():
            self._judge()

    def _first_goal(self) -> int:
        """``number_evaluated`` before the loop of SurrogatePopulation.__call__."""
        size = self._strategy.population
        return min(size, int(1 + max(size * MIN_SHARE, FIRST_POINTS - self._model.size)))

    def _reachable_goal(self) -> int:
        return min(self._goal, len(self._samples))

    def _sample(self, n: int) -> None:
        first = len(self._samples)
        self._samples += [_Sample(first + i, unit) for i, unit in enumerate(self._strategy.ask(n))]

    def _cell(self, unit: Vector) -> Vector:
        """The point as the model sees it: equal genomes map to one point."""
        return self._box.unit(self._box.genome(unit))

    def _judge(self) -> None:
        """The loop body of SurrogatePopulation.__call__ after the function has been evaluated."""
        new = [t for t in self._ledger.results if t.point.place not in self._learnt]
        self._model.add([(self._cell(t.point.unit), t.losses) for t in new])
        self._learnt |= {t.point.place: t.losses for t in new}
        scored, size = len(self._learnt), len(self._samples)
        self._model.sort(self._goal)
        # n_for_tau of SurrogatePopulationSettings
        tau = self._model.tau(int(max(MIN_FOR_TAU, min(1.2 * scored, 0.75 * size))))
        if tau >= GOOD_TAU or scored == size:
            self._model.sort(scored)
            self._model.widen(tau)
            self._finish()
            return
        while self._goal <= scored:
            self._goal += math.ceil(self._goal * GROWTH)

    def _finish(self) -> None:
        """Tell CMA-ES the generation: its losses if all are known, else the model's values, with inf for failures."""
        foreign = self._ledger.foreign
        if len(self._learnt) == len(self._samples):
            scalars = self._scalars.of([self._learnt[s.place] for s in self._samples])
            others = self._scalars.of([t.losses for t in foreign])
        else:
            failed = [s.place in self._learnt and not np.isfinite(self._learnt[s.place][0]) for s in self._samples]
            scalars = np.where(failed, np.inf, self._model.values([self._cell(s.unit) for s in self._samples]))
            others = self._model.values([t.point.unit for t in foreign])
        units = [s.unit for s in self._samples]
        if self._strategy.tell(units, scalars, [t.point.unit for t in foreign], others):
            self._model = _Model(self._strategy.population, self._scalars)
        else:
            self._strategy.inject(self._model.optimum)
        self._ledger.close()
        self._ledger.forget()
        self._samples, self._given, self._learnt = [], [], {}


class _Model:
    """``cma.fitness_models.LQModel`` on the unit box, extended to several objectives and failed candidates.

    Depending on its number of points it is linear, quadratic without interactions, or full. It keeps the latest two
    points per coefficient, and weighs better points more. Its polynomials are centred in the middle of the box, so that
    terms left undetermined by too few points favour the centre and not a corner.

    Args:
        generation: the least number of points that it keeps.
        scalars: combines the objectives into one loss, based on what has been seen so far, so that all points are rated
            again each time.
    """

    def __init__(self, generation: int, scalars: Scalars) -> None:
        with quiet():
            from cma.fitness_models import LQModel

        self._model: Any = LQModel()
        self._model.settings.max_absolute_size = generation
        self._model.set_xoffset(-0.5)
        self._scalars = scalars
        self._losses: dict[bytes, Vector] = {}

    @property
    def size(self) -> int:
        """How many points the model holds."""
        return int(self._model.size)

    def add(self, points: Sequence[tuple[Vector, Vector]]) -> None:
        """Add points of the unit box with their losses [objectives], the latest last."""
        if not points:
            return
        with quiet():
            for unit, losses in points:
                if np.isfinite(losses[0]) or unit.tobytes() not in self._losses:
                    self._losses[unit.tobytes()] = losses
                if not self._model.isin(unit):
                    self._model.add_data_row(unit, 0.0)
        values = self._scalars.of([self._losses[row.tobytes()] for row in self._model.X])
        known = values[np.isfinite(values)]
        values[~np.isfinite(values)] = known.max() if known.size else 0.0
        self._model.F, self._model.Y = values, values.copy()
        self._model._coefficients_count = self._model._xopt_count = -1

    def sort(self, n: int) -> None:
        """Sort the latest ``n`` points by loss, so that the worst of them leave the model first."""
        self._model.sort(n)

    def tau(self, n: int) -> float:
        """Kendall's tau between losses and values of the latest ``n``; 0 for fewer than three or if all are equal."""
        with quiet():
            return float(self._model.kendall(n))

    def widen(self, tau: float) -> None:
        """Keep more points from now on if the full model's tau is this low."""
        self._model.adapt_max_relative_size(tau)

    def values(self, units: Sequence[Vector]) -> Vector:
        """One value per point of the unit box; all 0 with fewer than two points in the model."""
        if self.size < 2:
            return np.zeros(len(units))
        with quiet():
            return np.array([float(self._model.eval(unit)) for unit in units])

    @property
    def optimum(self) -> Vector:
        """The model's stationary point, or a step down its gradient, moved into the unit box."""
        with quiet():
            return np.clip(np.asarray(self._model.xopt, dtype=np.float64), 0.0, 1.0)
