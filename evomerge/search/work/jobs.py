"""What passes between driver and workers: jobs one way, results or failures the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Split
from evomerge.genome import Genome
from evomerge.recipes.base import Recipe
from evomerge.recipes.use import ExpertUse
from search_spaces.base import Measures

FailureReason = Literal["error", "not_finite", "out_of_memory", "worker_died", "timeout", "node_lost", "cluster_fault"]

# Failures of the worker or its machine rather than of the candidate: another attempt may succeed.
WORKER_FAULTS: frozenset[FailureReason] = frozenset(
    {"out_of_memory", "worker_died", "timeout", "node_lost", "cluster_fault"}
)

# Of these, failures that no candidate can cause: they use up no attempts. A candidate can kill its worker.
BLAMELESS: frozenset[FailureReason] = frozenset({"node_lost", "cluster_fault"})


@dataclass(frozen=True)
class Task:
    """One evaluator's share of a job: which of its items to score.

    ``evaluator`` is the evaluator's position in the search's list; ``indices`` are positions in the split.
    """

    evaluator: int
    split: Split
    indices: Sequence[int]


@dataclass(frozen=True)
class Calibrate:
    """Run a source over the calibration texts, for recipes like the job's. Returns as ``Measured``."""

    source: str


@dataclass(frozen=True)
class FitNumbers:
    """Fit the fitted parts of recipes like the job's. Returns as ``Measured``."""


@dataclass(frozen=True)
class TextLosses:
    """Score the job's recipe by its losses on the calibration texts. Returns as ``Measured``, with one entry
    of scores: under "loss" nats per token, float32 [texts].
    """


@dataclass(frozen=True)
class Descend:
    """Follow the gradient of a proxy downwards from a genome: of the mean over items of log(1 - log p), where p is the
    probability p(answer | prompt) of the right answer.

    Each step draws fresh items and is one of Adam in the unit box, where every gene is scaled by its range; values that
    leave the box are clipped to its border. Genes without a derivative of the proxy do not move. Returns as
    ``Descended``.

    Attributes:
        start: float64 [genes], where it begins; the job's recipe is what it decodes to.
        evaluator: position in the search's list of the one whose requests for likelihoods are the proxy.
        indices: positions in the search split that items are drawn from.
        items: the number drawn for each step, at most all of them.
        keep: the numbers of steps after which the point is returned, from 1, ascending. The last one is the number
            of steps; if empty, only the gradient at the start is computed.
        rate: Adam's learning rate: about how far a gene moves in a step, as a fraction of its range.
        seed: of the draws.
        weights: of the items at ``indices``, in the mean over those drawn; equal weights if empty.
        measures: of the sources, from which the search's space was built.
    """

    start: Genome
    evaluator: int
    indices: Sequence[int]
    items: int
    keep: Sequence[int]
    rate: float
    seed: int
    weights: Sequence[float] = ()
    measures: Measures = field(default_factory=Measures)


@dataclass(frozen=True)
class Job:
    """One attempt at one candidate: its tasks are scored, or ``instead`` is done. Jobs of one ``group`` are scored at
    once.
    """

    candidate: int
    attempt: int
    recipe: Recipe
    tasks: Sequence[Task]
    group: int | None = None
    instead: Calibrate | FitNumbers | TextLosses | Descend | None = None


@dataclass(frozen=True)
class Measured:
    """What a worker measured: for each task of the job, scores by metric (float32 [n_items]); seconds by phase.

    ``answers``, for each task or not at all: what the model wrote, by the item's position, if it wrote anything.
    ``change`` is the model's distance from the search's base; None if not measured. ``uses``, for each task or not
    at all: how a model of experts used them; None if no token passed. ``drawings``, like ``answers``: small
    copies of the pictures that were made with the model, PNG or JPEG.
    """

    scores: Sequence[Mapping[str, NDArray[np.float32]]]
    timings: Mapping[str, float]
    answers: Sequence[Mapping[int, str]] = ()
    change: float | None = None
    uses: Sequence[ExpertUse | None] = ()
    drawings: Sequence[Mapping[int, bytes]] = ()


@dataclass(frozen=True)
class Descended:
    """The result of a descent.

    Attributes:
        points: the genome after each number of steps in ``Descend.keep``.
        losses: float64 [steps, or 1 where there are none]: the proxy before each step, a mean over that step's
            items. Items differ from step to step.
        gradient: float64 [genes], of the proxy at the start by each gene, for a unit of the gene; NaN of
            those by which it has no derivative.
        timings: seconds by phase: "merge" (writing weights), "gradient" (all passes).
    """

    points: Sequence[Genome]
    losses: NDArray[np.float64]
    gradient: NDArray[np.float64]
    timings: Mapping[str, float]


@dataclass(frozen=True)
class Failed:
    """Why an attempt gave no scores. ``log`` is the traceback or the worker's last output."""

    reason: FailureReason
    message: str
    log: str = ""


Result = Measured | Descended | Failed
"""What a worker returns: ``Descended`` for a descent, ``Measured`` for all else, or ``Failed``."""


@dataclass(frozen=True)
class Finished:
    """The end of one attempt. ``worker`` is its name, followed by @ and that of its node if there are several."""

    candidate: int
    attempt: int
    worker: str
    result: Result


@dataclass(frozen=True)
class PoolState:
    """The state of a pool, for the screen: workers by what they do now. Each takes up to ``together`` jobs at once;
    ``gpus`` counts those of all workers.
    """

    workers: int
    busy: int
    starting: int = 0
    queued: int = 0
    together: int = 1
    gpus: float = 0.0


def batch(queue: deque[Job]) -> list[Job]:
    """Take the next jobs for one worker: those of a group, or a single one."""
    jobs = [queue.popleft()]
    while queue and queue[0].group == jobs[0].group is not None:
        jobs.append(queue.popleft())
    return jobs


NewsKind = Literal[
    "node joined",
    "node drains",
    "node left",
    "worker started",
    "worker failed to start",
    "worker dropped",
    "worker died",
]
"""What happens to nodes and workers, in the words of the search's events. Dropped workers are ended by the pool."""


@dataclass(frozen=True)
class PoolNews:
    """Something that happened to a node or to a worker; ``why`` may be empty."""

    kind: NewsKind
    node: str
    worker: str = ""
    why: str = ""

    @property
    def payload(self) -> dict[str, str]:
        """The content of the event apart from its kind."""
        content = {"node": self.node, "worker": self.worker, "why": self.why}
        return {name: value for name, value in content.items() if value}
