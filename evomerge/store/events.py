"""The events of a search: a class for each kind, whose fields are its content besides the time and the candidate.

Events are written from these classes and read back into them (``EventRow.read``); in the store they are JSON. Events
about nodes and workers share one class in ``search.work.jobs``. An event of an unknown kind, written by a newer
program, is still an ``EventRow``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from evomerge.recipes.use import ExpertUse
from evomerge.store.columns import DamagedValueError
from evomerge.store.rows import Estimate, EventRow, Scores

Whole = Annotated[StrictInt, Field(ge=0)]


class Recordable(Protocol):
    """Anything that can be recorded as an event."""

    @property
    def kind(self) -> str: ...

    @property
    def payload(self) -> Mapping[str, Any]: ...


class Event(BaseModel):
    """Something that happened in a search."""

    model_config = ConfigDict(frozen=True)

    kind: ClassVar[str]

    @property
    def payload(self) -> Mapping[str, Any]:
        """The content as it is stored: only the fields that were set."""
        return self.model_dump(exclude_unset=True)


# ---- the search and its driver ---------------------------------------------------------------------------------------


class Created(Event):
    kind: ClassVar[str] = "created"


class BeganAgain(Event):
    """The search was started over: all earlier asks and tells were deleted."""

    kind: ClassVar[str] = "began again"


class LeaseTaken(Event):
    """A new driver has taken the lease."""

    kind: ClassVar[str] = "lease"
    epoch: int
    host: str | None
    pid: int | None


class Reconnected(Event):
    """The connection to the database was lost for this long."""

    kind: ClassVar[str] = "reconnected"
    seconds: float
    why: str


class State(Event):
    """The new state of the search."""

    kind: ClassVar[str] = "state"
    state: StrictStr
    why: str = ""


class DriverFailed(Event):
    """An error has ended the driver; the state of the search is as it was."""

    kind: ClassVar[str] = "driver failed"
    why: str


class SettingsChanged(Event):
    """The search file was changed; this is the previous one."""

    kind: ClassVar[str] = "settings"
    before: Mapping[str, Any]


class SettingsRefused(Event):
    kind: ClassVar[str] = "settings refused"
    why: str


class EvaluatorsChanged(Event):
    """Evaluators, by name and new version, that have changed but score as recorded, as ``scored`` has shown."""

    kind: ClassVar[str] = "evaluators changed"
    evaluators: Sequence[Mapping[str, str]]
    scored: Sequence[str]


class Calibrated(Event):
    kind: ClassVar[str] = "calibrated"
    digest: str
    texts: int
    sources: Sequence[str]


class TextLoss(Event):
    """The loss of one source, or of the mean of several, on the calibration texts, in nats per token."""

    kind: ClassVar[str] = "text loss"
    sources: list[StrictStr]
    loss: float


class Fitted(Event):
    """Numbers of models were fitted to items, for this many baselines."""

    kind: ClassVar[str] = "fitted"
    digest: str
    items: int
    steps: int
    baselines: int


class ScoredItems(BaseModel):
    """Scores by metric for some positions of the search split, by one version of an evaluator."""

    model_config = ConfigDict(frozen=True)

    evaluator: StrictStr
    items: list[Whole]
    metrics: dict[StrictStr, list[float]]


class SelectScored(Event):
    """A source, or a merge that decides about sources, was scored on some items before the search."""

    kind: ClassVar[str] = "select scored"
    model: StrictStr
    scores: list[ScoredItems]


class Compared(BaseModel):
    """The mean of paired differences over all items of all objectives, with its 95% interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float


Fate = Literal["base", "kept", "rest", "dropped", "worse"]


class SelectedSource(BaseModel):
    """One of the sources of a selection, or the base.

    Attributes:
        fate: "base", "kept", "rest" (it is part of the average of the rest), "dropped", or "worse": surely worse than
            the base or other sources in every objective.
        estimates: estimates by objective.
        items: how many items of all objectives it was scored on.
        place: its rank among the kept ones, from 1. ``gain`` is the share of the items of all objectives that it solves
            and those before it do not, and ``error`` its standard error.
        norm: the norm of its change, relative to the base's weights.
        scale: the factor of its change in the search.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    fate: Fate
    estimates: dict[str, Estimate]
    items: Whole
    place: int | None = None
    gain: float | None = None
    error: float | None = None
    norm: float | None = None
    scale: float = 1.0


class Selected(Event):
    """The sources to search over were selected.

    Attributes:
        sources: all sources, starting with the kept ones in their order.
        scored: how many item scores the selection took; ``full`` is how many scoring everything would have taken.
        merges: the mean over objectives of each merge that was scored on the items of the last rung.
        others: how much better the average of the kept sources is than a control, in which all but the first of them
            are replaced by random directions of the same lengths: whether the others are worth more than noise.
        rest: how much better that average is if it includes the rest; None without a rest.
    """

    kind: ClassVar[str] = "selected"
    sources: list[SelectedSource]
    scored: Whole
    full: Whole
    merges: dict[str, Estimate]
    others: Compared | None = None
    rest: Compared | None = None


class Command(Event):
    """The driver has taken a command."""

    kind: ClassVar[str] = "command"
    verb: str


class CopyingState(Event):
    """The state of copying to object storage has changed."""

    kind: ClassVar[str] = "artifacts"
    state: str
    why: str


# ---- candidates ------------------------------------------------------------------------------------------------------


class StepEvent(Event):
    """A step of the optimizer with its candidates, in the order in which they were asked for or told."""

    step: Whole
    candidates: list[Whole]


class Ask(StepEvent):
    kind: ClassVar[str] = "ask"


class Tell(StepEvent):
    kind: ClassVar[str] = "tell"


class Front(Event):
    """The Pareto front has changed to these candidates."""

    kind: ClassVar[str] = "front"
    candidates: list[Whole]


class RaceDecision(BaseModel):
    """A decision in a candidate's race: the rung that it reached, why it left, and the rung that it continues to."""

    model_config = ConfigDict(frozen=True)

    reached: StrictInt
    out: StrictStr
    rung: StrictInt


