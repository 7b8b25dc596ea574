"""The request and response bodies of the API, which the server and the client share."""

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
"""A number that may be unknown: NaN and infinities, which JSON cannot represent, become null."""


def _reason(failure: Any) -> Any:
    return str(failure.get("reason")) if isinstance(failure, dict) else failure


class RequestBody(BaseModel):
    """The base of request bodies: unknown keys are an error."""

    model_config = ConfigDict(extra="forbid")


class Objective(BaseModel):
    """An objective of a search and its direction."""

    name: str
    maximise: bool


class CandidateName(BaseModel):
    """A candidate with its scores. ``id`` is the name shown to people, such as c0042.

    ``scalar`` is the value of the scalarisation on the search split; null if there is none or it was not computed.
    """

    model_config = ConfigDict(from_attributes=True)

    id: str
    number: int
    label: str
    objectives: dict[str, Estimate]
    scalar: Number = None


class CandidateSummary(CandidateName):
    """A candidate as shown in lists. Times are seconds since 1970; ``seconds`` is the time spent on it.

    ``niche`` is its bin along each feature of the search, from 0, and ``elite`` says that it is among the best there.
    ``same_as`` is the candidate with the same recipe whose scores were reused; ``failure`` is the reason of its last
    failure. ``change`` is the distance of its weights from those of the search's base, relative to the base's norm.
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
    """A page of candidates; ``next`` is the cursor of the next page, null on the last one."""

    candidates: list[CandidateSummary]
    next: str | None


class CandidateDetail(CandidateSummary):
    """Everything known about a candidate except the scores of single items.

    ``recipe`` is the recipe as YAML; ``mergekit`` is what `evomerge show --recipe` prints, null if mergekit cannot
    express it. ``genome`` maps parameters to values, with choices by name. ``failed`` holds the reason, message and log
    of its last failure, and ``held_out`` its objectives on the held-out split.
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
    """A search as shown in lists.

    ``driver`` says whether a process is driving it. ``eta_s`` is the time in seconds until its budget is spent at the
    pace so far, ``sparkline`` the best score so far after equal numbers of candidates, and ``gpu_hours`` the GPU time
    of its workers, null if they have no GPU or it is unknown. ``best_source`` is the best of the source models. With
    several objectives, ``best`` and ``best_source`` are chosen by the scalarisation that ``scalar`` names; without one,
    ``best_role`` is "knee" and they are the best compromises on the front and among the sources. ``confirmed`` is what
    was chosen on held-out items: the winner, or the knee of a front; null before confirmation.
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
        """The summary of a search whose store cannot be opened."""
        counts = Counts(asked=0, done=0, eliminated=0, failed=0, cached=0, running=0)
        return cls(
            name=name, state="unreadable", why=why, driver=False, created_at=0.0, spent_s=0.0, counts=counts,
            budget=Budget(), eta_s=None, best=None, best_source=None,
            sparkline=[], gpu_hours=None, objectives=[],
        )  # fmt: skip


class Searches(BaseModel):
    searches: list[SearchSummary]


class GivenFile(RequestBody):
    """A search file as YAML text. Relative paths are resolved against the first of the server's source folders."""

    file: str = Field(max_length=2**16)


class NewSearch(GivenFile):
    """A search to create, and whether to start its driver at once."""

    start: bool = True


class PlanRow(BaseModel):
    """A line of a plan: a title and its text."""

    key: str
    text: str


class PlanPrompt(BaseModel):
    """What the model is asked for one item: the prompt, the answer that is scored after it, and the tokens."""

    place: str
    item: str
    prompt: str
    answer: str
    tokens: str


class Plan(BaseModel):
    """What a search will do and cost, what to expect from it, and an example prompt for each objective."""

    name: str
    rows: list[PlanRow]
    outlook: Outlook
    prompts: list[PlanPrompt]


class CommandResult(BaseModel):
    """What was done in response to a command, in words."""

    told: str


class NewBudget(RequestBody):
    """Changes to a budget: a bound that is given replaces the old one, and null removes it. ``resume`` also resumes."""

    candidates: PositiveInt | None = None
    hours: PositiveFloat | None = None
    patience: PositiveInt | None = None
    cost: PositiveFloat | None = None
    resume: bool = False


class Side(BaseModel):
    """One candidate on one item: its score, its answer if answers were kept, and whether a drawing was kept."""

    score: Number
    answer: str | None
    drawn: bool = False


class ComparedItem(BaseModel):
    """An item that both candidates were scored on: its position in the split, its question and right answer if kept,
    and the hashes of the pictures that it shows."""

    item: int
    text: str | None
    gold: str | None
    a: Side
    b: Side
    pictures: list[str] = []


class Compared(BaseModel):
    """Two candidates: a comparison in each objective and constraint, and item by item in ``objective``."""

    comparisons: list[Comparison]
    objective: str | None
    items: list[ComparedItem]


class Front(BaseModel):
    """The candidates on the Pareto front, by number."""

    candidates: list[CandidateSummary]


class SearchEvent(BaseModel):
    """An event of a search as it is streamed; ``time`` is in seconds since 1970."""

    seq: int
    time: float
    kind: str
    candidate: int | None
    attempt: int | None
    payload: dict[str, JsonValue]


class NewExport(RequestBody):
    """A candidate to export: best, knee, a source's name or an id. ``name`` is the folder's name, by default the id."""

    candidate: str = Field(default="best", min_length=1, max_length=200)
    name: Name | None = None
    verify: bool = True


class ExportFile(BaseModel):
    name: str
    bytes: int


class Export(BaseModel):
    """An export. ``progress`` goes from 0 to 1; ``files`` is filled once it is done, ``log`` until then.

    ``command`` is the equivalent command line.
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


class GivenSources(RequestBody):
    """The models to inspect, by name, and the base."""

    sources: dict[Name, str] = Field(min_length=1, max_length=16)
    base: str | None = None


class FoundModel(BaseModel):
    """A model folder that search files may name by its ``reference``. ``bytes`` is the size of its weights.

    For an adapter, ``adapter_of`` is the model that it declares as its base, and ``reference`` is MODEL+ADAPTER, or
    null if that model is neither here nor on the hub.
    """

    name: str
    reference: str | None
    model_type: str
    bytes: int
    adapter_of: str | None = None


class Sources(BaseModel):
    sources: list[FoundModel]


class Health(BaseModel):
    status: Literal["ok"]
