"""Events: what older programs have written is read into a class of its kind, and would be written again as it was."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from evomerge.store import EventRow, events
from evomerge.store.columns import DamagedValueError

GOLDEN = Path(__file__).parent / "golden" / "store"


def kinds(above: type[BaseModel] = events.Event) -> dict[str, Any]:
    """The classes of events by kind."""
    found = {} if above is events.Event or "kind" not in vars(above) else {above.kind: above}  # type: ignore[attr-defined]
    for each in above.__subclasses__():
        found |= kinds(each)
    return found


KINDS = kinds() | {"item response": events.ItemResponse}


def row(kind: str, payload: dict[str, Any]) -> EventRow:
    (found,) = events.event_rows([(7, 1.0, kind, 3, 1, payload)])
    return found


@pytest.mark.parametrize("name", ["plain-format-4", "racing-format-4", "miniature-format-4"])
def test_events_of_an_older_program(name: str) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript((GOLDEN / f"{name}.sql").read_text(encoding="utf-8"))
        found = connection.execute("SELECT kind, payload FROM event").fetchall()
    assert found
    for kind, text in found:
        payload = json.loads(text)
        told = KINDS[kind].model_validate(payload)
        assert json.loads(json.dumps(told.payload)) == payload, kind
        assert row(kind, payload).content == (told if kind in events.READ else None)


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        (events.Dispatch(worker="w"), {"worker": "w"}),
        (events.Dispatch(worker="", reached=0, out="", rung=-1), {"worker": "", "reached": 0, "out": "", "rung": -1}),
        (events.Cached(same_as=4), {"same_as": 4}),
        (events.Stale(what="result"), {"what": "result"}),
        (events.Screening(pairs=2, tau=math.inf, on=False), {"pairs": 2, "tau": math.inf, "on": False}),
    ],
)
def test_only_what_was_given_is_written(event: events.Event, payload: dict[str, Any]) -> None:
    assert event.payload == payload
    assert row(event.kind, payload).read(type(event)) == event


def test_what_was_decided_of_a_race_is_told_or_not() -> None:
    assert events.Dispatch(worker="").decided is None
    decided = events.RaceDecision(reached=0, out="", rung=1)
    assert events.Dispatch(worker="", **decided.model_dump()).decided == decided


def test_every_kind_is_its_own() -> None:
    assert len(KINDS) > 25
    assert all(each.kind == kind for kind, each in KINDS.items())


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("failure", {}),
        ("tell", {"step": 1, "candidates": 5}),
        ("winner", {"candidate": "best"}),
        ("rung", {"items": 3}),
    ],
)
def test_an_event_that_says_something_else_is_damage(kind: str, payload: dict[str, Any]) -> None:
    with pytest.raises(DamagedValueError, match=f"event 7, '{kind}'"):
        row(kind, payload)


def test_an_event_is_read_as_what_it_is() -> None:
    found = row("failure", {"reason": "died", "final": True})
    assert found.read(events.AttemptEnded) is found.read(events.Failure)
    with pytest.raises(TypeError):
        found.read(events.Rung)
