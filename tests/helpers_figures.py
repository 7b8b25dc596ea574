"""Simulated searches of every kind that figures draw: finished, empty, failing, constrained, over paths."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from helpers_search import ITEMS, SOURCES, drive, make_setup, recipe_seed, simulate

from evomerge.genome import SearchSpace
from evomerge.optimizers import CmaSettings
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.search.driving.confirm import Confirmation
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool, Simulation
from evomerge.search.preparing.setup import ConstraintInfo, EvaluatorInfo, Setup
from evomerge.search.settings.sections import Confirm
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import CandidateRow, Store, acquire
from search_spaces.base import SpaceContext
from search_spaces.data_flow_space import DataFlowSpaceSettings


def create(root: Path, name: str, setup: Setup) -> Path:
    """The folder of a search that has not started."""
    folder = root / name
    folder.mkdir(parents=True)
    settings = {
        "name": name, "seed": setup.seed, "sources": SOURCES, "base": "base",
        "space": {"kind": "parameter_space", "method": "task_arithmetic", "granularity": "layer"},
        "objectives": {o.name: {"metric": o.metric} for o in setup.objectives},
        "optimizer": setup.optimizer.model_dump(mode="json", exclude_defaults=True),
        "budget": setup.budget.model_dump(), "confirm": setup.confirm.model_dump(), "racing": None,
    }  # fmt: skip
    told = [asdict(m) | {"version": setup.evaluators[m.evaluator].version} for m in setup.measures]
    fingerprints = {
        "sources": {},
        "evaluators": [asdict(each) for each in setup.evaluators],
        "objectives": told[: len(setup.objectives)],
        "constraints": [each for each in told if "threshold" in each],
        "features": [each for each in told if "bins" in each],
        "screen": None,
        "parameters": [asdict(parameter) for parameter in setup.space.parameters],
    }
    Store.create(
        folder / "search.db", name=name, settings=settings, fingerprints=fingerprints, environment={"cma": "4.5"}
    ).close()
    (folder / "search.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def search(root: Path, name: str, setup: Setup, simulation: Simulation = simulate) -> Path:
    """The folder of a search that is finished and confirmed."""
    folder = create(root, name, setup)
    drive(folder, setup, simulation=simulation)
    with Store.open(folder / "search.db") as store, acquire(store):
        pool, word = SimulatedPool(1, simulation, SimulatedClock()), Control(store.take_commands, interval_s=0.0)
        assert Confirmation(Drive(setup, store, pool, word, logs=folder / "logs")).run(_recipe_of)
    return folder


def _recipe_of(row: CandidateRow) -> StackRecipe:
    return read_recipe(row.recipe, SOURCES)


def two_objectives(candidates: int = 30) -> Setup:
    """o0 is maximised and o1 minimised; the front's three best are confirmed, and more are scored for the curse."""
    return replace(make_setup(objectives=2, candidates=candidates), confirm=Confirm(top=3, drawn=10))


def constrained() -> Setup:
    """One objective, and a constraint on another evaluator that some candidates miss."""
    limit = ConstraintInfo("language", 1, "acc", True, ITEMS, 0.92)
    evaluators = tuple(EvaluatorInfo(f"task{i}", f"v{i}", ITEMS, ITEMS) for i in range(2))
    return replace(make_setup(candidates=25), constraints=(limit,), evaluators=evaluators)


def failing(job: Job) -> tuple[float, Measured | Failed]:
    """Some candidates are not finite; workers of others die, at the first attempt or at every one."""
    seconds, found = simulate(job)
    kind = recipe_seed(job.recipe) % 8
    if job.candidate > 2 and kind == 0:
        return seconds, Failed("not_finite", "layer 3 holds <b>NaN</b>")
    if job.candidate > 2 and (kind == 1 or (kind in (2, 3) and job.attempt == 1)):
        return seconds, Failed("worker_died", "killed by signal 9", log="the worker's last words")
    return seconds, found


def paths() -> Setup:
    """A search over paths through the layers of two sources."""
    context = SpaceContext(
        sources=SOURCES, base=None, tokenizer="one", layers=4, tied=False, method=_no_method, recipe_seed=0, dtype=None
    )
    settings = DataFlowSpaceSettings.model_validate({"kind": "data_flow_space", "repeats": 1, "others": ["two"]})
    space: SearchSpace = settings.build(context)
    return replace(make_setup(candidates=12), space=space, optimizer=CmaSettings(name="cma", x0="default"))


def _no_method(name: str) -> Any:
    raise AssertionError(f"a path needs no method, and was asked for {name}")


def path_scores(job: Job) -> tuple[float, Measured | Failed]:
    """Scores that depend on the recipe alone."""
    right = np.random.default_rng(recipe_seed(job.recipe)).random(ITEMS) < 0.5
    scores = [{"acc": right.astype(np.float32)[list(task.indices)]} for task in job.tasks]
    return 1.0, Measured(scores, {"merge": 0.1, "score": 0.9})
