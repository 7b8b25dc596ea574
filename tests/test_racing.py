"""The statistics of racing, against plain formulas, enumeration, simulation and scipy."""

from __future__ import annotations

import json
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from helpers_search import ITEMS, make_setup
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from evomerge.search.estimation.items import STRATA, ItemOrder, item_order
from evomerge.search.estimation.racing import (
    Sample,
    difference_estimate,
    stratified_estimate,
    stratified_mean,
    surely_better,
    surely_less,
    verdicts,
)
from evomerge.search.estimation.scores import ScoreTable, estimate
from evomerge.search.estimation.screening import MIN_PAIRS, ScoredPair, Screener, weighted_tau
from evomerge.search.preparing.setup import ScreenInfo, Setup

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import racing as bench  # noqa: E402

STRATUM = np.array([0, 0, 0, 1, 1, 1, 1])  # a population of seven items in two strata
SCORES = np.array([0.0, 1.0, 0.5, 2.0, 2.5, 2.0, 4.0])


def samples(first: int, second: int) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Every way to draw so many items of each stratum."""
    drawn = product(combinations(range(3), first), combinations(range(3, 7), second))
    return [np.array([*one, *other]) for one, other in drawn]


def sample_of(items: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Sample:
    return Sample(STRATUM[items], np.array([3, 4]))


def test_over_all_samples_the_stratified_mean_is_the_mean() -> None:
    found = [stratified_mean(SCORES[items], sample_of(items)) for items in samples(2, 2)]
    assert np.mean(found) == pytest.approx(SCORES.mean())
    assert np.std(found) > 0.1


def test_over_all_samples_the_difference_estimate_is_the_mean_whatever_the_prediction() -> None:
    for predicted in (np.zeros(7), SCORES + 0.1, np.array([9.0, -3, 1, 0, 0, 5, 2])):
        found = [difference_estimate(SCORES[i], i, predicted, sample_of(i)) for i in samples(2, 3)]
        assert np.mean([each.mean for each in found]) == pytest.approx(SCORES.mean())
    exact = [difference_estimate(SCORES[i], i, SCORES + 0.1, sample_of(i)).mean for i in samples(1, 1)]
    assert exact == pytest.approx([SCORES.mean()] * len(exact))


def test_over_all_samples_the_variance_claimed_is_that_of_the_estimates() -> None:
    """Without the part that the items themselves, as a sample, add: the prediction's own variance."""
    predicted = np.array([9.0, -3, 1, 0, 0, 5, 2])
    found = [difference_estimate(SCORES[i], i, predicted, sample_of(i)) for i in samples(2, 3)]
    claimed = np.mean([each.stderr**2 for each in found]) - predicted.var(ddof=1) / 7
    assert claimed == pytest.approx(np.var([each.mean for each in found]))


def test_a_sample_of_one_stratum_is_the_plain_mean_and_its_error() -> None:
    scores = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    found = stratified_estimate(scores, Sample(np.zeros(5, dtype=np.int64), np.array([50])))
    assert found.model_dump() == {"mean": pytest.approx(0.6), "stderr": pytest.approx(stats.sem(scores)), "n": 5}


def test_comparisons_are_wrong_no_oftener_than_they_say() -> None:
    """Two models of the same mean over all items, many samples: how often one is called surely less."""
    random = np.random.default_rng(3)
    count, wrong, trials = 400, 0, 600
    ease = random.normal(0, 1.5, count)
    one, other = ((ease + random.logistic(0, 0.5, count) > 0).astype(float) for _ in range(2))
    flip = np.flatnonzero(one != other)
    surplus = int(one.sum() - other.sum())
    wanted = flip[one[flip] == (surplus > 0)][: abs(surplus)]
    one[wanted] = 1 - one[wanted]
    assert one.sum() == other.sum()
    for trial in range(trials):
        order = item_order(np.array([ease > 0, ease > 1], dtype=np.float64), trial)
        sample = order.sample(order.positions[:60], count)
        less, _ = surely_less(np.array([one, other])[:, order.positions[:60]], sample, 0.9)
        wrong += int(less[0, 1]) + int(less[1, 0])
    assert wrong / trials < 2 * 0.1 + 3 * np.sqrt(0.2 * 0.8 / trials)
    assert wrong > 0


def test_when_every_item_is_scored_the_comparison_is_exact() -> None:
    sample = Sample(STRATUM, np.array([3, 4]))
    scores = np.array([SCORES, SCORES, SCORES + np.array([0, 0, 0, 0, 0, 0, 1e-6])])
    less, no_more = surely_less(scores, sample, 0.99)
    assert less.tolist() == [[False, False, True], [False, False, True], [False, False, False]]
    assert no_more.tolist() == [[True, True, True], [True, True, True], [False, False, True]]


def test_agreeing_on_every_scored_item_is_no_certainty() -> None:
    random = np.random.default_rng(0)
    order = item_order(random.integers(0, 2, (3, 100)).astype(np.float64), 0)
    few = order.positions[:12]
    scores = np.zeros((3, 12))
    scores[1, :3] = 1.0
    scores[2, :6] = 1.0
    less, _ = surely_less(scores, order.sample(few, 100), 0.999)
    assert not less[0, 1]


