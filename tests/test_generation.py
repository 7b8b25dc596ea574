"""Generations on a simulated pool: racing, the screen, constraints, and that resuming in the midst of them is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers_search import FakeSpace, drive, drive_dying, make_setup, recipe_seed, table, weights_of

from evomerge.optimizers import CmaSettings, Observation, OptimizerSettings, OptunaSettings
from evomerge.optimizers.cma_es import Cma
from evomerge.search.preparing.setup import ConstraintInfo, EvaluatorInfo, ScreenInfo, Setup
from evomerge.search.settings.sections import Racing
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import Store

COUNT = 240
EASE = np.random.default_rng(5).normal(0.0, 2.0, COUNT)  # what items have in common for every candidate


def setup_of(
    *, racing: Racing | None = None, screen: bool = False, least: float | None = None, objectives: int = 1,
    optimizer: OptimizerSettings | None = None, candidates: int = 60, round_to: int | None = None,
) -> Setup:  # fmt: skip
    """Evaluators: the objectives', then the screen's, then that of the constraint, which falls as objectives rise."""
    plain = make_setup(
        space=FakeSpace(2, round_to), optimizer=optimizer or CmaSettings(name="cma", population=8),
        objectives=objectives, candidates=candidates,
    )  # fmt: skip
    names = [f"task{i}" for i in range(objectives)] + ["screen", "limit"]
    at = {name: position for position, name in enumerate(names)}
    return replace(
        plain,
        objectives=tuple(replace(o, items=COUNT) for o in plain.objectives),
        evaluators=tuple(EvaluatorInfo(name, name, COUNT, COUNT) for name in names),
        racing=racing,
        screen=ScreenInfo("screen", at["screen"], "acc", True, 30, 0, least_tau=0.4, drop=0.5) if screen else None,
        constraints=(ConstraintInfo("limit", at["limit"], "acc", True, COUNT, least),) if least is not None else (),
    )


def simulate(job: Job) -> tuple[float, Measured | Failed]:
    """An item is solved by candidates near enough to weights of 0.9 (task1: of 0.3); the same for the same recipe."""
    weights, found = np.array(weights_of(job.recipe)), []
    for task in job.tasks:
        goal = 0.3 if task.evaluator == 1 else 0.9
        ability = 2.0 - 20.0 * float(((weights - goal) ** 2).mean())
        noise = np.random.default_rng(recipe_seed(job.recipe, task.evaluator)).logistic(0, 0.3, COUNT)
        values = (ability + EASE + noise > 0).astype(np.float32)
        if task.evaluator == LIMIT:  # how small the weights are
            values = (np.arange(COUNT) / COUNT > weights.mean()).astype(np.float32)
        found.append({"acc": values[list(task.indices)]})
    return 1.0 + recipe_seed(job.recipe, "seconds") % 256 / 64, Measured(
        found, {"generate": 0.01 * sum(map(len, found))}
    )


LIMIT = 2  # of a setup with one objective
RACE = Racing(rungs=(20, 60))


def items_scored(folder: Path) -> dict[int, int]:
    """How many items of the first objective each candidate has scores of."""
    with Store.open(folder / "search.db") as store:
        found = {}
        for row in store.candidates():
            if row.same_as is None:
                scores = [s for s in store.scores(row.number, "search") if s.evaluator == "task0"]
                found[row.number] = len(scores[0].items) if scores else 0
        return found


def truth(setup: Setup, folder: Path) -> dict[int, float]:
    """Each candidate's mean over all items of the first objective, scored here."""
    with Store.open(folder / "search.db") as store:
        rows = store.candidates()
    means = {}
    for row in rows:
        if row.genome is not None:
            job = mock.Mock(recipe=setup.space.decode(row.genome), tasks=setup.tasks("search")[:1])
            _, measured = simulate(job)
            assert isinstance(measured, Measured)
            means[row.number] = float(measured.scores[0]["acc"].mean())
    return means


def test_a_race_scores_fewer_items_and_finds_as_good_a_merge(tmp_path: Path) -> None:
    drive(tmp_path / "full", setup_of(), simulation=simulate)
    drive(tmp_path / "raced", setup_of(racing=RACE), simulation=simulate)
    full, raced = (sum(items_scored(tmp_path / name).values()) for name in ("full", "raced"))
    assert raced < full / 2
    miss = {}
    for name in ("full", "raced"):
        with Store.open(tmp_path / name / "search.db") as store:
            (row,) = store.best("o0", maximise=True)
        assert row.genome is not None
        miss[name] = float(np.sqrt(((row.genome - 0.9) ** 2).mean()))
    assert miss["raced"] < max(0.1, 1.5 * miss["full"])  # both start at 0.4


