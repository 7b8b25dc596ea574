"""Streams of the events of searches. For each search that has clients, one task polls one open store."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress

from evomerge.errors import InputError
from evomerge.service.bodies import SearchEvent
from evomerge.service.root import Root, UnknownSearchError
from evomerge.store import EventRow, Store, summaries

POLL_S = 0.5
"""How often a store is polled for new events."""

PING_S = 15.0
"""After this long without an event a comment is sent, so that proxies do not close the stream."""

_AT_ONCE = 200
_KEPT = 1000  # the newest events of a search, kept in memory for clients that keep up

_log = logging.getLogger(__name__)


class Streams:
    """The event streams of the searches in a root. Everything except reading runs in the event loop."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._feeds: dict[str, _Feed] = {}

    async def follow(self, name: str, seq: int) -> AsyncIterator[bytes]:
        """The events of a search after this seq as server-sent events, followed by new ones as they come.

        Ends only if the search can no longer be read; clients then reconnect and get the reason.
        """
        feed = self._feeds.get(name)
        if feed is None or feed.has_ended:
            feed = self._feeds[name] = _Feed(self._root, name)
        feed.clients += 1
        try:
            async for chunk in feed.chunks(seq):
                yield chunk
        finally:
            feed.clients -= 1
            if feed.clients == 0:
                feed.end()
                if self._feeds.get(name) is feed:
                    del self._feeds[name]

    def end(self) -> None:
        """End all streams; clients will reconnect to the next server."""
        for feed in self._feeds.values():
            feed.end()


class _Feed:
    """The feed of one search that has clients: its store, which one task polls, and its newest events, encoded."""

    def __init__(self, root: Root, name: str) -> None:
        self.clients = 0
        self._root = root
        self._name = name
        self._store: Store | None = None
        self._newest: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)
        self._before = 0  # the seq of the last event older than those kept
        self._last = 0  # the seq of the newest event
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    @property
    def has_ended(self) -> bool:
        return self._task.done()

    def end(self) -> None:
        self._task.cancel()

    async def chunks(self, seq: int) -> AsyncIterator[bytes]:
        """Events after a seq, as many per chunk as there are; a comment if there are none for a while."""
        while not self.has_ended:
            changed = self._changed
            if self._store is not None:
                seq = seq if seq <= self._last else 0  # those events are gone: the search was started over
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
        return [_encoded(event) for event in await asyncio.to_thread(summaries.events_after, store, seq, _AT_ONCE)]

    async def _read(self) -> None:
        """Poll the store for new events."""
        with ExitStack() as opened:
            try:
                store = await asyncio.to_thread(opened.enter_context, self._root.store(self._name))
                file, seq = _file_of(store), await asyncio.to_thread(summaries.last_event, store)
                self._store, self._before, self._last = store, seq, seq
                self._notify()
                while _file_of(store) == file:
                    events = await asyncio.to_thread(summaries.events_after, store, self._last, _AT_ONCE)
                    self._keep(events)
                    if not events and await asyncio.to_thread(summaries.last_event, store) < self._last:
                        self._newest.clear()
                        self._before = self._last = 0
                        self._notify()
                    elif len(events) < _AT_ONCE:
                        await asyncio.sleep(POLL_S)
            except (InputError, UnknownSearchError) as error:
                _log.info("the events of %r cannot be read: %s", self._name, error)
            finally:
                self._notify()

    def _keep(self, events: list[EventRow]) -> None:
        for event in events:
            if len(self._newest) == _KEPT:
                self._before = self._newest[0][0]
            self._newest.append(_encoded(event))
            self._last = event.seq
        if events:
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _file_of(store: Store) -> tuple[int, int] | None:
    """The device and inode of a store's file, to notice when it is replaced; None for a database server."""
    with suppress(OSError):
        status = os.stat(store.place)
        return status.st_dev, status.st_ino
    return None


def _encoded(event: EventRow) -> tuple[int, bytes]:
    data = SearchEvent.model_validate(event, from_attributes=True).model_dump_json()
    return event.seq, f"data: {data}\nid: {event.seq}\n\n".encode()
