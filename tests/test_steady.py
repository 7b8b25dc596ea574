"""The asynchronous mode on a simulated pool: no worker waits, nothing is lost, and what was told is replayed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_search import Killed, drive, dying, table, why
from test_generation import COUNT, RACE, items_scored, setup_of, simulate

from evomerge.errors import InputError
from evomerge.optimizers import CmaSettings, OptunaSettings
from evomerge.search.driving.control import Control
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Racing
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import Store


def steady(**given: object) -> Setup:
    return replace(setup_of(**given), mode="asynchronous")  # type: ignore[arg-type]


def test_a_budget_is_exact_and_every_candidate_is_told_once(tmp_path: Path) -> None:
    drive(tmp_path, steady(candidates=57), simulation=simulate, workers=5)
    assert why(tmp_path) == "57 candidates asked"
    with Store.open(tmp_path / "search.db") as store:
        told = [number for step in store.steps() if step.kind == "tell" for number in step.candidates]
        assert sorted(told) == list(range(57))
        counts = store.counts()
        assert counts["asked"] == counts["running"] == 0
        assert store.search().state == "finished"


def test_it_finds_what_generations_find(tmp_path: Path) -> None:
    for name, setup in (("steady", steady(candidates=120)), ("generations", setup_of(candidates=120))):
        drive(tmp_path / name, setup, simulation=simulate, workers=6)
    miss = {}
    for name in ("steady", "generations"):
        with Store.open(tmp_path / name / "search.db") as store:
            (row,) = store.best("o0", maximise=True)
        assert row.genome is not None
        miss[name] = float(np.sqrt(((row.genome - 0.9) ** 2).mean()))
    assert miss["steady"] < max(0.12, 1.5 * miss["generations"])


def idle_share(folder: Path, setup: Setup, workers: int) -> float:
    """The share of the workers' time, from first to last job, in which they had none; candidates take uneven times."""
    spent, last = [0.0], [0.0]

    def uneven(job: Job) -> tuple[float, Measured | Failed]:
        seconds = float(np.random.default_rng(int(job.recipe.hash[:8], 16)).lognormal(0, 1))
        spent[0] += seconds
        _, measured = simulate(job)
        return seconds, measured

    driver = drive(folder, setup, simulation=uneven, workers=workers)
    last[0] = driver._clock() - driver._started
    return 1 - spent[0] / (workers * last[0])


def test_workers_wait_less_than_with_generations(tmp_path: Path) -> None:
    optimizer = CmaSettings(name="cma", population=8)
    generations = idle_share(tmp_path / "g", setup_of(candidates=300, optimizer=optimizer), 8)
    without = idle_share(tmp_path / "s", steady(candidates=300, optimizer=optimizer), 8)
    assert generations > 0.35  # the slowest of eight takes much longer than the mean
    assert without < 0.15  # the tail, when nothing is left to ask for


def test_a_race_without_a_barrier_scores_fewer_items(tmp_path: Path) -> None:
    drive(tmp_path / "raced", steady(racing=RACE, candidates=80), simulation=simulate, workers=4)
    scored = items_scored(tmp_path / "raced")
    assert sum(scored.values()) < 0.5 * COUNT * len(scored)
    with Store.open(tmp_path / "raced" / "search.db") as store:
        rows = store.candidates()
        (best,) = store.best("o0", maximise=True)
    assert sum(row.status == "eliminated" for row in rows) > 5
    assert scored[best.number] == COUNT
    assert best.step > 0
    kept = {row.number: row.losses[0] for row in rows if row.status == "done" and row.losses and row.step > 0}
    assert max(row.losses[0] for row in rows if row.status == "eliminated" and row.losses) >= np.median(
        list(kept.values())
    )


@pytest.mark.parametrize(
    "setup",
    [
        steady(candidates=25, round_to=1),
        steady(racing=RACE, candidates=25, round_to=1),
        steady(racing=Racing(rungs=(20,)), screen=True, least=0.45, candidates=26, round_to=2),
        steady(candidates=25, optimizer=OptunaSettings(name="tpe", population=6)),
    ],
    ids=["plain", "race", "race, screen and constraint", "tpe"],
)
def test_killed_at_every_write_it_goes_on_and_loses_nothing(tmp_path: Path, setup: Setup) -> None:
    deaths = 0
    while True:
        try:
            with dying(after_commits=1 + deaths % 5):
                drive(tmp_path, setup, simulation=simulate, workers=3)
            break
        except Killed:
            deaths += 1
    assert deaths > 10
    with Store.open(tmp_path / "search.db") as store:
        told = [number for step in store.steps() if step.kind == "tell" for number in step.candidates]
        rows = store.candidates()
    assert sorted(told) == [row.number for row in rows]
    assert all(row.losses is not None for row in rows)
    before = table(tmp_path)
    more = replace(setup, budget=setup.budget.model_copy(update={"candidates": len(rows) + 9}))
    drive(tmp_path, more, simulation=simulate, workers=3)  # replays every ask and tell, and would notice a drift
    after = table(tmp_path)
    assert len(after) == len(rows) + 9
    assert [row[:10] for row in after[: len(rows)]] == [row[:10] for row in before]


