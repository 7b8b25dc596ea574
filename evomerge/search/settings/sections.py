"""The sections of the search file: what a user can write under each of its keys."""

from __future__ import annotations

import os.path
from collections.abc import Collection, Mapping
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

# Nonsensical values fail at once, and not when memory or a column of the store overflows.
Items = Annotated[int, Field(gt=0, le=10**8)]
Candidates = Annotated[int, Field(gt=0, le=10**7)]
WorkerCount = Annotated[int, Field(gt=0, le=100_000)]
Threads = Annotated[int, Field(gt=0, le=4096)]
Price = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)]
Amount = Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)]
Hours = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]


MAX_GPUS = 16
"""The largest number of GPUs in one node: most have at most eight, a few have sixteen."""


class Section(BaseModel):
    """A part of the search file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(Section):
    """A metric of an evaluator.

    Keys that are not listed here (``task: mini_math_ja``) are the evaluator's own settings. ``items`` limits how many
    items of the search split a candidate is scored on; the held-out split is always scored completely.
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
    """Texts that sources are run over, for methods that need the inputs of their layers.

    In a file of JSON lines (``.jsonl``) the text is under ``text``; any other file has one text per line. The first
    ``prompts`` texts are used, each up to ``tokens`` tokens. ``sources`` names files for single sources, such as texts
    of the task that each was trained for; ``file`` is for all others.
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
        """The same with absolute paths, relative to the folder ``root``."""

        def absolute(path: Path) -> Path:
            return Path(os.path.realpath(root / os.path.expanduser(path)))

        file = None if self.file is None else absolute(self.file)
        own = {name: absolute(path) for name, path in self.sources.items()}
        return self.model_copy(update={"file": file, "sources": own})

    @cached_property
    def texts(self) -> Calibration:
        """The texts, read once when first needed."""
        return self.recorded(None)

    def recorded(self, digest: str | None) -> Calibration:
        """The texts of a search that has recorded their digest: read only if evidence from them is missing."""
        own = {name: (path, f"{_OWN_TEXTS}.{name}") for name, path in self.sources.items()}
        return calibration_from(self.file, self.prompts, self.tokens, "calibration.file", digest, own)

    def check(self, sources: Collection[str]) -> None:
        """Refuse texts for a source that does not exist, or a source without any. Raises InputError."""
        own = {name: f"{_OWN_TEXTS}.{name}" for name in self.sources}
        check_all_have_texts(own, self.file is not None, sources)


class Objective(Measure):
    """A quantity that the search improves. ``direction`` is the metric's own by default."""

    direction: Literal["maximize", "minimize"] | None = None


class Constraint(Measure):
    """A requirement: a mean of ``at_least`` or ``at_most``. Candidates that violate it rank behind all others."""

    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("needs one of at_least and at_most")
        return self


