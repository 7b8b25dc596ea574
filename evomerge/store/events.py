"""The events of a search: a class for each kind, whose fields are what it says beside the moment and the candidate.

They are written from these classes and read into them (``EventRow.read``); in the store they are JSON. What happens to
nodes and workers has one class for all, in ``search.work.jobs``. An event of a kind that is not here, as a newer
program may write, is still an ``EventRow``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, RootModel


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
    state: str
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

    step: int
    candidates: Sequence[int]


class Ask(Stepped):
    kind: ClassVar[str] = "ask"


class Tell(Stepped):
    kind: ClassVar[str] = "tell"


class Front(Event):
    """These candidates form the Pareto front now."""

    kind: ClassVar[str] = "front"
    candidates: Sequence[int]


class Decided(BaseModel):
    """What was decided of a candidate's race: the rung it reached, why it left, and the rung that it goes on to."""

    model_config = ConfigDict(frozen=True)

    reached: int
    out: str
    rung: int


class Dispatch(Event):
    """An attempt begins. Without a barrier it says what was decided of the candidate's race."""

    kind: ClassVar[str] = "dispatch"
    worker: str = ""
    reached: int | None = None
    out: str | None = None
    rung: int | None = None

    @property
    def decided(self) -> Decided | None:
        """What was decided of the race, where that was written down."""
        if self.reached is None or self.out is None or self.rung is None:
            return None
        return Decided(reached=self.reached, out=self.out, rung=self.rung)


class AttemptEnded(Event):
    """An attempt ended at a worker."""

    worker: str = ""


class Result(AttemptEnded):
    """An attempt ended with all scores."""

    kind: ClassVar[str] = "result"


class Rung(AttemptEnded):
    """An attempt ended with the scores of a rung: so many items in all by each evaluator's version."""

    kind: ClassVar[str] = "rung"
    items: Mapping[str, int]


class Failure(AttemptEnded):
    """An attempt failed, for good where ``final``. ``log`` is a file in the folder of the search."""

    kind: ClassVar[str] = "failure"
    reason: str
    message: str = ""
    log: str = ""
    final: bool = False


class Cached(Event):
    """A candidate is answered by the scores of another, or ended its race so, with so many items."""

    kind: ClassVar[str] = "cached"
    same_as: int | None = None
    items: int = 0


class RaceEnded(Event):
    """A candidate's race ended with so many items."""

    items: int


class Done(RaceEnded):
    kind: ClassVar[str] = "done"


class Eliminated(RaceEnded):
    kind: ClassVar[str] = "eliminated"


class Stale(Event):
    """An attempt ended that nobody waited for any more: what it brought, or whose it was."""

    kind: ClassVar[str] = "stale"
    what: str | None = None
    candidate: int | None = None
    attempt: int | None = None


class ScoresAdded(Event):
    """A finished candidate has more scores: evaluator's version, split and number of items of each."""

    kind: ClassVar[str] = "scores"
    scores: Sequence[tuple[str, str, int]]


class Screening(Event):
    """What is known of the screen: Kendall's tau over so many pairs of scores, and whether it decides."""

    kind: ClassVar[str] = "screen"
    pairs: int = 0
    tau: float = float("nan")
    on: bool = False


class ItemErrors(BaseModel):
    """Mean absolute errors of a measure's estimates, and whether item response is used for it."""

    model_config = ConfigDict(frozen=True)

    reference: float
    item_response: float
    p_irt: float
    used: bool


class ItemResponse(RootModel[Mapping[str, ItemErrors]]):
    """What is known of item response, by measure."""

    kind: ClassVar[str] = "item response"

    @property
    def payload(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.model_dump()
        return found


# ---- confirmation ----------------------------------------------------------------------------------------------------


class Shortlist(Event):
    """What will be confirmed, and what is only scored for the pictures, before any of it is scored."""

    kind: ClassVar[str] = "shortlist"
    candidates: Sequence[int]
    drawn: Sequence[int] = ()


class Confirming(Event):
    """An attempt on the held-out split begins."""

    kind: ClassVar[str] = "confirm"
    candidate: int
    attempt: int


class ConfirmFailed(Failure):
    kind: ClassVar[str] = "confirm failed"
    candidate: int


class Winner(Event):
    """The best on the held-out split, and whether it keeps the constraints there."""

    kind: ClassVar[str] = "winner"
    candidate: int
    feasible: bool = True


class Chosen(Event):
    """Where there is no one winner: the candidate in each role."""

    kind: ClassVar[str] = "confirmed"
    chosen: Mapping[str, int]
    feasible: bool = True
