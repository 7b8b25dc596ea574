"""A root with a small simulated search, and the service for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI
from helpers_miniature import MINIATURES
from helpers_search import drive, make_setup
from starlette.testclient import TestClient

from evomerge.search.preparing.setup import Setup
from evomerge.service.app import create_app
from evomerge.service.connections import Server
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.root import Root
from evomerge.service.streams import Streams
from evomerge.store import Store

TOKEN = "a-token-for-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}
NAME = "made-up"


def make_search(root: Path, name: str = NAME, **changes: Any) -> Path:
    """A finished simulated search with two objectives in a folder of a root; ``changes`` as for ``make_setup``."""
    folder = root / name
    folder.mkdir(parents=True)
    setup = make_setup(**{"objectives": 2, "candidates": 30, **changes})
    settings = _settings(name, setup)
    fingerprints = _fingerprints(setup)
    Store.create(
        folder / "search.db", name=name, settings=settings, fingerprints=fingerprints, environment={"evomerge": "0"}
    ).close()
    (folder / "search.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    drive(folder, setup)
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / "c0007.log").write_text("what c0007 said\n")
    return folder


def _settings(name: str, setup: Setup) -> dict[str, Any]:
    return {
        "name": name,
        "seed": 0,
        "sources": {"base": "b", "one": "x", "two": "y"},
        "base": "base",
        "space": {"kind": "parameter_space", "method": "task_arithmetic", "granularity": "layer"},
        "objectives": {o.name: {"task": o.name, "metric": o.metric} for o in setup.objectives},
        "optimizer": {"name": "cma"},
        "budget": setup.budget.model_dump(),
        "confirm": setup.confirm.model_dump(),
        "racing": None,
    }


def _fingerprints(setup: Setup) -> dict[str, Any]:
    return {
        "sources": {},
        "evaluators": [asdict(each) for each in setup.evaluators],
        "objectives": [asdict(o) | {"version": setup.evaluators[o.evaluator].version} for o in setup.objectives],
        "constraints": [],
        "screen": None,
        "parameters": [asdict(parameter) for parameter in setup.space.parameters],
    }


def make_app(root: Path, token: str | None = TOKEN) -> FastAPI:
    """The service for the searches in a folder; it may use the miniature models."""
    settings = ServiceSettings(Root.of(str(root), root), token, ("testserver", "127.0.0.1"), (MINIATURES,))
    return create_app(settings)


@contextmanager
def client_of(app: FastAPI, **headers: str) -> Iterator[TestClient]:
    """A client that sends the token, and follows no redirects."""
    with TestClient(app, headers=BEARER | headers, follow_redirects=False) as client:
        yield client


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve the app on a real port of this machine; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        streams: Streams | None = getattr(app.state, "streams", None)  # which an app of the dashboard does not have
        server = Server(app, listening, ending=streams.end if streams else lambda: None)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
