"""From what workers measured to what the store keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge.search.jobs import Measured, Task
from evomerge.search.setup import Setup, objective_values
from evomerge.search.statistics import mean_and_error
from evomerge.store import Estimate, Scores


def to_scores(setup: Setup, result: Measured, tasks: Sequence[Task]) -> list[Scores]:
    """Per-item scores in the store's form, one for each task of the job."""
    return [
        Scores(
            evaluator=setup.evaluators[task.evaluator].version,
            split=task.split,
            items=np.asarray(task.indices, dtype=np.int32),
            metrics=metrics,
        )
        for task, metrics in zip(tasks, result.scores, strict=True)
    ]


def estimate_objectives(setup: Setup, scores: Sequence[Scores]) -> dict[str, Estimate]:
    """Each objective's mean over its items of the search split, with its standard error."""
    metrics = [each.metrics for each in scores]
    return {o.name: mean_and_error(objective_values(o, metrics, "search")) for o in setup.objectives}
