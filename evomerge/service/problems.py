"""Errors as problem+json (RFC 9457): what is wrong, where it is, and how to fix it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from evomerge.errors import InputError
from evomerge.printable import printable
from evomerge.service.root import UnknownSearchError

MEDIA_TYPE = "application/problem+json"


class Fault(BaseModel):
    """A single fault; ``field`` is the key of the search file or of the request."""

    field: str
    problem: str
    hint: str = ""


class Problem(BaseModel):
    """The body of every error response."""

    title: str
    status: int
    detail: str = ""
    faults: list[Fault] = []


class ProblemError(Exception):
    """Raised by routes to respond with this problem."""

    def __init__(self, status: int, title: str, *faults: Fault, detail: str = "") -> None:
        super().__init__(title)
        self.problem = Problem(title=title, status=status, detail=detail, faults=list(faults))


def answer(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(problem.model_dump(), problem.status, headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make the app respond to every error with a problem."""

    @app.exception_handler(ProblemError)
    def problem(request: Request, error: ProblemError) -> JSONResponse:
        return answer(error.problem, {"retry-after": "60"} if error.problem.status == 503 else None)

    @app.exception_handler(InputError)
    def wrong_input(request: Request, error: InputError) -> JSONResponse:
        fault = Fault(field=error.place, problem=error.problem, hint=error.hint)
        return answer(Problem(title="That does not work", status=422, detail=str(error), faults=[fault]))

    @app.exception_handler(UnknownSearchError)
    def unknown(request: Request, error: UnknownSearchError) -> JSONResponse:
        return answer(Problem(title="There is no such search", status=404, detail=printable(str(error))))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [Fault(field=_field(detail["loc"]), problem=printable(detail["msg"])) for detail in error.errors()]
        return answer(Problem(title="The request is not valid", status=422, faults=faults))

    @app.exception_handler(HTTPException)
    def plain(request: Request, error: HTTPException) -> JSONResponse:
        return answer(Problem(title=str(error.detail), status=error.status_code), dict(error.headers or {}))


def _field(location: tuple[Any, ...]) -> str:
    return printable(".".join(str(part) for part in location if part not in ("body", "query", "path")))


_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": words, "content": _CONTENT}
    for status, words in (
        (404, "Not found"),
        (409, "Not possible in the current state"),
        (422, "Invalid input"),
        ("default", "Refused"),
    )
}
"""The error responses of routes in the OpenAPI document."""