def test_what_is_scored_on_few_items_is_estimated_near_the_truth(tmp_path: Path) -> None:
    setup = setup_of(racing=RACE)
    drive(tmp_path, setup, simulation=simulate)
    means = truth(setup, tmp_path)
    with Store.open(tmp_path / "search.db") as store:
        rows = [row for row in store.candidates() if row.number in means and row.step > 0]
    partial = [row for row in rows if row.objectives["o0"].n < COUNT]
    misses = np.array([row.objectives["o0"].mean - means[row.number] for row in partial])
    claimed = np.array([row.objectives["o0"].stderr for row in partial])
    assert len(partial) > 30
    assert np.sqrt((misses**2).mean()) < claimed.mean()  # the errors claimed are also those of the items as a sample
    full = [row for row in rows if row.objectives["o0"].n == COUNT]
    assert all(row.objectives["o0"].mean == pytest.approx(means[row.number]) for row in full)


def test_eliminated_candidates_rank_behind_the_others_and_are_not_confirmed(tmp_path: Path) -> None:
    drive(tmp_path, setup_of(racing=RACE), simulation=simulate)
    with Store.open(tmp_path / "search.db") as store:
        rows = store.candidates()
        front = store.front()
        best = store.best("o0", maximise=True, k=100)
    eliminated = [row for row in rows if row.status == "eliminated"]
    assert len(eliminated) > 5
    for row in eliminated:
        kept = [r.losses[0] for r in rows if r.step == row.step and r.status in ("done", "cached") and r.losses]
        assert row.losses is not None
        assert row.losses[0] >= max(kept)
    scored = items_scored(tmp_path)
    assert all(row.eligible and scored[row.number] == COUNT for row in [*front, *best])


def test_the_best_of_a_generation_is_scored_on_every_item_before_it_leads(tmp_path: Path) -> None:
    # With most seeds the first that leads, a baseline, is followed once: it is nearly as good as can be.
    drive(tmp_path, replace(setup_of(racing=Racing(rungs=(20,))), seed=1), simulation=simulate)
    scored = items_scored(tmp_path)
    with Store.open(tmp_path / "search.db") as store:
        fronts = [event.payload["candidates"] for event in store.events(kinds=("front",))]
    assert len(fronts) > 2  # it changed
    assert all(scored[number] == COUNT for front in fronts for number in front)


def test_the_mean_of_the_distribution_is_scored_beside_each_generation_and_not_told(tmp_path: Path) -> None:
    told: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []

    class Watched(Cma):
        def tell(self, observations: Sequence[Observation]) -> None:
            told.extend(o.genome for o in observations)
            super().tell(observations)

    with mock.patch.object(CmaSettings, "build", lambda self, p, o, s, f: Watched(self, p, o, s)):
        drive(tmp_path, setup_of(racing=RACE), simulation=simulate)
    with Store.open(tmp_path / "search.db") as store:
        rows = store.candidates()
    favourites = [row for row in rows if row.origin == "favourite"]
    assert [row.step for row in favourites] == list(range(1, len(favourites) + 1))
    assert favourites[0].genome is not None
    assert favourites[0].genome.tolist() == [0.5, 0.5]  # where the search starts
    taught = {genome.tobytes() for genome in told}
    assert all(row.genome is not None and row.genome.tobytes() not in taught for row in favourites)
    asked = [row for row in rows if row.origin == "cma" and row.losses]
    assert {row.genome.tobytes() for row in asked if row.genome is not None} <= taught
    drive(tmp_path / "full", setup_of(), simulation=simulate)
    with Store.open(tmp_path / "full" / "search.db") as store:
        assert all(row.origin != "favourite" for row in store.candidates())


def test_rungs_grow_by_three_beyond_the_last_that_is_named() -> None:
    setup = setup_of(racing=Racing(rungs=(10, 25)))
    assert [counts[0] for counts in setup.rungs] == [10, 25, 75, 225, 240]
    assert setup.ordinary_rungs == 2
    everything = setup_of(racing=Racing(rungs=(100, 500)))
    assert [counts[0] for counts in everything.rungs] == [100, 240]
    assert everything.ordinary_rungs == 2


def test_a_recipe_known_already_is_scored_only_on_what_is_missing(tmp_path: Path) -> None:
    jobs: dict[tuple[str, int], list[int]] = {}

    def watch(job: Job) -> tuple[float, Measured | Failed]:
        for task in job.tasks:
            jobs.setdefault((job.recipe.hash, task.evaluator), []).extend(task.indices)
        return simulate(job)

    drive(tmp_path, setup_of(racing=RACE, screen=True, round_to=1), simulation=watch)
    with Store.open(tmp_path / "search.db") as store:
        assert store.counts()["cached"] > 5
    assert jobs
    for items in jobs.values():
        assert len(items) == len(set(items))


