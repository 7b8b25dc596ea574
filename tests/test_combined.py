"""The number of a scalarisation, from scores of items: plain formulas, and how often its intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.optimizers.scalarisation import Chebyshev, Scalarisation, WeightedSum
from evomerge.search.estimation.combined import Combined, Range, Scored

SUM = WeightedSum(name="weighted_sum", weights=(2, 1))
DISTANCE = Chebyshev(name="chebyshev", weights=(1, 1))
SCALE = Range(np.array([-0.8, -0.9]), np.array([-0.2, -0.1]))
TRUTH = np.array([[0.7, 0.3, 0.5], [0.2, 0.8, 0.6]])  # of two objectives, by model


def scored(seed: int, *, shared: bool, n: int = 120, right_or_wrong: bool = True) -> list[Scored]:
    """Scores of three models; on shared items what is hard for one objective is hard for the other."""
    random = np.random.default_rng(seed)
    found = []
    hard = random.normal(size=(n, 1))
    for place, means in enumerate(TRUTH):
        if place and not shared:
            n = n // 2
            hard = random.normal(size=(n, 1))
        if right_or_wrong:
            # Uniform ranks of a sum of what models share and what they do not, so that the mean is exactly as said.
            from scipy.special import ndtr

            ranks = ndtr((hard + random.normal(size=(n, 3))) / np.sqrt(2))
            scores = (ranks < means).astype(np.float64)
        else:
            scores = means + 0.2 * hard + random.normal(0.0, 0.1, (n, 3))
        found.append(Scored(scores, 0 if shared else place, is_exact=False))
    return found


def number(mix: Scalarisation, means: np.ndarray) -> np.ndarray:
    return -mix(-means.T, SCALE.best, SCALE.worst)


@pytest.mark.parametrize("shared", [True, False])
def test_a_weighted_sum_is_that_of_its_items_where_they_are_the_same_and_else_of_independent_means(
    shared: bool,
) -> None:
    one, other = scored(0, shared=shared)
    found = Combined(SUM, [one, other])
    assert found.means == pytest.approx(2 * one.scores.mean(axis=0) + other.scores.mean(axis=0))
    if shared:
        sums = 2 * one.scores + other.scores
        wanted = sums.std(axis=0, ddof=1) / np.sqrt(len(sums))
    else:
        errors = [each.scores.std(axis=0, ddof=1) / np.sqrt(len(each.scores)) for each in (one, other)]
        wanted = np.hypot(2 * errors[0], errors[1])
    assert found.errors == pytest.approx(wanted)


def test_an_objective_with_fewer_of_the_same_items_is_paired_on_those() -> None:
    one, other = scored(0, shared=True)
    few = Scored(other.scores[:30], other.items, is_exact=False)
    alone = [Combined(None, [each]).errors ** 2 for each in (one, few)]
    found = Combined(WeightedSum(name="weighted_sum", weights=(1, 1)), [one, few]).errors ** 2
    centred = [each - each.mean(axis=0) for each in (one.scores, few.scores)]
    both = (centred[0][:30] * centred[1]).sum(axis=0) / (len(one.scores) * 30)
    assert found == pytest.approx(alone[0] + alone[1] + 2 * both, rel=0.05)


def test_what_is_counted_adds_no_error_and_one_item_has_none() -> None:
    one, _ = scored(0, shared=True)
    layers = Scored(np.array([[-30.0, -31.0, -32.0]]), 1, is_exact=True)
    found = Combined(WeightedSum(name="weighted_sum", weights=(1, 0.1)), [one, layers])
    assert found.errors == pytest.approx(Combined(None, [one]).errors)
    single = Scored(np.array([[1.0, 0.0, 1.0]]), 1, is_exact=False)
    unknown = Combined(SUM, [one, single])
    assert np.isnan(unknown.errors).all()
    assert all(np.isnan([each.low, each.p]).all() for each in unknown.differences([(0, 1)], 0.95, 0))
    assert np.isnan(unknown.difference(0, 1, 0.95).low)


def test_of_one_objective_it_is_the_objective() -> None:
    one, _ = scored(1, shared=True)
    found = Combined(None, [one])
    assert found.means == pytest.approx(one.scores.mean(axis=0))
    assert found.errors == pytest.approx(one.scores.std(axis=0, ddof=1) / np.sqrt(len(one.scores)))


@pytest.mark.parametrize("mix", [SUM, DISTANCE])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("right_or_wrong", [True, False])
def test_intervals_hold_the_truth_all_at_once_as_often_as_they_say(
    mix: Scalarisation, shared: bool, right_or_wrong: bool
) -> None:
    repeats, held, width, spread = 300, 0, [], []
    truth = number(mix, TRUTH)
    pairs = [(2, 0), (2, 1)]
    wanted = np.array([truth[a] - truth[b] for a, b in pairs])
    for seed in range(repeats):
        found = Combined(mix, scored(seed, shared=shared, right_or_wrong=right_or_wrong), SCALE)
        gaps = found.differences(pairs, 0.9, seed)
        held += all(gap.low <= true <= gap.high for gap, true in zip(gaps, wanted, strict=True))
        width.append(gaps[0].high - gaps[0].low)
        spread.append(gaps[0].mean)
    assert 0.85 <= held / repeats <= 0.97  # 3 standard errors of 300 draws are 0.05; of 0 and 1 they hold a little more
    assert np.mean(width) < 5.5 * np.std(spread), "no wider than a corrected interval of 90% has to be"


def test_pairing_on_the_same_items_makes_intervals_narrow() -> None:
    together = scored(3, shared=True, right_or_wrong=False)
    apart = [together[0], Scored(together[1].scores, 1, is_exact=False)]
    paired, unpaired = (Combined(SUM, each, SCALE).difference(2, 0, 0.95) for each in (together, apart))
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.high - paired.low < 1.2 * (unpaired.high - unpaired.low)
    sums = 2 * together[0].scores + together[1].scores
    gap = sums[:, 2] - sums[:, 0]
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    assert (paired.high - paired.low) / 2 == pytest.approx(1.98 * error, rel=0.01)


def test_the_luck_of_the_choice_is_that_of_the_sum() -> None:
    random = np.random.default_rng(5)
    lucks, excess = [], []
    for seed in range(60):
        scores = random.normal(size=(100, 8))
        found = Combined(SUM, [Scored(scores, 0, is_exact=False), Scored(scores, 0, is_exact=False)])
        lucks.append(found.luck(range(8), seed))
        excess.append(found.means.max())
    assert np.mean(lucks) == pytest.approx(np.mean(excess), rel=0.25), "three times the luck of one, items being shared"
