"""What candidates are worth by their neighbours: a Gaussian process, against scikit-learn's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_search import FakeSpace, drive, table
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from test_generation import COUNT, items_scored, setup_of, simulate

from evomerge.errors import InputError
from evomerge.search.estimation import neighbours
from evomerge.search.estimation.neighbours import MIN_POINTS, Neighbours, posterior
from evomerge.search.preparing.setup import ObjectiveInfo
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.settings.sections import Racing
from evomerge.store import Estimate, Store

ITEMS = 250
OBJECTIVE = ObjectiveInfo("maths", 0, "acc", True, ITEMS)
RANDOM = np.random.default_rng(3)


def test_the_posterior_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    length, height, rough = 0.3, 1.0, 0.3
    monkeypatch.setattr(neighbours, "LENGTHS", (length,))
    monkeypatch.setattr(neighbours, "HEIGHTS", (height,))
    monkeypatch.setattr(neighbours, "ROUGHNESS", (rough,))
    units, noise, of_all = RANDOM.random((30, 3)), RANDOM.uniform(0, 0.01, 30), 4e-4
    seen = np.sin(4 * units.sum(axis=1)) + np.sqrt(noise) * RANDOM.standard_normal(30)
    spread = float(seen.var())
    kernel = ConstantKernel(height * spread, "fixed") * RBF(length * np.sqrt(3), "fixed")
    alpha = noise + rough * of_all + 1e-9 + 1e-6 * of_all
    covariance = kernel(units) + np.diag(alpha)
    weights = np.linalg.solve(covariance, np.ones(30))
    centre = weights @ seen / weights.sum()  # generalised least squares
    process = GaussianProcessRegressor(kernel, alpha=alpha, optimizer=None).fit(units, seen - centre)
    np.testing.assert_allclose(posterior(units, seen, noise, of_all), centre + process.predict(units), rtol=1e-6)


def test_the_smoothness_is_the_likeliest() -> None:
    """Noise of no shape is drawn to its mean; a smooth function without noise is left as it is."""
    units = RANDOM.random((60, 2))
    noise = np.full(60, 1e-2)
    flat = posterior(units, np.sqrt(noise) * RANDOM.standard_normal(60), noise, 1e-4)
    assert flat.std() < 0.05
    smooth = np.sin(3 * units[:, 0]) + units[:, 1]
    np.testing.assert_allclose(posterior(units, smooth, np.zeros(60), 1e-4), smooth, atol=0.02)


def test_equal_scores_stay_as_they_are() -> None:
    np.testing.assert_array_equal(posterior(RANDOM.random((5, 2)), np.full(5, 0.25), np.ones(5), 0.1), np.full(5, 0.25))


def of_items(mean: float, count: int) -> Estimate:
    return Estimate(mean=mean, stderr=float(np.sqrt(0.2 / count)), n=count)


def quality(genome: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return 0.8 - float(((genome - 0.6) ** 2).sum())


def test_a_lucky_rival_does_not_keep_a_good_candidate_from_being_looked_at() -> None:
    known = Neighbours(FakeSpace(2).parameters, OBJECTIVE)
    for genome in RANDOM.uniform(0.2, 1.0, (30, 2)):
        known.take(genome, of_items(quality(genome), 75), is_rival=False)
    lucky = np.array([0.35, 0.35])
    known.take(lucky, of_items(quality(lucky) + 0.13, ITEMS), is_rival=True)  # 0.805 where 0.675 is usual
    good, poor = np.array([0.6, 0.58]), np.array([0.2, 0.25])
    others = [(poor, of_items(quality(poor), 75)), (good, of_items(quality(good), 75))]
    assert others[1][1].mean < quality(lucky) + 0.13  # by its own score it would not challenge
    assert known.leader(others, [0, 1]) == 1
    assert known.leader(others, [0]) is None
    assert known.leader(others, []) is None


def test_there_is_no_model_of_few_candidates_or_without_a_rival() -> None:
    known = Neighbours(FakeSpace(2).parameters, OBJECTIVE)
    for genome in RANDOM.random((MIN_POINTS, 2)):
        known.take(genome, of_items(0.5, 75), is_rival=False)
    assert not known.are_enough(5)
    known.take(np.array([0.5, 0.5]), of_items(0.5, ITEMS), is_rival=True)
    assert known.are_enough(0)
    fresh = Neighbours(FakeSpace(2).parameters, OBJECTIVE)
    fresh.take(np.array([0.5, 0.5]), of_items(0.5, ITEMS), is_rival=True)
    assert not fresh.are_enough(MIN_POINTS - 2)


def test_who_leads_is_scored_on_every_item_before_it_is_the_best(tmp_path: Path) -> None:
    setup = setup_of(racing=Racing(rungs=(20, 60), challengers="neighbours"))
    drive(tmp_path / "one", setup, simulation=simulate)
    drive(tmp_path / "other", setup, simulation=simulate)
    assert table(tmp_path / "one") == table(tmp_path / "other")
    scored = items_scored(tmp_path / "one")
    with Store.open(tmp_path / "one" / "search.db") as store:
        assert all(scored[row.number] == COUNT for row in store.front())
    by_scores = setup_of(racing=Racing(rungs=(20, 60)))
    drive(tmp_path / "by scores", by_scores, simulation=simulate)
    assert table(tmp_path / "by scores") != table(tmp_path / "one")


@pytest.mark.parametrize("changes", [{"mode": "asynchronous"}, {"objectives": {"one": {}, "two": {}}}])
def test_neighbours_are_of_one_objective_and_of_generations(changes: dict[str, object]) -> None:
    task = {"task": "mini_math_ja", "metric": "acc", "items": 100}
    objectives = dict.fromkeys(changes.get("objectives", {"one": {}}), task)  # type: ignore[call-overload]
    content = {
        "name": "x", "sources": {"a": "/a", "b": "/b"}, "space": {"kind": "parameter_space", "method": "linear"},
        "budget": {"candidates": 10}, "racing": {"rungs": [25], "challengers": "neighbours"}, **changes,
        "objectives": objectives,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"racing\.challengers: neighbours is for generations"):
        parse_search_file(content, place="x.yaml", root=Path("/"))
