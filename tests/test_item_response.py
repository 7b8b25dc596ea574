"""Item response: recovery against plain maximisation, and an estimator that is right whatever the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from numpy.typing import NDArray
from scipy import optimize, stats

from evomerge.search.estimation.item_response import (
    EASINESS_SPREAD,
    SLOPE_SPREAD,
    ItemModel,
    fit,
    held_out_error,
    p_irt,
)
from evomerge.search.estimation.items import ItemOrder, plain_order
from evomerge.search.estimation.racing import difference_estimate
from evomerge.store import Estimate

Matrix = NDArray[np.float64]


def simulated(models: int, items: int, seed: int = 0) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Answers [models, items] of a true 2PL model, and its abilities, easiness and slopes."""
    random = np.random.RandomState(seed)
    ability, easiness = random.standard_normal(models), 1.5 * random.standard_normal(items)
    slope = random.uniform(0.5, 1.8, items)
    p = 1 / (1 + np.exp(-(easiness + np.outer(ability, slope))))
    return (random.random_sample(p.shape) < p).astype(np.float64), ability, easiness, slope


def subsets(items: int, size: int, count: int, seed: int = 0) -> list[NDArray[np.int64]]:
    random = np.random.RandomState(seed)
    return [np.sort(random.permutation(items)[:size]) for _ in range(count)]


def estimate(model: ItemModel, items: NDArray[np.int64], scores: Matrix, strata: NDArray[np.int64]) -> Estimate:
    """As a race estimates a candidate that was scored on these items."""
    order = ItemOrder(np.arange(len(strata), dtype=np.int32), strata)
    return difference_estimate(
        scores, items, model.predict(items, scores), order.sample(items.astype(np.int32), len(strata))
    )


def test_fit_is_the_maximum_of_the_posterior() -> None:
    """Against BFGS with differences for gradients, on the densities as scipy.stats has them."""
    y = simulated(6, 8)[0]
    y[0, :3] = (0.25, 0.5, 0.7)  # scores between right and wrong
    centre = np.log((y.sum() + 0.5) / (y.size - y.sum() + 0.5))

    def loss(flat: Matrix) -> float:
        ability, easiness, slope = flat[:6], flat[6:14], flat[14:]
        total = -stats.norm.logpdf(ability).sum() - stats.norm.logpdf(easiness, centre, EASINESS_SPREAD).sum()
        total -= stats.norm.logpdf(slope, 1, SLOPE_SPREAD).sum()
        for m in range(6):
            for i in range(8):
                p = 1 / (1 + np.exp(-(easiness[i] + slope[i] * ability[m])))
                total -= y[m, i] * np.log(p) + (1 - y[m, i]) * np.log(1 - p)
        return float(total)

    slow = optimize.minimize(loss, np.concatenate([np.zeros(14), np.ones(8)]), method="BFGS", options={"gtol": 1e-4})
    model = fit(y)
    found = np.concatenate([model.abilities, model.easiness, model.slope])
    np.testing.assert_allclose(found, slow.x, atol=0.02)


def test_parameters_are_recovered() -> None:
    y, ability, easiness, slope = simulated(200, 300)
    model = fit(y)
    for found, true, least in ((model.abilities, ability, 0.98), (model.easiness, easiness, 0.97)):
        assert np.corrcoef(found, true)[0, 1] > least
    assert np.corrcoef(model.slope, slope)[0, 1] > 0.7
    assert model.slope.min() > 0


def test_ability_is_the_maximum_of_its_posterior() -> None:
    y = simulated(30, 60)[0]
    model = fit(y[1:])
    items = np.arange(20)
    grid = np.linspace(-6, 6, 60001)
    mean, spread = model.abilities.mean(), model.abilities.std()
    for scores in (y[0, items], np.ones(20), np.zeros(20)):
        logits = model.easiness[items] + np.outer(grid, model.slope[items])
        posterior = stats.norm.logpdf(grid, mean, spread) + (scores * logits - np.logaddexp(0, logits)).sum(axis=1)
        assert model.ability(items, scores) == pytest.approx(grid[posterior.argmax()], abs=2e-4)


def test_beats_one_known_model_on_models_of_one_kind() -> None:
    y = simulated(40, 400, seed=1)[0]
    error = held_out_error(y[1:], subsets(400, 40, 5), plain_order(400), y[0])
    assert error.item_response < 0.85 * error.reference
    assert error.p_irt < 0.85 * error.reference