ONE_AT_A_TIME = {
    "plain": steady(candidates=25, round_to=1),
    "race of few recipes": steady(racing=RACE, candidates=32, round_to=1),
    "race with item response": steady(racing=Racing(rungs=(20, 60, 120), estimate="item_response"), candidates=32),
    "race, screen and constraint": steady(racing=RACE, screen=True, least=0.45, candidates=48, round_to=2),
    "race of two objectives": steady(
        racing=RACE, objectives=2, candidates=32, optimizer=OptunaSettings(name="nsga2", population=6)
    ),
    "race by tpe": steady(racing=RACE, candidates=32, optimizer=OptunaSettings(name="tpe", population=6)),
}


@pytest.mark.parametrize("setup", ONE_AT_A_TIME.values(), ids=ONE_AT_A_TIME)
def test_with_one_worker_a_killed_search_is_the_same_search(tmp_path: Path, setup: Setup) -> None:
    """With more, who is there when a decision is made depends on when workers end."""
    drive(tmp_path / "whole", setup, simulation=simulate, workers=1)
    deaths = 0
    while True:
        try:
            with dying(after_commits=1 + 3 * deaths % 7):
                drive(tmp_path / "killed", setup, simulation=simulate, workers=1)
            break
        except Killed:
            deaths += 1
    assert deaths > 5
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


@pytest.mark.parametrize("budgets", [(20, 21, 30, 31, 40), (9, 40), (12, 16, 17, 18, 25, 40)])
def test_a_race_whose_budget_is_raised_is_the_race_that_had_it_from_the_start(
    tmp_path: Path, budgets: Sequence[int]
) -> None:
    """Where the optimizer has no favourite, which needs room for two."""
    whole = steady(racing=RACE, candidates=40, optimizer=OptunaSettings(name="random", population=6))
    drive(tmp_path / "whole", whole, simulation=simulate, workers=1)
    for candidates in budgets:
        part = replace(whole, budget=whole.budget.model_copy(update={"candidates": candidates}))
        drive(tmp_path / "parts", part, simulation=simulate, workers=1)
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    assert sum(row[6] == "eliminated" for row in table(tmp_path / "whole")) > 5


def test_a_stopped_search_is_the_same_search(tmp_path: Path) -> None:
    setup = steady(racing=RACE, candidates=40)
    drive(tmp_path / "whole", setup, simulation=simulate, workers=1)
    calls = [0]

    def stop_later(word: Control) -> None:
        calls[0] += 1
        if calls[0] == 25:
            word.hear("stop")

    drive(tmp_path / "stopped", setup, simulation=simulate, workers=1, idle=stop_later)
    with Store.open(tmp_path / "stopped" / "search.db") as store:
        assert store.search().state == "stopped"
        assert sum(store.counts().values()) < 40
    drive(tmp_path / "stopped", setup, simulation=simulate, workers=1)
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")


def test_with_several_workers_a_race_remembers_whom_it_knew(tmp_path: Path) -> None:
    """Decisions differ with the times at which workers end, but no candidate is scored as if it were the first."""
    setup = steady(racing=RACE, candidates=60)
    drive(tmp_path / "whole", setup, simulation=simulate, workers=3)
    deaths = 0
    while True:
        try:
            with dying(after_commits=20 + deaths % 7):
                drive(tmp_path / "killed", setup, simulation=simulate, workers=3)
            break
        except Killed:
            deaths += 1
    whole, killed = (sum(items_scored(tmp_path / name).values()) for name in ("whole", "killed"))
    assert killed < 1.25 * whole


def test_failed_candidates_are_told_and_a_straggler_counts_when_it_comes(tmp_path: Path) -> None:
    def some_fail(job: Job) -> tuple[float, Measured | Failed]:
        seconds, measured = simulate(job)
        if job.candidate == 5:
            return 60.0, measured
        return seconds, Failed("error", "broken") if job.candidate % 7 == 3 else measured

    drive(tmp_path, steady(candidates=60), simulation=some_fail, workers=4)
    with Store.open(tmp_path / "search.db") as store:
        rows = store.candidates()
        order = [number for step in store.steps() if step.kind == "tell" for number in step.candidates]
    assert {row.number for row in rows if row.status == "failed"} == {n for n in range(60) if n % 7 == 3}
    assert all(row.losses == [math.inf] for row in rows if row.status == "failed")
    assert order.index(5) > 40


def test_patience_is_counted_in_generations_worth_of_candidates(tmp_path: Path) -> None:
    def nothing_works(job: Job) -> tuple[float, Measured | Failed]:
        return 1.0, Measured([{"acc": np.zeros(len(t.indices), np.float32)} for t in job.tasks], {})

    setup = steady(candidates=500, optimizer=CmaSettings(name="cma", population=6))
    setup = replace(setup, budget=setup.budget.model_copy(update={"candidates": None, "patience": 3}))
    drive(tmp_path, setup, simulation=nothing_works, workers=2)
    assert why(tmp_path) == "the front has not changed for 3 generations"
    with Store.open(tmp_path / "search.db") as store:
        assert 1 + 18 <= sum(store.counts().values()) <= 1 + 18 + 2  # the first baseline changes it


def test_when_every_baseline_fails_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every source and average failed"):
        drive(tmp_path, steady(), simulation=lambda job: (1.0, Failed("error", "no")))
