"""What the answers and requests of the API are made of; the client reads the same."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PositiveFloat, PositiveInt

from evomerge.report.comparing import Comparison
from evomerge.report.outlook import Outlook
from evomerge.report.picks import Pick
from evomerge.report.search_status import Counts
from evomerge.report.spending import Cost
from evomerge.search.settings.sections import Name
from evomerge.store.record import Budget
from evomerge.store.rows import Estimate, Status


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_none_if_nan)]
"""A number that may not be known: NaN and infinities, which JSON has no words for, are null."""


def _reason(failure: Any) -> Any:
    return str(failure.get("reason")) if isinstance(failure, dict) else failure


class Wanted(BaseModel):
    """The body of a request: a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class Objective(BaseModel):
    """An objective of a search, and which way is better."""

    name: str
    maximise: bool


class CandidateName(BaseModel):
    """A candidate with what it is worth: ``id`` is how people call it, c0042.

    ``scalar`` is the number of a scalarisation on the search split, null without one and where it is not reckoned.
    """

    model_config = ConfigDict(from_attributes=True)

    id: str
    number: int
    label: str
    objectives: dict[str, Estimate]
    scalar: Number = None


class CandidateSummary(CandidateName):
    """A candidate as a list shows it. Times are seconds since 1970; ``seconds`` were spent on it.

    ``niche`` is its bin along each feature of the search, from 0, and ``elite`` says that it is among the best there.
    ``same_as`` is the candidate with the same recipe that answered it; ``failure`` the reason of its last failure.
    ``change`` is how far its weights are from those of the search's base, as a share of their norm.
    """

    step: int
    origin: str
    status: Status
    same_as: int | None
    attempts: int
    worker: str
    eligible: bool
    on_front: bool
    niche: list[int] | None = None
    elite: bool = False
    change: Number = None
    seconds: float
    failure: Annotated[str | None, BeforeValidator(_reason)]
    asked_at: float
    finished_at: float | None


class CandidatePage(BaseModel):
    """A page of candidates; ``next`` is the cursor of the one after it, null on the last."""

    candidates: list[CandidateSummary]
    next: str | None


class CandidateDetail(CandidateSummary):
    """All that is known of a candidate, scores of items apart.

    ``recipe`` is the recipe as YAML; ``mergekit`` the same as `evomerge show --recipe` prints it, null where mergekit
    cannot say it. ``genome`` is by parameter, choices by their names. ``failed`` holds reason, message and log of its
    last failure, and ``held_out`` its objectives there.
    """

    recipe_hash: str
    recipe: str
    mergekit: str | None
    genome: dict[str, float | int | str]
    losses: list[Number] | None
    timings: dict[str, float]
    failed: dict[str, JsonValue] | None
    held_out: dict[str, Estimate]


class SearchSummary(BaseModel):
    """A search as a list shows it.

    ``driver``: whether a process drives it. ``eta_s`` are seconds until its budget is spent at the pace so far,
    ``sparkline`` the best so far at a few equal steps of candidates, ``gpu_hours`` what its workers spent on GPUs,
    null where they have none or it cannot be told. ``best_source`` is the best of the models that it began with.
    With several objectives both are so by their scalarisation, the number that ``scalar`` names, or ``best_role`` is
    "knee": the best compromise on the front, that of the sources. ``confirmed`` is what held-out items chose: the
    winner, or the knee of a front; null before that.
    """

    name: str
    state: str
    why: str
    driver: bool
    created_at: float
    spent_s: float
    counts: Counts
    budget: Budget
    eta_s: float | None
    best: CandidateName | None
    best_role: str = "best"
    best_source: CandidateName | None
    sparkline: list[float]
    gpu_hours: float | None
    cost: Cost | None = None
    objectives: list[Objective]
    scalar: Objective | None = None
    confirmed: Pick | None = None

    @classmethod
    def unreadable(cls, name: str, why: str) -> Self:
        """What can be said of a search whose store cannot be opened."""
        counts = Counts(asked=0, done=0, eliminated=0, failed=0, cached=0, running=0)
        return cls(
            name=name, state="unreadable", why=why, driver=False, created_at=0.0, spent_s=0.0, counts=counts,
            budget=Budget(), eta_s=None, best=None, best_source=None,
            sparkline=[], gpu_hours=None, objectives=[],
        )  # fmt: skip


