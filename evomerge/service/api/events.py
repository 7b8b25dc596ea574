"""What happens in a search, as server-sent events: a stream that goes on where a client left it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from evomerge.service.app import RootDependency
from evomerge.service.bodies import Happening
from evomerge.service.problems import RESPONSES
from evomerge.service.root import Root
from evomerge.store import EventRow, summaries

router = APIRouter(prefix="/api/v1/searches/{name}", tags=["events"], responses=RESPONSES)

POLL_S = 0.5
"""How often the store is asked for more."""

_AT_ONCE = 200
_LARGEST = 2**63 - 1


def _begin(
    name: str,
    root: RootDependency,
    since: Annotated[int, Query(ge=0, le=_LARGEST, description="the seq of the last event known")] = 0,
    last_event_id: Annotated[str | None, Header(description="as a browser sends it; goes before since")] = None,
) -> int:
    """The event after which the stream begins, once it is known that there is such a search."""
    with root.store(name):
        pass
    known = last_event_id is not None and last_event_id.isascii() and last_event_id.isdecimal()
    return min(int(last_event_id[:19]), _LARGEST) if known and last_event_id else since


@router.get("/events", response_class=EventSourceResponse)
async def events(
    name: str, root: RootDependency, begin: Annotated[int, Depends(_begin)]
) -> AsyncIterator[ServerSentEvent]:
    """Every event of the search from a given one on, and then those that come. It never ends."""
    seq = begin
    while True:
        found = await asyncio.to_thread(_next, root, name, seq)
        for event in found:
            seq = event.seq
            yield ServerSentEvent(data=Happening(**asdict(event)), id=str(seq))
        if len(found) < _AT_ONCE:
            await asyncio.sleep(POLL_S)


def _next(root: Root, name: str, seq: int) -> list[EventRow]:
    with root.store(name) as store:
        return summaries.events_after(store, seq, _AT_ONCE)
