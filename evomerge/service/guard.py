"""Access control: checks the Host header, body size, origin and token. The outermost layer, in plain ASGI.

API clients send the token as ``Authorization: Bearer``. A browser sends it once, through the printed link (``?token=``)
or the login form, and gets a session cookie. The cookie is random, and valid until logout or until this process ends.
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
"""The maximum size of a request body. A search file is a few kilobytes."""

MAX_HEADER_BYTES = 2**15

MAX_FAILURES, FAILURES_S = 10, 60.0
"""How many wrong tokens an address may send within this many seconds before it is locked out."""

_MAX_ADDRESSES = 10_000  # whose failures are remembered, so that they cannot fill the memory
_MAX_COOKIES = 10_000  # sessions; beyond that, the oldest one has to log in again

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
"""The default headers of every response; a route can set its own values."""

_SAFE = ("GET", "HEAD", "OPTIONS")
_API = "/api/"
_OPEN = ("/login", "/healthz", "/api/v1/health")  # without a token, as is /static/


class Authenticator:
    """Checks tokens and session cookies, and counts failed attempts by address.

    Args:
        token: None disables authentication.
    """

    def __init__(self, token: str | None) -> None:
        self.token = token
        self._cookies: dict[bytes, None] = {}  # hashes of all session cookies, oldest first
        # Derived from the token, so that two servers on one host do not overwrite each other's cookies.
        self.cookie_name = f"evomerge-{sha256((token or '').encode()).hexdigest()[:8]}"
        self._failures: dict[str, deque[float]] = {}

    def has_session(self, cookie: str | None) -> bool:
        """Whether this is a valid session cookie. Guessing one is hopeless, so failed attempts are not counted."""
        return cookie is not None and _hash(cookie) in self._cookies

    def accepts(self, given: str, address: str) -> bool:
        """Whether this is the right token; a wrong one counts as a failed attempt of the address."""
        if self.token is None or secrets.compare_digest(given.encode(), self.token.encode()):
            return True
        if address not in self._failures and len(self._failures) >= _MAX_ADDRESSES:
            self._failures.pop(next(iter(self._failures)))
        self._failures.setdefault(address, deque(maxlen=MAX_FAILURES)).append(time.monotonic())
        return False

    def lockout_s(self, address: str) -> float:
        """For how many seconds wrong tokens from an address are answered with 429; 0 if it is not locked out.

        The right token is always accepted: behind a proxy all clients share one address, and a stranger must not be
        able to lock the others out.
        """
        tried = self._failures.get(address, deque[float]())
        if len(tried) < MAX_FAILURES:
            return 0.0
        return max(0.0, tried[0] + FAILURES_S - time.monotonic())

    def log_in(self, response: Response, scheme: str) -> None:
        """Start a session: set a new session cookie."""
        cookie = secrets.token_urlsafe(32)
        if len(self._cookies) >= _MAX_COOKIES:
            self._cookies.pop(next(iter(self._cookies)))
        self._cookies[_hash(cookie)] = None
        response.set_cookie(
            self.cookie_name, cookie, path="/", httponly=True, samesite="strict", secure=scheme == "https"
        )

    def log_out(self, response: Response, cookie: str | None) -> None:
        """End a session: invalidate its cookie, including any copies, and delete it from the browser."""
        if cookie is not None:
            self._cookies.pop(_hash(cookie), None)
        response.delete_cookie(self.cookie_name, path="/", httponly=True, samesite="strict")


def _hash(cookie: str) -> bytes:
    """The hash under which a cookie is stored. Looking it up by its hash leaks nothing through timing."""
    return sha256(cookie.encode(errors="surrogatepass")).digest()


class Guard:
    """ASGI middleware that passes on permitted requests, refuses all others, and adds headers to every response."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator
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
        if scope["method"] in _SAFE:  # whose bodies are never read
            await self._app(scope, receive, sending)
            return
        body = await _body(receive)
        if body is None:
            return
        if len(body) > MAX_BYTES:
            await _too_large()(scope, receive, sending)
            return
        await self._app(scope, _replayed(body, receive), sending)

    def _refusal(self, scope: Scope) -> Response | None:
        """The response to a request that is not permitted; None if it is permitted."""
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return _refused(431, "The headers are too large", f"The maximum is {MAX_HEADER_BYTES} bytes.")
        if _host(headers.get("host", "")) not in self._hosts:
            hint = "Open it by the address that was printed, or start it with --allow-host NAME."
            return _refused(421, "Unknown host name", hint)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            return _too_large()
        if scope["path"] in _OPEN or scope["path"].startswith("/static/"):
            if not _is_same_origin(scope, headers):
                return _cross_site()
            return None if "token" not in _query(scope) else self._by_link(scope)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if self._authenticator.token is not None and kind.lower() == "bearer":
            return self._by_bearer(scope, given.strip())  # other sites cannot make a browser send this header
        return _cross_site() if not _is_same_origin(scope, headers) else self._without_bearer(scope, headers)

    def _by_bearer(self, scope: Scope, given: str) -> Response | None:
        """The refusal of a wrong bearer token; None if it is right. If a token is sent, cookies are ignored."""
        wait = self._authenticator.lockout_s(address_of(scope))
        if self._authenticator.accepts(given, address_of(scope)):
            return None
        return too_many_failures(wait) if wait else _refused(401, "The token is wrong")

    def _without_bearer(self, scope: Scope, headers: Headers) -> Response | None:
        authenticator = self._authenticator
        if scope["method"] == "GET" and "token" in _query(scope) and not scope["path"].startswith(_API):
            return self._by_link(scope)
        if authenticator.token is None or authenticator.has_session(cookie_of(headers, authenticator.cookie_name)):
            return None
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return RedirectResponse(f"/login?{urlencode({'next': _url_without_token(scope)})}", 303)
        return _refused(401, "A token is needed", "Send it as `Authorization: Bearer TOKEN`, or open the printed link.")

    def _by_link(self, scope: Scope) -> Response:
        """Log a browser in with the token in the link, and redirect so that it disappears from the address bar."""
        wait = self._authenticator.lockout_s(address_of(scope))
        if not self._authenticator.accepts(_query(scope)["token"], address_of(scope)):
            return too_many_failures(wait) if wait else RedirectResponse("/login?failed=1", 303)
        response = RedirectResponse(_url_without_token(scope), 303)
        self._authenticator.log_in(response, scope["scheme"])
        return response


