"""Means, errors, differences alone and in families, and the sign test, against scipy's own tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evomerge.search.estimation.statistics import (
    Corrected,
    Matrix,
    kendall_tau,
    luck_of_choice,
    mean_and_error,
    paired_difference,
    shift,
    sign_test,
    simultaneous_differences,
)


def test_an_interval_of_right_and_wrong_stays_within_what_is_possible() -> None:
    """Of a proportion's difference; means of other scores have no bounds that are known."""
    sure = np.ones((40, 2))
    sure[0, 0] = 0.0
    for found in simultaneous_differences(-sure, 0.95, seed=0):
        assert found.low == -1.0
        assert found.mean < found.high < 0.0
    assert simultaneous_differences(1.5 * sure, 0.95, seed=0)[0].high > 1.5
    ours = np.ones(10, dtype=np.float32)
    found = paired_difference(ours, np.array([1] + [0] * 9, dtype=np.float32), 0.99)
    assert found.high == 1.0
    assert found.mean == pytest.approx(0.9)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=50))
def test_mean_and_error_of_right_and_wrong(answers: list[int]) -> None:
    values = np.array(answers, dtype=np.float32)
    found = mean_and_error(values)
    assert found.mean == pytest.approx(sum(answers) / len(answers))
    assert found.stderr == pytest.approx(float(stats.sem(values.astype(np.float64))), abs=1e-12)
    assert found.n == len(answers)


def test_a_single_item_says_nothing_of_its_error() -> None:
    """Neither zero nor any other number: it is not known."""
    one = np.array([0.352], np.float32)
    found = mean_and_error(one)
    assert (found.mean, found.n) == (pytest.approx(0.352), 1)
    assert found.stderr is None
    gap = paired_difference(one, np.zeros(1, np.float32), 0.95)
    assert np.isnan([gap.low, gap.high]).all()
    (corrected,) = simultaneous_differences(np.ones((1, 1)), 0.95, seed=0)
    assert corrected.mean == 1.0
    assert np.isnan([corrected.low, corrected.high, corrected.p]).all()
    assert np.isnan(shift(np.ones(1), np.zeros(5), 0.95).low)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_is_that_of_the_paired_t_test(confidence: float) -> None:
    rng = np.random.default_rng(0)
    ours = (rng.random(300) < 0.6).astype(np.float32)
    theirs = (rng.random(300) < 0.4).astype(np.float32)
    found = paired_difference(ours, theirs, confidence)
    reference = stats.ttest_rel(ours.astype(float), theirs.astype(float)).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.mean == pytest.approx(float(ours.mean() - theirs.mean()))


def test_equal_scores_differ_by_exactly_nothing() -> None:
    same = np.array([1, 0, 1], np.float32)
    found = paired_difference(same, same, 0.95)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """95% of intervals over the difference of two correlated coins hold the true difference, 0.2."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        hard = rng.random(200) < 0.5
        ours = (rng.random(200) < np.where(hard, 0.4, 0.9)).astype(np.float32)
        theirs = (rng.random(200) < np.where(hard, 0.2, 0.7)).astype(np.float32)
        found = paired_difference(ours, theirs, 0.95)
        held += found.low <= 0.2 <= found.high
    assert 0.93 <= held / 1000 <= 0.97


def test_sign_test() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(10, 0) == pytest.approx(2 / 2**10)


# ---- families of comparisons -----------------------------------------------------------------------------------------


def family(n: int, comparisons: int, correlation: float, seed: int = 0) -> Matrix:
    """Normal differences, float64 [n, comparisons], any two of them with this correlation, and no true difference."""
    rng = np.random.default_rng(seed)
    own, common = rng.standard_normal((n, comparisons)), rng.standard_normal((n, 1))
    return np.asarray(np.sqrt(1 - correlation) * own + np.sqrt(correlation) * common)


def reach_of(found: Corrected) -> float:
    return (found.high - found.low) / 2


def test_intervals_hold_all_at_once_with_the_probability_of_the_multivariate_t() -> None:
    """The box of as many standard errors has 95% of scipy's multivariate t, with the correlation of the items."""
    n = 2000
    differences = family(n, 3, 0.6)
    errors = stats.sem(differences, axis=0)
    found = simultaneous_differences(differences, 0.95, seed=0)
    box = np.array([reach_of(each) for each in found]) / errors
    reference = stats.multivariate_t(shape=np.corrcoef(differences.T), df=n - 1, allow_singular=True, seed=0)
    inside = reference.cdf(box, lower_limit=-box, maxpts=200_000)
    assert inside == pytest.approx(0.95, abs=0.01)


def test_it_costs_more_than_one_comparison_and_less_than_bonferroni() -> None:
    differences = family(1000, 20, 0.8)
    (found, *_) = simultaneous_differences(differences, 0.95, seed=0)
    error = float(stats.sem(differences[:, 0]))
    one, bonferroni = (float(stats.t.ppf(1 - a / 2, 999)) * error for a in (0.05, 0.05 / 20))
    assert one * 1.05 < reach_of(found) < bonferroni * 0.95