def test_held_out_error_shows_a_model_that_does_not_fit() -> None:
    """Answers that have nothing in common, but that all are much like those of the known model."""
    random = np.random.RandomState(3)
    known = (random.random_sample(200) < 0.5).astype(np.float64)
    y = np.where(random.random_sample((8, 200)) < 0.5, known, 1 - known)
    siblings = np.abs(known - (random.random_sample((8, 200)) < 0.05))
    assert held_out_error(siblings, subsets(200, 40, 20), plain_order(200), known).reference < 0.03
    error = held_out_error(y, subsets(200, 40, 20), plain_order(200), np.full(200, 0.5))
    assert error.item_response > error.reference


def test_unbiased_whatever_the_model() -> None:
    """Over random samples, with a model that takes hard items for easy: p-IRT is off, the estimate is not."""
    random = np.random.RandomState(5)
    easiness = 1.5 * random.standard_normal(300)
    truth = (random.random_sample(300) < 1 / (1 + np.exp(-easiness - 0.5))).astype(np.float64)
    wrong = ItemModel(-easiness + 2.0, np.full(300, 0.05), np.array([-0.1, 0.1]), 0.0, 1.0)
    strata = (np.arange(300) >= 200).astype(np.int64)
    found, errors, naive = [], [], []
    for _ in range(2000):
        items = np.concatenate([random.permutation(200)[:40], 200 + random.permutation(100)[:20]])
        result = estimate(wrong, items, truth[items], strata)
        found.append(result.mean)
        errors.append(np.sqrt(result.stderr**2 - predicted_variance(wrong, items, truth)))
        naive.append(p_irt(wrong, items, truth[items]))
    standard = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - truth.mean()) < 4 * standard + 0.002
    assert abs(np.mean(naive) - truth.mean()) > 0.1
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(found), rel=0.08)


def predicted_variance(model: ItemModel, items: NDArray[np.int64], truth: Matrix) -> float:
    """The part of an estimate's variance that the items themselves, as a sample, add."""
    predicted = model.predict(items, truth[items])
    return float(predicted.var(ddof=1) / len(predicted))


@settings(derandomize=True)
@given(
    strategies.integers(0, 1000),
    strategies.sampled_from([(0.0, 1.0), (-3.0, 0.5), (0.0, 100.0), (2.0, 0.0)]),
    strategies.integers(1, 3),
)
def test_exact_when_every_item_is_scored(seed: int, scale: tuple[float, float], strata: int) -> None:
    """Of metrics of any range, scores outside it too, and constant ones."""
    random = np.random.RandomState(seed)
    responses = scale[0] + scale[1] * random.random_sample((4, 12))
    scores = scale[0] + 1.5 * scale[1] * random.random_sample(12)
    every = random.permutation(12)
    result = estimate(fit(responses), every, scores[every], np.arange(12) % strata)
    assert result.mean == pytest.approx(scores.mean(), abs=1e-9 * (1 + abs(scores).max()))
    assert result.n == 12
    assert p_irt(fit(responses), every, scores[every]) == pytest.approx(scores.mean())


def test_the_unit_of_a_metric_does_not_matter() -> None:
    y = simulated(10, 50)[0]
    items, strata = np.arange(15), np.zeros(50, dtype=np.int64)
    plain = estimate(fit(y[1:]), items, y[0, items], strata)
    other = estimate(fit(8 * y[1:] - 3), items, 8 * y[0, items] - 3, strata)
    assert other.mean == pytest.approx(8 * plain.mean - 3, abs=1e-6)
    assert other.stderr == pytest.approx(8 * plain.stderr, abs=1e-6)


def test_few_models_are_rasch() -> None:
    """Two models say next to nothing of slopes: they stay near 1, and items that both solve stay finite."""
    y = simulated(2, 100)[0]
    model = fit(y)
    assert np.abs(model.slope - 1).max() < 0.5
    assert np.abs(model.easiness).max() < 8


def test_faults_of_the_caller() -> None:
    for responses in (np.zeros((0, 4)), np.zeros(4), np.array([[0.0, np.nan]])):
        with pytest.raises(ValueError, match="finite"):
            fit(responses)
    with pytest.raises(ValueError, match="two models"):
        held_out_error(np.zeros((1, 4)), [np.arange(2)], plain_order(4), np.zeros(4))
