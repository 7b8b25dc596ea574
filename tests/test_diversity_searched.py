"""Searches that keep many candidates, and the greedy soup: killed, without a barrier, raced, on a server, on Ray."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_elites
from helpers_miniature import evomerge, json_of, short_search_file
from helpers_postgres import Server, database, postgres
from helpers_search import Killed, drive, dying, make_setup, simulate, table
from helpers_tiers import nightly_but

from evomerge.optimizers import SoupSettings
from evomerge.optimizers.base import Settings
from evomerge.optimizers.cycle_qd import CycleQdSettings
from evomerge.optimizers.dns import DnsSettings
from evomerge.optimizers.m2n2 import M2n2Settings
from evomerge.optimizers.map_elites import MapElitesSettings
from evomerge.optimizers.pareto_map import MapSettings
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool, Simulation
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Racing
from evomerge.store import Store, acquire
from evomerge.testing.store_fixtures import create

__all__ = ["database", "postgres"]  # fixtures

OPTIMIZERS: dict[str, Settings] = {
    "cycle_qd": CycleQdSettings(name="cycle_qd", population=6),
    "dns": DnsSettings(name="dns", population=6, capacity=8),
    "m2n2": M2n2Settings(name="m2n2", population=6, capacity=8),
    "map": MapSettings(name="map", population=6, least_explained=0.0),
    "map_elites": MapElitesSettings(name="map_elites", population=6),
    "greedy_soup": SoupSettings(name="greedy_soup"),
}
WAYS = ("generational", "generational, raced", "asynchronous", "asynchronous, raced")


def setup_of(name: str, mode: Any = "generational", *, race: bool = False, candidates: int = 34) -> Setup:
    if name == "map_elites":
        return test_elites.setup_of(race=race, mode=mode, candidates=candidates)
    objectives = 1 if name == "greedy_soup" else 2
    plain = make_setup(objectives=objectives, optimizer=OPTIMIZERS[name], candidates=candidates)  # type: ignore[arg-type]
    return replace(plain, mode=mode, racing=Racing(rungs=(10, 20)) if race else None)


def simulation_of(name: str) -> Simulation:
    return test_elites.simulate if name == "map_elites" else simulate


def names(*left_out: str, commit: Collection[str] = tuple(OPTIMIZERS)) -> list[Any]:
    return nightly_but(commit, [name for name in OPTIMIZERS if name not in left_out])


@pytest.mark.parametrize("way", nightly_but(["generational, raced"], WAYS))
@pytest.mark.parametrize("name", names("map_elites"))  # which tests/test_elites.py kills
def test_killed_and_resumed_it_is_the_same_search(tmp_path: Path, name: str, way: str) -> None:
    setup = setup_of(name, way.removesuffix(", raced"), race=way.endswith("raced"))
    drive(tmp_path / "whole", setup, workers=1)
    for commits in (3, 7, 11) if name == "greedy_soup" else (3, 17, 30):  # a soup has stopped then
        folder = tmp_path / f"killed {commits}"
        with dying(commits), pytest.raises(Killed):
            drive(folder, setup, workers=1)
        drive(folder, setup, workers=1)
        assert table(folder) == table(tmp_path / "whole")


@pytest.mark.parametrize("name", names("greedy_soup", commit=["cycle_qd", "dns", "m2n2", "map"]))  # it stops before
def test_with_many_workers_and_no_barrier_everyone_is_told(tmp_path: Path, name: str) -> None:
    setup = setup_of(name, "asynchronous", race=True, candidates=60)
    drive(tmp_path, setup, workers=7, simulation=simulation_of(name))
    with Store.open(tmp_path / "search.db") as store:
        told = [number for step in store.steps() if step.kind == "tell" for number in step.candidates]
        origins = {row.origin for row in store.candidates() if row.step > 0}
    assert sorted(told) == list(range(60))
    assert origins == {name}


@pytest.mark.parametrize("name", names(commit=["dns"]))
def test_on_a_server_it_is_the_same_search(postgres: Server, database: str, tmp_path: Path, name: str) -> None:
    setup = setup_of(name)
    drive(tmp_path / "file", setup, workers=1, simulation=simulation_of(name))
    with create(postgres.url(database), name) as store, acquire(store):
        clock = SimulatedClock()
        pool = SimulatedPool(1, simulation_of(name), clock)
        Driver(Drive(setup, store, pool, Control(store.take_commands), logs=tmp_path, clock=clock)).run()
        losses = [row.losses for row in store.candidates()]
    with Store.open(tmp_path / "file" / "search.db") as store:
        assert losses == [row.losses for row in store.candidates()]


@pytest.mark.nightly  # two whole searches
@pytest.mark.parametrize("name", names())
def test_on_ray_it_is_the_same_search(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"task": "mini_math_ja", "search": "validation[:12]", "held_out": "test[:4]"}
    asked: dict[str, Any] = {"objectives": {"japanese": task | {"metric": "acc_ja"}}}
    if name == "map_elites":
        asked["features"] = {"right": task | {"metric": "acc", "range": [0, 1], "bins": 5}}
    elif name != "greedy_soup":
        asked["objectives"]["right"] = task | {"metric": "acc"}
    found = []
    for pool in ({}, {"pool": "ray", "cluster": {"workers": 2}}):
        optimizer = OPTIMIZERS[name].model_dump(mode="json")
        folder = tmp_path / f"search {len(found)}"
        file = short_search_file(
            tmp_path, optimizer=optimizer, budget={"candidates": 18}, confirm={"top": 1}, **asked, **pool
        )
        assert evomerge("search", file, "--dir", folder) == 0
        found.append(json_of(capsys, "top", folder, "--all", "--json"))
    for row in [row for rows in found for row in rows]:
        for key in ("worker", "seconds", "timings"):
            row.pop(key, None)
    assert found[0] == found[1]