class Feature(Measure):
    """A property that sets apart equally good candidates, such as their size: a grid keeps the best of each niche.

    ``range`` is divided into ``bins`` equal parts; a value outside of it belongs to the nearest one.
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
    """A cheap metric that is scored first, so that candidates that it ranks low need not be scored on the objectives.

    It is used only while its ranks agree with those of ``objective`` (by default the first): while Kendall's tau,
    measured during the search, is at least ``least_tau``. Then it rejects the lowest ``drop`` share of each
    generation.
    """

    objective: str | None = None
    least_tau: float = Field(default=0.5, gt=0, lt=1)
    drop: float = Field(default=0.5, gt=0, lt=1)


class Proxy(Measure):
    """A smooth substitute for the objectives, whose gradient by weights proposes candidates. It decides nothing.

    The evaluator gives the likelihood p of each right answer; the proxy is the mean of log(1 - log p). With each
    generation a worker takes ``steps`` steps further down its gradient, each on ``drawn`` of the first ``items`` items
    of the search split, of about ``rate`` of each parameter's range. The points half way and at the end are scored.
    """

    evaluator: str = "likelihood"
    metric: str = "log_likelihood"
    drawn: Items = 64
    steps: int = Field(default=16, ge=2, le=1000)
    rate: float = Field(default=0.05, gt=0, le=0.5)


class FitItems(Measure):
    """Right answers that numbers of models are fitted to before the search; no candidate is scored on them.

    The keys are those of the evaluator ``likelihood``. Each of ``steps`` steps draws ``drawn`` of the first ``items``
    items of its file, or of all. Numbers of about 1 move by about ``rate`` in the first step, and by less and less,
    down to 0 along a cosine. None of the items may be in a split of the search's own evaluators.
    """

    evaluator: str = "likelihood"
    metric: str = "log_likelihood"
    drawn: Items = 16
    steps: int = Field(default=120, ge=1, le=100_000)
    rate: float = Field(default=0.1, gt=0, le=10)


class Racing(Section):
    """Scores every candidate on few items, and on more only if that can change a decision.

    ``rungs`` are increasing numbers of items. At each rung the candidates whose place is clear, with ``confidence`` in
    each comparison, leave the race. The last rung ends it for all except those that challenge the best: these continue
    to all items. ``estimate`` says what predicts the scores of items that were not scored: the best ``baseline``, or a
    model of ``item_response``, which is used only while it is measured to be better.
    """

    rungs: tuple[Annotated[int, Field(ge=10, le=10**8)], ...] = Field(min_length=1, max_length=100)
    confidence: float = Field(default=0.9, gt=0.5, lt=1)
    estimate: Estimate = "baseline"

    @model_validator(mode="before")
    @classmethod
    def _without_challengers(cls, content: object) -> object:
        """Drop a choice that earlier versions recorded with every race; only its default is left."""
        if isinstance(content, Mapping) and content.get("challengers") == "scores":
            return {key: value for key, value in content.items() if key != "challengers"}
        return content

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        return rising(rungs)


def rising(rungs: tuple[int, ...]) -> tuple[int, ...]:
    """The rungs of a race. Raises ValueError: one is not larger than the one before."""
    if list(rungs) != sorted(set(rungs)):
        raise ValueError("must each be larger than the one before")
    return rungs


MAX_KEPT = 8
"""The largest number of sources that are searched after a choice: published gains stop at five to eight (arXiv
2509.24244)."""


class Select(Section):
    """Chooses among many sources before anything is searched; the base and the tokenizer's source always stay.

    Each source alone, and the base, are scored on the first of ``rungs`` items of every maximised objective, and on
    more while their place there is not clear with ``confidence``. Sources that the base or others surely beat are
    dropped. Of the rest, the ``keep`` that add most items to those before them are searched. ``rest``: the others enter
    as one averaged source (``average``), not at all (``drop``), or only if that is ``measured`` to improve the average
    of those kept. A change longer than ``norm_ratio`` times the median of the kept ones is scaled down to that length.
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
    """When the search ends: at the first bound reached. Baselines and cached candidates count as candidates.

    ``patience`` counts generations in which the front did not change. ``cost`` is money, in ``cluster.currency``: the
    cost of the workers at the prices of ``cluster`` while they are held.
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
    """What is scored before anything is searched, in addition to sources, their average and the method's defaults.

    ``kappa``: task arithmetic with lambda = kappa sqrt(N) on the mean of N task vectors, in spaces over task vectors.
    ``soups``: with calibration texts, LM-Cocktail's mix by the losses on these, and their greedy soup.
    """

    kappa: bool = True
    soups: bool = True


class Confirm(Section):
    """What is scored on the held-out split at the end: the front, the ``top`` of the search, the baselines.

    ``drawn`` of the best by what decides, or for a front by each objective, are also scored there once the winner is
    named, only to plot the winner's curse. ``confidence`` applies to all intervals of an objective together.
    """

    top: Candidates = 5
    drawn: int = Field(default=0, ge=0, le=10**7)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class Workers(Section):
    """How many workers there may be if nodes come and go. The search begins when ``min`` fit."""

    min: int = Field(default=1, ge=0)
    max: WorkerCount

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, {self.max}")
        return self


class Cluster(Section):
    """The workers.

    ``address`` joins a running Ray cluster; if left out, one is started on this machine and shut down at the end.
    ``workers``, if left out, means as many as the cluster has room for; ``{min, max}``, as many as fit while nodes
    come and go. ``cpus_per_worker`` is also the number of threads that a worker computes with, in either
    pool. ``residency`` says where a worker on a GPU keeps the sources: in the device's memory, in pinned host memory,
    or in mapped files; ``auto`` takes the first of these that has room. ``insecure`` joins a cluster that requires no
    token. ``gpus_per_worker`` is a share of a GPU, or whole GPUs of one node, over which a worker spreads its model.
    ``runtime_env`` is Ray's runtime environment for worker processes.
    ``gpu_hour`` is the price of a GPU per hour, and ``worker_hour`` that of a worker apart from its GPUs, in
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
        """How many devices a worker spreads its model over."""
        return max(1, int(self.gpus_per_worker or 1))

    @property
    def prices(self) -> Prices | None:
        """What workers cost; None if not given."""
        return Prices.of(self.gpu_hour, self.worker_hour, self.currency)


Mode = Literal["generational", "asynchronous"]
"""Whether generations wait for their last candidate, so that a search is reproducible, or no worker ever waits."""


class BestKept(Section):
    """Keep the search-split answers of the ``best`` by each objective, of baselines, the front and the elites."""

    best: Candidates


KeptAnswers = Literal["all", "held_out", "none"] | BestKept
"""Which answers of models the store keeps for people to read."""
