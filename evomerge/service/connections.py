"""Connections to the server, limited in number and time, so that idle clients cannot lock others out."""

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
"""How long a client may take to send a whole request. The largest is a megabyte, most are a few hundred bytes."""

UNREAD_S = 60.0
"""How long a client may leave a response unread before its connection is aborted."""

MAX_CONNECTIONS = 1000

_GRACE_S = 2  # for open responses when the server shuts down
_RETRY_S = 1.0  # before accepting again after running out of file descriptors
_LOGGED_EVERY_S = 60.0

_log = logging.getLogger(__name__)


def most_connections() -> int:
    """The maximum number of open connections: at most half of the file descriptors; stores and logs need the rest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft // 2))


class Connection(H11Protocol):
    """A connection that is closed if no request arrives in time, or if the client does not read the response.

    Args:
        closed: called once, when the connection is closed.

    Attributes:
        waits_since: when it began to wait for a request (monotonic seconds); None while a request is being answered.
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
    """uvicorn's server with at most ``most`` open connections.

    A further connection replaces the one that has waited longest for its request. If all of them are being answered, it
    waits until one is closed.

    Args:
        listening: the socket that clients connect to; it is closed on shutdown.
        ending: called on shutdown, so that endless responses can be ended.
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
            timeout_graceful_shutdown=_GRACE_S, log_level="error",  # any stranger can cause a warning
            log_config=None,  # otherwise it closes all logging handlers of this process, one of which closes stderr
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
        """Accept connections one by one. asyncio's own server accepts until no file descriptor is left, and logs a
        traceback for every connection after that.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listening)
            except ConnectionError:  # the client has already disconnected
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
        """Log that no connection can be accepted, at most once a minute."""
        if time.monotonic() - self._logged_at >= _LOGGED_EVERY_S:
            self._logged_at = time.monotonic()
            _log.warning("no connection can be accepted now: %s", error.strerror)
