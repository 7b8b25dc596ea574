"""What the driver knows of a search: plain data, without a tensor, a model or a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from evaluators.base import ItemScores, Split
from evomerge.errors import InputError
from evomerge.genome import Genome, SearchSpace
from evomerge.optimizers import Feature, Optimizer, OptimizerSettings
from evomerge.optimizers.base import OPTIMIZER_MEMBERS
from evomerge.prices import Prices
from evomerge.search.settings.early import UNMEASURED
from evomerge.search.settings.sections import Budget, Confirm, KeptAnswers, Mode, Racing
from evomerge.search.work.jobs import Task
from evomerge.store import Estimate
from search_spaces.base import Measures


def violation(mean: float, threshold: float, *, at_least: bool) -> float:
    """By how much a mean misses a threshold, as a share of it; 0 where it is kept."""
    miss = threshold - mean if at_least else mean - threshold
    return max(0.0, miss) / (abs(threshold) or 1.0)


@dataclass(frozen=True)
class MeasureInfo:
    """A metric of an evaluator, as the driver sees it.

    ``evaluator`` is a position in ``Setup.evaluators``. A candidate's value is the mean of ``metric`` over the first
    ``items`` items of the search split.
    """

    name: str
    evaluator: int
    metric: str
    maximise: bool
    items: int


@dataclass(frozen=True)
class ObjectiveInfo(MeasureInfo):
    """What the search makes better."""

    def loss(self, mean: float) -> float:
        """The value that an optimizer minimises."""
        return -mean if self.maximise else mean


@dataclass(frozen=True)
class ConstraintInfo(MeasureInfo):
    """What a candidate must keep: at least ``threshold`` where ``maximise``, at most that otherwise."""

    threshold: float

    def violation(self, mean: float) -> float:
        """By how much a mean misses the threshold, as a share of it; 0 where it is kept."""
        return violation(mean, self.threshold, at_least=self.maximise)


@dataclass(frozen=True)
class ScreenInfo(MeasureInfo):
    """A cheap metric that says beforehand which candidates are worth scoring on ``objective``, a position."""

    objective: int
    least_tau: float
    drop: float


@dataclass(frozen=True)
class ProxyInfo:
    """A smooth stand-in for the objectives; see ``Proxy``. ``evaluator`` is a position in ``Setup.evaluators``;
    ``drawn`` is no more than ``items``.
    """

    evaluator: int
    items: int
    drawn: int
    steps: int
    rate: float


@dataclass(frozen=True)
class FeatureInfo(MeasureInfo):
    """What sets candidates apart that may be equally good, and how its range is divided. See ``Feature``."""

    low: float
    high: float
    bins: int

    @property
    def axis(self) -> Feature:
        return Feature(self.name, self.low, self.high, self.bins)


def objective_values(measure: MeasureInfo, scores: Sequence[ItemScores], split: Split) -> NDArray[np.float32]:
    """The per-item scores that a measure is the mean of; ``scores`` has one entry for each evaluator."""
    values = scores[measure.evaluator][measure.metric]
    return values[: measure.items] if split == "search" else values


@dataclass(frozen=True)
class EvaluatorInfo:
    """An evaluator as the driver sees it; ``version`` keys its scores in the store, the counts are items by split."""

    name: str
    version: str
    search_items: int
    held_out_items: int


@dataclass(frozen=True, eq=False)
class StartPoint:
    """A genome that an earlier search found good, and what it is to people: "from coarse c0012"."""

    genome: Genome
    label: str


Counts = Mapping[int, int]
"""How many items of the search split each evaluator is asked for, by the evaluator's position; others for none."""