class Dispatch(Event):
    """An attempt begins. In races without barriers, the event includes the decision about the candidate."""

    kind: ClassVar[str] = "dispatch"
    worker: StrictStr
    reached: StrictInt | None = None
    out: StrictStr | None = None
    rung: StrictInt | None = None

    @model_validator(mode="after")
    def _says_all_or_nothing(self) -> Self:
        if len({value is None for value in (self.reached, self.out, self.rung)}) > 1:
            raise ValueError("says a part of what was decided")
        return self

    @property
    def decided(self) -> RaceDecision | None:
        """The decision in the race, if it was recorded."""
        if self.reached is None or self.out is None or self.rung is None:
            return None
        return RaceDecision(reached=self.reached, out=self.out, rung=self.rung)


class AttemptEnded(Event):
    """An attempt ended on a worker."""

    worker: StrictStr = ""


class Result(AttemptEnded):
    """An attempt ended with all scores."""

    kind: ClassVar[str] = "result"


class Rung(AttemptEnded):
    """An attempt ended with the scores of a rung; ``items`` counts all items so far by evaluator version."""

    kind: ClassVar[str] = "rung"
    items: Annotated[dict[StrictStr, Whole], Field(min_length=1)]


class Failure(AttemptEnded):
    """An attempt failed; there is no retry if ``final``. ``log`` is a file in the folder of the search."""

    kind: ClassVar[str] = "failure"
    reason: StrictStr
    message: StrictStr = ""
    log: str = ""
    final: StrictBool


class Cached(Event):
    """A candidate reuses the scores of another, at once or at the end of its race, with this many items."""

    kind: ClassVar[str] = "cached"
    same_as: int | None = None
    items: int = 0


class RaceEnded(Event):
    """A candidate's race ended with this many items."""

    items: Whole


class Done(RaceEnded):
    kind: ClassVar[str] = "done"


class Eliminated(RaceEnded):
    kind: ClassVar[str] = "eliminated"


class ExpertsUsed(Event):
    """How a model with experts used them in an attempt, by evaluator name."""

    kind: ClassVar[str] = "experts"
    tasks: dict[StrictStr, ExpertUse]


class Stale(Event):
    """An outdated attempt ended and was ignored: its outcome, or its worker."""

    kind: ClassVar[str] = "stale"
    what: str | None = None
    candidate: int | None = None
    attempt: int | None = None


class ScoresAdded(Event):
    """A finished candidate has additional scores: evaluator version, split and number of items of each."""

    kind: ClassVar[str] = "scores"

    @classmethod
    def of(cls, scores: Iterable[Scores]) -> Self:
        return cls.model_validate({"scores": [(s.evaluator, s.split, len(s.items)) for s in scores]})

    scores: list[tuple[StrictStr, Literal["search", "held_out"], Whole]]


class Screening(Event):
    """The state of the screen: Kendall's tau over this many pairs of scores, and whether the screen is in use."""

    kind: ClassVar[str] = "screen"
    pairs: Whole
    tau: StrictFloat
    on: StrictBool


class Descent(Event):
    """Steps down the gradient of the proxy.

    ``passes`` counts items run forward and backward. ``proxy`` is its value before the first and the last step, each on
    its own items; ``at`` is its approximate value at each returned point (not recorded by old versions); ``gradient``
    is the gradient at the start by parameter, None for parameters without one.
    """

    kind: ClassVar[str] = "descent"
    step: Whole
    steps: Whole
    rate: StrictFloat
    passes: Whole
    proxy: tuple[StrictFloat, StrictFloat]
    gradient: list[StrictFloat | None]
    seconds: float
    worker: StrictStr = ""
    at: list[StrictFloat] = []


