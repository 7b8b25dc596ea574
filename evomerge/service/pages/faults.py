"""Error pages for browsers: what is wrong, and how to fix it. API clients still get problem+json."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from evomerge.errors import InputError
from evomerge.service.pages.rendering import page
from evomerge.service.problems import Problem, ProblemError, answer
from evomerge.service.root import UnknownSearchError

_KINDS = (ProblemError, InputError, UnknownSearchError, RequestValidationError, HTTPException)
_API = "/api/"

Handler = Callable[[Request, Any], Response | Awaitable[Response]]

_log = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Show errors as pages in browsers. Call this after ``problems.install``, whose responses it shows."""
    for kind in _KINDS:
        app.add_exception_handler(kind, _shown(app.exception_handlers[kind]))
    app.add_exception_handler(Exception, _broken)


def _shown(as_problem: Handler) -> Handler:
    """A handler that responds like ``as_problem``, but with a page if a browser asks."""

    async def handle(request: Request, error: Any) -> Response:
        result = as_problem(request, error)
        response = result if isinstance(result, Response) else await result
        if not _is_person(request):
            return response
        problem = Problem.model_validate(json.loads(bytes(response.body)))
        return _page(request, problem)

    return handle


async def _broken(request: Request, error: Exception) -> Response:
    """The response to an internal error. Its message may contain paths and values, so it only goes to the log."""
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    problem = Problem(title="Something broke here", status=500, detail="The server's log says what it was.")
    return _page(request, problem) if _is_person(request) else answer(problem)


def _is_person(request: Request) -> bool:
    return not request.url.path.startswith(_API) and "text/html" in request.headers.get("accept", "")


def _page(request: Request, problem: Problem) -> Response:
    titles = {404: "There is no such page", 405: "That is not a page"}
    plain = problem.title in ("Not Found", "Method Not Allowed")
    return page(
        request, "fault.html", status_code=problem.status, here="", status=problem.status,
        title=titles.get(problem.status, problem.title) if plain else problem.title,
        detail="" if problem.faults else problem.detail, faults=problem.faults,
    )  # fmt: skip
