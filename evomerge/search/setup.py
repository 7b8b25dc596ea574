"""What the driver knows of a search: plain data, without a tensor, a model or a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.base import ItemScores, Split
from evomerge.genome import SearchSpace
from evomerge.optimizers import OptimizerSettings
from evomerge.search.jobs import Task
from evomerge.search.search_file import Budget, Confirm


@dataclass(frozen=True)
class ObjectiveInfo:
    """An objective as the driver sees it.

    ``evaluator`` is a position in ``Setup.evaluators``. A candidate's value is the mean of ``metric`` over the first
    ``items`` items of the search split.
    """

    name: str
    evaluator: int
    metric: str
    maximise: bool
    items: int

    def loss(self, mean: float) -> float:
        """The value that an optimizer minimises."""
        return -mean if self.maximise else mean


def objective_values(objective: ObjectiveInfo, scores: Sequence[ItemScores], split: Split) -> NDArray[np.float32]:
    """The per-item scores that an objective is the mean of; ``scores`` has one entry for each evaluator."""
    values = scores[objective.evaluator][objective.metric]
    return values[: objective.items] if split == "search" else values


@dataclass(frozen=True)
class EvaluatorInfo:
    """An evaluator as the driver sees it; ``version`` keys its scores in the store, the counts are items by split."""

    name: str
    version: str
    search_items: int
    held_out_items: int


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

    def tasks(self, split: Split) -> list[Task]:
        """What a candidate is scored on: on the search split as many items as objectives want, else every item."""
        tasks = []
        for position, evaluator in enumerate(self.evaluators):
            wanted = [o.items for o in self.objectives if o.evaluator == position]
            count = max(wanted) if split == "search" else evaluator.held_out_items
            tasks.append(Task(position, split, range(count)))
        return tasks
