"""MAP: quadratics of the objectives, their error, and the front that is looked for on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import evomerge, json_of, short_search_file
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.front import hypervolume, nondominated
from evomerge.genome import Genome, Parameter
from evomerge.optimizers import Observation
from evomerge.optimizers.base import Settings
from evomerge.optimizers.cma_es import Box
from evomerge.optimizers.pareto_map import MapSettings, first_fit, spread_over_fronts
from evomerge.optimizers.quadratic import Quadratic, terms
from evomerge.report.quadratics import QuadraticState, quadratics_text
from evomerge.store import Store
from evomerge.testing.optimizers import OptimizerContract

WEIGHTS = [Parameter(f"p{i}", 0.0, 1.0, 0.5) for i in range(3)]
ENDS = np.array([[0.2, 0.3, 0.5], [0.8, 0.6, 0.5]])


class TestMap(OptimizerContract):
    objectives = 2
    generations = 5  # quadratics of four parameters are fitted from 23 candidates on

    @pytest.fixture
    def settings(self) -> Settings:
        return MapSettings(name="map", population=8)


class TestMapOnOne(TestMap):
    objectives = 1


def spheres(genome: Genome) -> list[float]:
    """Squared distances from both ends; the front is the line between them."""
    return [float(((genome - end) ** 2).sum()) for end in ENDS]


def off_the_line(genomes: list[Genome]) -> NDArray[np.float64]:
    """How far genomes are from the line between both ends: float64 [genomes]."""
    along = ENDS[1] - ENDS[0]
    shares = np.clip((np.array(genomes) - ENDS[0]) @ along / (along @ along), 0, 1)
    return np.asarray(np.linalg.norm(np.array(genomes) - ENDS[0] - shares[:, None] * along, axis=1))


def test_a_quadratic_is_found_again() -> None:
    random = np.random.RandomState(0)
    units, coefficients = random.random_sample((40, 4)), random.standard_normal((4, 4))

    def values(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray([point @ coefficients @ point - 2 * point[1] + 3 for point in points])

    model = Quadratic.fit(units, values(units)[:, None])
    elsewhere = random.random_sample((9, 4))
    assert model.values(elsewhere)[:, 0] == pytest.approx(values(elsewhere))
    assert model.explained == pytest.approx([1.0])
    assert (terms(5), len(model.coefficients)) == (21, 15)


def test_what_is_explained_is_that_of_fits_without_the_candidate() -> None:
    """Leaving one out by fitting again and again."""
    random = np.random.RandomState(1)
    units = random.random_sample((30, 3))
    losses = np.column_stack([((units - 0.3) ** 2).sum(axis=1), np.zeros(30)]) + 0.2 * random.standard_normal((30, 2))
    missed, varied = np.zeros(2), np.zeros(2)
    for at in range(30):
        others = np.arange(30) != at
        value = Quadratic.fit(units[others], losses[others]).values(units[at : at + 1])[0]
        missed += (losses[at] - value) ** 2
        varied += (losses[at] - losses[others].mean(axis=0)) ** 2
    explained = Quadratic.fit(units, losses).explained
    assert explained == pytest.approx(1 - missed / varied)
    assert explained[1] < 0 < explained[0]  # of noise alone the mean foretells more


def test_nothing_is_known_of_the_error_of_few_points_or_of_equal_losses() -> None:
    units = np.random.RandomState(2).random_sample((10, 3))
    assert Quadratic.fit(units, units[:, :1]).explained[0] == -np.inf  # as many as coefficients
    many = np.random.RandomState(2).random_sample((30, 3))
    assert Quadratic.fit(many, np.full((30, 1), 0.25)).explained[0] == -np.inf


def test_points_of_the_front_are_spread_and_then_those_behind_it() -> None:
    losses = np.array([[0.0, 4.0], [1.0, 2.9], [2.0, 2.0], [4.0, 0.0], [4.0, 4.0], [5.0, 5.0]])
    assert spread_over_fronts(losses, losses[:1], 4) == [3, 2, 1, 0]
    assert spread_over_fronts(losses, losses[:0], 5)[4:] == [4]
    assert spread_over_fronts(losses[:, :1], losses[:0, :1], 3) == [0, 1, 2]


def told(losses_of: object, asks: int, seed: int = 0) -> list[Genome]:
    """The genomes of the last of so many asks for eight."""
    optimizer = MapSettings(name="map", population=8).build(WEIGHTS, 2, seed)
    random = np.random.RandomState(seed)
    genomes: list[Genome] = []
    for _ in range(asks):
        genomes = optimizer.ask(8)
        losses = [losses_of(g, random) for g in genomes]  # type: ignore[operator]
        optimizer.tell([Observation(g, pair) for g, pair in zip(genomes, losses, strict=True)])
    return genomes


def test_what_is_asked_for_lies_along_the_front() -> None:
    asks = -(-first_fit(3) // 8)
    before = told(lambda g, _: spheres(g), asks)
    after = told(lambda g, _: spheres(g), asks + 1)
    assert off_the_line(before).mean() > 0.2
    assert off_the_line(after).max() < 0.1
    assert np.ptp(np.array(after)[:, 0]) > 0.4  # of the 0.6 from end to end


def test_with_noisy_scores_the_front_gets_further_than_by_chance() -> None:
    def noisy(genome: Genome, random: np.random.RandomState) -> list[float]:
        return [loss + 0.05 * random.standard_normal() for loss in spheres(genome)]

    def volume(genomes: list[Genome]) -> float:
        return hypervolume(np.array([spheres(g) for g in genomes]), np.array([0.6, 0.6]))

    learnt = [volume(told(noisy, 6, seed)) for seed in range(5)]
    chance = [volume(told(noisy, 1, seed)) for seed in range(5)]
    assert min(learnt) > max(chance)


def test_a_poor_quadratic_is_not_used() -> None:
    """Of losses that no quadratic explains, children of two of the known front are asked for: near the line of both."""
    optimizer = MapSettings(name="map", population=8).build(WEIGHTS, 2, 0)
    known, losses = [np.zeros(3)], [[9.0, 9.0]]
    for _ in range(4):
        known += (genomes := optimizer.ask(8))
        losses += (new := [[float((20 * g[0]) % 1), float((20 * g[1]) % 1)] for g in genomes])
        optimizer.tell([Observation(g, pair) for g, pair in zip(genomes, new, strict=True)])
    assert Quadratic.fit(np.array(known[1:]), np.array(losses[1:])).explained.min() < 0.3
    front = np.array(known)[nondominated(np.array(losses))]
    one, other = front[:, None, None], front[None, :, None]
    length = np.maximum(((other - one) ** 2).sum(axis=-1), 1e-12)
    children = np.array(optimizer.ask(8))
    along = ((children - one) * (other - one)).sum(axis=-1) / length
    off = np.linalg.norm(children - one - along[..., None] * (other - one), axis=-1)
    assert np.all(off.min(axis=(0, 1)) < 0.25)  # five standard deviations of the noise


def test_candidates_that_miss_a_constraint_are_not_fitted_to() -> None:
    """Their losses say by how much they miss it, and nothing of the objectives."""
    for violating in (False, True):
        optimizer = MapSettings(name="map", population=8).build(WEIGHTS, 2, 0)
        for _ in range(2):
            optimizer.tell([Observation(g, spheres(g)) for g in optimizer.ask(8)])
        if violating:
            corners = [np.array([x, y, 1.0]) for x in (0.0, 1.0) for y in (0.0, 1.0)]
            optimizer.tell([Observation(corner, [40.0, 50.0], feasible=False) for corner in corners])
        assert off_the_line(optimizer.ask(8)).max() < 0.1


def test_pending_points_are_not_asked_for_again() -> None:
    optimizer = MapSettings(name="map", population=8).build(WEIGHTS, 2, 0)
    for _ in range(2):
        optimizer.tell([Observation(g, spheres(g)) for g in optimizer.ask(8)])
    pending = [genome for _ in range(6) for genome in optimizer.ask(1)]
    losses = np.array([spheres(genome) for genome in pending])
    gaps = np.linalg.norm(losses[:, None] - losses, axis=2)[np.triu_indices(6, 1)]
    assert gaps.min() > 0.03


def test_more_parameters_than_a_quadratic_can_learn_are_refused() -> None:
    space = [Parameter(f"p{i}", 0.0, 1.0, 0.5) for i in range(11)]
    with pytest.raises(InputError, match="at most 10 parameters, and the search space has 11"):
        MapSettings(name="map").check(space, 2, "optimizer")
    MapSettings(name="map").check(space[:10], 2, "optimizer")


def test_a_plan_says_what_is_learnt() -> None:
    words = MapSettings(name="map").learns(WEIGHTS, 100)
    assert words == "a quadratic of each objective, of 10 coefficients, from 15 candidates on"


# ---- in a search -----------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # that a killed one is the same is held by tests/test_diversity_searched.py
def test_a_search_shows_how_far_its_quadratics_can_be_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task": "mini_math_ja", "search": "validation[:20]", "held_out": "test[:4]"}
    file = short_search_file(
        tmp_path, objectives={"japanese": task | {"metric": "acc_ja"}, "right": task | {"metric": "acc"}},
        optimizer={"name": "map", "population": 6}, budget={"candidates": 11}, confirm={"top": 1},
    )  # fmt: skip
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert evomerge("resume", tmp_path / "search", "--set", "budget.candidates=16") == 0
    capsys.readouterr()
    state = json_of(capsys, "status", tmp_path / "search", "--json")["quadratics"]
    assert evomerge("status", tmp_path / "search") == 0
    assert "quadratics: " in capsys.readouterr().out
    with Store.open(tmp_path / "search" / "search.db") as store:
        record, rows = store.search().record, [row for row in store.candidates() if row.genome is not None]
    units = np.array([Box(record.parameters).unit(row.genome) for row in rows if row.genome is not None])
    explained = Quadratic.fit(units, np.array([row.losses for row in rows])).explained
    assert state["candidates"] == len(rows) >= state["first_fit"]
    assert [state["explained"][name] for name in ("japanese", "right")] == pytest.approx(explained.tolist())
    assert state["on"] == (explained.min() >= 0.3)


def test_quadratics_in_words() -> None:
    state = QuadraticState(explained={"maths": 0.834, "json": None}, candidates=45, first_fit=23, least=0.3, on=False)
    assert quadratics_text(state).startswith(
        "maths 0.83, json - of the variance foretold, by 45 candidates: off, 0.3 of"
    )
    few = state.model_copy(update={"candidates": 7})
    assert quadratics_text(few) == "fitted from 23 candidates on, of which 7 are scored: off"
