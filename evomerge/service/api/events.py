"""The events of a search as server-sent events. A client that reconnects continues where it left off."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from starlette.responses import StreamingResponse

from evomerge.service.dependencies import RootDependency, StreamsDependency
from evomerge.service.problems import RESPONSES

router = APIRouter(prefix="/api/v1/searches/{name}", tags=["events"], responses=RESPONSES)

_LARGEST = 2**63 - 1
_DATA: dict[str, Any] = {
    "type": "string",
    "contentMediaType": "application/json",
    "contentSchema": {"$ref": "#/components/schemas/SearchEvent"},
}
_STREAM = {"content": {"text/event-stream": {"itemSchema": {"type": "object", "properties": {"data": _DATA}}}}}
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the latter because nginx would buffer the stream


class EventStream(StreamingResponse):
    media_type = "text/event-stream"


def _begin(
    name: str,
    root: RootDependency,
    since: Annotated[int, Query(ge=0, le=_LARGEST, description="the seq of the last event known")] = 0,
    last_event_id: Annotated[
        str | None, Header(description="as a browser sends it; takes precedence over since")
    ] = None,
) -> int:
    """The event after which the stream begins. Checks first that the search exists."""
    with root.store(name):
        pass
    known = last_event_id is not None and last_event_id.isascii() and last_event_id.isdecimal()
    return min(int(last_event_id[:19]), _LARGEST) if known and last_event_id else since


@router.get("/events", response_class=EventStream, responses={200: _STREAM})
async def events(name: str, begin: Annotated[int, Depends(_begin)], streams: StreamsDependency) -> EventStream:
    """All events of the search after a given one, followed by new ones as they come. The stream does not end."""
    return EventStream(streams.follow(name, begin), headers=_HEADERS)
