"""At the end of a search the best candidates are fitted anew: new candidates, within the budget, whatever stops it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_search import FakeSpace, drive, drive_dying, make_setup, simulate, table

from evomerge.optimizers import CmaSettings
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Racing
from evomerge.search.work.jobs import Failed, FitNumbers, Job, Measured
from evomerge.store import CandidateRow, Store

ANEW = 99


class FittedSpace(FakeSpace):
    """What is fitted anew has another seed, by which alone its recipe tells."""

    refits = 3

    def refitted(self, recipe: Recipe) -> Recipe | None:
        assert isinstance(recipe, StackRecipe)
        return None if recipe.seed == ANEW else recipe.model_copy(update={"seed": ANEW})


def setup_of(candidates: int = 30, mode: str = "generational", racing: bool = False) -> Setup:
    setup = make_setup(space=FittedSpace(), optimizer=CmaSettings(name="cma", population=6), candidates=candidates)
    changes: dict[str, Any] = {"mode": mode} | ({"racing": Racing(rungs=(10, 20))} if racing else {})
    return replace(setup, **changes)


def rows_of(folder: Path) -> list[CandidateRow]:
    with Store.open(folder / "search.db") as store:
        return store.candidates()


def refits_of(rows: list[CandidateRow]) -> list[CandidateRow]:
    return [row for row in rows if row.origin == "refit"]


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_the_best_are_fitted_anew_within_the_budget(tmp_path: Path, mode: str) -> None:
    fitted: list[Job] = []

    def simulation(job: Job) -> tuple[float, Measured | Failed]:
        if isinstance(job.instead, FitNumbers):
            fitted.append(job)
        return simulate(job)

    drive(tmp_path, setup_of(mode=mode), simulation=simulation)
    rows = rows_of(tmp_path)
    anew = refits_of(rows)
    assert (len(rows), rows[-3:]) == (30, anew)
    ranks = sorted((row for row in rows if row not in anew), key=lambda row: -row.objectives["o0"].mean)
    labels = {row.label for row in anew}
    assert labels == {f"{row.id}, fitted anew" for row in ranks[:3]}
    assert {job.recipe.hash for job in fitted} == {row.recipe_hash for row in anew}
    assert all('"seed":99' in row.recipe and row.genome is None and row.status == "done" for row in anew)


@pytest.mark.parametrize(("mode", "racing"), [("generational", False), ("generational", True), ("asynchronous", False)])
def test_killed_at_any_transaction_it_is_the_search_that_was_not(tmp_path: Path, mode: str, racing: bool) -> None:
    setup = setup_of(22, mode, racing)
    drive(tmp_path / "whole", setup, workers=1)
    assert drive_dying(tmp_path / "killed", setup, lives=(1, 4), workers=1) > 10
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert len(refits_of(rows_of(tmp_path / "killed"))) == 3


def test_with_more_budget_others_are_fitted_anew_and_none_twice(tmp_path: Path) -> None:
    drive(tmp_path, setup_of(30))
    drive(tmp_path, setup_of(30))  # nothing is left to do
    assert len(rows_of(tmp_path)) == 30
    drive(tmp_path, setup_of(60))
    rows = rows_of(tmp_path)
    anew = refits_of(rows)
    assert len(rows) == 60
    assert 3 < len(anew) <= 6
    assert len({row.recipe_hash for row in anew}) == len(anew)
