"""Means, errors, paired differences and the sign test, against scipy's own tests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evomerge.search.statistics import mean_and_error, paired_difference, sign_test


@given(st.lists(st.integers(0, 1), min_size=2, max_size=50))
def test_mean_and_error_of_right_and_wrong(answers: list[int]) -> None:
    values = np.array(answers, dtype=np.float32)
    found = mean_and_error(values)
    assert found["mean"] == pytest.approx(sum(answers) / len(answers))
    assert found["stderr"] == pytest.approx(float(stats.sem(values.astype(np.float64))), abs=1e-12)
    assert found["n"] == len(answers)


def test_a_single_item_has_no_error() -> None:
    assert mean_and_error(np.array([1.0], np.float32)) == {"mean": 1.0, "stderr": 0.0, "n": 1}


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
