"""The search that ``chaos.py`` disturbs, in its own process: a synthetic space, and workers that sleep instead of
merging and scoring.

    python scripts/chaos_search.py FOLDER STORE ADDRESS CANDIDATES
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, event

from evomerge.method import Method, MethodParameter
from evomerge.optimizers import CmaSettings
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.ray import RayPool, RayWorker
from evomerge.search.preparing.setup import EvaluatorInfo, ObjectiveInfo, Setup
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.settings.sections import Budget, Cluster, Confirm
from evomerge.search.work import deadlines
from evomerge.search.work.jobs import Failed, Finished, Job, Measured
from evomerge.store import Store, acquire
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings

ITEMS = 20
MERGE_S, SCORE_S = 0.1, 0.2
MIN_S = 12.0  # the shortest deadline, in place of a minute; a straggler and a zombie take longer
NOTICE_S = 5.0  # in which Ray notices a lost node here, in place of 15 s: its health checks are as many, and closer
ATTEMPTS = 5  # several faults may hit one candidate, and none of them is its own
ZOMBIE = "raylet killed"
FLAGS = ("at", "workers", "dead", "again", "late")  # folders in which workers and ``chaos.py`` tell each other things


def _no_plan(facts: object, blend: object) -> NoReturn:
    raise NotImplementedError("nothing is merged here")


def make_setup(candidates: int) -> Setup:
    """A search over three weights. It does not import torch, because drivers are started often here."""
    weight = MethodParameter("weight", "source", 0.0, 1.0, 0.4)
    context = SpaceContext(
        sources={"base": "", "one": "", "two": "", "three": ""},
        base="base",
        tokenizer="base",
        layers=8,
        tied=False,
        method=lambda name: Method(name, _no_plan, (weight,), needs_base=True),
        recipe_seed=0,
        dtype=None,
    )
    return Setup(
        name="chaos",
        seed=0,
        space=ParameterSpace(ParameterSpaceSettings(method="task_arithmetic", granularity="model"), context),
        optimizer=CmaSettings(name="cma", population=8, restarts=50),
        objectives=(ObjectiveInfo("score", 0, "acc", True, ITEMS),),
        evaluators=(EvaluatorInfo("task", "v", ITEMS, ITEMS),),
        budget=Budget(candidates=candidates),
        confirm=Confirm(),
        attempts=ATTEMPTS,
        mode="asynchronous",
    )


def scores_of(recipe_hash: str) -> NDArray[np.float32]:
    """The correct scores of a recipe: float32 [ITEMS]."""
    return np.random.default_rng(int(recipe_hash[:12], 16)).random(ITEMS).astype(np.float32)


class Worker(RayWorker):
    """A worker that sleeps. It writes what it is doing to ``at/PID``, and injects the faults of ``plan.json``."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path, contents: dict[str, str]) -> None:
        self._name = name
        self._folder = folder
        self._note = folder / "at" / str(os.getpid())
        self._plan: dict[str, str] = json.loads((folder / "plan.json").read_text())
        (folder / "workers" / str(os.getpid())).touch()

    def load(self) -> None:
        pass

    def run(self, job: Job) -> Finished:
        kind = self._plan.get(str(job.candidate), "")
        scores = scores_of(job.recipe.hash)
        if kind == ZOMBIE:
            scores = scores + self._outlive_the_node(job)
        if kind == "straggler" and job.attempt == 1:
            time.sleep(10 * MIN_S)
        for phase, seconds in (("merge", MERGE_S), ("score", SCORE_S), ("report", 0.05)):
            self._say(job, phase)
            time.sleep(seconds)
            if kind == "crash" and phase == "score":
                os._exit(1)
            if kind == "nan":
                scores = scores * np.float32(math.nan)
        self._note.unlink(missing_ok=True)
        result: Measured | Failed = Measured([{"acc": scores}], {})
        if not np.isfinite(scores).all():
            result = Failed("not_finite", f"acc of {ITEMS} items")
        return Finished(job.candidate, job.attempt, self._name, result)

    def _outlive_the_node(self, job: Job) -> np.float32:
        """Continue until the node is lost and the candidate is tried elsewhere; return the error of the scores then."""
        dead, again, late = (self._folder / name / str(job.candidate) for name in ("dead", "again", "late"))
        if dead.exists():
            again.touch()
            return np.float32(0.0)
        self._say(job, "zombie")
        while not again.exists():
            time.sleep(0.05)
        late.touch()
        return np.float32(1.0)

    def _say(self, job: Job, phase: str) -> None:
        partial = self._note.with_suffix(".partial")
        what = {"candidate": job.candidate, "attempt": job.attempt, "phase": phase, "node": self.node()}
        partial.write_text(json.dumps(what))
        partial.rename(self._note)


def drive(folder: Path, place: str, address: str, candidates: int) -> None:
    """Run the search, or continue it from the store."""
    deadlines.MIN_S = MIN_S
    real = time.time

    def offset() -> float:
        return float((folder / "clock").read_text()) if (folder / "clock").exists() else 0.0

    time.time = lambda: real() + offset()

    @event.listens_for(Engine, "begin")
    def full_or_not(connection: Any) -> None:
        """Simulate a full disk in SQLite: the database may not grow by another page."""
        if connection.dialect.name == "sqlite":
            pages = 1 if (folder / "full").exists() else 2**30
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    setup = make_setup(candidates)
    with Store.open(place) as store, acquire(store):
        cluster = Cluster(address=address, insecure=True)
        pool = RayPool(SearchFile.model_construct(name="chaos", cluster=cluster), folder, {}, Worker)
        try:
            Driver(Drive(setup, store, pool, Control(store.take_commands), logs=folder / "logs")).run()
        finally:
            pool.close()


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
