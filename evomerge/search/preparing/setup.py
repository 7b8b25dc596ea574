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
    """By how much a mean violates a threshold, as a share of it; 0 if it is met."""
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
    """A quantity that the search improves."""

    def loss(self, mean: float) -> float:
        """The value that an optimizer minimises."""
        return -mean if self.maximise else mean


@dataclass(frozen=True)
class ConstraintInfo(MeasureInfo):
    """A requirement: at least ``threshold`` if ``maximise``, at most ``threshold`` otherwise."""

    threshold: float

    def violation(self, mean: float) -> float:
        """By how much a mean violates the threshold, as a share of it; 0 if it is met."""
        return violation(mean, self.threshold, at_least=self.maximise)


@dataclass(frozen=True)
class ScreenInfo(MeasureInfo):
    """A cheap metric that predicts which candidates are worth scoring on ``objective``, a position."""

    objective: int
    least_tau: float
    drop: float


@dataclass(frozen=True)
class ProxyInfo:
    """A smooth substitute for the objectives; see ``Proxy``. ``evaluator`` is a position in ``Setup.evaluators``;
    ``drawn`` is at most ``items``.
    """

    evaluator: int
    items: int
    drawn: int
    steps: int
    rate: float


@dataclass(frozen=True)
class FeatureInfo(MeasureInfo):
    """A property that sets apart equally good candidates, and how its range is divided. See ``Feature``."""

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
    """An evaluator as the driver sees it; ``version`` is the key of its scores in the store; the counts are items."""

    name: str
    version: str
    search_items: int
    held_out_items: int


@dataclass(frozen=True, eq=False)
class StartPoint:
    """A genome from an earlier search, and its label for people: "from coarse c0012"."""

    genome: Genome
    label: str


Counts = Mapping[int, int]
"""The number of search-split items of each evaluator, by the evaluator's position; none for others."""


@dataclass(frozen=True)
class Setup:
    """All that the driver knows about a search. It holds no tensor and no model."""

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
        """The objectives, constraints and features, without the screen."""
        return chain(self.objectives, self.constraints, self.features)

    @property
    def axes(self) -> tuple[Feature, ...]:
        """The features, in the form that optimizers and elites use."""
        return tuple(feature.axis for feature in self.features)

    def build_optimizer(self) -> Optimizer:
        """The optimizer before its first ask.

        Raises:
            InputError: it lacks a required member.
        """
        made = self.optimizer.build(self.space.parameters, len(self.objectives), self.seed, self.axes)
        if missing := [name for name in OPTIMIZER_MEMBERS if not hasattr(made, name)]:
            problem = f"{type(made).__name__} of {self.optimizer.name} has no {', '.join(missing)}"
            raise InputError("optimizer", problem, "evomerge/optimizers/base.py says what each is.")
        return made

    def feature_values(self, objectives: Mapping[str, Estimate]) -> list[float]:
        """A candidate's value of each feature from its estimates; NaN if there is none."""
        return [objectives[f.name].mean if f.name in objectives else math.nan for f in self.features]

    def counts(self, rung: int | None = None) -> Counts:
        """How many items of the search split are scored at a rung; None means all that objectives need."""
        wanted: dict[int, int] = {}
        for measure in self.measures:
            items = measure.items if rung is None else min(rung, measure.items)
            wanted[measure.evaluator] = max(items, wanted.get(measure.evaluator, 0))
        return wanted

    def violation(self, objectives: Mapping[str, Estimate]) -> float:
        """By how much estimates violate the constraints, in total; 0 if they meet them. Constraints without an estimate
        do not count.
        """
        pairs = ((constraint, objectives.get(constraint.name)) for constraint in self.constraints)
        return sum(constraint.violation(value.mean) for constraint, value in pairs if value is not None)

    @property
    def rungs(self) -> list[Counts]:
        """The rungs of a race, each with more items than the one before, up to all items.

        The rungs of the search file are followed by larger ones, each three times as large, for candidates that
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
        """How many of the rungs every candidate can reach; the others are for those that challenge the best."""
        if self.racing is None:
            return 1
        most = max(self.counts().values())
        return sum(size < most for size in self.racing.rungs) + (self.racing.rungs[-1] >= most)

    def tasks(self, split: Split) -> list[Task]:
        """What is scored without racing: the wanted number of items on the search split, every item on the other."""
        if split == "held_out":
            return [Task(e, split, range(self.evaluators[e].held_out_items)) for e in sorted(self.counts())]
        return [Task(e, split, range(count)) for e, count in sorted(self.all_counts().items())]

    def all_counts(self) -> Counts:
        """How many search-split items a baseline is scored on: all that any measure needs, including the screen."""
        counts = dict(self.counts())
        if self.screen is not None:
            counts[self.screen.evaluator] = max(self.screen.items, counts.get(self.screen.evaluator, 0))
        return counts


CHALLENGE_GROWTH = 3
"""The factor by which items grow from rung to rung for a candidate that challenges the best."""