@dataclass(frozen=True)
class Setup:
    """All that the driver knows of a search. It holds no tensor and no model."""

    name: str
    seed: int
    space: SearchSpace
    optimizer: OptimizerSettings
    objectives: tuple[ObjectiveInfo, ...]
    evaluators: tuple[EvaluatorInfo, ...]
    budget: Budget
    confirm: Confirm
    attempts: int
    constraints: tuple[ConstraintInfo, ...] = ()
    features: tuple[FeatureInfo, ...] = ()
    screen: ScreenInfo | None = None
    proxy: ProxyInfo | None = None
    racing: Racing | None = None
    mode: Mode = "generational"
    answers: KeptAnswers = "all"
    prices: Prices | None = None
    space_measures: Measures = UNMEASURED
    start: tuple[StartPoint, ...] = ()

    @property
    def measures(self) -> Iterator[MeasureInfo]:
        """What a candidate is judged and placed by: objectives, constraints and features, without the screen."""
        return chain(self.objectives, self.constraints, self.features)

    @property
    def axes(self) -> tuple[Feature, ...]:
        """The features, as optimizers and elites know them."""
        return tuple(feature.axis for feature in self.features)

    def build_optimizer(self) -> Optimizer:
        """The optimizer, as it is before its first ask.

        Raises:
            InputError: it lacks what every optimizer has.
        """
        made = self.optimizer.build(self.space.parameters, len(self.objectives), self.seed, self.axes)
        if missing := [name for name in OPTIMIZER_MEMBERS if not hasattr(made, name)]:
            problem = f"{type(made).__name__} of {self.optimizer.name} has no {', '.join(missing)}"
            raise InputError("optimizer", problem, "evomerge/optimizers/base.py says what each is.")
        return made

    def feature_values(self, objectives: Mapping[str, Estimate]) -> list[float]:
        """A candidate's value of each feature by its estimates; NaN where there is none."""
        return [objectives[f.name].mean if f.name in objectives else math.nan for f in self.features]

    def counts(self, rung: int | None = None) -> Counts:
        """How many items of the search split are scored at a rung; all that objectives want when None."""
        wanted: dict[int, int] = {}
        for measure in self.measures:
            items = measure.items if rung is None else min(rung, measure.items)
            wanted[measure.evaluator] = max(items, wanted.get(measure.evaluator, 0))
        return wanted

    def violation(self, objectives: Mapping[str, Estimate]) -> float:
        """By how much estimates miss the constraints, in all; 0 when they keep them. What is not estimated is not held
        against a candidate.
        """
        pairs = ((constraint, objectives.get(constraint.name)) for constraint in self.constraints)
        return sum(constraint.violation(value.mean) for constraint, value in pairs if value is not None)

    @property
    def rungs(self) -> list[Counts]:
        """The rungs of a race, each with more items than the one before, up to all items.

        After those that the search file names come larger ones, each three times as large, for candidates that
        challenge the best. Without racing, all items are the only rung.
        """
        if self.racing is None:
            return [self.counts()]
        most = max(self.counts().values())
        sizes = [size for size in self.racing.rungs if size < most]
        while sizes and sizes[-1] * CHALLENGE_GROWTH < most:
            sizes.append(sizes[-1] * CHALLENGE_GROWTH)
        return [*(self.counts(size) for size in sizes), self.counts()]

    @property
    def ordinary_rungs(self) -> int:
        """How many of the rungs every candidate may reach; the others are for those that challenge the best."""
        if self.racing is None:
            return 1
        most = max(self.counts().values())
        return sum(size < most for size in self.racing.rungs) + (self.racing.rungs[-1] >= most)

    def tasks(self, split: Split) -> list[Task]:
        """What is scored without racing: on the search split as many items as are wanted, else every item."""
        if split == "held_out":
            return [Task(e, split, range(self.evaluators[e].held_out_items)) for e in sorted(self.counts())]
        return [Task(e, split, range(count)) for e, count in sorted(self.all_counts().items())]

    def all_counts(self) -> Counts:
        """How many items of the search split a baseline is scored on: all that anything wants, the screen's too."""
        counts = dict(self.counts())
        if self.screen is not None:
            counts[self.screen.evaluator] = max(self.screen.items, counts.get(self.screen.evaluator, 0))
        return counts


CHALLENGE_GROWTH = 3
"""By how much the items grow from rung to rung for a candidate that challenges the best."""
