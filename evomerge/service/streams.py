"""The events of searches for everybody who follows them: of each search one open store, looked at by one task."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress

from evomerge.errors import InputError
from evomerge.service.bodies import Happening
from evomerge.service.root import Root, UnknownSearchError
from evomerge.store import EventRow, Store, summaries

POLL_S = 0.5
"""How often a store is asked for more."""

PING_S = 15.0
"""After how long without an event a client is sent a comment, so that proxies do not take the stream for dead."""

_AT_ONCE = 200
_KEPT = 1000  # the newest events of a search, which clients that keep up are served from

_log = logging.getLogger(__name__)


class Streams:
    """The streams of events of the searches in a root. All of it runs in the event loop but the reading."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._followed: dict[str, _Followed] = {}

    async def follow(self, name: str, seq: int) -> AsyncIterator[bytes]:
        """The events of a search after the one with this seq as server-sent events, and those that come.

        Ends only when the search can no longer be read; clients connect again then, and hear why.
        """
        followed = self._followed.get(name)
        if followed is None or followed.has_ended:
            followed = self._followed[name] = _Followed(self._root, name)
        followed.clients += 1
        try:
            async for chunk in followed.chunks(seq):
                yield chunk
        finally:
            followed.clients -= 1
            if followed.clients == 0:
                followed.end()
                if self._followed.get(name) is followed:
                    del self._followed[name]

    def end(self) -> None:
        """End all streams; clients connect again to whatever server comes next."""
        for followed in self._followed.values():
            followed.end()


class _Followed:
    """A search with clients: its store, which one task reads, and the newest events, already written out."""

    def __init__(self, root: Root, name: str) -> None:
        self.clients = 0
        self._root = root
        self._name = name
        self._store: Store | None = None
        self._newest: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)
        self._before = 0  # the seq of the last event that is older than those kept
        self._last = 0  # that of the newest event
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    @property
    def has_ended(self) -> bool:
        return self._task.done()

    def end(self) -> None:
        self._task.cancel()

    async def chunks(self, seq: int) -> AsyncIterator[bytes]:
        """Events after a seq, as many at once as there are; a comment where there are none for long."""
        while not self.has_ended:
            changed = self._changed
            if self._store is not None:
                seq = seq if seq <= self._last else 0  # of events that are gone: the search has begun again
                events = await self._after(self._store, seq)
                if events:
                    seq = events[-1][0]
                    yield b"".join(text for _, text in events)
                    continue
            try:
                async with asyncio.timeout(PING_S):
                    await changed.wait()
            except TimeoutError:
                yield b": nothing new\n\n"

    async def _after(self, store: Store, seq: int) -> list[tuple[int, bytes]]:
        if seq >= self._before:
            return [(number, text) for number, text in self._newest if number > seq]
        return [_written(event) for event in await asyncio.to_thread(summaries.events_after, store, seq, _AT_ONCE)]

    async def _read(self) -> None:
        """Read what is new, again and again."""
        with ExitStack() as opened:
            try:
                store = await asyncio.to_thread(opened.enter_context, self._root.store(self._name))
                file, seq = _file_of(store), await asyncio.to_thread(summaries.last_event, store)
                self._store, self._before, self._last = store, seq, seq
                self._tell_all()
                while _file_of(store) == file:
                    events = await asyncio.to_thread(summaries.events_after, store, self._last, _AT_ONCE)
                    self._keep(events)
                    if not events and await asyncio.to_thread(summaries.last_event, store) < self._last:
                        self._newest.clear()
                        self._before = self._last = 0
                        self._tell_all()
                    elif len(events) < _AT_ONCE:
                        await asyncio.sleep(POLL_S)
            except (InputError, UnknownSearchError) as error:
                _log.info("the events of %r cannot be read: %s", self._name, error)
            finally:
                self._tell_all()

    def _keep(self, events: list[EventRow]) -> None:
        for event in events:
            if len(self._newest) == _KEPT:
                self._before = self._newest[0][0]
            self._newest.append(_written(event))
            self._last = event.seq
        if events:
            self._tell_all()

    def _tell_all(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _file_of(store: Store) -> tuple[int, int] | None:
    """Which file a store is, so that one in its place is not taken for it; None of a database server."""
    with suppress(OSError):
        status = os.stat(store.place)
        return status.st_dev, status.st_ino
    return None


def _written(event: EventRow) -> tuple[int, bytes]:
    data = Happening.model_validate(event, from_attributes=True).model_dump_json()
    return event.seq, f"data: {data}\nid: {event.seq}\n\n".encode()
