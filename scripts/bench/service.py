"""How long the server takes for each page and each response of the API, with a large search of 10,000 candidates with
200 parameters.

The search is simulated once. Every path is requested through the whole app, including access control. The figure is the
median of several responses, in milliseconds of the wall clock and of this process; the first one, without caches, is
reported separately. The goal is under 300 ms.

    python scripts/bench/service.py [--candidates 10000] [--parameters 200] [--repeats 5] [--json docs/service.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.work.jobs import Job, Measured
from evomerge.service.app import create_app
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.root import Root
from evomerge.store import Store, acquire
from evomerge.testing.searches import made_up_setup, made_up_space

ITEMS = 250
PATHS = (
    "/", "/searches/large", "/searches/large/candidates/77", "/searches/large/compare?a=0&b=77",
    "/searches/large/exports", "/api/v1/searches", "/api/v1/searches/large", "/api/v1/searches/large/front",
    "/api/v1/searches/large/candidates?sort=score&order=desc", "/api/v1/searches/large/candidates/77",
    "/api/v1/searches/large/compare?a=0&b=77",
    *(f"/api/v1/searches/large/figures/{name}" for name in (
        "front", "history", "hypervolume", "importance", "slice", "parallel", "timeline", "failures")),
    "/api/v1/searches/large/candidates/77/figures/recipe",
)  # fmt: skip


def make(folder: Path, candidates: int, parameters: int) -> int:
    """Make a finished search named large, and return its number of parameters."""
    space = made_up_space(max(1, round(parameters / 3) - 3), "layer")
    setup = made_up_setup(space, candidates, ITEMS, name="large")
    random = np.random.default_rng(0)

    def simulate(job: Job) -> tuple[float, Measured]:
        return 1.0, Measured([{"acc": random.random(ITEMS).astype(np.float32)}], {"merge": 0.1, "generate": 0.9})

    folder.mkdir()
    sources = {name: f"models/{name}" for name in ("base", "source 0", "source 1", "source 2")}
    settings: dict[str, Any] = {"name": "large", "seed": 0, "budget": {"candidates": candidates, "hours": None}}
    settings |= {
        "space": {"kind": "parameter_space", "method": "task_arithmetic"},
        "sources": sources,
    }
    settings |= {"optimizer": {"name": "cma"}, "confirm": {"top": 5, "confidence": 0.95, "drawn": 0}}
    objective = {"name": "score", "evaluator": 0, "metric": "acc", "maximise": True, "items": ITEMS, "version": "v"}
    fingerprints = {
        "objectives": [objective], "constraints": [], "screen": None, "sources": {},
        "evaluators": [{"name": "task", "version": "v", "search_items": ITEMS, "held_out_items": ITEMS}],
        "parameters": [asdict(parameter) for parameter in space.parameters],
    }  # fmt: skip
    store = Store.create(
        folder / "search.db", name="large", settings=settings, fingerprints=fingerprints, environment={}
    )
    with store, acquire(store):
        clock = SimulatedClock()
        pool = SimulatedPool(8, simulate, clock)
        Driver(Drive(setup, store, pool, Control(store.take_commands), logs=folder, clock=clock)).run()
    return len(space.parameters)


def ask(client: TestClient, path: str, repeats: int) -> dict[str, float | str]:
    wall, own = [], []
    for _ in range(repeats + 1):
        started, began = time.perf_counter(), time.process_time()
        answer = client.get(path, headers={"accept": "text/html" if not path.startswith("/api") else "*/*"})
        wall.append(1000 * (time.perf_counter() - started))
        own.append(1000 * (time.process_time() - began))
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:300]}")
    return {
        "path": path,
        "first_ms": wall[0],
        "ms": statistics.median(wall[1:]),
        "first_own_ms": own[0],
        "own_ms": statistics.median(own[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--parameters", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        parameters = make(Path(place) / "large", given.candidates, given.parameters)
        app = create_app(ServiceSettings(root=Root.of(place, Path(place)), token=None, hosts=("testserver",)))
        gc.freeze()  # as the server does
        with TestClient(app) as client:
            rows = [ask(client, path, given.repeats) for path in PATHS]
    print(f"{given.candidates} candidates, {parameters} parameters: milliseconds, and of this process alone")
    for row in rows:
        print(
            f"{row['path']:58} {row['ms']:7.0f} {row['own_ms']:7.0f}   "
            f"first {row['first_ms']:7.0f} {row['first_own_ms']:7.0f}"
        )
    if given.json is not None:
        rounded = [{k: v if isinstance(v, str) else round(v, 1) for k, v in row.items()} for row in rows]
        content = {"candidates": given.candidates, "parameters": parameters, "answers": rounded}
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