def address_of(scope: Scope) -> str:
    """The client address of a request."""
    return str((scope.get("client") or ("",))[0])


def too_many_failures(wait_s: float) -> Response:
    """The response to an address that has sent too many wrong tokens."""
    return answer(Problem(title="Too many wrong tokens", status=429), {"retry-after": str(int(wait_s) + 1)})


def local_target(text: str) -> str:
    """Where to redirect after a login: the requested path, never another site."""
    return quote("/" + text.lstrip("/\\"), safe="/?&=%+,:;@~-._")


async def _body(receive: Receive) -> bytes | None:
    """Read the body, or slightly more than MAX_BYTES of it. None if the client disconnects first."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BYTES or not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns a body that was already read, and then passes on later messages."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _is_same_origin(scope: Scope, headers: Headers) -> bool:
    """Whether a request is safe, comes from our own pages, or does not come from a browser.

    Every current browser sends one of the two headers with a request that changes something. A request with neither,
    but with a cookie, is refused.
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


def _cross_site() -> Response:
    return _refused(403, "The request comes from another site")


def _too_large() -> Response:
    return _refused(413, "The body is too large", f"The maximum is {MAX_BYTES} bytes.")


def _host(value: str) -> str:
    """A Host header without the port."""
    name, _, port = value.lower().rpartition(":")
    return name if port.isdecimal() and name else value.lower()


def cookie_of(headers: Headers, name: str) -> str | None:
    """The value of a cookie, or None."""
    pairs: Iterable[str] = headers.get("cookie", "").split(";")
    return next((value for key, _, value in (pair.strip().partition("=") for pair in pairs) if key == name), None)


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))


def _url_without_token(scope: Scope) -> str:
    """The path and query of a request without the token."""
    kept = [(k, v) for k, v in parse_qsl(scope["query_string"].decode("latin-1")) if k != "token"]
    path = quote("/" + scope["path"].lstrip("/\\"))
    return f"{path}?{urlencode(kept)}" if kept else path
