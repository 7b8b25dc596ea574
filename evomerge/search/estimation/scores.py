"""Scores of items: from the results of workers to rows of the store, and to estimates of a candidate's measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from evomerge.recipes.use import ExpertUse, together
from evomerge.search.estimation.items import ItemOrder
from evomerge.search.estimation.racing import difference_estimate, stratified_estimate
from evomerge.search.estimation.statistics import mean_and_error
from evomerge.search.preparing.setup import Counts, MeasureInfo, Setup
from evomerge.search.settings.sections import BestKept
from evomerge.search.work.jobs import Measured, Task
from evomerge.store import Answers, Estimate, Scores


def to_scores(setup: Setup, result: Measured, tasks: Sequence[Task]) -> list[Scores]:
    """The scores of a job as rows of the store, one for each task."""
    return [
        Scores(
            evaluator=setup.evaluators[task.evaluator].version,
            split=task.split,
            items=np.asarray(task.indices, dtype=np.int32),
            metrics=metrics,
        )
        for task, metrics in zip(tasks, result.scores, strict=True)
    ]


def to_answers(setup: Setup, result: Measured, tasks: Sequence[Task]) -> list[Answers]:
    """The answers and drawings of a job as rows of the store, for the tasks whose answers the search keeps."""
    nothing: list[Mapping[int, Any]] = [{}] * len(tasks)
    given = zip(tasks, result.answers or nothing, result.drawings or nothing, strict=True)
    return [
        Answers(setup.evaluators[task.evaluator].version, task.split, list(texts), list(texts.values()), drawings)
        for task, texts, drawings in given
        if (texts or drawings) and (isinstance(setup.answers, BestKept) or setup.answers in ("all", task.split))
    ]


def uses_by_name(setup: Setup, result: Measured, tasks: Sequence[Task]) -> dict[str, ExpertUse]:
    """How a model with routed experts used them, by the evaluator's name; empty for other models."""
    names = [setup.evaluators[task.evaluator].name for task in tasks]
    pairs = [(name, use) for name, use in zip(names, result.uses, strict=False) if use is not None]
    found = {name: together(use for of, use in pairs if of == name) for name in names}
    return {name: use for name, use in found.items() if use is not None}


class ScoreTable:
    """The known scores of a candidate on the search split.

    For each evaluator and metric it has float32 [items], by position in the split; NaN where there is no score yet.
    """

    def __init__(self) -> None:
        self._values: dict[int, dict[str, NDArray[np.float32]]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._values

    @property
    def count(self) -> int:
        """The number of scored items, summed over evaluators."""
        return sum(int((~np.isnan(next(iter(metrics.values())))).sum()) for metrics in self._values.values())

    @classmethod
    def of(cls, setup: Setup, scores: Sequence[Scores]) -> Self:
        """The table of a recorded candidate."""
        table, versions = cls(), [evaluator.version for evaluator in setup.evaluators]
        for row in scores:
            table.add(setup, versions.index(row.evaluator), row.items, row.metrics)
        return table

    def add(
        self,
        setup: Setup,
        evaluator: int,
        items: NDArray[np.int32] | Sequence[int],
        metrics: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Enter scores of an evaluator.

        Args:
            evaluator: its index in the setup.
            items: positions in the search split.
            metrics: for each metric float32 [items], in the order of ``items``.
        """
        count = setup.evaluators[evaluator].search_items
        mine = self._values.setdefault(evaluator, {})
        for metric, values in metrics.items():
            mine.setdefault(metric, np.full(count, np.nan, dtype=np.float32))[np.asarray(items, dtype=np.int64)] = (
                values
            )

    def values(self, measure: MeasureInfo) -> NDArray[np.float32]:
        """The scores whose mean is a measure: float32 [measure.items], NaN where there is none."""
        mine = self._values.get(measure.evaluator, {}).get(measure.metric)
        return np.full(measure.items, np.nan, dtype=np.float32) if mine is None else mine[: measure.items]

    def missing(self, evaluator: int, positions: NDArray[np.int32]) -> list[int]:
        """Which of these positions have no score of an evaluator yet, in ascending order."""
        mine = next(iter(self._values.get(evaluator, {}).values()), None)
        missing = positions if mine is None else positions[np.isnan(mine[positions])]
        ascending: list[int] = np.sort(missing).tolist()
        return ascending

    def scores(self, setup: Setup) -> list[Scores]:
        """All scores as rows of the store, items in ascending order."""
        scores = []
        for evaluator, metrics in sorted(self._values.items()):
            known = np.flatnonzero(~np.isnan(next(iter(metrics.values())))).astype(np.int32)
            kept = {metric: values[known] for metric, values in metrics.items()}
            scores.append(Scores(setup.evaluators[evaluator].version, "search", known, kept))
        return scores

    def take(self, setup: Setup, other: ScoreTable, evaluator: int, positions: NDArray[np.int32]) -> None:
        """Copy the scores of an evaluator at these positions from another table, where it has any."""
        theirs = other._values.get(evaluator, {})
        if not theirs:
            return
        known = np.sort(positions[~np.isnan(next(iter(theirs.values()))[positions])])
        if len(known):
            self.add(setup, evaluator, known, {metric: values[known] for metric, values in theirs.items()})

    def update(self, setup: Setup, other: ScoreTable) -> None:
        """Copy all scores from another table."""
        for evaluator in other._values:
            self.take(setup, other, evaluator, np.arange(setup.evaluators[evaluator].search_items, dtype=np.int32))

    def within(self, setup: Setup, orders: Sequence[ItemOrder], counts: Counts) -> ScoreTable:
        """A table of only the scores among each evaluator's first ``counts`` items, in the order of ``orders``."""
        table = ScoreTable()
        for evaluator, count in counts.items():
            table.take(setup, self, evaluator, orders[evaluator].positions[:count])
        return table


Prediction = Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.float64]]
"""(int64 [k] positions of scored items, float64 [k] their scores) -> float64 [n], a predicted score for every item."""


def estimate(measure: MeasureInfo, table: ScoreTable, order: ItemOrder, predict: Prediction | None) -> Estimate | None:
    """A measure's mean over all of its items, with its standard error; None if no item is scored.

    If some are not scored, the mean is estimated (``racing.difference_estimate``, or without a prediction
    ``racing.stratified_estimate``). The correction by the errors of the prediction may lead beyond the range of
    possible means, so the mean is clipped to the range of known and predicted scores.

    Args:
        order: that of the measure's evaluator.
        predict: predicts the scores on all items; None for no prediction.
    """
    values = table.values(measure)
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return None
    if len(known) == len(values):
        return mean_and_error(values)
    sample = order.sample(known.astype(np.int32), measure.items)
    scores = values[known].astype(np.float64)
    if predict is None:
        raw, all_scores = stratified_estimate(scores, sample), scores
    else:
        predicted = predict(known, scores)
        raw = difference_estimate(scores, known, predicted, sample)
        all_scores = np.concatenate([scores, predicted])
    mean = float(np.clip(raw.mean, all_scores.min(), all_scores.max()))
    return Estimate(mean=mean, stderr=raw.stderr if len(scores) > 1 else None, n=raw.n)


def missing_tasks(table: ScoreTable, orders: Sequence[ItemOrder], counts: Counts) -> list[Task]:
    """The tasks that are left until each evaluator's first ``counts`` items, in its order, are all scored."""
    tasks = []
    for evaluator, count in sorted(counts.items()):
        if missing := table.missing(evaluator, orders[evaluator].positions[:count]):
            tasks.append(Task(evaluator, "search", missing))
    return tasks
