"""The events of a search: a class for each kind, whose fields are what it says beside the moment and the candidate.

They are written from these classes and read into them (``EventRow.read``); in the store they are JSON. What happens to
nodes and workers has one class for all, in ``search.work.jobs``. An event of a kind that is not here, as a newer
program may write, is still an ``EventRow``.
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


class Happened(Protocol):
    """What can be written down as an event."""

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
        """What it says, as the store keeps it: only what was given."""
        return self.model_dump(exclude_unset=True)


# ---- the search and its driver ---------------------------------------------------------------------------------------


class Created(Event):
    kind: ClassVar[str] = "created"


class BeganAgain(Event):
    """What was asked and told is gone."""

    kind: ClassVar[str] = "began again"


class LeaseTaken(Event):
    """Another driver is at work."""

    kind: ClassVar[str] = "lease"
    epoch: int
    host: str | None
    pid: int | None


class Reconnected(Event):
    """The database was away for so long."""

    kind: ClassVar[str] = "reconnected"
    seconds: float
    why: str


class State(Event):
    """What the search is doing from now on."""

    kind: ClassVar[str] = "state"
    state: StrictStr
    why: str = ""


class SettingsChanged(Event):
    """The search file is another; this is the one before."""

    kind: ClassVar[str] = "settings"
    before: Mapping[str, Any]


class SettingsRefused(Event):
    kind: ClassVar[str] = "settings refused"
    why: str


class EvaluatorsChanged(Event):
    """Evaluators, by name and new version, that have changed and score as recorded; ``scored`` has shown it."""

    kind: ClassVar[str] = "evaluators changed"
    evaluators: Sequence[Mapping[str, str]]
    scored: Sequence[str]


class Calibrated(Event):
    kind: ClassVar[str] = "calibrated"
    digest: str
    texts: int
    sources: Sequence[str]


class TextLoss(Event):
    """How unlikely the mean of some sources, or one alone, finds the calibration texts: nats for a token."""

    kind: ClassVar[str] = "text loss"
    sources: list[StrictStr]
    loss: float


class Fitted(Event):
    """Numbers of models are fitted to items, for so many of the baselines."""

    kind: ClassVar[str] = "fitted"
    digest: str
    items: int
    steps: int
    baselines: int


class ScoredItems(BaseModel):
    """Scores by metric of the items at some positions of the search split, by an evaluator's version."""

    model_config = ConfigDict(frozen=True)

    evaluator: StrictStr
    items: list[Whole]
    metrics: dict[StrictStr, list[float]]


class SelectScored(Event):
    """A source, or a merge that decides on some, is scored on some items before the search."""

    kind: ClassVar[str] = "select scored"
    model: StrictStr
    scores: list[ScoredItems]


class Compared(BaseModel):
    """The mean of paired differences over all items of all objectives, with the interval of 95%."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float


Fate = Literal["base", "kept", "rest", "dropped", "worse"]


class SelectedSource(BaseModel):
    """A source that was chosen from, or the base.

    Attributes:
        fate: "base", "kept", "rest" (it is part of the average of these), "dropped", or "worse": than the base or than
            others, surely and in every objective.
        estimates: by objective.
        items: that it was scored on, of all objectives.
        place: among those kept, from 1; with ``gain`` what it solves more than those before it, as a share of the items
            of all objectives, and ``error``, the standard error of that.
        norm: of its change, relative to the base's weights.
        scale: what its change is multiplied by in the search.
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
    """Sources are chosen: these are searched.

    Attributes:
        sources: all of them, those kept first in their order.
        scored: item scores that the choice took; ``full`` is how many all of them in full would have taken.
        merges: the mean over objectives of each merge that was scored on the items of the last rung.
        others: how much better the average of those kept is than the first of them among random directions of the same
            lengths, which is the control: whether the others are worth more than noise.
        rest: how much better that average is with the rest in it; None without a rest.
    """

    kind: ClassVar[str] = "selected"
    sources: list[SelectedSource]
    scored: Whole
    full: Whole
    merges: dict[str, Estimate]
    others: Compared | None = None
    rest: Compared | None = None


