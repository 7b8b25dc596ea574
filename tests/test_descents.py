"""Descents in a search: points that a proxy's gradient leads to, scored beside what the optimizer asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import ROOT, SHORT_MATHS, short_search_file
from helpers_search import FakeSpace, drive, drive_dying, make_setup, simulate, table

from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome
from evomerge.optimizers import CmaSettings, Observation, ProxyDescentSettings, Settings
from evomerge.search.driving.control import Control
from evomerge.search.driving.descents import HALVINGS, PATIENCE
from evomerge.search.estimation.agreement import MAX_POINTS, MIN_POINTS, Agreement, fitted_values
from evomerge.search.preparing.prepare import prepare
from evomerge.search.preparing.setup import EvaluatorInfo, ProxyInfo, Setup
from evomerge.search.settings.search_file import load_search_file
from evomerge.search.work.jobs import Descend, Descended, Failed, Job, Measured
from evomerge.store import Store
from evomerge.store.events import Agreed, Descent
from evomerge.testing.optimizers import OptimizerContract

PROXY = ProxyInfo(evaluator=1, items=30, drawn=8, steps=16, rate=0.02)
BEST = 0.7  # of every weight, by the simulated scores


def proxied(candidates: int = 60, objectives: int = 1) -> Setup:
    setup = make_setup(space=FakeSpace(12), optimizer=CmaSettings(name="cma", population=4), candidates=candidates,
                       objectives=objectives)  # fmt: skip
    likelihood = EvaluatorInfo("likelihood", "l0", 30, 30)
    return replace(setup, proxy=replace(PROXY, evaluator=objectives), evaluators=(*setup.evaluators, likelihood))


def towards(best: float, *, flat: bool = False) -> Callable[[Job], tuple[float, Measured | Descended | Failed]]:
    """Simulates a proxy that every weight should be ``best`` for; a flat one is the same everywhere it leads."""

    def run(job: Job) -> tuple[float, Measured | Descended | Failed]:
        if not isinstance(job.instead, Descend):
            return simulate(job)
        descend, genome, points = job.instead, job.instead.start, list[Genome]()
        losses = list[float]()
        for step in range(1, descend.keep[-1] + 1):
            losses.append(1.0 if flat else float(np.abs(genome - best).mean()))
            genome = np.clip(genome - descend.rate * np.sign(genome - best), 0.0, 1.0)
            if step in descend.keep:
                points.append(genome)
        return 2.0, Descended(points, np.array(losses), 2 * (descend.start - best), {"gradient": 1.0})

    return run


def origins(folder: Path) -> list[tuple[int, str]]:
    with Store.open(folder / "search.db") as store:
        return [(row.step, row.origin) for row in store.candidates()]


def descents(folder: Path) -> list[Descent]:
    with Store.open(folder / "search.db") as store:
        return [event.read(Descent) for event in store.events(kinds=("descent",))]


def best_loss(folder: Path) -> float:
    with Store.open(folder / "search.db") as store:
        return min(row.losses[0] for row in store.candidates() if row.losses)


def test_points_of_a_path_stand_beside_each_generation_and_lead_to_better_candidates(tmp_path: Path) -> None:
    drive(tmp_path / "with", proxied(), simulation=towards(BEST))
    drive(tmp_path / "without", replace(proxied(), proxy=None), simulation=towards(BEST))
    first = [origin for step, origin in origins(tmp_path / "with") if step == 1]
    assert first == ["cma"] * 4 + ["proxy"] * 2
    assert len(origins(tmp_path / "with")) == 60  # the budget counts them
    assert best_loss(tmp_path / "with") < best_loss(tmp_path / "without")


def test_a_descent_goes_on_where_the_one_before_ended(tmp_path: Path) -> None:
    drive(tmp_path, proxied(candidates=15), simulation=towards(BEST))
    first, second = descents(tmp_path)
    with Store.open(tmp_path / "search.db") as store:
        path = [row.genome for row in store.candidates() if row.origin == "proxy"]
    half, end = path[:2]
    assert (first.step, first.steps, first.passes, first.rate) == (1, 16, 16 * 8, PROXY.rate)
    assert half is not None
    assert end is not None
    assert np.abs(half - BEST).max() > np.abs(end - BEST).max()
    assert second.gradient == pytest.approx((2 * (end - BEST)).tolist())


def test_a_proxy_that_leads_nowhere_is_begun_again_at_half_the_rate_and_then_rests(tmp_path: Path) -> None:
    drive(tmp_path, proxied(candidates=400), simulation=towards(-1.0, flat=True))
    rates = [descent.rate for descent in descents(tmp_path)]
    assert rates[0] == PROXY.rate
    assert rates[-1] == PROXY.rate / 2**HALVINGS
    steps = [step for step, origin in origins(tmp_path) if origin == "proxy"]
    assert max(steps) < max(step for step, _ in origins(tmp_path)) / 2


class FarFromASource(FakeSpace):
    """A descent starts at 0 everywhere, and a source that is no point of the space is nearly as good as can be."""

    def baselines(self) -> Iterator[Baseline]:
        n = len(self.parameters)
        yield Baseline("source", "source", self.decode(np.full(n, BEST - 0.01)), None)
        yield Baseline("defaults", "default", self.decode(np.zeros(n)), np.zeros(n))


def test_while_the_best_is_a_source_a_proxy_starts_again_from_the_best_of_its_own_points(tmp_path: Path) -> None:
    setup = replace(proxied(candidates=200), space=FarFromASource(12))
    drive(tmp_path, replace(setup, proxy=replace(PROXY, evaluator=1, rate=0.004)), simulation=towards(BEST))
    found = descents(tmp_path)
    starts, rates = [d.proxy[0] for d in found], [d.rate for d in found]
    # At each rate as many descents as there is patience for, however much each of them improves.
    assert rates[: 4 * PATIENCE] == [0.004 / 2**halvings for halvings in range(4) for _ in range(PATIENCE)]
    assert starts[0] == pytest.approx(BEST)
    assert max(starts[PATIENCE:]) < starts[2]


class WithDefaults(FakeSpace):
    """The second source has weights of 0, the defaults weights of 0.4: the better of the two by the first objective."""

    def baselines(self) -> Iterator[Baseline]:
        yield from super().baselines()
        defaults = np.full(len(self.parameters), 0.4)
        yield Baseline("defaults", "default", self.decode(defaults), defaults)


@pytest.mark.parametrize(
    ("space", "objectives", "start"),
    [
        pytest.param(FakeSpace(12), 1, 1.0, id="the best source"),
        pytest.param(WithDefaults(12), 1, 0.4, id="defaults that are the best"),
        pytest.param(FarFromASource(12), 1, 0.0, id="defaults, where the best source is no point of the space"),
        pytest.param(WithDefaults(12), 2, 0.4, id="defaults, where each objective has another best"),
    ],
)
def test_a_descent_starts_from_the_best_baseline(
    space: FakeSpace, objectives: int, start: float, tmp_path: Path
) -> None:
    setup = replace(proxied(candidates=12, objectives=objectives), space=space)
    drive(tmp_path, setup, simulation=towards(BEST))
    assert descents(tmp_path)[0].proxy[0] == pytest.approx(abs(start - BEST))


def agreements(folder: Path) -> list[Agreed]:
    with Store.open(folder / "search.db") as store:
        return [event.read(Agreed) for event in store.events(kinds=("proxy",))]


def test_a_proxy_that_the_objective_agrees_with_says_so(tmp_path: Path) -> None:
    drive(tmp_path, proxied(candidates=30), simulation=towards(BEST))
    last = agreements(tmp_path)[-1]
    assert last.on
    assert MIN_POINTS <= last.points <= MAX_POINTS
    assert last.tau > 0.5


def test_a_proxy_that_the_objective_contradicts_rests_without_another_try(tmp_path: Path) -> None:
    drive(tmp_path, proxied(candidates=400), simulation=towards(-1.0))
    assert {descent.rate for descent in descents(tmp_path)} == {PROXY.rate}
    assert len(descents(tmp_path)) <= PATIENCE + 1
    last = agreements(tmp_path)[-1]
    assert not last.on
    assert last.tau < -0.3


def test_the_proxy_at_a_point_is_read_off_a_line_through_its_steps() -> None:
    noisy = 3.0 - 0.25 * np.arange(16) + np.resize([0.1, -0.1, -0.1, 0.1], 16)  # of no slope and no mean
    assert fitted_values(noisy, (8, 16)) == pytest.approx([1.0, -1.0])
    assert fitted_values(np.array([2.0]), (1,)) == [2.0]


@pytest.mark.parametrize(
    ("losses", "tau", "low"), [((5, 4, 3, 1, 0, 2), -11 / 15, False), ((5, 4, 3, 2, 0, 1), -13 / 15, True)]
)
def test_a_proxy_is_dropped_only_if_the_objectives_surely_disagree(
    losses: tuple[float, ...], tau: float, low: bool
) -> None:
    """Of six points, tau has a standard deviation of 0.355 by chance, and 2.33 of these are 0.827."""
    agreement = Agreement()
    for value, loss in enumerate(losses):
        agreement.add(float(value), [loss])
    assert agreement.tau == pytest.approx(tau)
    assert agreement.is_low == low


def test_points_that_failed_say_nothing_of_the_proxy() -> None:
    agreement = Agreement()
    for value in range(MIN_POINTS):
        agreement.add(float(value), [math.inf])
    assert agreement.points == 0
    assert not agreement.is_low
    for value in range(MIN_POINTS):
        agreement.add(float(value), [-value, 2.0 * value])  # of two objectives, of which one agrees
    assert agreement.tau == 0.0


@pytest.mark.parametrize("contrary", [False, True])
@pytest.mark.parametrize("objectives", [1, 2])
def test_a_search_that_is_killed_at_any_write_is_the_same(tmp_path: Path, objectives: int, contrary: bool) -> None:
    setup = proxied(candidates=40, objectives=objectives)
    simulation = towards(-1.0 if contrary else BEST)
    drive(tmp_path / "whole", setup, simulation=simulation)
    assert drive_dying(tmp_path / "killed", setup, lives=(1, 5), simulation=simulation) > 20
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


def test_nothing_is_asked_for_when_a_stop_comes_during_a_descent(tmp_path: Path) -> None:
    setup, words = proxied(), list[Control]()

    def stopping(job: Job) -> tuple[float, Measured | Descended | Failed]:
        if isinstance(job.instead, Descend):
            words[0].hear("stop")
        return towards(BEST)(job)

    drive(tmp_path / "stopped", setup, simulation=stopping, control=words.append)
    assert {step for step, _ in origins(tmp_path / "stopped")} == {0}
    drive(tmp_path / "stopped", setup, simulation=towards(BEST))
    drive(tmp_path / "whole", setup, simulation=towards(BEST))
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")


def test_a_search_goes_on_without_the_points_of_a_descent_that_failed(tmp_path: Path) -> None:
    def failing(job: Job) -> tuple[float, Measured | Descended | Failed]:
        if isinstance(job.instead, Descend):
            return 1.0, Failed("error", "no gradient today", "a traceback")
        return simulate(job)

    drive(tmp_path, proxied(), simulation=failing)
    assert {origin for _, origin in origins(tmp_path)} == {"source", "average", "cma"}
    with Store.open(tmp_path / "search.db") as store:
        events = store.events(kinds=("descent failed",))
    assert events[0].payload["why"] == "no gradient today"
    logs = [tmp_path / event.payload["log"] for event in events]
    assert len(set(logs)) == len(logs)
    assert all("a traceback" in log.read_text() for log in logs)


def test_a_proxy_that_cannot_be_followed_from_anywhere_rests(tmp_path: Path) -> None:
    def failing(job: Job) -> tuple[float, Measured | Descended | Failed]:
        return (1.0, Failed("error", "NaN", "")) if isinstance(job.instead, Descend) else simulate(job)

    flat = replace(proxied(candidates=200), space=FakeSpace(1, round_to=0))  # of which the baselines are the best
    drive(tmp_path, flat, simulation=failing)
    with Store.open(tmp_path / "search.db") as store:
        assert len(store.events(kinds=("descent failed",))) == PATIENCE * (HALVINGS + 1)


def test_a_resumed_search_goes_on_whose_descents_end_their_workers(tmp_path: Path) -> None:
    words = list[Control]()

    def dying_of_it(job: Job) -> tuple[float, Measured | Descended | Failed]:
        if not isinstance(job.instead, Descend):
            return simulate(job)
        words[0].hear("stop")
        return 1.0, Failed("worker_died", "killed", "")

    setup = proxied(candidates=15)
    drive(tmp_path, setup, simulation=dying_of_it, control=words.append)
    assert {step for step, _ in origins(tmp_path)} == {0}
    words = [Control(list)]  # which nobody listens to
    drive(tmp_path, setup, simulation=dying_of_it)
    assert len(origins(tmp_path)) == 15


def test_there_is_no_descent_where_the_budget_has_no_room_for_its_points(tmp_path: Path) -> None:
    drive(tmp_path, proxied(candidates=3 + 4 + 2 + 4), simulation=towards(BEST))
    assert [descent.step for descent in descents(tmp_path)] == [1]


LIKELIHOOD = {"file": "maths.jsonl", "prompt": "{question}", "answer": " {answer}"}


@pytest.mark.parametrize(
    ("changes", "place", "problem"),
    [
        ({"mode": "asynchronous"}, "proxy", "an asynchronous search has none"),
        ({"space": {"kind": "parameter_space", "method": "gram"}}, "proxy", "needs a gradient"),
        ({"proxy": {"evaluator": "numbers", "metric": "accuracy", **LIKELIHOOD}}, "proxy.evaluator", "likelihood"),
        ({"proxy": None, "optimizer": {"name": "proxy_descent"}}, "optimizer", "follows a proxy, and there is none"),
        ({"proxy": {"file": "nowhere.jsonl"}}, "proxy", "nowhere.jsonl"),
    ],
)
def test_what_cannot_have_a_proxy_is_told(tmp_path: Path, changes: dict[str, object], place: str, problem: str) -> None:
    (tmp_path / "maths.jsonl").write_text(
        "".join(f'{{"question": "{n} + 1 =", "answer": "{n + 1}"}}\n' for n in range(40))
    )
    file = short_search_file(tmp_path, **{"proxy": LIKELIHOOD} | changes)
    with pytest.raises(InputError) as caught:
        prepare(load_search_file(file))
    assert place in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(("split", "shared"), [("held_out", 4), ("search", 0)])
def test_a_proxy_by_what_an_objective_is_confirmed_on_is_told(tmp_path: Path, split: str, shared: int) -> None:
    data = ROOT / "evaluators" / "tasks" / "data"
    proxy = {"file": f"{data}/mini_math_ja.{split}.jsonl", "held_out_file": f"{data}/mini_math_en.search.jsonl"}
    warnings = prepare(load_search_file(short_search_file(tmp_path, objectives=SHORT_MATHS, proxy=proxy))).warnings
    told = f"proxy: asks {shared} held-out items of objectives.mini_math_ja in the search, which confirm nothing then"
    assert [told] * bool(shared) == [warning for warning in warnings if "held-out items of" in warning]


class TestProxyDescent(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return ProxyDescentSettings(name="proxy_descent", population=4)


def test_proxy_descent_asks_around_the_mean_of_the_latest_points_of_the_proxy() -> None:
    parameters = FakeSpace(3).parameters
    optimizer = ProxyDescentSettings(name="proxy_descent", sigma=1e-9).build(parameters, 1, 0)
    optimizer.tell([Observation(np.zeros(3), [0.1])])  # a baseline
    (asked,) = optimizer.ask(1)
    assert asked == pytest.approx(np.zeros(3), abs=1e-6)
    path = [np.full(3, value) for value in (0.9, 0.2, 0.3, 0.4, 0.5)]
    optimizer.tell([Observation(asked, [0.0]), *(Observation(point, [1.0]) for point in path)])
    assert optimizer.favourite == pytest.approx(np.full(3, 0.35))
