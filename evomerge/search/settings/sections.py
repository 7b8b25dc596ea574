"""The sections of the search file: what a person may write under each of its keys."""

from __future__ import annotations

import os.path
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    field_validator,
    model_validator,
)

from evomerge.calibration import Calibration, calibration_from, check_all_have_texts
from evomerge.faults import NAME_PATTERN
from evomerge.prices import Prices
from evomerge.store.record import Estimate

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]

# What nobody means fails at once, and not when memory or a column of the store is full.
Items = Annotated[int, Field(gt=0, le=10**8)]
Candidates = Annotated[int, Field(gt=0, le=10**7)]
WorkerCount = Annotated[int, Field(gt=0, le=100_000)]
Threads = Annotated[int, Field(gt=0, le=4096)]
Price = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)]
Amount = Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)]
Hours = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]


MAX_GPUS = 16
"""GPUs of one node: what is built has eight, a few have sixteen."""


class Section(BaseModel):
    """A part of the search file: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(Section):
    """A metric of an evaluator.

    Keys that are not named here (``task: mini_math_ja``) are the evaluator's own settings. ``items`` bounds how many
    items of the search split a candidate is scored on; the held-out split is always scored whole.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    evaluator: str = "lm_eval"
    metric: str
    items: Items | None = None

    @property
    def evaluator_keys(self) -> dict[str, Any]:
        """The keys that belong to the evaluator's settings."""
        return dict(self.model_extra or {})


_OWN_TEXTS = "calibration.sources"


class CalibrationTexts(Section):
    """Texts that sources are run over, for methods that must know what their layers are given.

    Of lines of JSON (``.jsonl``) the text is under ``text``; any other file is a text a line. The first ``prompts``
    count, each up to ``tokens`` tokens. ``sources`` names files of single sources, such as texts of the task that each
    was trained for; ``file`` is of all others.
    """

    file: Path | None = None
    sources: dict[Name, Path] = Field(default_factory=dict)
    prompts: int = Field(default=32, gt=0, le=100_000)
    tokens: int = Field(default=512, gt=0, le=1_000_000)

    @model_validator(mode="after")
    def _some_file(self) -> Self:
        if self.file is None and not self.sources:
            raise ValueError("names no texts; give a file, or one for each source under sources")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are named."""
        return (*(() if self.file is None else (self.file,)), *self.sources.values())

    def at(self, root: Path) -> Self:
        """The same with its paths absolute, taken from the folder ``root``."""

        def absolute(path: Path) -> Path:
            return Path(os.path.realpath(root / os.path.expanduser(path)))

        file = None if self.file is None else absolute(self.file)
        own = {name: absolute(path) for name, path in self.sources.items()}
        return self.model_copy(update={"file": file, "sources": own})

    @cached_property
    def texts(self) -> Calibration:
        """The texts, read once, when they are first needed."""
        return self.recorded(None)

    def recorded(self, digest: str | None) -> Calibration:
        """The texts of a search that has recorded their digest: read only where evidence of them is missing."""
        own = {name: (path, f"{_OWN_TEXTS}.{name}") for name, path in self.sources.items()}
        return calibration_from(self.file, self.prompts, self.tokens, "calibration.file", digest, own)

    def check(self, sources: Collection[str]) -> None:
        """Refuse texts of a source that there is not, or a source without any. Raises InputError."""
        own = {name: f"{_OWN_TEXTS}.{name}" for name in self.sources}
        check_all_have_texts(own, self.file is not None, sources)


class Objective(Measure):
    """What the search makes better. ``direction`` is the metric's own when left out."""

    direction: Literal["maximize", "minimize"] | None = None


class Constraint(Measure):
    """What a candidate must keep: a mean of ``at_least`` or ``at_most``. Those that miss it rank after all others."""

    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("needs one of at_least and at_most")
        return self


class Feature(Measure):
    """What sets candidates apart that may be equally good, such as their size: a grid keeps the best of each niche.

    ``range`` is divided into so many ``bins``; a value beyond it belongs to the bin at that end.
    """

    range: tuple[FiniteFloat, FiniteFloat]
    bins: int = Field(default=10, ge=2, le=1000)

    @field_validator("range")
    @classmethod
    def _rises(cls, range: tuple[float, float]) -> tuple[float, float]:
        if not range[0] < range[1]:
            raise ValueError(f"must go from a smaller number to a larger one, and is {list(range)}")
        return range


