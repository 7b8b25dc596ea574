"""A client for the service's API, with the same types. The command line uses it for ``--server URL``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from evomerge.errors import InputError
from evomerge.report.search_status import SearchStatus
from evomerge.service.bodies import (
    CandidateDetail,
    CandidatePage,
    CandidateSummary,
    CommandResult,
    Compared,
    Export,
    Plan,
    Searches,
    SearchEvent,
    SearchSummary,
)
from evomerge.service.processes import TOKEN_VARIABLE

Body = TypeVar("Body", bound=BaseModel)
Command = Literal["pause", "resume", "stop", "cancel"]

_TIMEOUT_S = 330.0  # longer than the server's timeout for a check
_PAGE = 500
_HINT = "Is it an Evomerge server, and of this version?"


class Client:
    """A client of one server. Every method raises InputError if the server cannot be reached or refuses.

    Args:
        url: the server's URL, such as http://127.0.0.1:8080.
        token: the server's token; by default that of EVOMERGE_TOKEN.
        transport: replaces the network, for tests.
    """

    def __init__(self, url: str, token: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._url = url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=f"{self._url}/api/v1/", headers=headers, timeout=_TIMEOUT_S, transport=transport,
                trust_env=False,
            )  # fmt: skip
        except (httpx.InvalidURL, ValueError) as error:
            raise InputError("--server", f"is not the URL of a server ({error})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def searches(self) -> list[SearchSummary]:
        return self._get(Searches, "searches").searches

    def status(self, search: str) -> SearchStatus:
        return self._get(SearchStatus, f"searches/{_quoted(search)}")

    def validate(self, file: str) -> Plan:
        return self._post(Plan, "searches/validate", {"file": file})

    def create(self, file: str, *, start: bool = True) -> SearchStatus:
        return self._post(SearchStatus, "searches", {"file": file, "start": start})

    def send_command(self, search: str, word: Command) -> str:
        """Pause, resume, stop or cancel a search. Returns what was done, in words."""
        return self._post(CommandResult, f"searches/{_quoted(search)}/{word}", {}).told

    def change_budget(self, search: str, *, resume: bool = False, **bounds: float | None) -> str:
        """Change bounds of a search's budget. Returns what was done, in words."""
        return self._post(CommandResult, f"searches/{_quoted(search)}/budget", {**bounds, "resume": resume}).told

    def candidates(self, search: str, **wanted: Any) -> Iterator[CandidateSummary]:
        """All candidates, page by page. ``wanted`` are the API's parameters: status, origin, sort, order, front."""
        cursor: str | None = None
        while True:
            asked = {"limit": _PAGE, **wanted} | ({} if cursor is None else {"cursor": cursor})
            page = self._get(CandidatePage, f"searches/{_quoted(search)}/candidates", asked)
            yield from page.candidates
            cursor = page.next
            if cursor is None:
                return

    def candidate(self, search: str, number: int) -> CandidateDetail:
        return self._get(CandidateDetail, f"searches/{_quoted(search)}/candidates/{number}")

    def compare(self, search: str, a: int, b: int, split: str = "search") -> Compared:
        return self._get(Compared, f"searches/{_quoted(search)}/compare", {"a": a, "b": b, "split": split})

    def events(self, search: str, since: int = 0) -> Iterator[SearchEvent]:
        """The events after ``since``, followed by new ones until the server closes the stream."""
        try:
            headers = {"last-event-id": str(since)}
            with self._http.stream("GET", f"searches/{_quoted(search)}/events", headers=headers) as stream:
                if stream.is_error:
                    stream.read()
                    raise _error_of(stream)
                for line in stream.iter_lines():
                    if line.startswith("data: "):
                        try:
                            yield SearchEvent.model_validate_json(line.removeprefix("data: "))
                        except ValidationError as error:
                            raise _not_ours(stream, error) from None
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def export(self, search: str, candidate: str = "best", *, name: str | None = None, verify: bool = True) -> Export:
        return self._post(
            Export, f"searches/{_quoted(search)}/exports", {"candidate": candidate, "name": name, "verify": verify}
        )

    def export_state(self, search: str, name: str) -> Export:
        return self._get(Export, f"searches/{_quoted(search)}/exports/{name}")

    def _get(self, kind: type[Body], path: str, wanted: Mapping[str, Any] | None = None) -> Body:
        return self._request(kind, "GET", path, params=wanted)

    def _post(self, kind: type[Body], path: str, body: Mapping[str, Any]) -> Body:
        return self._request(kind, "POST", path, json=body)

    def _request(self, kind: type[Body], method: str, path: str, **more: Any) -> Body:
        try:
            response = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if not response.is_success:
            raise _error_of(response)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise _not_ours(response, error) from None

    def _unreachable(self, error: Exception) -> InputError:
        return InputError(self._url, f"cannot be reached ({error})", "Check that `evomerge serve` runs there.")


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _not_ours(response: httpx.Response, error: ValidationError) -> InputError:
    """The error for an answer that is not one of this API's."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    what = f"{where}: {fault['msg']}" if where else str(fault["msg"])
    return InputError(str(response.url), f"gave an answer that cannot be read ({what})", _HINT)


def _error_of(response: httpx.Response) -> InputError:
    """The problem that the server reported, as an InputError."""
    try:
        said = response.json()
        faults, title, detail = said.get("faults", []), str(said["title"]), str(said.get("detail", ""))
    except (ValueError, KeyError, AttributeError):
        return InputError(str(response.url), f"responded with status {response.status_code}", _HINT)
    if faults:
        return InputError(faults[0]["field"], faults[0]["problem"], faults[0].get("hint", ""))
    if response.status_code == 401:
        return InputError(TOKEN_VARIABLE, "is not the server's token", "It is at the end of the link that it printed.")
    return InputError(response.url.host, f"{title[0].lower()}{title[1:]}", detail)
