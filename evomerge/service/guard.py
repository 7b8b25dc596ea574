"""Who may call the service, and how: Host, body size, origin, token. The outermost layer, in plain ASGI.

A caller shows the token as ``Authorization: Bearer``. A browser gives it once, by the printed link (``?token=``) or the
login form, and from then on shows a cookie, which is no token: it is random, and ends with a logout or this process.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evomerge.service.problems import Problem, answer

if TYPE_CHECKING:
    from evomerge.service.dependencies import ServiceSettings

MAX_BYTES = 2**20
"""Of a request's body. A search file is a few kilobytes."""

MAX_HEADER_BYTES = 2**15

MAX_FAILURES, FAILURES_S = 10, 60.0
"""Wrong tokens from one address, within so many seconds, before it has to wait."""

_MAX_ADDRESSES = 10_000  # that failures are remembered of, so that they cannot fill the memory
_MAX_COOKIES = 10_000  # logins; the oldest has to log in again

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer, where a route has not set its own."""

_SAFE = ("GET", "HEAD", "OPTIONS")
_API = "/api/"
_OPEN = ("/login", "/healthz", "/api/v1/health")  # to whoever knows no token, as is /static/


class Door:
    """Knows the token and the cookies that stand for it, and who has tried wrong ones.

    Args:
        token: None lets everybody in.
    """

    def __init__(self, token: str | None) -> None:
        self.token = token
        self._cookies: dict[bytes, None] = {}  # hashes of those given out, the oldest first
        # By the token, so that two servers of one host do not take each other's cookies away.
        self.cookie_name = f"evomerge-{sha256((token or '').encode()).hexdigest()[:8]}"
        self._failures: dict[str, deque[float]] = {}

    def knows(self, cookie: str | None) -> bool:
        """Whether a browser has logged in here. Guessing a cookie is hopeless, so tries are not counted."""
        return cookie is not None and _hash(cookie) in self._cookies

    def opens(self, given: str, address: str) -> bool:
        """Whether this is the token; a wrong one is held against the address."""
        if self.token is None or secrets.compare_digest(given.encode(), self.token.encode()):
            return True
        if address not in self._failures and len(self._failures) >= _MAX_ADDRESSES:
            self._failures.pop(next(iter(self._failures)))
        self._failures.setdefault(address, deque(maxlen=MAX_FAILURES)).append(time.monotonic())
        return False

    def wait_s(self, address: str) -> float:
        """For how long wrong tokens of an address are answered by a refusal to look at them; 0 where they are not.

        The right one is always looked at: behind a proxy all have one address, and a stranger must not lock it.
        """
        tried = self._failures.get(address, deque[float]())
        if len(tried) < MAX_FAILURES:
            return 0.0
        return max(0.0, tried[0] + FAILURES_S - time.monotonic())

    def let_in(self, response: Response, scheme: str) -> None:
        """Give the browser a cookie of its own."""
        cookie = secrets.token_urlsafe(32)
        if len(self._cookies) >= _MAX_COOKIES:
            self._cookies.pop(next(iter(self._cookies)))
        self._cookies[_hash(cookie)] = None
        response.set_cookie(
            self.cookie_name, cookie, path="/", httponly=True, samesite="strict", secure=scheme == "https"
        )

    def see_off(self, response: Response, cookie: str | None) -> None:
        """End a cookie, whoever else has a copy of it, and take it away."""
        if cookie is not None:
            self._cookies.pop(_hash(cookie), None)
        response.delete_cookie(self.cookie_name, path="/", httponly=True, samesite="strict")


def _hash(cookie: str) -> bytes:
    """What is kept of a cookie. To find it by its hash tells nothing about it, however long that takes."""
    return sha256(cookie.encode(errors="surrogatepass")).digest()


class Guard:
    """ASGI middleware: lets through what may come, answers the rest itself, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings, door: Door) -> None:
        self._app = app
        self._door = door
        self._hosts = {host.lower() for host in settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, sending)
            return
        if scope["method"] in _SAFE:  # whose bodies nobody reads
            await self._app(scope, receive, sending)
            return
        body = await _body(receive)
        if body is None:
            return
        if len(body) > MAX_BYTES:
            await _too_large()(scope, receive, sending)
            return
        await self._app(scope, _again(body, receive), sending)

    def _refusal(self, scope: Scope) -> Response | None:
        """What to answer to one who may not come; None to one who may."""
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return _refused(431, "The headers are too large", f"{MAX_HEADER_BYTES} bytes are the most.")
        if _host(headers.get("host", "")) not in self._hosts:
            hint = "Open it by the address that was printed, or start it with --allow-host NAME."
            return _refused(421, "Unknown host name", hint)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            return _too_large()
        if scope["path"] in _OPEN or scope["path"].startswith("/static/"):
            if not _is_ours(scope, headers):
                return _foreign()
            return None if "token" not in _query(scope) else self._by_link(scope)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if self._door.token is not None and kind.lower() == "bearer":
            return self._by_bearer(scope, given.strip())  # which no other site can have a browser send
        return _foreign() if not _is_ours(scope, headers) else self._without_bearer(scope, headers)

    def _by_bearer(self, scope: Scope, given: str) -> Response | None:
        """The answer to one who shows a token: it alone decides, not a cookie beside it."""
        wait = self._door.wait_s(address_of(scope))
        if self._door.opens(given, address_of(scope)):
            return None
        return too_often(wait) if wait else _refused(401, "The token is wrong")

    def _without_bearer(self, scope: Scope, headers: Headers) -> Response | None:
        door = self._door
        if scope["method"] == "GET" and "token" in _query(scope) and not scope["path"].startswith(_API):
            return self._by_link(scope)
        if door.token is None or door.knows(cookie_of(headers, door.cookie_name)):
            return None
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return RedirectResponse(f"/login?{urlencode({'next': _here(scope)})}", 303)
        return _refused(401, "A token is needed", "Show it as `Authorization: Bearer TOKEN`, or open the printed link.")

    def _by_link(self, scope: Scope) -> Response:
        """Log a browser in by a link, and take the token out of its address bar."""
        wait = self._door.wait_s(address_of(scope))
        if not self._door.opens(_query(scope)["token"], address_of(scope)):
            return too_often(wait) if wait else RedirectResponse("/login?failed=1", 303)
        response = RedirectResponse(_here(scope), 303)
        self._door.let_in(response, scope["scheme"])
        return response


