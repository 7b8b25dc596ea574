"""The recorded definition of a search, parsed into attributes as soon as it is read from its store.

Fields that older programs did not write have defaults, so that stores of every format can be read. The settings of
plug-ins, such as the keys of a search space, stay as they are in the search file.
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
"""What predicts the scores of items that a race left out. Baselines used to be called landmarks."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)


# What was resolved at the start of the search: its fingerprints -------------------------------------------------------


class Number(_Part):
    """A number that candidates are measured by, over this many items of the search split."""

    name: str
    maximise: bool
    items: int

    @property
    def sign(self) -> float:
        """The factor that makes higher values better."""
        return 1.0 if self.maximise else -1.0


class Measure(Number):
    """A metric of an evaluator, such as an objective. ``evaluator`` is its index in ``SearchRecord.evaluators``, and
    ``version`` the key of its scores.
    """

    evaluator: int
    metric: str
    version: str


class Constraint(Measure):
    """A condition on candidates: at least ``threshold`` if ``maximise``, at most ``threshold`` otherwise."""

    threshold: float


class Feature(Measure):
    """A number that distinguishes candidates that may be equally good; its range is divided into ``bins``."""

    low: float
    high: float
    bins: int


class Screen(Measure):
    """A cheap metric that rejects candidates early. ``objective`` is the index of the objective that it stands for."""

    objective: int
    least_tau: float
    drop: float


class Evaluator(_Part):
    """An evaluator with the number of its items by split.

    Attributes:
        version: the key of its scores.
        items: a hash of the items of each split; older programs recorded none.
        accepted_version: the latest version that was verified to score as recorded; None if that is the first one.
    """

    name: str
    version: str
    search_items: int
    held_out_items: int
    items: Mapping[str, str] = {}
    accepted_version: str | None = None

    @property
    def accepted(self) -> str:
        """The version of the evaluator that scores as recorded: the latest verified one, or the first."""
        return self.accepted_version or self.version


class Start(_Part):
    """A good genome from an earlier search, and its candidate there."""

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
    """The optimizer, and how it combines several objectives into one, as in the search file."""

    name: str
    scalarisation: dict[str, Any] | None = None


class Budget(_Part):
    """The bounds that end the search, whichever is reached first."""

    candidates: int | None = None
    hours: float | None = None
    patience: int | None = None
    cost: float | None = None


class Confirm(_Part):
    """How many candidates are scored on the held-out split, and the confidence of its intervals."""

    top: int = 5
    drawn: int = 0
    confidence: float = 0.95


class Racing(_Part):
    """The rungs of the race, in items."""

    rungs: tuple[int, ...]
    confidence: float
    estimate: Estimate = "baseline"


class Cluster(_Part):
    """The workers, as far as reports need to know."""

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
    """A row of the table, so that errors name the column and the place in it."""

    created_at: float = Field(ge=0, lt=_YEAR_10000, allow_inf_nan=False)
    spent_s: float = Field(ge=0, allow_inf_nan=False)
    worker_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    gpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    held_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    settings: _Settings
    fingerprints: _Fingerprints


class SearchRecord(_Settings, _Fingerprints):
    """The definition of a search.

    Attributes:
        sources: the location of each source at the start of the search; ``files`` has hashes of its files.
        space: the search space, as in the search file.
        compositions: for each objective that needs several skills at once, the objectives that need one of them.
        objectives: with ``constraints`` and ``features``, the resolved measures of candidates.
        screen: None if candidates are not screened.
        parameters: the parameters of the search space, in the order of a genome.
        calibration: the digest of the calibration texts, if there are any.
        fit: the digest of the items that numbers are fitted to, and of the settings of the fit.
        start: genomes from earlier searches.
    """

    files: Mapping[str, Mapping[str, FileFingerprint]]

    @classmethod
    def of(cls, row: object) -> Self:
        """Parse a row of the table.

        Raises:
            ValueError: names the first value that is missing or invalid.
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
        """The source of the tokenizer and the configuration: the named one, else the base, else the first source."""
        return self.tokenizer or self.base or next(iter(self.sources))
