"""What a search is, as its store has recorded it: parsed once where it is read, and attributes from there on.

What older programs did not know of yet has a default, so that stores of every format are read. What belongs to a
plug-in, such as the keys of a search space, stays as its search file has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from evomerge.files import FileFingerprint
from evomerge.genome import Parameter
from evomerge.prices import Prices

_YEAR_10000 = 253402300800  # in seconds since 1970; no date is later

Estimate = Annotated[
    Literal["baseline", "item_response"], BeforeValidator(lambda given: "baseline" if given == "landmark" else given)
]
"""What predicts the scores of items that a race left out. Baselines were called landmarks once."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)


# What was resolved when the search began: its fingerprints --------------------------------------------------------


class Number(_Part):
    """A number that candidates have, over so many items of the search split."""

    name: str
    maximise: bool
    items: int

    @property
    def sign(self) -> float:
        """What it is multiplied by so that more is better."""
        return 1.0 if self.maximise else -1.0


class Measure(Number):
    """A metric of an evaluator: an objective. ``evaluator`` is its place in ``SearchRecord.evaluators``, ``version``
    what scores by it are kept under.
    """

    evaluator: int
    metric: str
    version: str


class Constraint(Measure):
    """What a candidate must keep: at least ``threshold`` where ``maximise``, at most that otherwise."""

    threshold: float


class Feature(Measure):
    """What sets candidates apart that may be equally good; its range is divided into ``bins``."""

    low: float
    high: float
    bins: int


class Screen(Measure):
    """A cheap metric that candidates are left out by. ``objective`` is the place of the one that it stands for."""

    objective: int
    least_tau: float
    drop: float


class Evaluator(_Part):
    """An evaluator with the number of its items by split.

    Attributes:
        version: what its scores are kept under.
        items: for each split a hash of its items; older programs kept none.
        accepted_version: the latest that was seen to score as recorded, where that is not the first.
    """

    name: str
    version: str
    search_items: int
    held_out_items: int
    items: Mapping[str, str] = {}
    accepted_version: str | None = None

    @property
    def accepted(self) -> str:
        """The version of the evaluator that scores as recorded: the first one, or the last that was seen to."""
        return self.accepted_version or self.version


class Start(_Part):
    """A genome that an earlier search found good, and which candidate of it that is."""

    label: str
    genome: tuple[float, ...]


class _Fingerprints(_Part):
    objectives: tuple[Measure, ...] = Field(min_length=1)
    files: Mapping[str, Mapping[str, FileFingerprint]] = Field(alias="sources")
    evaluators: tuple[Evaluator, ...]
    constraints: tuple[Constraint, ...] = ()
    features: tuple[Feature, ...] = ()
    screen: Screen | None = None
    parameters: tuple[Parameter, ...]
    calibration: str | None = None
    fit: str | None = None
    start: tuple[Start, ...] = ()


# What the search file says ----------------------------------------------------------------------------------------


class Optimizer(_Part):
    """The optimizer, and how it makes one number of several objectives, in the words of the search file."""

    name: str
    scalarisation: dict[str, Any] | None = None


class Budget(_Part):
    """When the search ends: whichever comes first."""

    candidates: int | None = None
    hours: float | None = None
    patience: int | None = None
    cost: float | None = None


class Confirm(_Part):
    """How many are scored on the held-out split, and how sure its intervals are."""

    top: int = 5
    drawn: int = 0
    confidence: float = 0.95


class Racing(_Part):
    """The rungs of the race, in items."""

    rungs: tuple[int, ...]
    confidence: float
    estimate: Estimate = "baseline"


class Cluster(_Part):
    """The workers, as far as it matters to those who look at a search."""

    gpus_per_worker: float | None = None
    gpu_hour: float | None = None
    worker_hour: float | None = None
    currency: str = ""

    @property
    def prices(self) -> Prices | None:
        return Prices.of(self.gpu_hour, self.worker_hour, self.currency)


class _Settings(_Part):
    seed: int
    sources: Mapping[str, str]
    base: str | None = None
    tokenizer: str | None = None
    space: Mapping[str, Any]
    optimizer: Optimizer
    budget: Budget
    confirm: Confirm
    racing: Racing | None = None
    compositions: Mapping[str, tuple[str, ...]] = {}
    cluster: Cluster = Cluster()
    device: str | None = None


# Both ---------------------------------------------------------------------------------------------------------------


class _Row(_Part):
    """A row of the table, so that an error names its column and the place there."""

    created_at: float = Field(ge=0, lt=_YEAR_10000, allow_inf_nan=False)
    spent_s: float = Field(ge=0, allow_inf_nan=False)
    worker_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    gpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    held_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    settings: _Settings
    fingerprints: _Fingerprints


class SearchRecord(_Settings, _Fingerprints):
    """What a search is.

    Attributes:
        sources: where each source was when the search began; ``files`` is what its files held.
        space: the search space, in the words of the search file.
        compositions: of objectives that need several skills at once, those that need one each.
        objectives: with ``constraints`` and ``features`` what candidates are measured by, resolved.
        screen: None where candidates are not screened.
        parameters: of the search space, in the order of a genome.
        calibration: the digest of the texts, where there are any.
        fit: that of the items that numbers are fitted to, and of how.
        start: what it takes from earlier searches.
    """

    files: Mapping[str, Mapping[str, FileFingerprint]]

    @classmethod
    def of(cls, row: object) -> Self:
        """That of a row of the table.

        Raises:
            ValueError: names the first value that is missing or of another kind.
        """
        try:
            parsed = _Row.model_validate(row)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {first['msg']}") from None
        return cls.model_construct(**dict(parsed.settings), **dict(parsed.fingerprints))

    @property
    def judging(self) -> tuple[Measure, ...]:
        """The measures by which one candidate is better than another: objectives and constraints."""
        return (*self.objectives, *self.constraints)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Objectives, constraints and features."""
        return (*self.judging, *self.features)

    @property
    def tokenizer_source(self) -> str:
        """The source that gives tokenizer and configuration: as named, else the base, else the first source."""
        return self.tokenizer or self.base or next(iter(self.sources))
