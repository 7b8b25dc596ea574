"""What passes between driver and workers: jobs one way, results or failures the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Split
from evomerge.recipe import Recipe

FailureReason = Literal["error", "not_finite", "out_of_memory", "worker_died", "timeout"]

# Failures that say something of the worker or its machine rather than of the candidate: another attempt may succeed.
WORKER_FAULTS: frozenset[FailureReason] = frozenset({"out_of_memory", "worker_died", "timeout"})


@dataclass(frozen=True)
class Task:
    """One evaluator's share of a job: which of its items to score.

    ``evaluator`` is the evaluator's position in the search's list; ``indices`` are positions in the split.
    """

    evaluator: int
    split: Split
    indices: Sequence[int]


@dataclass(frozen=True)
class Job:
    """One attempt at one candidate."""

    candidate: int
    attempt: int
    recipe: Recipe
    tasks: Sequence[Task]


@dataclass(frozen=True)
class Measured:
    """What a worker measured: for each task of the job, scores by metric (float32 [n_items]); seconds by phase."""

    scores: Sequence[Mapping[str, NDArray[np.float32]]]
    timings: Mapping[str, float]


@dataclass(frozen=True)
class Failed:
    """Why an attempt gave no scores. ``log`` is the traceback or the worker's last words."""

    reason: FailureReason
    message: str
    log: str = ""


@dataclass(frozen=True)
class Finished:
    """The end of one attempt."""

    candidate: int
    attempt: int
    worker: str
    result: Measured | Failed


@dataclass(frozen=True)
class PoolState:
    """What a pool is doing, for the screen: workers by what they do now."""

    workers: int
    busy: int
    starting: int = 0
    queued: int = 0
