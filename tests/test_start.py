"""A search that starts from another: its candidates are scored first, told first, and replayed from the record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_search import Killed, drive, dying, make_setup, table

from evomerge.optimizers import CmaSettings
from evomerge.search.driving.candidates import START
from evomerge.search.preparing.setup import Setup, StartPoint
from evomerge.search.settings.sections import Mode
from evomerge.store import Store

NEAR = [np.full(4, 0.72), np.full(4, 0.1), np.array([0.6, 0.8, 0.7, 0.7])]


def starting(mode: Mode = "generational", candidates: int = 30, **settings: object) -> Setup:
    """A search from three candidates, of which two are near the optimum of the simulation."""
    setup = make_setup(candidates=candidates, optimizer=CmaSettings(name="cma", **settings).warm())  # type: ignore[arg-type]
    start = tuple(StartPoint(genome, f"from coarse c{i:04d}") for i, genome in enumerate(NEAR))
    return replace(setup, mode=mode, start=start)


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_they_are_scored_and_told_before_anything_is_asked_for(mode: Mode, tmp_path: Path) -> None:
    drive(tmp_path, starting(mode))
    with Store.open(tmp_path / "search.db") as store:
        rows, steps = store.candidates(), list(store.steps())
    start = [row for row in rows if row.origin == START]
    assert [(row.step, row.label) for row in start] == [(1, f"from coarse c{i:04d}") for i in range(3)]
    assert all(np.array_equal(row.genome, near) for row, near in zip(start, NEAR, strict=True))  # type: ignore[arg-type]
    second_ask = next(at for at, step in enumerate(steps) if step.kind == "ask" and step.step == 2)
    told = {number for step in steps[:second_ask] if step.kind == "tell" for number in step.candidates}
    assert told == {0, 1, 2, 3, 4, 5}


def test_cma_begins_at_the_best_of_what_it_was_told(tmp_path: Path) -> None:
    drive(tmp_path, starting(sigma=0.01, population=8))
    with Store.open(tmp_path / "search.db") as store:
        rows = [row for row in store.candidates() if row.step <= 2]
    best = min((row for row in rows if row.step < 2 and row.genome is not None), key=lambda row: row.losses or [9.0])
    first = np.array([row.genome for row in rows if row.step == 2])
    assert np.abs(first - best.genome).max() < 0.05


def test_a_budget_that_ends_among_them_is_kept_and_can_be_raised(tmp_path: Path) -> None:
    drive(tmp_path, starting(candidates=5))
    assert [row[2] for row in table(tmp_path)] == ["source", "source", "average", START, START]
    drive(tmp_path, starting(candidates=9))
    assert [row[2] for row in table(tmp_path)][3:] == [START, START, *["cma"] * 4]


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_killed_at_every_write_it_is_the_same_search(mode: Mode, tmp_path: Path) -> None:
    drive(tmp_path / "whole", starting(mode, 12), workers=1)
    deaths = 0
    while True:
        try:
            with dying(after_commits=1 + deaths % 3):
                drive(tmp_path / "killed", starting(mode, 12), workers=1)
            break
        except Killed:
            deaths += 1
    assert deaths > 6
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


def test_what_was_said_of_the_optimizer_stays() -> None:
    assert CmaSettings(name="cma").warm() == CmaSettings(name="cma", x0="best", sigma=0.1)
    assert CmaSettings(name="cma", x0="centre", sigma=0.2).warm() == CmaSettings(name="cma", x0="centre", sigma=0.2)