def test_comparisons_that_are_the_same_cost_nothing() -> None:
    one = family(300, 1, 0.0)
    (alone,) = simultaneous_differences(one, 0.95, seed=0)
    many = simultaneous_differences(np.repeat(one, 30, axis=1), 0.95, seed=0)
    assert reach_of(many[0]) == pytest.approx(reach_of(alone), rel=0.03)


@given(st.integers(0, 10_000), st.floats(-1, 1), st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=settings().max_examples // 4)
def test_p_says_what_the_interval_says(seed: int, effect: float, confidence: float) -> None:
    """Zero is outside of the interval when p is below 1 - confidence, but for the grain of the draws."""
    for found in simultaneous_differences(family(60, 4, 0.5, seed) + effect, confidence, seed):
        grain = 2 / 5001
        if found.low > 0 or found.high < 0:
            assert found.p <= 1 - confidence + grain
        else:
            assert found.p >= 1 - confidence - grain
        assert found.low <= found.mean <= found.high


def test_a_single_comparison_has_the_p_of_the_paired_t_test() -> None:
    for effect in (0.02, 0.05, 0.08):
        differences = family(2000, 1, 0.0) + effect
        (found,) = simultaneous_differences(differences, 0.95, seed=0)
        assert found.p == pytest.approx(float(stats.ttest_1samp(differences[:, 0], 0.0).pvalue), abs=0.02)


@pytest.mark.parametrize("rare", [0.01, 0.05, 0.3])
def test_right_or_wrong_scores_that_rarely_differ_are_covered_too(rare: float) -> None:
    """Eight candidates against four baselines that change few answers of one model, 100 items.

    Intervals of Student's t with Bonferroni's correction, the plain formula, hold the truth far too seldom there.
    """
    rng = np.random.default_rng(7)
    n, repeats = 100, 120
    often = [rare * (1 + i / 8) for i in range(8)], [rare * (1 + i / 4) for i in range(4)]
    truth = np.array([0.1 * (a - b) for a in often[0] for b in often[1]])  # a changed answer is right with 0.7, not 0.6
    held = plain = 0
    for repeat in range(repeats):
        answers = rng.random(n) < 0.6
        ours, theirs = (
            [np.where(rng.random(n) < share, rng.random(n) < 0.7, answers).astype(float) for share in shares]
            for shares in often
        )
        differences = np.stack([a - b for a in ours for b in theirs], axis=1)
        found = simultaneous_differences(differences, 0.95, seed=repeat)
        held += all(each.low <= true <= each.high for each, true in zip(found, truth, strict=True))
        reach = stats.t.ppf(1 - 0.025 / len(truth), n - 1) * stats.sem(differences, axis=0)
        plain += bool(np.all(np.abs(differences.mean(axis=0) - truth) <= reach))
    assert held / repeats >= 0.93
    assert rare > 0.01 or plain / repeats < 0.5


def test_a_family_without_any_difference_is_points() -> None:
    assert simultaneous_differences(np.zeros((5, 2)), 0.95, seed=0) == [Corrected(0.0, 0.0, 0.0, 1.0)] * 2


def test_all_items_that_differ_by_the_same_are_sure() -> None:
    """Nothing is left to chance, so p agrees with an interval of no width."""
    (found,) = simultaneous_differences(np.full((20, 1), 2.5), 0.95, seed=0)
    assert (found.low, found.high) == (2.5, 2.5)
    assert found.p < 0.001


# Families of four comparisons, the last with a source that is far worse: float64 [items, 4], and the true means.
HARD = 5.7


def continuous(random: np.random.Generator) -> Matrix:
    """Log-likelihoods: every item differs a little, and all of them from the bad source by much."""
    common, own = random.standard_normal((100, 1)), random.standard_normal((100, 3))
    return np.c_[TRUTH["continuous"][:3] + 0.04 * (0.7 * common + 0.7 * own), HARD + random.standard_normal((100, 1))]


def binary(random: np.random.Generator) -> Matrix:
    """Right or wrong: one item in ten differs, and four in five from the bad source."""
    few = np.where(random.random((100, 3)) < 0.1, np.where(random.random((100, 3)) < 0.6, 1.0, -1.0), 0.0)
    return np.c_[few, -(random.random((100, 1)) < 0.8).astype(float)]


def overlap(random: np.random.Generator) -> Matrix:
    """Shares of words: one answer in ten is another one, and the bad source writes nothing alike."""
    few = np.where(random.random((100, 3)) < 0.1, random.normal(0.1, 0.3, (100, 3)), 0.0)
    return np.c_[few, random.normal(0.5, 0.2, (100, 1))]


def grades(random: np.random.Generator) -> Matrix:
    """Whole marks that all differ: lattice points, of which none is common."""
    return np.round(random.normal([0.3, 0.0, -0.2, 6.0], 2.5, (100, 4)))


def mixed(random: np.random.Generator) -> Matrix:
    """Comparisons of all these kinds at once."""
    return np.c_[binary(random)[:, :1], overlap(random)[:, :1], continuous(random)[:, :1], np.full(100, 0.0)]


TRUTH = {
    "continuous": np.array([-0.04, 0.0, 0.02, HARD]), "binary": np.array([0.02, 0.02, 0.02, -0.8]),
    "overlap": np.array([0.01, 0.01, 0.01, 0.5]), "grades": np.array([0.3, 0.0, -0.2, 6.0]),
    "mixed": np.array([0.02, 0.01, -0.04, 0.0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", [continuous, binary, overlap, grades, mixed])
def test_one_bad_source_widens_no_interval_and_all_are_covered(
    kind: Callable[[np.random.Generator], Matrix],
) -> None:
    """Each is as wide as without the bad source, but for the one comparison more, and no family misses its truth."""
    random, repeats = np.random.default_rng(5), 100
    held = 0
    for repeat in range(repeats):
        differences = kind(random)
        found = simultaneous_differences(differences, 0.95, seed=repeat)
        held += all(e.low <= true <= e.high for e, true in zip(found, TRUTH[kind.__name__], strict=True))
        alone = simultaneous_differences(differences[:, :3], 0.95, seed=repeat)
        assert all(reach_of(a) <= 1.25 * reach_of(b) for a, b in zip(found[:3], alone, strict=True))
    assert held / repeats >= 0.9


@pytest.mark.parametrize("kind", [continuous, grades])
def test_scores_that_differ_on_every_item_have_the_plain_standard_error(
    kind: Callable[[np.random.Generator], Matrix],
) -> None:
    """Not more than Bonferroni's intervals of Student's t, the plain formula, are wide."""
    differences = kind(np.random.default_rng(0))
    plain = stats.t.ppf(1 - 0.025 / 4, len(differences) - 1) * stats.sem(differences, axis=0)
    found = simultaneous_differences(differences, 0.95, seed=0)
    assert [reach_of(each) for each in found] == pytest.approx(plain.tolist(), rel=0.08)


def test_a_model_that_scores_as_a_source_does_has_a_point_among_continuous_scores() -> None:
    differences = np.c_[np.zeros(50), np.random.default_rng(0).normal(3.0, 1.0, 50)]
    same, other = simultaneous_differences(differences, 0.95, seed=0)
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert other.low > 2.0


def test_a_comparison_without_any_difference_has_an_interval_all_the_same() -> None:
    differences = np.zeros((50, 2))
    differences[:9, 1] = 1.0
    equal, other = simultaneous_differences(differences, 0.95, seed=3)
    assert equal.low < 0 < equal.high
    assert equal.p == 1.0
    assert other.p < 0.1
    assert [equal, other] == simultaneous_differences(differences, 0.95, seed=3)


# ---- what the choice adds --------------------------------------------------------------------------------------------


def test_luck_of_choice_is_how_much_the_best_of_equals_looks_too_good() -> None:
    """Against the truth: the best of eight equally good, correlated candidates, in many repetitions."""
    rng = np.random.default_rng(0)
    true, estimated = [], []
    for seed in range(200):
        values = 0.5 + 0.1 * rng.standard_normal((100, 8)) + 0.3 * rng.standard_normal((100, 1))
        true.append(float(values.mean(axis=0).max() - values.mean()))
        estimated.append(luck_of_choice([values], seed))
    assert np.mean(estimated) == pytest.approx(np.mean(true), rel=0.12)


def test_there_is_no_luck_in_a_sure_choice_or_in_none() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((100, 3)) * 0.1 + np.array([0.0, 0.5, 5.0])
    assert luck_of_choice([values], 0) < 0.001
    assert luck_of_choice([values[:, :1]], 0) == 0.0
    assert luck_of_choice([values[:1]], 0) == 0.0


def test_luck_in_a_weighted_sum_is_that_of_the_sum() -> None:
    """Two objectives on items of their own: as much as of one number that is as noisy as their sum."""
    random = np.random.default_rng(1)
    parts = [random.standard_normal((400, 5)) * size for size in (3.0, 4.0)]
    sums = [luck_of_choice([part - part.mean(axis=0) for part in parts], seed) for seed in range(5)]
    one = random.standard_normal((400, 5)) * 5.0
    alone = [luck_of_choice([one - one.mean(axis=0)], seed) for seed in range(5)]
    assert np.mean(sums) == pytest.approx(np.mean(alone), rel=0.1)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_shift_is_welchs_interval(confidence: float) -> None:
    rng = np.random.default_rng(2)
    before, after = rng.random(80), rng.random(30) * 0.5
    found = shift(before, after, confidence)
    reference = stats.ttest_ind(before, after, equal_var=False).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.mean == pytest.approx(before.mean() - after.mean())
    assert shift(np.ones(4), np.zeros(3), 0.95).low == 1.0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=20))
def test_kendalls_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=np.float64).T
    assert kendall_tau(x, y) == pytest.approx(float(stats.kendalltau(x, y).statistic), nan_ok=True)


def test_a_weight_of_zero_leaves_out() -> None:
    x, y = np.random.default_rng(0).random((2, 9))
    weights = np.array([1.0] * 6 + [0.0] * 3)
    assert kendall_tau(x, y, weights) == pytest.approx(float(stats.kendalltau(x[:6], y[:6]).statistic))