def address_of(scope: Scope) -> str:
    """The address that a request comes from."""
    return str((scope.get("client") or ("",))[0])


def too_often(wait_s: float) -> Response:
    """The answer to an address that has tried too many wrong tokens."""
    return answer(Problem(title="Too many wrong tokens", status=429), {"retry-after": str(int(wait_s) + 1)})


def local_target(text: str) -> str:
    """Where to go after a login: the path that was asked for, never another site."""
    return quote("/" + text.lstrip("/\\"), safe="/?&=%+,:;@~-._")


async def _body(receive: Receive) -> bytes | None:
    """The body, however it is cut up: whole, or more than MAX_BYTES of it. None when the client goes before that."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BYTES or not message.get("more_body"):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, and then what else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _is_ours(scope: Scope, headers: Headers) -> bool:
    """Whether a request that changes something comes from our own page, or from no browser.

    Every browser of today sends one of the two headers with such a request; one with neither, and with a cookie, is
    none of ours.
    """
    if scope["method"] in _SAFE:
        return True
    if (site := headers.get("sec-fetch-site")) is not None:
        return site == "same-origin"
    if (origin := headers.get("origin")) is not None:
        return origin.lower() == f"{scope['scheme']}://{headers.get('host', '')}".lower()
    return "cookie" not in headers


def _refused(status: int, title: str, detail: str = "") -> Response:
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    return answer(Problem(title=title, status=status, detail=detail), headers)


def _foreign() -> Response:
    return _refused(403, "The request comes from another site")


def _too_large() -> Response:
    return _refused(413, "The body is too large", f"{MAX_BYTES} bytes are the most.")


def _host(value: str) -> str:
    """A Host header without its port."""
    name, _, port = value.lower().rpartition(":")
    return name if port.isdecimal() and name else value.lower()


def cookie_of(headers: Headers, name: str) -> str | None:
    """The value of a cookie."""
    pairs: Iterable[str] = headers.get("cookie", "").split(";")
    return next((value for key, _, value in (pair.strip().partition("=") for pair in pairs) if key == name), None)


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))


def _here(scope: Scope) -> str:
    """The path and query of a request without its token."""
    kept = [(k, v) for k, v in parse_qsl(scope["query_string"].decode("latin-1")) if k != "token"]
    path = quote("/" + scope["path"].lstrip("/\\"))
    return f"{path}?{urlencode(kept)}" if kept else path
