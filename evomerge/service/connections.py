"""Connections of the server: bounded in number and in time, so that clients that say nothing keep nobody out."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 20.0
"""How long a client may take to send a whole request. The largest has a megabyte, most are a few hundred bytes."""

UNREAD_S = 60.0
"""How long a client may leave an answer unread before its connection is cut."""

MAX_CONNECTIONS = 1000

_GRACE_S = 2  # that answers get when the server ends
_RETRY_S = 1.0  # after which a connection is accepted again when there was no descriptor left for it
_LOGGED_EVERY_S = 60.0

_log = logging.getLogger(__name__)


def most_connections() -> int:
    """How many connections are kept at once: half of the descriptors at most, the rest is for stores and logs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft // 2))


class Connection(H11Protocol):
    """A connection that is closed when its request does not come, or when nobody reads the answer.

    Args:
        closed: called once, when it is closed.

    Attributes:
        waits_since: when it began to wait for a request (monotonic seconds); None while one is answered.
    """

    def __init__(self, *arguments: Any, closed: Callable[[], None], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.waits_since: float | None = None
        self._closed = closed
        self._request_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_request_timer()
        self._stop_answer_timer()
        self._closed()

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_request_timer()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_answer_timer()

    def _expect_request(self) -> None:
        self._stop_request_timer()
        self.waits_since = time.monotonic()
        self._request_timer = self.loop.call_later(REQUEST_S, self.transport.close)

    def _stop_request_timer(self) -> None:
        self.waits_since = None
        if self._request_timer is not None:
            self._request_timer.cancel()

    def _stop_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which keeps no more connections than ``most`` at once.

    One too many takes the place of that which has waited longest for its request. Where all are being answered it
    waits for one of them.

    Args:
        listening: the socket that clients connect to; it is closed at the end.
        ending: called when the server is told to end, so that answers without an end can come to one.
    """

    def __init__(
        self,
        app: ASGIApp,
        listening: socket.socket,
        most: int | None = None,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app, http=Connection, ws="none", access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=_GRACE_S, log_level="error",  # a warning is a line that any stranger can write
            log_config=None,  # else it closes the handlers of whoever logs in this process, one of which closes stderr
        )  # fmt: skip
        super().__init__(config)
        self._listening = listening
        self._ending = ending
        self._free = asyncio.Semaphore(most_connections() if most is None else most)
        self._logged_at = -_LOGGED_EVERY_S

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._listening.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._accepting.cancel()
        self._ending()
        await super().shutdown([self._listening])

    async def _accept(self) -> None:
        """Accept connections one by one. asyncio's own server takes as many as there are descriptors, and writes a
        traceback for each that there is none left for.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listening)
            except ConnectionError:  # the client has gone again
                continue
            except OSError as error:
                self._log_refusal(error)
                await asyncio.sleep(_RETRY_S)
                continue
            if self._free.locked():
                self._close_longest_waiting()
            await self._free.acquire()
            try:
                await loop.connect_accepted_socket(self._connection, accepted)
            except OSError:
                accepted.close()
                self._free.release()

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, closed=self._free.release)

    def _close_longest_waiting(self) -> None:
        waiting = [
            (connection.waits_since, connection)
            for connection in self.server_state.connections
            if isinstance(connection, Connection) and connection.waits_since is not None
        ]
        if waiting:
            min(waiting, key=lambda pair: pair[0])[1].transport.abort()

    def _log_refusal(self, error: OSError) -> None:
        """Log that no connection can be accepted, not more often than a person needs."""
        if time.monotonic() - self._logged_at >= _LOGGED_EVERY_S:
            self._logged_at = time.monotonic()
            _log.warning("no connection can be accepted now: %s", error.strerror)
