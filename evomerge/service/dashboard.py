"""A read-only optuna-dashboard at /dashboard/, which shows searches as Optuna studies.

Its frontend requests absolute paths. We write the HTML page, so its script can be served below /dashboard. The other
paths that it reads (_READ) do not collide with our routes and are served as they are. Everything else it could request
would write, and has no route; the storage behind it refuses writes as well. Its own content security policy allows
``unsafe-eval``, but its read-only pages do not need that, so ours suffices.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import cast
from urllib.parse import parse_qsl

import optuna_dashboard
from a2wsgi import WSGIMiddleware
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from evomerge.errors import InputError
from evomerge.service.guard import CONTENT_POLICY
from evomerge.service.problems import Fault, ProblemError
from evomerge.service.projection import ReadOnlyStorage, StudyDescription, projection_of
from evomerge.service.root import Root, UnknownSearchError
from evomerge.store import Store

_READ = ("/api/meta", "/api/studies", "/api/studies/{study}", "/api/studies/{study}/{rest:path}", "/csv/{study}")
_HEAD = """<style>
button:has([data-testid="AddBoxIcon"], [data-testid="EditIcon"]),
[aria-label="rename study"], [aria-label="delete study"] {
  display: none !important;
}
#evomerge {
  position: fixed; top: 0.875rem; right: 1.25rem; z-index: 2000; padding: 0.375rem 0.75rem; border-radius: 999px;
  background: rgb(0 0 0 / 72%); color: #fff; font: 0.875rem/1.5 system-ui, sans-serif;
}
#evomerge a { color: #fff; }
@media (max-width: 40rem) {
  main { min-width: 0; flex: 1; overflow-x: auto; }
  main .MuiCardContent-root > .MuiBox-root, main fieldset > div { flex-wrap: wrap; gap: 0.5rem; }
  main fieldset { min-width: 0; flex-direction: row; flex-wrap: wrap; }
  main .MuiGrid-container { flex-direction: column; flex-wrap: nowrap; }
  main .MuiGrid-container > .MuiGrid-root { width: 100%; max-width: 100%; }
  #evomerge { top: auto; bottom: 0.75rem; }
}
</style>
</head>"""
_BODY = """<body><div id="evomerge" role="note"><a href="/">Evomerge</a> · read-only</div>"""
"""Changes to its page: a link back, hidden buttons for everything that is refused, and lines that wrap on a phone. If a
later version renames the buttons they will be visible again, but still have no effect."""

_MAX_KEPT = 8  # studies whose trials are cached: 1,000 trials of 20 parameters take about 5 MB


class Studies:
    """The searches of a root as Optuna studies, under the names of the searches.

    Trials are cached until there is a newer projection of the search.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, StudyDescription]] = {}
        self._kept: OrderedDict[str, tuple[object, list[FrozenTrial]]] = OrderedDict()

    def descriptions(self) -> Mapping[str, StudyDescription]:
        """Every search that can be opened, oldest first, so that studies keep their numbers."""
        names = self._root.names()
        with self._lock:
            known = {name: self._known[name] for name in names if name in self._known}
        for name, result in self._root.each(_description_of, [name for name in names if name not in known]):
            if not isinstance(result, str):
                known[name] = result
        with self._lock:
            self._known = known
        return {name: known[name][1] for name in sorted(known, key=lambda name: (known[name][0], name))}

    def trials(self, name: str) -> list[FrozenTrial]:
        """The trials of a study: its completely scored candidates. Empty if the search can no longer be read."""
        try:
            with self._root.store(name) as store:
                projection = projection_of(store)
        except (InputError, UnknownSearchError):
            return []
        with self._lock:
            kept = self._kept.get(name)
        if kept is not None and kept[0] is projection:
            return kept[1]
        trials = cast(list[FrozenTrial], projection.study(None).get_trials(deepcopy=False))
        with self._lock:
            self._kept[name] = projection, trials
            self._kept.move_to_end(name)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return trials


def _description_of(name: str, store: Store) -> tuple[float, StudyDescription]:
    """When a search began, and its description as a study."""
    search = store.search()
    objectives = search.record.objectives
    up = [bool(objective.maximise) for objective in objectives]
    directions = [StudyDirection.MAXIMIZE if maximise else StudyDirection.MINIMIZE for maximise in up]
    return search.created_at, StudyDescription(name, directions, [objective.name for objective in objectives], [])


class _ReadOnlyRoute:
    """Passes requests on to optuna-dashboard with their full path, after checking that it can handle them.

    optuna-dashboard responds to unexpected requests with an internal error and a traceback in the log: a request
    without Accept-Encoding, an ``after`` that is not a number, a study that no longer exists.

    Args:
        knows: whether there is a study with this number.
    """

    def __init__(self, app: ASGIApp, knows: Callable[[int], bool], prefix: str = "") -> None:
        self._app = app
        self._knows = knows
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"].removeprefix(self._prefix), scope["headers"]
        study, file = (scope["path_params"].get(key) for key in ("study", "name"))
        if study is not None and not (_is_number(study) and await run_in_threadpool(self._knows, int(study))):
            raise ProblemError(404, "There is no such study")
        if file is not None and file.startswith("."):
            raise ProblemError(404, "There is no such file")
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if not all(_is_number(value) for name, value in query if name == "after"):
            raise ProblemError(
                422, "The request is not valid", Fault(field="after", problem="is not a number from 0 up")
            )
        if not any(name == b"accept-encoding" for name, _ in headers):
            headers = [*headers, (b"accept-encoding", b"identity")]
        inner = {**scope, "root_path": "", "path": path, "raw_path": path.encode(), "headers": headers}
        await self._app(inner, receive, send)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16


def install(app: FastAPI, root: Root) -> None:
    """Serve the dashboard. Call this before anything else is mounted."""
    studies = Studies(root)
    storage = ReadOnlyStorage(studies.descriptions, studies.trials)
    wsgi = cast(ASGIApp, WSGIMiddleware(optuna_dashboard.wsgi(storage)))
    app.router.routes.append(
        Route("/dashboard/static/{name}", _ReadOnlyRoute(wsgi, storage.knows, "/dashboard"), methods=["GET"])
    )
    app.router.routes.extend(Route(path, _ReadOnlyRoute(wsgi, storage.knows), methods=["GET"]) for path in _READ)
    page = (files("optuna_dashboard") / "index.html").read_text(encoding="utf-8")
    page = page.replace('src="/static/', 'src="/dashboard/static/').replace("</head>", _HEAD).replace("<body>", _BODY)

    def show(request: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": CONTENT_POLICY})

    app.router.routes.append(Route("/dashboard", show, methods=["GET"]))
    app.router.routes.append(Route("/dashboard/{rest:path}", show, methods=["GET"]))
