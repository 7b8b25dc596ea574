"""The driver on a simulated pool: budgets, failures, the cache, the verbs, and resume from any moment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast
from unittest import mock

import numpy as np
import pytest
from helpers_search import (
    SOURCES,
    FakeSpace,
    Killed,
    create_store,
    drive,
    drive_dying,
    make_setup,
    numbers,
    scores_of,
    simulate,
    table,
    weights_of,
    why,
)  # fmt: skip

from evomerge.errors import InputError
from evomerge.genome import Baseline, Parameter, SearchSpace
from evomerge.method import find_method
from evomerge.optimizers import CmaSettings, Feature, OptimizerSettings, OptunaSettings
from evomerge.optimizers.base import Optimizer, Settings
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.driving.ending import Ending
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.settings.sections import Budget
from evomerge.search.work.jobs import Failed, Finished, Job, Measured, PoolNews
from evomerge.store import Store, acquire
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpaceSettings
from search_spaces.profiles import Cosines


def test_budget_of_candidates_is_exact_and_counts_baselines(tmp_path: Path) -> None:
    drive(tmp_path, make_setup(candidates=29))
    assert why(tmp_path) == "29 candidates asked"
    with Store.open(tmp_path / "search.db") as store:
        assert sum(store.counts().values()) == 29
        assert [row.label for row in store.candidates(step=0)] == ["one", "two", "uniform average"]
        assert store.search().state == "finished"


def test_a_search_improves_on_its_baselines(tmp_path: Path) -> None:
    drive(tmp_path, make_setup(candidates=120))
    with Store.open(tmp_path / "search.db") as store:
        (best,) = store.best("o0", maximise=True)
        baselines = [row.objectives["o0"].mean for row in store.candidates(step=0)]
    assert best.objectives["o0"].mean > max(baselines)


def test_hours_are_those_of_the_clock_and_add_up_over_resumes(tmp_path: Path) -> None:
    drive(tmp_path, make_setup(candidates=None, hours=0.01))
    with Store.open(tmp_path / "search.db") as store:
        spent, asked = store.search().spent_s, sum(store.counts().values())
    assert 36 <= spent < 60
    drive(tmp_path, make_setup(candidates=None, hours=0.01))
    assert why(tmp_path) == "0.01 hours spent"
    with Store.open(tmp_path / "search.db") as store:
        assert sum(store.counts().values()) == asked
        assert store.search().spent_s == pytest.approx(spent)


def test_patience_ends_a_search_whose_front_stands_still(tmp_path: Path) -> None:
    def nothing_works(job: Job) -> tuple[float, Measured | Failed]:
        return 1.0, Measured([{"acc": np.zeros(len(t.indices), np.float32)} for t in job.tasks], {})

    drive(tmp_path, make_setup(candidates=500, patience=3), simulation=nothing_works)
    assert why(tmp_path) == "the front has not changed for 3 generations"


@pytest.mark.parametrize(
    ("ending", "state", "why", "bound"),
    [
        (Ending("candidates", 40), "finished", "40 candidates asked", "budget.candidates"),
        (Ending("hours", 0.5), "finished", "0.5 hours spent", "budget.hours"),
        (Ending("patience", 3), "finished", "the front has not changed for 3 generations", "budget.patience"),
        # What an optimizer says names the words of other endings.
        (Ending("optimizer", "tried for hours, the front {} is done"), "finished",
         "tried for hours, the front {} is done", ""),
        (Ending("stop"), "stopped", "asked to stop", ""),
        (Ending("cancel"), "cancelled", "asked to end at once", ""),
        (Ending("interrupted"), "cancelled", "interrupted twice", ""),
    ],
)  # fmt: skip
def test_how_a_search_ends(ending: Ending, state: str, why: str, bound: str) -> None:
    assert (ending.state, ending.why, ending.bound) == (state, why, bound)


def test_two_objectives_make_a_front_of_both_directions(tmp_path: Path) -> None:
    drive(tmp_path, make_setup(objectives=2, optimizer=OptunaSettings(name="nsga2", population=8), candidates=60))
    with Store.open(tmp_path / "search.db") as store:
        rows = [row for row in store.candidates() if row.objectives]
        points = {r.number: (-r.objectives["o0"].mean, r.objectives["o1"].mean) for r in rows}
        front = {row.number for row in store.front()}
    for number, (a, b) in points.items():  # the plain definition
        dominated = any((c, d) != (a, b) and c <= a and d <= b for c, d in points.values())
        first_of_equals = number == min(n for n, p in points.items() if p == (a, b))
        assert (number in front) == (not dominated and first_of_equals)


def test_failed_candidates_are_recorded_logged_and_told_as_worst(tmp_path: Path) -> None:
    def some_fail(job: Job) -> tuple[float, Measured | Failed]:
        if job.candidate % 5 == 4:
            return 1.0, Failed("not_finite", "NaN or Inf in lm_head.weight", "a traceback")
        return simulate(job)

    drive(tmp_path, make_setup(candidates=30), simulation=some_fail)
    rows = table(tmp_path)
    assert numbers(rows, "failed") == [4, 9, 14, 19, 24, 29]
    with Store.open(tmp_path / "search.db") as store:
        row = store.candidate(9)
        assert row.losses == [math.inf]
        assert row.failure is not None
        assert row.failure["reason"] == "not_finite"
        assert "a traceback" in (tmp_path / row.failure["log"]).read_text()
        assert row.attempts == 1, "the candidate's own fault is not tried again"


def test_a_search_in_which_all_but_a_baseline_fails_goes_on_to_its_budget(tmp_path: Path) -> None:
    def only_the_first_works(job: Job) -> tuple[float, Measured | Failed]:
        return simulate(job) if job.candidate == 0 else (1.0, Failed("error", "no"))

    drive(tmp_path, make_setup(candidates=40), simulation=only_the_first_works)
    assert len(numbers(table(tmp_path), "failed")) >= 37


def test_when_every_baseline_fails_the_search_ends_with_the_reason(tmp_path: Path) -> None:
    for _ in range(2):  # and again on resume, without spending anything
        with pytest.raises(InputError, match="every source and average failed; candidate 0: no chat template"):
            drive(
                tmp_path, make_setup(candidates=40), simulation=lambda job: (1.0, Failed("error", "no chat template"))
            )
    assert len(table(tmp_path)) == 3


def test_deaths_of_the_driver_use_up_no_attempts(tmp_path: Path) -> None:
    """Candidate 5 loses its driver twice and then its worker once; it has another attempt all the same."""
    deaths = [0]

    def dies(job: Job) -> tuple[float, Measured | Failed]:
        if job.candidate == 5 and deaths[0] < 2:
            deaths[0] += 1
            raise Killed
        if job.candidate == 5 and deaths[0] == 2:
            deaths[0] += 1
            return 1.0, Failed("worker_died", "killed")
        return simulate(job)

    setup = make_setup(candidates=12, attempts=2)
    for _ in range(2):
        with pytest.raises(Killed):
            drive(tmp_path, setup, simulation=dies)
    drive(tmp_path, setup, simulation=dies)
    with Store.open(tmp_path / "search.db") as store:
        assert (store.candidate(5).status, store.candidate(5).attempts) == ("done", 4)


def test_a_workers_fault_is_tried_again_and_then_final(tmp_path: Path) -> None:
    tried: list[tuple[int, int]] = []

    def worker_dies(job: Job) -> tuple[float, Measured | Failed]:
        tried.append((job.candidate, job.attempt))
        if job.candidate == 5 or (job.candidate == 7 and job.attempt == 1):
            return 1.0, Failed("worker_died", "killed")
        return simulate(job)

    drive(tmp_path, make_setup(candidates=12, attempts=3), simulation=worker_dies)
    assert [attempt for number, attempt in tried if number == 5] == [1, 2, 3]
    with Store.open(tmp_path / "search.db") as store:
        assert store.candidate(5).status == "failed"
        assert (store.candidate(7).status, store.candidate(7).attempts) == ("done", 2)


def test_a_lost_node_uses_up_no_attempts_neither_live_nor_in_replay(tmp_path: Path) -> None:
    """Candidate 5 loses its node four times, two of them before a new driver takes over, and its worker twice."""
    lost = ["node_lost", "node_lost", "driver", "node_lost", "worker_died", "node_lost", "worker_died"]
    # The first driver dies before others have scored; with the second they have when a worker dies, which is to blame.
    ends = iter(zip(lost, [0.1, 0.1, 0.0, 9.0, 9.0, 9.0, 9.0], strict=True))

    def breaks(job: Job) -> tuple[float, Measured | Failed]:
        if job.candidate != 5 or (found := next(ends, None)) is None:
            return simulate(job)
        end, seconds = found
        if end == "driver":
            raise Killed
        return seconds, Failed(end, "gone")  # type: ignore[arg-type]

    setup = make_setup(candidates=12, attempts=2)
    with pytest.raises(Killed):
        drive(tmp_path, setup, simulation=breaks)
    drive(tmp_path, setup, simulation=breaks)
    with Store.open(tmp_path / "search.db") as store:
        row = store.candidate(5)
        failures = [(e.payload["reason"], e.payload["final"]) for e in store.events(kinds=("failure",))]
    assert failures == [(end, end == "worker_died" and i == 6) for i, end in enumerate(lost) if end != "driver"]
    assert (row.status, row.attempts) == ("failed", len(lost)), "two dead workers are two, whatever came between them"


class TellingPool(SimulatedPool):
    """Has news of a node with each job that it is given."""

    def submit(self, job: Job) -> None:
        super().submit(job)
        self._told = [
            *getattr(self, "_told", []),
            PoolNews("worker died", "node-1", "ray-1@node-1", f"at {job.candidate}"),
        ]

    def wait(self, timeout_s: float) -> list[Finished]:
        if self.now() > 20.0:
            raise InputError("cluster", "no worker could be started")
        return super().wait(timeout_s)

    def news(self) -> Sequence[PoolNews]:
        told, self._told = self._told, []
        return told


def test_what_happens_to_nodes_and_workers_is_recorded_also_when_it_ends_the_search(tmp_path: Path) -> None:
    setup = make_setup(candidates=40)
    with create_store(tmp_path, setup) as store, acquire(store):
        clock = SimulatedClock()
        pool = TellingPool(3, simulate, clock)
        driver = Driver(Drive(setup, store, pool, Control(store.take_commands), logs=tmp_path, clock=clock))
        with pytest.raises(InputError, match="no worker could be started"):
            driver.run()
        told = [event.payload for event in store.events(kinds=("worker died",))]
        dispatched = [event.candidate for event in store.events(kinds=("dispatch",))]
    expected = [{"node": "node-1", "worker": "ray-1@node-1", "why": f"at {number}"} for number in dispatched]
    assert told == expected


def test_recipes_are_scored_once(tmp_path: Path) -> None:
    scored: list[str] = []

    def count(job: Job) -> tuple[float, Measured | Failed]:
        scored.append(job.recipe.hash)
        return simulate(job)

    drive(tmp_path, make_setup(space=FakeSpace(2, round_to=1), candidates=80), simulation=count)
    assert len(scored) == len(set(scored)) < 80
    with Store.open(tmp_path / "search.db") as store:
        cached = store.candidates(statuses=("cached",))
        assert len(cached) == 80 - len(scored)
        for row in cached:
            assert row.same_as is not None
            same_as = store.candidate(row.same_as)
            assert (same_as.status, same_as.recipe_hash, same_as.objectives) == (
                "done",
                row.recipe_hash,
                row.objectives,
            )


def test_results_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    setup = make_setup(candidates=50)
    for workers in (1, 7):
        drive(tmp_path / str(workers), setup, workers=workers)
    assert table(tmp_path / "1") == table(tmp_path / "7")


def curves() -> SearchSpace:
    """A space of weights that are curves over depth."""
    method = lambda name: find_method(name, "method")  # noqa: E731
    context = SpaceContext(SOURCES, "base", "base", layers=4, tied=False, method=method, recipe_seed=0, dtype=None)
    return ParameterSpaceSettings(method="task_arithmetic", profile=Cosines(cosines=3)).build(context)


@pytest.mark.parametrize(
    ("space", "optimizer"),
    [
        pytest.param(FakeSpace(2, round_to=1), CmaSettings(name="cma", population=6), id="cma"),
        pytest.param(FakeSpace(2, round_to=1), OptunaSettings(name="tpe", population=5), id="tpe"),
        pytest.param(FakeSpace(2, round_to=1), OptunaSettings(name="nsga2"), id="nsga2"),
        pytest.param(curves(), CmaSettings(name="cma", population=6), id="curves"),
    ],
)
def test_killed_at_every_write_and_resumed_it_is_the_same_search(
    tmp_path: Path, space: SearchSpace, optimizer: OptimizerSettings
) -> None:
    """Death before or after each transaction of a short search; each time a new driver goes on from the store."""
    setup = make_setup(space=space, optimizer=optimizer, candidates=21)
    drive(tmp_path / "whole", setup)
    assert drive_dying(tmp_path / "killed", setup, lives=(1, 4)) > 12
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


class SpaceThatKnewLess(FakeSpace):
    """As before somebody saw that its first baseline is a point of it."""

    def baselines(self) -> Iterator[Baseline]:
        for mark in super().baselines():
            yield replace(mark, genome=None) if mark.label == "one" else mark


def test_a_search_goes_on_as_it_began_where_more_baselines_are_points_today(tmp_path: Path) -> None:
    drive(tmp_path / "whole", make_setup(space=SpaceThatKnewLess(), candidates=27))
    drive(tmp_path / "part", make_setup(space=SpaceThatKnewLess(), candidates=11))  # two whole steps
    drive(tmp_path / "part", make_setup(candidates=27))
    assert table(tmp_path / "part") == table(tmp_path / "whole")


def test_a_changed_library_is_noticed_on_resume(tmp_path: Path) -> None:
    drive(tmp_path, make_setup(candidates=20))
    with pytest.raises(InputError, match=r"candidate 3 \(step 1\): replaying .* another genome"):
        drive(tmp_path, make_setup(candidates=40, seed=1))


def test_a_raised_budget_goes_on(tmp_path: Path) -> None:
    drive(tmp_path, make_setup(candidates=20))
    before = table(tmp_path)
    drive(tmp_path, make_setup(candidates=40))
    after = table(tmp_path)
    assert [row[:10] for row in after[:20]] == [row[:10] for row in before]  # all but the front, which moves on
    assert len(after) == 40


def test_stop_lets_what_runs_finish_and_resume_gives_the_same_search(tmp_path: Path) -> None:
    setup = make_setup(candidates=40)
    drive(tmp_path / "whole", setup)
    calls = [0]

    def stop_later(word: Control) -> None:
        calls[0] += 1
        if calls[0] == 9:
            word.hear("stop")

    drive(tmp_path / "stopped", setup, idle=stop_later)
    with Store.open(tmp_path / "stopped" / "search.db") as store:
        counts = store.counts()
        assert store.search().state == "stopped"
    assert counts["running"] == 0
    assert 0 < counts["done"] < 40
    drive(tmp_path / "stopped", setup)
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")


def test_cancel_ends_at_once_and_resume_gives_the_same_search(tmp_path: Path) -> None:
    setup = make_setup(candidates=30)
    drive(tmp_path / "whole", setup)
    calls = [0]

    def cancel_later(word: Control) -> None:
        calls[0] += 1
        if calls[0] == 7:
            word.hear("cancel")

    drive(tmp_path / "cancelled", setup, idle=cancel_later)
    with Store.open(tmp_path / "cancelled" / "search.db") as store:
        assert store.search().state == "cancelled"
        assert store.counts()["running"] > 0
    drive(tmp_path / "cancelled", setup)
    assert table(tmp_path / "cancelled") == table(tmp_path / "whole")


def test_pause_starts_nothing_new_until_resume(tmp_path: Path) -> None:
    started: list[int] = []
    calls = [0]

    def count(job: Job) -> tuple[float, Measured | Failed]:
        started.append(job.candidate)
        return simulate(job)

    def pause_a_while(word: Control) -> None:
        calls[0] += 1
        if calls[0] == 6:
            word.hear("pause")
            seen.append(len(started))
        if calls[0] == 40:
            seen.append(len(started))
            word.hear("resume")

    seen: list[int] = []
    drive(tmp_path, make_setup(candidates=20), simulation=count, idle=pause_a_while)
    assert seen[0] == seen[1] < 20
    assert len(started) == 20


def test_a_budget_changed_meanwhile_is_the_one_that_ends_it(tmp_path: Path) -> None:
    budgets = iter([None, Budget(candidates=33)])  # the first is refused
    steps = iter(range(10**6))

    def control(word: Control) -> None:
        word._reread = lambda: next(budgets)

    def change(word: Control) -> None:
        if next(steps) in (3, 5):
            word.hear("reread")

    drive(tmp_path, make_setup(candidates=20), control=control, idle=change)
    assert why(tmp_path) == "33 candidates asked"
    assert len(table(tmp_path)) == 33
    drive(tmp_path, make_setup(candidates=33))
    drive(tmp_path / "at once", make_setup(candidates=33))
    assert table(tmp_path) == table(tmp_path / "at once")


def test_pauses_are_not_spent() -> None:
    moment = [100.0]
    word = Control(list, clock=lambda: moment[0])
    for verb, seconds in (("pause", 7.0), ("pause", 3.0), ("resume", 50.0), ("pause", 1.0)):
        word.hear(verb)  # type: ignore[arg-type]
        moment[0] += seconds
    assert word.paused_s() == 11.0


def test_the_simulation_depends_on_the_recipe() -> None:
    """Guards the tests above: a constant simulation would make equal tables out of unequal searches."""
    space = FakeSpace()
    near, far = space.decode(np.full(4, 0.7)), space.decode(np.full(4, 0.0))
    tasks = make_setup().tasks("search")
    assert weights_of(near) == [0.7] * 4
    good, bad = (scores_of(Job(0, 1, recipe, tasks)).scores[0]["acc"].mean() for recipe in (near, far))
    assert good > bad


@pytest.mark.parametrize("deaths", [1, 13])
def test_workers_that_die_before_any_has_scored_are_the_clusters_fault(tmp_path: Path, deaths: int) -> None:
    died = [0]

    def dying_at_first(job: Job) -> tuple[float, Measured | Failed]:
        died[0] += 1
        return (1.0, Failed("worker_died", "killed")) if died[0] <= deaths else simulate(job)

    with mock.patch("evomerge.search.driving.dispatch._PAUSE_S", 0.0):
        drive(tmp_path, make_setup(candidates=12), simulation=dying_at_first, workers=1)
    with Store.open(tmp_path / "search.db") as store:
        assert store.search().state == "finished"
        assert store.counts()["failed"] == 0
        failures = [event.payload for event in store.events(kinds=("failure",))]
    assert [(each["reason"], each["final"]) for each in failures] == [("cluster_fault", False)] * deaths


def test_a_cluster_on_which_nothing_lives_ends_the_search_with_its_last_words(tmp_path: Path) -> None:
    with (
        mock.patch("evomerge.search.driving.dispatch._PAUSE_S", 0.0),
        pytest.raises(InputError, match="the last one: killed"),
    ):
        drive(tmp_path, make_setup(), simulation=lambda job: (1.0, Failed("worker_died", "killed")), workers=2)


def test_one_source_that_kills_its_worker_is_told_from_a_cluster_that_does(tmp_path: Path) -> None:
    def one_kills(job: Job) -> tuple[float, Measured | Failed]:
        return (1.0, Failed("worker_died", "killed")) if job.candidate == 0 else simulate(job)

    with mock.patch("evomerge.search.driving.dispatch._PAUSE_S", 0.0):
        drive(tmp_path, make_setup(candidates=12), simulation=one_kills, workers=1)
    with Store.open(tmp_path / "search.db") as store:
        assert [row.number for row in store.candidates(statuses=["failed"])] == [0]
        assert store.search().state == "finished"


class FixedGenomeSettings(Settings):
    """An optimizer of a package that gives one genome, wherever it lies; it has no ``check``."""

    name: Literal["fixed_genome"] = "fixed_genome"
    genome: tuple[float, ...]
    dtype: str

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Optimizer:
        optimizer = mock.Mock(population=1, favourite=None, stopped=None, refined=(), wants_items=False, keeps="all")
        optimizer.ask = lambda n: [np.array(self.genome, self.dtype)] * n
        return cast(Optimizer, optimizer)


@pytest.mark.parametrize(
    ("genome", "dtype", "said"),
    [
        ((0.5, 1.5), "float64", "gave 1.5 for w1"),
        ((-1e-9, 0.5), "float64", "for w0"),
        ((math.nan, 0.5), "float64", "gave nan for w0"),
        ((0.5,), "float64", "for 2 parameters"),
        ((0.5, 0.5), "float32", "float32"),
    ],
)
def test_an_optimizer_that_leaves_the_space_is_refused_by_name(
    tmp_path: Path, genome: tuple[float, ...], dtype: str, said: str
) -> None:
    """Its genome would be scored as if it were a point of the space, or fail somewhere within."""
    setup = make_setup(space=FakeSpace(2), optimizer=FixedGenomeSettings(genome=genome, dtype=dtype))
    setup.optimizer.check(setup.space.parameters, 1, "optimizer")
    with pytest.raises(InputError) as refused:
        drive(tmp_path, setup)
    assert refused.value.place == "optimizer fixed_genome"
    assert said in refused.value.problem
    with Store.open(tmp_path / "search.db") as store:
        assert not store.candidates(step=1)


class GivingSettings(Settings):
    """An optimizer of a package that gives one less than it is asked for, or lists, or lacks what it must have."""

    name: Literal["giving"] = "giving"
    gives: Literal["one less", "lists", "nothing"]

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Optimizer:
        members = {"population": 2, "favourite": None, "stopped": None, "wants_items": False, "keeps": "all"}
        if self.gives == "nothing":
            return cast(Optimizer, mock.Mock(spec=[*members, "ask", "tell"], **members))
        optimizer, point = mock.Mock(refined=(), **members), np.full(len(parameters), 0.5)
        optimizer.ask = lambda n: [point] * (n - 1) if self.gives == "one less" else [point.tolist()] * n
        return cast(Optimizer, optimizer)


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ("one less", "optimizer giving: gave 1 genomes, and was asked for 2"),
        ("lists", "optimizer giving: gave a list for a genome"),
        ("nothing", "optimizer: Mock of giving has no refined, replay"),
    ],
)
def test_an_optimizer_that_gives_something_else_is_refused_by_name(
    tmp_path: Path, gives: Literal["one less", "lists", "nothing"], said: str
) -> None:
    """The store would refuse a generation of none, far from its cause."""
    with pytest.raises(InputError, match=said):
        drive(tmp_path, make_setup(space=FakeSpace(2), optimizer=GivingSettings(gives=gives)))
