"""Statistics of per-item scores: means and differences, with standard errors and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats takes longer to import than a status takes to show

from evomerge.store import Estimate

Values = NDArray[np.float32]
Matrix = NDArray[np.float64]

_DRAWS = 5000  # this gives the 95% quantile to within 0.3% of probability; an adjusted p is at least 1/5001


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its two-sided confidence interval, which is NaN to NaN for a single item."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Corrected(Difference):
    """A difference whose interval and two-sided ``p`` are corrected for a family of comparisons; NaN for one item."""

    p: float


def mean_and_error(values: Values) -> Estimate:
    """The mean of per-item scores (float32 [n]) and its standard error, in float64; the error of one item is NaN."""
    exact = values.astype(np.float64)
    n = len(exact)
    error = float(exact.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean=float(exact.mean()), stderr=error, n=n)


def paired_difference(ours: Values, theirs: Values, confidence: float) -> Difference:
    """By how much ``ours`` is better on the same items, with Student's t interval for paired samples.

    Pairing removes the variance that all models share (some items are hard for each of them), which is most of the
    variance of models merged from the same sources.

    Args:
        ours, theirs: float32 [n], higher is better.
        confidence: two-sided.
    """
    differences = ours.astype(np.float64) - theirs.astype(np.float64)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Difference(mean, math.nan, math.nan)
    if np.ptp(differences) == 0.0:
        return Difference(mean, mean, mean)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    reach = float(special.stdtrit(len(differences) - 1, 0.5 + confidence / 2)) * error
    bound = bound_of(differences)
    return Difference(mean, max(-bound, mean - reach), min(bound, mean + reach))


def bound_of(differences: Matrix) -> float:
    """The largest possible mean of such differences: 1 if scores are right or wrong, otherwise infinity."""
    return 1.0 if _is_right_or_wrong(differences) else math.inf


def _is_right_or_wrong(differences: Matrix) -> bool:
    """Whether all of these can be differences of scores that are 0 or 1."""
    return bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())


def simultaneous_differences(differences: Matrix, confidence: float, seed: int) -> list[Corrected]:
    """The means of many paired differences, with simultaneous confidence intervals.

    The single-step max-|t| procedure (Westfall & Young, "Resampling-Based Multiple Testing", 1993; Hothorn, Bretz &
    Westfall, Biometrical Journal 50, 2008, section 3). Every interval has a half-width of c standard errors, where c is
    the ``confidence`` quantile of the largest of all |t| if there are no true differences. Its distribution is
    simulated with the correlation of the comparisons over items. For candidates of one search that correlation is high,
    so the intervals are narrower than Bonferroni's.

    Scores that rarely differ may have too small a standard error by chance, or none. So, like a score interval
    (Agresti & Coull, The American Statistician 52, 1998), the sum of squares of such a comparison is increased by c^2
    times its typical squared difference: if n right-or-wrong items show no difference, the interval is +-c^2 / n. A
    comparison of continuous scores has the plain standard error, and no comparison is widened because of the scores of
    another one.

    Args:
        differences: float64 [items, comparisons], on the same items; positive is better.
        confidence: the probability that all intervals hold at once.
        seed: of the draws. Equal arguments give equal intervals.

    Returns:
        For each comparison its mean, interval and adjusted p, which are consistent: p < 1 - confidence if 0 is outside.
        For a single item, intervals and p are NaN. If all items have the same difference, and no other comparison shows
        a typical one, the interval is a point.
    """
    means = differences.mean(axis=0)
    typical = [typical_squares(differences)]
    return simultaneous_sums(means, [differences - means], typical, confidence, seed, bound=bound_of(differences))


def simultaneous_sums(
    means: Matrix,
    deviations: Sequence[Matrix],
    typical: Sequence[Matrix],
    confidence: float,
    seed: int,
    *,
    bound: float = math.inf,
) -> list[Corrected]:
    """As ``simultaneous_differences``, for differences that are sums over several independent sets of items.

    Their variances add. The degrees of freedom are the fewest of any comparison, by the Welch-Satterthwaite equation
    (Satterthwaite, Biometrics Bulletin 2, 1946).

    Args:
        means: float64 [comparisons], the differences.
        deviations: for each set float64 [items, comparisons], each item's contribution to a difference minus the mean
            one, so the mean of each column is 0.
        typical: for each set float64 [comparisons], from ``typical_squares``.
        confidence, seed: as for ``simultaneous_differences``.
        bound: the largest possible magnitude of a difference.

    Returns:
        As ``simultaneous_differences``.
    """
    sizes = [len(matrix) for matrix in deviations]
    if min(sizes) < 2:
        return [Corrected(mean, math.nan, math.nan, math.nan) for mean in means.tolist()]
    if not means.any() and not any(matrix.any() for matrix in deviations):
        return [Corrected(mean, mean, mean, 1.0) for mean in means.tolist()]
    # Columns whose squares sum to the variance of their mean.
    scaled = [matrix / math.sqrt(n * (n - 1)) for n, matrix in zip(sizes, deviations, strict=True)]
    variances = np.stack([(columns**2).sum(axis=0) for columns in scaled])
    variance = variances.sum(axis=0)
    least = sum(np.asarray(squares) / (n * (n - 1)) for n, squares in zip(sizes, typical, strict=True))
    largest = _largest_t(scaled, variances, seed)
    critical = float(np.quantile(largest, confidence))
    reach = critical * np.sqrt(variance + critical**2 * least)
    # The |t| at which the interval would end at 0: the positive root of t^2 (variance + t^2 least) = mean^2.
    below = variance + np.sqrt(variance**2 + 4 * least * means**2)
    certain = np.where(means != 0, math.inf, 0.0)  # all items have the same difference, which may be 0
    t_squared = np.divide(2 * means**2, below, out=certain, where=below > 0)
    as_large = _DRAWS - np.searchsorted(largest, np.sqrt(t_squared), side="left")
    p = (1 + as_large) / (1 + _DRAWS)
    low, high = np.maximum(means - reach, -bound), np.minimum(means + reach, bound)
    return [Corrected(*map(float, values)) for values in zip(means, low, high, p, strict=True)]


def typical_squares(differences: Matrix) -> Matrix:
    """The typical squared difference of each comparison, which widens intervals of scores that rarely differ.

    It is 1 for right-or-wrong scores. A comparison of other scores needs it only if at least half of its items have the
    same difference, usually 0: then it is the mean squared distance of the other items from that difference. If all
    items have the same difference, the median over the other comparisons is used instead.

    Args:
        differences: float64 [items, comparisons].

    Returns:
        float64 [comparisons]; 0 where it is not needed.
    """
    if _is_right_or_wrong(differences):
        return np.ones(differences.shape[1])
    typical = np.zeros(differences.shape[1])
    for number, column in enumerate(differences.T):
        values, counts = np.unique(column, return_counts=True)
        if len(values) == 1:
            typical[number] = math.nan
        elif 2 * counts.max() >= len(column):
            common = values[counts.argmax()]
            typical[number] = float(((column[column != common] - common) ** 2).mean())
    known = typical[typical > 0]
    return np.where(np.isnan(typical), np.median(known) if len(known) else 0.0, typical)


def _largest_t(scaled: Sequence[Matrix], variances: Matrix, seed: int) -> Matrix:
    """The largest |t| of a family without true differences, simulated: float64 [draws], in ascending order.

    A comparison without variance is simulated as independent of the others, which can only widen intervals.

    Args:
        scaled: for each set of items float64 [items, comparisons], columns whose squares sum to its ``variances``.
        variances: float64 [sets, comparisons].
    """
    random = np.random.default_rng(seed)
    variance = variances.sum(axis=0)
    flat = variance == 0
    errors = np.sqrt(np.where(flat, 1.0, variance))
    draws = sum((_noise(columns / errors, random) for columns in scaled), start=np.zeros((_DRAWS, len(variance))))
    draws[:, flat] = random.standard_normal((_DRAWS, int(flat.sum())))
    freedom = _freedom(variances[:, ~flat], [len(columns) for columns in scaled])
    return np.sort(np.abs(draws).max(axis=1) / np.sqrt(random.chisquare(freedom, _DRAWS) / freedom))


def _freedom(variances: Matrix, sizes: Sequence[int]) -> float:
    """The smallest Welch-Satterthwaite degrees of freedom of some sums of means.

    Args:
        variances: float64 [sets, sums], of each mean.
        sizes: the number of items in each set.
    """
    if len(sizes) == 1 or not variances.shape[1]:
        return min(sizes) - 1
    own = np.array(sizes, dtype=np.float64)[:, None] - 1
    return float((variances.sum(axis=0) ** 2 / (variances**2 / own).sum(axis=0)).min())


def _noise(centred: Matrix, random: np.random.Generator) -> Matrix:
    """Normal draws, float64 [draws, columns], with the covariance centred^T centred; ``centred`` is [n, columns]."""
    root = np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred
    return np.asarray(random.standard_normal((_DRAWS, len(root))) @ root)


def luck_of_choice(values: Sequence[Matrix], seed: int) -> float:
    """By how much the best of some candidates is overestimated because it was chosen on the same items.

    A parametric bootstrap of the choice: means are drawn around the measured ones, with their covariance, and the
    result is by how much the best of a draw exceeds its measured mean, on average. The measured means already contain
    noise; if all candidates are equal, which is the worst case, the bootstrap therefore finds only 1 / sqrt(2) of the
    bias, so the result is multiplied by sqrt(2). This is as much as choosing on half of the items and measuring on the
    other half gives, scaled to all items. It is 0 if one candidate is surely the best.

    Args:
        values: the scores that decide, float64 [items, candidates], higher is better; or several, each on its own
            items, whose means are added.
        seed: of the draws.
    """
    count = values[0].shape[1]
    if min(len(scores) for scores in values) < 2 or count < 2:
        return 0.0
    random = np.random.default_rng(seed)
    means, noise = np.zeros(count), np.zeros((_DRAWS, count))
    for scores in values:
        n, own = len(scores), scores.mean(axis=0)
        means += own
        noise += _noise((scores - own) / math.sqrt(n * (n - 1)), random)
    best = np.argmax(means + noise, axis=1)
    return max(0.0, math.sqrt(2) * float(np.take_along_axis(noise, best[:, None], axis=1).mean()))


def sum_interval(mean: float, deviations: Sequence[Matrix], confidence: float) -> Difference:
    """A sum of independent means, with Welch's confidence interval.

    Args:
        mean: the sum.
        deviations: for each set of items float64 [items], each item's contribution to the sum up to a constant.
        confidence: two-sided.
    """
    if min(len(part) for part in deviations) < 2:
        return Difference(mean, math.nan, math.nan)
    variances = np.array([float(part.var(ddof=1)) / len(part) for part in deviations])
    if not variances.any():
        return Difference(mean, mean, mean)
    freedom = _freedom(variances[:, None], [len(part) for part in deviations])
    reach = float(special.stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variances.sum())
    return Difference(mean, mean - reach, mean + reach)


def shift(before: Matrix, after: Matrix, confidence: float) -> Difference:
    """By how much the mean of ``after`` is below that of ``before``, on other items, with Welch's confidence interval.

    Args:
        before, after: float64 [n] and [m].
        confidence: two-sided.
    """
    return sum_interval(float(before.mean() - after.mean()), [before, after], confidence)


def kendall_tau(one: Matrix, other: Matrix, weights: Matrix | None = None) -> float:
    """Kendall's tau-b, corrected for ties (Biometrika 33, 1945); NaN if either column is constant.

    Args:
        one, other: float64 [n], the two columns.
        weights: float64 [n]; a pair counts with the product of its two weights. None for equal ones.
    """
    signs = [np.sign(column[:, None] - column[None, :]) for column in (one, other)]
    pairs = np.ones((len(one), len(one))) if weights is None else np.outer(weights, weights)
    scale = math.sqrt(float((pairs * signs[0] ** 2).sum()) * float((pairs * signs[1] ** 2).sum()))
    return float((pairs * signs[0] * signs[1]).sum()) / scale if scale else math.nan


def sign_test(better: int, worse: int) -> float:
    """The two-sided p of the sign test: the probability of a split at least this uneven if both are equally good."""
    # With probability 1/2 both tails are equal; an even split is in both, hence the cap.
    return min(1.0, 2.0 * float(special.bdtr(min(better, worse), better + worse, 0.5)))