class Screen(Measure):
    """A cheap metric that is scored first, so that candidates it finds poor need not be scored on the objectives.

    It decides only while its ranks agree with those of ``objective`` (the first when left out): while Kendall's tau,
    measured during the search, is ``least_tau`` or more. Then the ``drop`` share of each generation that it finds
    poorest is left out.
    """

    objective: str | None = None
    least_tau: float = Field(default=0.5, gt=0, lt=1)
    drop: float = Field(default=0.5, gt=0, lt=1)


class Proxy(Measure):
    """A smooth stand-in for the objectives, whose gradient by weights proposes candidates. It decides nothing.

    The evaluator says how likely each right answer is, p; the proxy is the mean of log(1 - log p). Beside each
    generation a worker takes ``steps`` steps further down its gradient, each on ``drawn`` of the first ``items`` items
    of the search split, of about ``rate`` of each parameter's range; the points half way and at their end are scored.
    """

    evaluator: str = "likelihood"
    metric: str = "log_likelihood"
    drawn: Items = 64
    steps: int = Field(default=16, ge=2, le=1000)
    rate: float = Field(default=0.05, gt=0, le=0.5)


class FitItems(Measure):
    """What numbers of models are fitted to before the search: right answers that no candidate is scored on.

    The keys are those of the evaluator ``likelihood``. Of the first ``items`` of its file, or of all, each of ``steps``
    steps takes ``drawn``; numbers that are about 1 go by about ``rate`` in the first step, and by less and less, down
    to nothing along a cosine. None of the items may be in a split of the search's own evaluators.
    """

    evaluator: str = "likelihood"
    metric: str = "log_likelihood"
    drawn: Items = 16
    steps: int = Field(default=120, ge=1, le=100_000)
    rate: float = Field(default=0.1, gt=0, le=10)


class Racing(Section):
    """Scores every candidate on few items, and on more only where that decides something.

    ``rungs`` are numbers of items, rising. At each one the candidates whose place is clear, with ``confidence`` in each
    comparison, leave the race. The last rung ends it for all but those that challenge the best: these go on to all
    items. ``estimate`` says what predicts the scores of items that were not scored: the best ``baseline``, or a model
    of ``item_response``, which is used only while it is found to be the better of the two. Who challenges is said by
    its own ``scores``, or, in generations of a search with one objective, by those of its ``neighbours`` as well.
    """

    rungs: tuple[Annotated[int, Field(ge=10, le=10**8)], ...] = Field(min_length=1, max_length=100)
    confidence: float = Field(default=0.9, gt=0.5, lt=1)
    estimate: Estimate = "baseline"
    challengers: Literal["scores", "neighbours"] = "scores"

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        return rising(rungs)


def rising(rungs: tuple[int, ...]) -> tuple[int, ...]:
    """The rungs of a race. Raises ValueError: one is no larger than the one before."""
    if list(rungs) != sorted(set(rungs)):
        raise ValueError("must each be larger than the one before")
    return rungs


MAX_KEPT = 8
"""Sources that are searched after a choice: published gains end at five to eight (arXiv 2509.24244)."""


class Select(Section):
    """Chooses among many sources before anything is searched; the base, and what gives the tokenizer, always stay.

    Each source alone, and the base, are scored on the first of ``rungs`` items of every maximised objective, and on
    more while its place there is not clear with ``confidence``. Those that the base or others surely better leave. Of
    the rest the ``keep`` are searched that add most items to those before them. ``rest``: the others enter as one
    averaged source (``average``), not at all (``drop``), or as is ``measured`` to be better beside the average of those
    kept. A change that is longer than ``norm_ratio`` times the median of the kept ones is scaled down to that.
    """

    keep: int = Field(default=6, ge=2, le=MAX_KEPT)
    rungs: tuple[Annotated[int, Field(ge=2, le=10**8)], ...] = Field(default=(10, 20, 30), min_length=1, max_length=100)
    confidence: float = Field(default=0.9, gt=0.5, lt=1)
    rest: Literal["measured", "average", "drop"] = "measured"
    norm_ratio: float = Field(default=3.0, ge=1, le=10**6)

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        return rising(rungs)


