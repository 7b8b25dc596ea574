"""What events carry: of every kind that is read again, what all programs have written with it since the first format.

Most of what is known of a search apart from its candidates lies in its events. What another program wrote into one is
found where it is read from the database, before a reader looks for what is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from evomerge.store.columns import DamagedValueError
from evomerge.store.rows import EventRow

Whole = Annotated[StrictInt, Field(ge=0)]


class _Step(BaseModel):
    step: Whole
    candidates: list[Whole]


class _State(BaseModel):
    state: StrictStr


class _Failure(BaseModel):
    reason: StrictStr
    final: StrictBool
    message: StrictStr = ""


class _ConfirmFailed(_Failure):
    candidate: Whole


class _Confirm(BaseModel):
    candidate: Whole


class _Dispatch(BaseModel, extra="forbid"):
    worker: StrictStr


class _DecidedDispatch(BaseModel):
    worker: StrictStr
    reached: StrictInt
    out: StrictStr
    rung: StrictInt


class _Worker(BaseModel):
    worker: StrictStr = ""


class _Rung(BaseModel):
    items: Annotated[dict[StrictStr, Whole], Field(min_length=1)]


class _Items(BaseModel):
    items: Whole


class _Scores(BaseModel):
    scores: list[tuple[StrictStr, Literal["search", "held_out"], Whole]]


class _Shortlist(BaseModel):
    candidates: list[Whole]
    drawn: list[Whole] = []


class _Winner(BaseModel):
    candidate: Whole
    feasible: StrictBool = True


class _Confirmed(BaseModel):
    chosen: dict[StrictStr, Whole]
    feasible: StrictBool = True


class _Screen(BaseModel):
    pairs: Whole
    tau: StrictFloat
    on: StrictBool


class _ItemResponse(BaseModel, extra="forbid"):
    reference: StrictFloat
    item_response: StrictFloat
    p_irt: StrictFloat
    used: StrictBool


_SHAPES: dict[str, Any] = {
    "ask": _Step,
    "tell": _Step,
    "state": _State,
    "dispatch": _Dispatch | _DecidedDispatch,
    "result": _Worker,
    "rung": _Rung,
    "failure": _Failure,
    "scores": _Scores,
    "done": _Items,
    "eliminated": _Items,
    "shortlist": _Shortlist,
    "confirm": _Confirm,
    "confirm failed": _ConfirmFailed,
    "winner": _Winner,
    "confirmed": _Confirmed,
    "screen": _Screen,
    "item response": dict[StrictStr, _ItemResponse],
}

_OF_A_CANDIDATE = frozenset({"dispatch", "result", "failure"})


def event_rows(rows: Iterable[Sequence[Any]]) -> list[EventRow]:
    """Events from rows of their table.

    Args:
        rows: with the columns of ``EventRow``, in its order.

    Raises:
        DamagedValueError: one is of no candidate though it should be, or carries something else than its kind does.
    """
    events = [EventRow(*row) for row in rows]
    for event in events:
        _check(event)
    return events


def _check(event: EventRow) -> None:
    if event.kind in _OF_A_CANDIDATE and event.candidate is None:
        raise DamagedValueError(f"event {event.seq}, {event.kind!r}, names no candidate")
    if event.kind in _SHAPES:
        try:
            _adapter(event.kind).validate_python(event.payload)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "payload"
            problem = f"event {event.seq}, {event.kind!r}, has another {place} than it was given"
            raise DamagedValueError(problem) from error


@cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_SHAPES[kind])