class Searches(BaseModel):
    searches: list[SearchSummary]


class GivenFile(Wanted):
    """A search file as YAML text. Paths in it that are relative are so to the first of the server's source folders."""

    file: str = Field(max_length=2**16)


class NewSearch(GivenFile):
    """A search to make, and whether to start its driver at once."""

    start: bool = True


class PlanRow(BaseModel):
    """A line of a plan: what, and how much."""

    key: str
    text: str


class PlanPrompt(BaseModel):
    """What the model is asked for an item of a measure: the text that it reads, what is scored after it, its tokens."""

    place: str
    item: str
    prompt: str
    answer: str
    tokens: str


class Plan(BaseModel):
    """What a search is going to do and cost, what to expect of it, and a prompt of each objective."""

    name: str
    rows: list[PlanRow]
    outlook: Outlook
    prompts: list[PlanPrompt]


class Told(BaseModel):
    """What was done with a request that takes its time."""

    told: str


class NewBudget(Wanted):
    """A budget that replaces what is given of it; a null lifts that bound. ``resume`` also goes on with the search."""

    candidates: PositiveInt | None = None
    hours: PositiveFloat | None = None
    patience: PositiveInt | None = None
    cost: PositiveFloat | None = None
    resume: bool = False


class Side(BaseModel):
    """A candidate at one item: its score, its answer where answers were kept, and whether a drawing of it is."""

    score: Number
    answer: str | None
    drawn: bool = False


class ComparedItem(BaseModel):
    """An item that both candidates were scored on: its place in the split, question and right answer where kept, and
    the hashes of the pictures that it shows."""

    item: int
    text: str | None
    gold: str | None
    a: Side
    b: Side
    pictures: list[str] = []


class Compared(BaseModel):
    """Two candidates: a comparison for each objective and constraint, and the items of ``objective``."""

    comparisons: list[Comparison]
    objective: str | None
    items: list[ComparedItem]


class Front(BaseModel):
    """The candidates on the Pareto front, by number."""

    candidates: list[CandidateSummary]


class Happening(BaseModel):
    """An event of a search, as the stream gives it; ``time`` in seconds since 1970."""

    seq: int
    time: float
    kind: str
    candidate: int | None
    attempt: int | None
    payload: dict[str, JsonValue]


class NewExport(Wanted):
    """A candidate to export: best, knee, a source's name or an id; ``name`` of the folder, its id when left out."""

    candidate: str = Field(default="best", min_length=1, max_length=200)
    name: Name | None = None
    verify: bool = True


class ExportFile(BaseModel):
    name: str
    bytes: int


class Export(BaseModel):
    """An export. ``progress`` goes from 0 to 1; ``files`` are there when it is done, ``log`` when it is not.

    ``command`` is the command line that does the same.
    """

    id: str
    candidate: str
    state: Literal["running", "done", "failed"]
    progress: float
    folder: str
    command: str
    files: list[ExportFile]
    log: str


class Exports(BaseModel):
    exports: list[Export]


class GivenSources(Wanted):
    """Models to inspect, by name, and which of them is the base."""

    sources: dict[Name, str] = Field(min_length=1, max_length=16)
    base: str | None = None


class Found(BaseModel):
    """A model folder that search files may name, by ``reference``. ``bytes`` are of its weights.

    Of an adapter ``adapter_of`` is the model that it says it was trained on, and ``reference`` is MODEL+ADAPTER; null
    where that model is neither here nor on the hub.
    """

    name: str
    reference: str | None
    model_type: str
    bytes: int
    adapter_of: str | None = None


class Sources(BaseModel):
    sources: list[Found]


class Health(BaseModel):
    status: Literal["ok"]