class Command(Event):
    """The driver has taken a verb."""

    kind: ClassVar[str] = "command"
    verb: str


class CopyingNews(Event):
    """What befell the copying to object storage."""

    kind: ClassVar[str] = "artifacts"
    state: str
    why: str


# ---- candidates ------------------------------------------------------------------------------------------------------


class Stepped(Event):
    """A step of the optimizer with candidates, in the order that it gave them or was told of them."""

    step: Whole
    candidates: list[Whole]


class Ask(Stepped):
    kind: ClassVar[str] = "ask"


class Tell(Stepped):
    kind: ClassVar[str] = "tell"


class Front(Event):
    """These candidates form the Pareto front now."""

    kind: ClassVar[str] = "front"
    candidates: list[Whole]


class Decided(BaseModel):
    """What was decided of a candidate's race: the rung it reached, why it left, and the rung that it goes on to."""

    model_config = ConfigDict(frozen=True)

    reached: StrictInt
    out: StrictStr
    rung: StrictInt


class Dispatch(Event):
    """An attempt begins. Without a barrier it says what was decided of the candidate's race."""

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
    def decided(self) -> Decided | None:
        """What was decided of the race, where that was written down."""
        if self.reached is None or self.out is None or self.rung is None:
            return None
        return Decided(reached=self.reached, out=self.out, rung=self.rung)


class AttemptEnded(Event):
    """An attempt ended at a worker."""

    worker: StrictStr = ""


class Result(AttemptEnded):
    """An attempt ended with all scores."""

    kind: ClassVar[str] = "result"


class Rung(AttemptEnded):
    """An attempt ended with the scores of a rung: so many items in all by each evaluator's version."""

    kind: ClassVar[str] = "rung"
    items: Annotated[dict[StrictStr, Whole], Field(min_length=1)]


class Failure(AttemptEnded):
    """An attempt failed, for good where ``final``. ``log`` is a file in the folder of the search."""

    kind: ClassVar[str] = "failure"
    reason: StrictStr
    message: StrictStr = ""
    log: str = ""
    final: StrictBool


class Cached(Event):
    """A candidate is answered by the scores of another, or ended its race so, with so many items."""

    kind: ClassVar[str] = "cached"
    same_as: int | None = None
    items: int = 0


class RaceEnded(Event):
    """A candidate's race ended with so many items."""

    items: Whole


class Done(RaceEnded):
    kind: ClassVar[str] = "done"


class Eliminated(RaceEnded):
    kind: ClassVar[str] = "eliminated"


class ExpertsUsed(Event):
    """How a model of experts used them in an attempt, by the evaluator's name."""

    kind: ClassVar[str] = "experts"
    tasks: dict[StrictStr, ExpertUse]


class Stale(Event):
    """An attempt ended that nobody waited for any more: what it brought, or whose it was."""

    kind: ClassVar[str] = "stale"
    what: str | None = None
    candidate: int | None = None
    attempt: int | None = None


class ScoresAdded(Event):
    """A finished candidate has more scores: evaluator's version, split and number of items of each."""

    kind: ClassVar[str] = "scores"

    @classmethod
    def of(cls, scores: Iterable[Scores]) -> Self:
        return cls.model_validate({"scores": [(s.evaluator, s.split, len(s.items)) for s in scores]})

    scores: list[tuple[StrictStr, Literal["search", "held_out"], Whole]]


class Screening(Event):
    """What is known of the screen: Kendall's tau over so many pairs of scores, and whether it decides."""

    kind: ClassVar[str] = "screen"
    pairs: Whole
    tau: StrictFloat
    on: StrictBool