class Budget(Section):
    """When the search ends: whichever comes first. Baselines and cached candidates count as candidates.

    ``patience`` counts generations in which the front did not change. ``cost`` is money, in ``cluster.currency``: what
    workers cost by the prices of ``cluster`` for as long as they are held.
    """

    candidates: Candidates | None = None
    hours: Hours | None = None
    patience: Candidates | None = None
    cost: Amount | None = None

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if all(bound is None for bound in (self.candidates, self.hours, self.patience, self.cost)):
            raise ValueError("needs candidates, hours, patience or cost, or the search would never end")
        return self


class Baselines(Section):
    """What is scored before anything is searched, beside sources, their average and the method's defaults.

    ``kappa``: task arithmetic with lambda = kappa sqrt(N) on the mean of N task vectors, in spaces over task vectors.
    ``soups``: where there are calibration texts, LM-Cocktail's mix by the losses of these, and their greedy soup.
    """

    kappa: bool = True
    soups: bool = True


class Confirm(Section):
    """What is scored on the held-out split at the end: the front, the ``top`` of the search, the baselines.

    ``drawn`` of the best by what decides, or of a front by each objective, are scored there too, once the winner is
    named, to draw the winner's curse alone. ``confidence`` is that of all intervals of an objective together.
    """

    top: Candidates = 5
    drawn: int = Field(default=0, ge=0, le=10**7)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class Workers(Section):
    """How many workers there may be, where nodes come and go. The search begins when ``min`` fit."""

    min: int = Field(default=1, ge=0)
    max: WorkerCount

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, {self.max}")
        return self


class Cluster(Section):
    """The workers.

    ``address`` joins a running Ray cluster; left out, one is started on this machine and shut down at the end.
    ``workers`` left out means as many as the cluster has room for; a number, so many; ``{min, max}``, as many as fit
    while nodes come and go. ``cpus_per_worker`` is also the number of threads that a worker computes with, in either
    pool. ``residency`` says where a worker on a GPU keeps the sources: in the device's memory, in pinned host memory,
    or in mapped files; ``auto`` takes the first of these that has room. ``insecure`` joins a cluster that asks for no
    token. ``gpus_per_worker`` is a share of a GPU, or whole GPUs of one node, over which a worker lays its model.
    ``runtime_env`` is what Ray sets up before a worker's process starts, in Ray's words (``runtime_env``).
    ``gpu_hour`` is the price of a GPU for an hour, and ``worker_hour`` that of a worker beside its GPUs, in
    ``currency``.
    """

    address: str | None = None
    workers: WorkerCount | Workers | None = None
    gpus_per_worker: float | None = Field(default=None, ge=0, le=1024)
    cpus_per_worker: Threads = 1
    insecure: bool = False
    residency: Literal["auto", "device", "pinned", "mapped"] = "auto"
    runtime_env: dict[str, Any] = {}
    gpu_hour: Price | None = None
    worker_hour: Price | None = None
    currency: str = Field(default="USD", pattern=r"^[^\s\d.,]{1,8}$")

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            low = int(gpus)
            problem = f"is {gpus:g}: a worker has a share of one GPU, or whole ones. Give {low} or {low + 1}"
            raise ValueError(problem)
        if gpus is not None and gpus > MAX_GPUS:
            raise ValueError(f"is {gpus:g} GPUs on one node, and no node has more than {MAX_GPUS}")
        return gpus

    @property
    def devices(self) -> int:
        """How many devices a worker lays its model over."""
        return max(1, int(self.gpus_per_worker or 1))

    @property
    def prices(self) -> Prices | None:
        """What workers cost; None where that is not said."""
        return Prices.of(self.gpu_hour, self.worker_hour, self.currency)


Mode = Literal["generational", "asynchronous"]
"""Whether a generation waits for its last candidate, and gives the same search every time, or no worker ever waits."""


class BestKept(Section):
    """Of the search split, what the ``best`` by each objective wrote, beside baselines, the front and the elites."""

    best: Candidates


KeptAnswers = Literal["all", "held_out", "none"] | BestKept
"""Of which splits, or of whom, the store keeps what models wrote: to be read, and for nothing else."""