def test_a_screen_that_agrees_leaves_out_the_poor_and_one_that_does_not_is_off(tmp_path: Path) -> None:
    def misled(job: Job) -> tuple[float, Measured | Failed]:
        seconds, measured = simulate(job)
        assert isinstance(measured, Measured)
        noise = np.random.default_rng(recipe_seed(job.recipe)).random(COUNT).astype(np.float32)
        scores = [
            {"acc": noise[list(task.indices)]} if task.evaluator == 1 else found
            for task, found in zip(job.tasks, measured.scores, strict=True)
        ]
        return seconds, Measured(scores, measured.timings)

    def like_the_first(job: Job) -> tuple[float, Measured | Failed]:
        seconds, measured = simulate(
            Job(job.candidate, job.attempt, job.recipe, [replace(t, evaluator=0) for t in job.tasks])
        )
        return seconds, measured

    setup = setup_of(screen=True)
    for name, simulation in (("good", like_the_first), ("poor", misled)):
        drive(tmp_path / name, setup, simulation=simulation)
    left_out = {}
    for name in ("good", "poor"):
        with Store.open(tmp_path / name / "search.db") as store:
            rows = store.candidates()
        left_out[name] = sum(row.status == "eliminated" for row in rows)
        for step in {row.step for row in rows}:
            # One of those that the screen would leave out is scored all the same.
            assert sum(row.status == "eliminated" for row in rows if row.step == step) in (0, 3)
    assert left_out["good"] >= 9
    assert left_out["poor"] == 0


def test_infeasible_candidates_rank_behind_feasible_ones_by_how_much_they_miss(tmp_path: Path) -> None:
    drive(tmp_path, setup_of(least=0.45), simulation=simulate)  # weights of at most 0.55 in the mean
    with Store.open(tmp_path / "search.db") as store:
        rows = [row for row in store.candidates() if row.losses is not None and row.genome is not None]
        (best,) = store.best("o0", maximise=True)
        front = store.front()
    infeasible = [row for row in rows if row.objectives["limit"].mean < 0.45]
    feasible = [row for row in rows if row not in infeasible]
    assert len(infeasible) > 5
    assert len(feasible) > 10
    assert all(row.eligible for row in feasible)
    assert not any(row.eligible for row in infeasible)
    assert best.objectives["limit"].mean >= 0.45
    assert {row.number for row in front}.isdisjoint(row.number for row in infeasible)
    for step in {row.step for row in rows}:
        worst = max((row.losses[0] for row in feasible if row.step == step and row.losses), default=-np.inf)
        missing = sorted(
            (-row.objectives["limit"].mean, row.losses[0]) for row in infeasible if row.step == step and row.losses
        )
        assert all(loss > worst for _, loss in missing)
        assert [loss for _, loss in missing] == sorted(loss for _, loss in missing)


def test_two_objectives_race_by_dominance(tmp_path: Path) -> None:
    setup = setup_of(objectives=2, racing=RACE, optimizer=OptunaSettings(name="nsga2", population=8))
    setup = replace(setup, objectives=tuple(replace(o, maximise=True) for o in setup.objectives))
    drive(tmp_path, setup, simulation=simulate)
    scored = items_scored(tmp_path)
    with Store.open(tmp_path / "search.db") as store:
        front = store.front()
    assert len(front) > 1
    assert all(scored[row.number] == COUNT for row in front)
    assert sum(scored.values()) < 0.8 * COUNT * len(scored)


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(setup_of(racing=RACE, candidates=28, round_to=1), id="race"),
        pytest.param(
            setup_of(racing=Racing(rungs=(20,)), screen=True, least=0.45, candidates=35, round_to=2),
            id="race, screen and constraint",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            setup_of(racing=RACE, candidates=28, round_to=1, optimizer=OptunaSettings(name="tpe", population=6)),
            id="tpe",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_killed_at_every_write_of_a_race_and_resumed_it_is_the_same_search(tmp_path: Path, setup: Setup) -> None:
    drive(tmp_path / "whole", setup, simulation=simulate)
    assert drive_dying(tmp_path / "killed", setup, lives=(1, 5), simulation=simulate) > 20
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


def test_a_candidate_that_fails_in_the_midst_of_a_race_leaves_it(tmp_path: Path) -> None:
    def breaks_later(job: Job) -> tuple[float, Measured | Failed]:
        if job.attempt > 1 and recipe_seed(job.recipe) % 2:
            return 1.0, Failed("error", "broken")
        return simulate(job)

    drive(tmp_path, setup_of(racing=RACE), simulation=breaks_later)
    with Store.open(tmp_path / "search.db") as store:
        failed = store.candidates(statuses=("failed",))
        assert len(failed) > 3
        assert all(row.losses == [np.inf] and row.attempts > 1 for row in failed)
        assert sum(store.counts().values()) == 60