class Descent(Event):
    """Steps down the gradient of the proxy.

    ``passes`` counts items run forward and backward. ``proxy`` is its value before the first and the last step, on
    items of their own; ``at`` is about what it is at each point that was given back (old searches do not tell);
    ``gradient`` is that at the start by each parameter, None where it has none.
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
    """What is known of the proxy: Kendall's tau with the objectives over so many points that it led to, and whether it
    is followed on.
    """

    kind: ClassVar[str] = "proxy"
    points: Whole
    tau: StrictFloat
    on: StrictBool


class DescentFailed(Event):
    """No points came of a descent. ``log`` is a file in the folder of the search."""

    kind: ClassVar[str] = "descent failed"
    step: Whole
    why: str
    log: str = ""


class Refined(Event):
    """In a search from coarse to fine, places of the model have come apart: so many of its numbers are free now."""

    kind: ClassVar[str] = "refined"
    told: Whole
    numbers: Whole
    finest: Whole
    places: list[StrictStr]

    @property
    def text(self) -> str:
        """What it says, to people."""
        places = ", ".join(self.places)
        return f"{places} came apart after {self.told} candidates: {self.numbers} of {self.finest} numbers"


class ItemErrors(BaseModel):
    """Mean absolute errors of a measure's estimates, and whether item response is used for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: StrictFloat
    item_response: StrictFloat
    p_irt: StrictFloat
    used: StrictBool


class ItemResponse(RootModel[dict[StrictStr, ItemErrors]]):
    """What is known of item response, by measure."""

    kind: ClassVar[str] = "item response"

    @property
    def payload(self) -> Mapping[str, Any]:
        content: Mapping[str, Any] = self.model_dump()
        return content


# ---- confirmation ----------------------------------------------------------------------------------------------------


class Shortlist(Event):
    """What will be confirmed, and what is only scored for the pictures, before any of it is scored."""

    kind: ClassVar[str] = "shortlist"
    candidates: list[Whole]
    drawn: list[Whole] = []


class TeamChosen(Event):
    """Candidates that together solve most items of the search split, before any of them is scored on others for it.

    ``curve`` has what the first candidates offer on these items, as the search went on: how many there are, what a team
    of as many members covers, and what the best of them solves.
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
    """The best on the held-out split, and whether it keeps the constraints there."""

    kind: ClassVar[str] = "winner"
    candidate: Whole
    feasible: StrictBool = True


class WinnerControlled(Event):
    """The winner was scored again with random directions as long as they are in the place of some of its sources.

    Attributes:
        kept: the source that it takes most of, which stayed; empty where it is no mix of sources.
        replaced: all others; none where it is one source alone.
        better: how much better the winner is than that, on the held-out split, in the mean of the objectives; None
            where nothing is replaced.
    """

    kind: ClassVar[str] = "winner controlled"
    candidate: Whole
    kept: str
    replaced: list[str]
    better: Compared | None = None


class Chosen(Event):
    """Where there is no one winner: the candidate in each role."""

    kind: ClassVar[str] = "confirmed"
    chosen: dict[StrictStr, Whole]
    feasible: StrictBool = True


# ---- reading ---------------------------------------------------------------------------------------------------------


READ: dict[str, type[Event | ItemResponse]] = {
    event.kind: event
    for event in (
        State, Ask, Tell, Front, Dispatch, Result, Rung, Failure, Cached, Done, Eliminated, ExpertsUsed, Stale,
        ScoresAdded, Screening, Descent, Agreed, Refined, ItemResponse, Shortlist, TeamChosen, Confirming,
        ConfirmFailed, Winner, WinnerControlled, Chosen, SelectScored, Selected, TextLoss,
    )
}  # fmt: skip
"""The events that are read again, by kind; the others are for people."""

_OF_A_CANDIDATE = frozenset({"dispatch", "result", "failure"})


def event_rows(rows: Iterable[Sequence[Any]]) -> list[EventRow]:
    """Events from rows of their table. What another program wrote into one is noticed here, and not where it is used.

    Args:
        rows: with the columns of ``EventRow``, in its order.

    Raises:
        DamagedValueError: one is of no candidate though it should be, or says something else than its kind does.
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