def test_dominance_needs_no_objective_worse() -> None:
    sample = Sample(np.zeros(4, dtype=np.int64), np.array([4]))
    first = np.array([[0.0] * 4, [1.0] * 4, [0.0] * 4])
    second = np.array([[1.0] * 4, [0.0] * 4, [2.0] * 4])
    better = surely_better([first, second], [sample, sample], 0.9)
    assert better.tolist() == [[False, False, True], [False, False, False], [False, False, False]]


def test_verdicts_are_those_of_the_definition() -> None:
    better = np.zeros((5, 5), dtype=np.bool_)
    better[0, 2:] = True  # 0 beats 2, 3, 4; 1 beats 3, 4; 2 beats 4
    better[1, 3:] = True
    better[2, 4] = True
    found = verdicts(better, keep=2)
    assert found.settled.tolist() == [True, False, False, False, False]
    assert found.eliminated.tolist() == [False, False, False, True, True]
    assert verdicts(better, keep=5).settled.all()


# ---- the order of items ----------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 99))
def test_an_order_holds_every_item_once_and_strata_are_those_of_the_baselines(n: int, models: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 2, (models, n)).astype(np.float64)
    order = item_order(scores, seed)
    assert sorted(order.positions.tolist()) == list(range(n))
    agree = scores.min(axis=0) == scores.max(axis=0)
    assert ((order.strata == 0) == agree).all()


def test_every_start_of_an_order_is_allotted_by_neymans_rule() -> None:
    random = np.random.default_rng(1)
    scores = (random.normal(0, 1, (5, 600)) + random.normal(0, 2, 600) > 0).astype(np.float64)
    order = item_order(scores, 0)
    variances = (5 * scores.var(axis=0) + scores.var(axis=0).mean()) / 6
    deviations = np.array([np.sqrt(variances[order.strata == h]).mean() for h in range(STRATA)])
    wanted = np.bincount(order.strata, minlength=STRATA) * deviations
    for most in (30, 90, 200):
        taken = np.bincount(order.strata[order.positions[:most]], minlength=STRATA)
        assert taken == pytest.approx(most * wanted / wanted.sum(), abs=2.0)
        share = (order.strata == 0).mean()
        assert taken[0] < most * share  # items on which baselines agree are asked more seldom


def test_orders_of_other_seeds_are_other_samples() -> None:
    scores = np.random.default_rng(0).integers(0, 2, (3, 50)).astype(np.float64)
    assert item_order(scores, 0).positions.tolist() == item_order(scores, 0).positions.tolist()
    assert item_order(scores, 0).positions.tolist() != item_order(scores, 1).positions.tolist()


def test_a_sample_counts_only_the_items_that_a_measure_is_the_mean_of() -> None:
    order = ItemOrder(np.array([4, 1, 0, 3, 2], dtype=np.int32), np.array([0, 1, 1, 2, 0]))
    sample = order.sample(np.array([1, 0], dtype=np.int32), 3)
    assert sample.strata.tolist() == [1, 0]
    assert sample.population.tolist() == [1, 2, 0]


# ---- the screen ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_tau_of_equal_weights_is_that_of_scipy(points: list[tuple[int, int]]) -> None:
    x, y = zip(*points, strict=True)
    expected = stats.kendalltau(x, y).statistic
    pairs = [ScoredPair(float(a), float(b), 2.0) for a, b in points]
    assert weighted_tau(pairs) == pytest.approx(expected, nan_ok=True)


def test_a_weight_of_two_is_nearly_two_candidates() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=60)
    y = x + random.normal(size=60)
    pairs = [ScoredPair(a, b, 1.0) for a, b in zip(x, y, strict=True)]
    doubled = [*pairs, *pairs[:30]]
    weighted = [ScoredPair(p.screen, p.objective, 2.0 if i < 30 else 1.0) for i, p in enumerate(pairs)]
    # A candidate and its double are a tied pair, which tau-b leaves out on both sides.
    assert weighted_tau(weighted) == pytest.approx(weighted_tau(doubled))


def screening(*, maximise: bool = True) -> Screener:
    return Screener(ScreenInfo("screen", 1, "m", maximise, 10, 0, least_tau=0.5, drop=0.5), seed=3)


@pytest.mark.parametrize("maximise", [True, False])
def test_a_screen_leaves_out_the_poorest_but_one_while_it_agrees(maximise: bool) -> None:
    screen = screening(maximise=maximise)
    means = {number: float(number if maximise else -number) for number in range(100, 110)}
    assert screen.poorest(means) == set()
    good = {number: float(number) for number in range(MIN_PAIRS)}
    screen.remember({n: v if maximise else -v for n, v in good.items()}, good)
    assert screen.is_on
    left_out = screen.poorest(means)
    assert len(left_out) == 4
    assert left_out < {100, 101, 102, 103, 104}
    screen.remember({n: v if maximise else -v for n, v in good.items()}, {n: -v for n, v in good.items()})
    assert not screen.is_on
    assert screen.poorest(means) == set()


