"""Racing: which candidates of a generation need no more items, because it is clear whether they will be selected.

A race selects the best ``keep`` of a generation (Heidrich-Meisner & Igel, "Hoeffding and Bernstein Races for Selecting
Policies in Evolutionary Direct Policy Search", ICML 2009). Candidates are compared in pairs on the items that both have
been scored on. A candidate that is surely worse than ``keep`` others is *eliminated*, because it cannot be among the
best. One that is surely better than all but ``keep - 1`` others is *settled*: it is among the best, and more items
would not change that. "Surely" means with the confidence of the race.

Items are a stratified random sample without replacement, the same for all candidates (``items.py``). So an estimate is

    mean = sum_h W_h m_h                                    (Cochran, Sampling Techniques, 3rd ed. 1977, eq. 5.1)
    var  = sum_h W_h^2 (1 - n_h / N_h) s_h^2 / n_h          (eq. 5.7)

with W_h = N_h / N the share of items in stratum h, n_h of its N_h items scored, and m_h, s_h^2 their mean and variance.
When every item is scored, the variance is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evomerge.store import Estimate

Matrix = NDArray[np.float64]

PRIOR_ITEMS = 2.0
"""How many items of each stratum the average over all pairs counts as in a pair's variance of differences.

Two merges often agree on every item of a small sample. The variance of that sample is zero, but that proves nothing.
"""


@dataclass(frozen=True)
class Sample:
    """The scored items of an evaluator as a stratified sample.

    Attributes:
        strata: int64 [k], the stratum of each scored item.
        population: int64 [H], the number of all items in each stratum.
    """

    strata: NDArray[np.int64]
    population: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 [H]: the number of scored items in each stratum."""
        return np.asarray(np.bincount(self.strata, minlength=len(self.population)))

    @property
    def shares(self) -> Matrix:
        """float64 [H]: W_h, the weight of each stratum; that of strata without scored items goes to the others."""
        weights = np.where(self.counts > 0, self.population, 0).astype(np.float64)
        return np.asarray(weights / weights.sum())

    @property
    def unseen(self) -> Matrix:
        """float64 [H]: 1 - n_h / N_h, the finite population correction."""
        return np.asarray(1.0 - self.counts / np.maximum(self.population, 1))


def stratified_mean(values: Matrix, sample: Sample) -> Matrix:
    """The mean over all items, estimated from scores: float64 [..., k] -> float64 [...]."""
    by_item = (sample.shares / np.maximum(sample.counts, 1))[sample.strata]
    return np.asarray(values @ by_item)


def stratified_estimate(values: Matrix, sample: Sample) -> Estimate:
    """The mean over all items and its standard error, from the scores of one candidate (float64 [k]).

    The error does not vanish when every item is scored, because the items of a search are themselves only a sample of
    what the model will be used for. So there is no finite population correction here.
    """
    variance = float((_shares_of_variance(sample) * _variances(values, sample)).sum())
    return Estimate(mean=float(stratified_mean(values, sample)), stderr=float(np.sqrt(variance)), n=len(values))


def difference_estimate(values: Matrix, known: NDArray[np.int64], predicted: Matrix, sample: Sample) -> Estimate:
    """As ``stratified_estimate``, improved by a prediction of the score on every item.

    The mean of the predictions plus the estimated mean of their errors (the difference estimator: Saerndal, Swensson &
    Wretman, Model Assisted Survey Sampling, 1992, eq. 6.3.4). It is unbiased however poor the predictions are; good
    ones make its standard error small. Candidates that are estimated with the same predictions can be compared even if
    they were scored on different items.

    Args:
        values: float64 [k], the known scores.
        known: int64 [k], their positions among the items.
        predicted: float64 [n], the predictions for all items.
    """
    missed = values - predicted[known]
    left = _shares_of_variance(sample) * sample.unseen
    variance = float((left * _variances(missed, sample)).sum()) + float(predicted.var(ddof=1)) / len(predicted)
    mean = float(predicted.mean()) + float(stratified_mean(missed, sample))
    return Estimate(mean=mean, stderr=float(np.sqrt(variance)), n=len(values))