class Agreed(Event):
    """The state of the proxy: Kendall's tau with the objectives over this many points from descents, and whether it is
    still followed.
    """

    kind: ClassVar[str] = "proxy"
    points: Whole
    tau: StrictFloat
    on: StrictBool


class DescentFailed(Event):
    """A descent produced no points. ``log`` is a file in the folder of the search."""

    kind: ClassVar[str] = "descent failed"
    step: Whole
    why: str
    log: str = ""


class Refined(Event):
    """In a coarse-to-fine search, groups of layers were split: this many numbers are free now."""

    kind: ClassVar[str] = "refined"
    told: Whole
    numbers: Whole
    finest: Whole
    places: list[StrictStr]

    @property
    def text(self) -> str:
        """The event as a sentence for people."""
        places = ", ".join(self.places)
        return f"{places} came apart after {self.told} candidates: {self.numbers} of {self.finest} numbers"


class ItemErrors(BaseModel):
    """Mean absolute errors of a measure's estimates, and whether item response theory is used for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: StrictFloat
    item_response: StrictFloat
    p_irt: StrictFloat
    used: StrictBool


class ItemResponse(RootModel[dict[StrictStr, ItemErrors]]):
    """The state of item response theory, by measure."""

    kind: ClassVar[str] = "item response"

    @property
    def payload(self) -> Mapping[str, Any]:
        content: Mapping[str, Any] = self.model_dump()
        return content


# ---- confirmation ----------------------------------------------------------------------------------------------------


class Shortlist(Event):
    """The candidates to confirm, and those scored only for figures. Recorded before any of them is scored."""

    kind: ClassVar[str] = "shortlist"
    candidates: list[Whole]
    drawn: list[Whole] = []


class TeamChosen(Event):
    """The candidates that together solve most items of the search split. Recorded before any held-out scores for it.

    ``curve`` shows the growth during the search: a number of first candidates, what the best team of the same size
    among them covers, and what the best of them solves.
    """

    kind: ClassVar[str] = "team"
    candidates: list[Whole]
    curve: list[tuple[Whole, float, float]] = []


class Confirming(Event):
    """An attempt on the held-out split begins."""

    kind: ClassVar[str] = "confirm"
    candidate: Whole
    attempt: int = 1


class ConfirmFailed(Failure):
    kind: ClassVar[str] = "confirm failed"
    candidate: Whole


class Winner(Event):
    """The best candidate on the held-out split, and whether it satisfies the constraints there."""

    kind: ClassVar[str] = "winner"
    candidate: Whole
    feasible: StrictBool = True


class WinnerControlled(Event):
    """The winner was compared with a control, in which some sources are replaced by random directions of equal length.

    Attributes:
        kept: the source with the largest share, which was not replaced; empty if the winner is not a mix of sources.
        replaced: all other sources; empty if the winner is a single source.
        better: how much better the winner is than the control on the held-out split, in the mean of the objectives;
            None if nothing was replaced.
    """

    kind: ClassVar[str] = "winner controlled"
    candidate: Whole
    kept: str
    replaced: list[str]
    better: Compared | None = None


class Chosen(Event):
    """The candidate in each role, if there is no single winner."""

    kind: ClassVar[str] = "confirmed"
    chosen: dict[StrictStr, Whole]
    feasible: StrictBool = True


# ---- reading ---------------------------------------------------------------------------------------------------------


READ: dict[str, type[Event | ItemResponse]] = {
    event.kind: event
    for event in (
        State, DriverFailed, Ask, Tell, Front, Dispatch, Result, Rung, Failure, Cached, Done, Eliminated, ExpertsUsed,
        Stale, ScoresAdded, Screening, Descent, Agreed, Refined, ItemResponse, Shortlist, TeamChosen, Confirming,
        ConfirmFailed, Winner, WinnerControlled, Chosen, SelectScored, Selected, TextLoss,
    )
}  # fmt: skip
"""The events that programs read back, by kind; the others are for people."""

_OF_A_CANDIDATE = frozenset({"dispatch", "result", "failure"})


def event_rows(rows: Iterable[Sequence[Any]]) -> list[EventRow]:
    """Events from rows of their table. Invalid content is detected here, instead of where it is used.

    Args:
        rows: rows with the columns of ``EventRow``, in its order.

    Raises:
        DamagedValueError: an event lacks its candidate, or its content does not match its kind.
    """
    return [_event_row(row) for row in rows]


def _event_row(row: Sequence[Any]) -> EventRow:
    seq, time, name, candidate, attempt, payload = row
    if name in _OF_A_CANDIDATE and candidate is None:
        raise DamagedValueError(f"event {seq}, {name!r}, names no candidate")
    if (kind := READ.get(name)) is None:
        return EventRow(*row)
    try:
        return EventRow(seq, time, name, candidate, attempt, payload, kind.model_validate(payload))
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "payload"
        problem = f"event {seq}, {name!r}, has another {place} than it was given"
        raise DamagedValueError(problem) from error