def test_the_audited_candidate_stands_for_those_left_out() -> None:
    """Were it not weighted, a generation of which the poor half is left out would hardly show that it is poor."""
    screen = screening()
    screened = {number: float(number) for number in range(8)}
    screen.remember(screened, {0: 0.0, 4: 4.0, 5: 5.0, 6: 7.0, 7: 6.0})
    assert [pair.weight for pair in screen._pairs] == [4.0, 1.0, 1.0, 1.0, 1.0]
    assert screen.tau == pytest.approx((4 * 4 + 5 - 1) / (4 * 4 + 6))


def test_the_line_through_the_pairs_predicts_the_objective() -> None:
    screen = screening()
    x = np.random.default_rng(0).normal(size=30)
    y = 3 * x - 1 + np.random.default_rng(1).normal(size=30)
    screen.remember(dict(enumerate(x.tolist())), dict(enumerate(y.tolist())))
    line = stats.linregress(x, y)
    assert screen.predict(0.7) == pytest.approx(line.slope * 0.7 + line.intercept)


# ---- estimates of a candidate that left its race ---------------------------------------------------------------------


def estimated(
    scores: NDArray[np.float64], reference: NDArray[np.float64], items: NDArray[np.int64]
) -> tuple[float, float]:
    """The mean and the error of a candidate with ``scores`` that was scored on ``items``, by a reference's scores."""
    setup: Setup = make_setup()
    (objective,) = setup.objectives
    table = ScoreTable()
    table.add(setup, 0, items.astype(np.int32), {"acc": scores[items].astype(np.float32)})
    order = item_order(np.stack([reference, np.zeros(ITEMS)]), seed=0)
    found = estimate(objective, table, order, lambda positions, known: reference)
    assert found is not None
    return found.mean, found.stderr


@given(st.integers(0, 10_000), st.integers(1, ITEMS - 1), st.floats(0, 1), st.floats(0, 1))
def test_an_estimate_of_right_or_wrong_is_a_share(seed: int, count: int, able: float, reference: float) -> None:
    """A poor candidate beside a good baseline, or the other way: what is added may not leave what can be."""
    random = np.random.default_rng(seed)
    ours, theirs = ((random.random(ITEMS) < share).astype(np.float64) for share in (able, reference))
    mean, _ = estimated(ours, theirs, random.permutation(ITEMS)[:count])
    assert 0.0 <= mean <= 1.0


@pytest.mark.parametrize(("low", "high"), [(-9.0, 0.0), (0.0, 5.0), (-1.0, 1.0), (0.0, 100.0)])
def test_an_estimate_of_any_metric_stays_within_its_scores(low: float, high: float) -> None:
    """Log-likelihoods stay below zero, bits above, a reward between its ends."""
    random = np.random.default_rng(0)
    for items in (random.permutation(ITEMS)[:5] for _ in range(50)):
        mean, _ = estimated(np.full(ITEMS, low), random.uniform(low, high, ITEMS), items)
        assert low <= mean <= high


def test_an_estimate_within_its_bounds_is_the_difference_estimators() -> None:
    random = np.random.default_rng(3)
    ours, theirs = random.random(ITEMS), random.random(ITEMS)
    items = random.permutation(ITEMS)[:20]
    sample = item_order(np.stack([theirs, np.zeros(ITEMS)]), seed=0).sample(items.astype(np.int32), ITEMS)
    plain = difference_estimate(ours[items].astype(np.float32).astype(np.float64), items, theirs, sample)
    assert estimated(ours, theirs, items) == pytest.approx((plain.mean, plain.stderr))


def test_an_estimate_from_one_item_has_no_error() -> None:
    mean, error = estimated(np.ones(ITEMS), np.full(ITEMS, 0.5), np.array([3]))
    assert 0.0 <= mean <= 1.0
    assert error is None


# ---- how often a race is wrong ---------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_that_of_the_recorded_results() -> None:
    results = json.loads((ROOT / "docs/racing.json").read_text())
    assert bench.table(results) in (ROOT / "docs/scoring.md").read_text()


def test_results_of_searches_that_are_not_raced_again_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SEARCHES", 1)
    monkeypatch.setattr(bench, "RUNGS", [(25, 50)])
    file, (row, *_) = tmp_path / "racing.json", json.loads((ROOT / "docs/racing.json").read_text())["miniatures"]
    kept = {**row, "rungs": [25, 50]}
    file.write_text(json.dumps({"simulated": [row], "miniatures": [kept]}))
    bench.main(["--json", str(file)])
    results = json.loads(file.read_text())
    assert results["miniatures"] == [kept]
    assert [found["candidates"] for found in results["simulated"]] == [90] * len(bench.CONFIDENCES)
    assert f"| {kept['wrongly_eliminated']:.1%} |" in capsys.readouterr().out
