"""One evaluator's share of a candidate on a live model, checked; and what an exception says of an attempt."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.base import Evaluator
from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.printable import printable
from evomerge.search.work.jobs import Failed, Measured, Task


@dataclass(frozen=True)
class Scored:
    """A task that is done: its scores by metric, float32 [n_items]; what the model wrote; seconds by phase."""

    scores: Mapping[str, NDArray[np.float32]]
    answers: Mapping[int, str]
    seconds: Mapping[str, float]


def score_task(evaluator: Evaluator, live: LiveModel, task: Task) -> Scored:
    """Have an evaluator score its items, and check what it gives.

    Raises:
        ValueError: the evaluator, which may be somebody's plug-in, gave something else than it declares.
        NotFiniteError: a score is NaN or Inf.
    """
    found = evaluator.score(live, task.split, task.indices)
    for metric in evaluator.metrics:
        if metric not in found or found[metric].shape != (len(task.indices),):
            shape = found[metric].shape if metric in found else "nothing"
            raise ValueError(f"{evaluator.name} gave {shape} for {metric} of {len(task.indices)} items")
    for metric, values in found.items():
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{evaluator.name}: {metric} of {int((~np.isfinite(values)).sum())} items")
    return Scored(found, dict(evaluator.answers), dict(evaluator.seconds))


def measured(scored: Sequence[Scored], timings: Mapping[str, float]) -> Measured:
    """The result of a job whose tasks are done, with their seconds added to those of its other phases."""
    total = dict(timings)
    for each in scored:
        for phase, seconds in each.seconds.items():
            total[phase] = total.get(phase, 0.0) + seconds
    return Measured([each.scores for each in scored], total, [each.answers for each in scored])


def failure(error: BaseException) -> Failed:
    """What comes back of an attempt that raised."""
    # Half of a surrogate pair in a message would be a log that cannot be written.
    log = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
    if isinstance(error, NotFiniteError):
        return Failed("not_finite", str(error))
    told = printable(f"{type(error).__name__}: {error}".removesuffix(": "))
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Failed("out_of_memory", printable(str(error)) or told, log)
    if type(error).__name__ == "AcceleratorError":  # after one, CUDA fails every later call of this process
        return Failed("worker_died", printable(str(error)))
    return Failed("error", told, log)