def _shares_of_variance(sample: Sample) -> Matrix:
    """float64 [H]: W_h^2 / n_h, the factor of each stratum's variance; 0 for strata without scored items."""
    return np.asarray(sample.shares**2 / np.maximum(sample.counts, 1))


def _variances(values: Matrix, sample: Sample) -> Matrix:
    """float64 [H]: the variance of the scores [k] in each stratum; 0 for strata with fewer than two."""
    by_stratum = [values[sample.strata == h] for h in range(len(sample.population))]
    return np.array([scores.var(ddof=1) if len(scores) > 1 else 0.0 for scores in by_stratum])


def surely_less(values: Matrix, sample: Sample, confidence: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which candidates surely have a lower mean over all items than others, and which surely have no higher one.

    Student's t interval of the paired differences, with the variance of the module's docstring (eq. 5.7).

    Args:
        values: float64 [candidates, k], scores on the same items.
        confidence: one-sided, of a single comparison.

    Returns:
        Two bool masks [candidates, candidates]: in row i and column j, whether i is surely lower than j, and whether i
        is surely not higher than j.
    """
    means = stratified_mean(values, sample)
    gaps = means[:, None] - means[None, :]
    variance = np.zeros_like(gaps)
    for stratum, left in enumerate(_shares_of_variance(sample) * sample.unseen):
        if left > 0:
            variance += left * _variance_of_differences(values[:, sample.strata == stratum])
    if not variance.any():
        return gaps < 0, gaps <= 0
    reach = special.stdtrit(max(1, len(sample.strata) - len(sample.population)), confidence) * np.sqrt(variance)
    return gaps + reach < 0, gaps + reach <= 0


def _variance_of_differences(values: Matrix) -> Matrix:
    """float64 [candidates, candidates]: the variance over items of each pair's difference; values [candidates, n]."""
    count = values.shape[1]
    centred = values - values.mean(axis=1, keepdims=True)
    products = centred @ centred.T
    squares = np.diag(products)[:, None] + np.diag(products)[None, :] - 2 * products
    squares = np.maximum(squares, 0.0)  # rounding
    pairs = len(values) * (len(values) - 1)
    average = squares.sum() / pairs / max(count - 1, 1) if pairs else 0.0
    return np.asarray((squares + PRIOR_ITEMS * average) / (max(count - 1, 0) + PRIOR_ITEMS))


@dataclass(frozen=True)
class Verdicts:
    """The decisions of a race, as bool masks [candidates]. A candidate that is neither is still in the race."""

    eliminated: NDArray[np.bool_]
    settled: NDArray[np.bool_]


def verdicts(better: NDArray[np.bool_], keep: int) -> Verdicts:
    """Decide a race.

    Args:
        better: bool [candidates, candidates]: in row i and column j, whether i is surely better than j.
        keep: how many candidates to select.
    """
    beaten_by = better.sum(axis=0)
    beats = better.sum(axis=1)
    return Verdicts(eliminated=beaten_by >= keep, settled=beats >= len(better) - keep)


def surely_better(objectives: Sequence[Matrix], samples: Sequence[Sample], confidence: float) -> NDArray[np.bool_]:
    """Which candidates surely dominate which others: worse in no objective, and better in at least one.

    Args:
        objectives: for each objective, losses float64 [candidates, k] on the items that all candidates are scored on.
        samples: for each objective, which items these are.
        confidence: one-sided, of a single comparison in one objective.

    Returns:
        bool [candidates, candidates]: in row i and column j, whether i surely dominates j.
    """
    pairs = [surely_less(values, sample, confidence) for values, sample in zip(objectives, samples, strict=True)]
    less, no_more = (np.array(masks) for masks in zip(*pairs, strict=True))
    return np.asarray(no_more.all(axis=0) & less.any(axis=0))
