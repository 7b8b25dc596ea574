"""A client of the service's API, with the same types: what the command line uses for ``--server URL``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from evomerge.errors import InputError
from evomerge.report.search_status import SearchStatus
from evomerge.service.bodies import (
    CandidateDetail,
    CandidatePage,
    CandidateSummary,
    Compared,
    Export,
    Happening,
    Plan,
    Searches,
    SearchSummary,
    Told,
)
from evomerge.service.processes import TOKEN_VARIABLE

Body = TypeVar("Body", bound=BaseModel)
Word = Literal["pause", "resume", "stop", "cancel"]

_TIMEOUT_S = 330.0  # longer than the server lets a check take
_PAGE = 500


class Client:
    """Talks to a server. Every method raises InputError when the server cannot be reached, or says no.

    Args:
        url: of the server, such as http://127.0.0.1:8080.
        token: what the server asks for; that of EVOMERGE_TOKEN when left out.
        transport: in place of the network, for tests.
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

    def tell(self, search: str, word: Word) -> str:
        """Pause, resume, stop or cancel a search; what was done, in words."""
        return self._post(Told, f"searches/{_quoted(search)}/{word}", {}).told

    def change_budget(self, search: str, *, resume: bool = False, **bounds: float | None) -> str:
        """Change bounds of the budget of a search that nobody drives; what was done, in words."""
        return self._post(Told, f"searches/{_quoted(search)}/budget", {**bounds, "resume": resume}).told

    def candidates(self, search: str, **wanted: Any) -> Iterator[CandidateSummary]:
        """Candidates page by page; ``wanted`` as in the API: status, origin, sort, order, front."""
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

    def events(self, search: str, since: int = 0) -> Iterator[Happening]:
        """The events after one, and then those that come, until the server ends."""
        try:
            headers = {"last-event-id": str(since)}
            with self._http.stream("GET", f"searches/{_quoted(search)}/events", headers=headers) as stream:
                if stream.is_error:
                    stream.read()
                    raise _said_no(stream)
                for line in stream.iter_lines():
                    if line.startswith("data: "):
                        yield Happening.model_validate(json.loads(line.removeprefix("data: ")))
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
            raise _said_no(response)
        return kind.model_validate_json(response.content)

    def _unreachable(self, error: Exception) -> InputError:
        return InputError(self._url, f"cannot be reached ({error})", "Check that `evomerge serve` runs there.")


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _said_no(response: httpx.Response) -> InputError:
    """The server's problem in the words of an error of ours."""
    try:
        said = response.json()
        faults, title, detail = said.get("faults", []), str(said["title"]), str(said.get("detail", ""))
    except (ValueError, KeyError, AttributeError):
        return InputError(str(response.url), f"answers {response.status_code}", "Is it an Evomerge server?")
    if faults:
        return InputError(faults[0]["field"], faults[0]["problem"], faults[0].get("hint", ""))
    if response.status_code == 401:
        return InputError(TOKEN_VARIABLE, "is not the server's token", "It is at the end of the link that it printed.")
    return InputError(response.url.host, f"{title[0].lower()}{title[1:]}", detail)
