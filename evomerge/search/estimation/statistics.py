"""Means with their errors, and differences of them: what per-item scores say of candidates, and how surely."""

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

_DRAWS = 5000  # the 95% quantile of so many is right to 0.3% of probability; an adjusted p is at least 1/5001


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its two-sided confidence interval, NaN to NaN where one item says nothing."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Corrected(Difference):
    """A difference whose interval and two-sided ``p`` hold for a whole family of comparisons at once; NaN as above."""

    p: float


def mean_and_error(values: Values) -> Estimate:
    """Mean and standard error of per-item scores of shape [n], in float64; of a single item the error is NaN."""
    exact = values.astype(np.float64)
    n = len(exact)
    error = float(exact.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean=float(exact.mean()), stderr=error, n=n)


def paired_difference(ours: Values, theirs: Values, confidence: float) -> Difference:
    """How much better ``ours`` is on the same items, with Student's t interval for paired samples.

    The pairing takes out what items have in common (some are hard for every model), which is most of the variance
    between models merged from the same sources.
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
    """How far from 0 a mean can be, of which these are some: 1 where scores are right or wrong, else no bound."""
    return 1.0 if _is_right_or_wrong(differences) else math.inf


def _is_right_or_wrong(differences: Matrix) -> bool:
    """Whether these can be differences of scores that are 0 or 1 each."""
    return bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())


def simultaneous_differences(differences: Matrix, confidence: float, seed: int) -> list[Corrected]:
    """The means of many paired differences, with intervals that hold the truth all at once as often as they say.

    The single-step max-|t| procedure (Westfall & Young, "Resampling-Based Multiple Testing", 1993; Hothorn, Bretz &
    Westfall, Biometrical Journal 50, 2008, section 3): every interval reaches as many standard errors as the
    largest of all |t| does with probability ``confidence`` where nothing differs. That largest is drawn with the
    correlation that the items show, which for candidates of one search is high, so it costs less than Bonferroni.

    Scores that rarely differ have too small a standard error by luck, or none. So, like a score interval (Agresti &
    Coull, The American Statistician 52, 1998), the sum of squares of such a comparison counts c^2 of its own typical
    squared differences more, c being that largest |t|: without any difference among n right-or-wrong items the
    interval is c^2 / n either way. A comparison of continuous scores has the plain standard error, and none is
    widened by what another of its family differs by.

    Args:
        differences: float64 [items, comparisons], of the same items; positive is better.
        seed: of the draws. Equal arguments give equal intervals.

    Returns:
        For each comparison its mean, interval and adjusted p, which agree: p < 1 - confidence when 0 is outside. Of a
        single item intervals and p are NaN. A comparison is a point where all items differ by the same and nothing
        says how large a difference would be.
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
    """As ``simultaneous_differences``, for differences that are sums over several sets of items, independent of each
    other: their variances add, and the degrees of freedom are the fewest that any comparison has by Welch and
    Satterthwaite (Satterthwaite, Biometrics Bulletin 2, 1946).

    Args:
        means: float64 [comparisons], the differences.
        deviations: for each set float64 [items, comparisons], by how much an item's part in a difference is above that
            of all; the mean of each column is 0.
        typical: for each set float64 [comparisons], as ``typical_squares`` gives it.
        bound: how far from 0 a difference can be.
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
    certain = np.where(means != 0, math.inf, 0.0)  # all items differ by the same, or none does
    t_squared = np.divide(2 * means**2, below, out=certain, where=below > 0)
    as_large = _DRAWS - np.searchsorted(largest, np.sqrt(t_squared), side="left")
    p = (1 + as_large) / (1 + _DRAWS)
    low, high = np.maximum(means - reach, -bound), np.minimum(means + reach, bound)
    return [Corrected(*map(float, values)) for values in zip(means, low, high, p, strict=True)]


def typical_squares(differences: Matrix) -> Matrix:
    """float64 [comparisons]: the typical squared difference that keeps rare differences from looking like none.

    Right-or-wrong scores differ by 1. Of other scores a comparison needs it only where at least half of its items
    differ by the same, mostly by nothing: then it is the mean square of how far the others are from that. Where all
    differ by the same, none of its own is known, and the median of the family's stands for it.
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
    """float64 [draws], rising: the largest |t| of a family without any true difference, by Gaussian multipliers.

    A comparison without variance of its own is taken as independent of the others, which only widens intervals.

    Args:
        scaled: for each set of items, columns whose squares sum to its ``variances`` [sets, comparisons].
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
    """The fewest degrees of freedom of any of some sums of means, whose ``variances`` are [sets, sums]."""
    if len(sizes) == 1 or not variances.shape[1]:
        return min(sizes) - 1
    own = np.array(sizes, dtype=np.float64)[:, None] - 1
    return float((variances.sum(axis=0) ** 2 / (variances**2 / own).sum(axis=0)).min())


def _noise(centred: Matrix, random: np.random.Generator) -> Matrix:
    """Normal draws, float64 [draws, columns], whose covariance is centred^T centred; ``centred`` [n, columns]."""
    root = np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred
    return np.asarray(random.standard_normal((_DRAWS, len(root))) @ root)


def luck_of_choice(values: Sequence[Matrix], seed: int) -> float:
    """How much better than it is the best of some candidates looks, because it was chosen on these very items.

    The parametric bootstrap of the choice: means are drawn anew around those found, with their covariance, and the best
    of each draw is on average so much better than it was before. Around means that are spread by noise already this
    finds 1 / sqrt(2) of the luck when all candidates are equal, which is the worst case, so it is raised by sqrt(2): as
    large as choosing on a half of the items and measuring on the other says, brought to all items. Where one is
    surely the best it is 0.

    Args:
        values: what the choice is by, float64 [items, candidates], more is better; or several, each on items of its
            own, whose means are added.
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
    """A sum of independent means with Welch's interval.

    Args:
        mean: the sum.
        deviations: for each set of items float64 [items], by how much its part in the sum is above that of all.
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
    """How much lower the mean of ``after`` [m] is than that of ``before`` [n], other items, with Welch's interval."""
    return sum_interval(float(before.mean() - after.mean()), [before, after], confidence)


def kendall_tau(one: Matrix, other: Matrix, weights: Matrix | None = None) -> float:
    """Kendall's tau-b of two columns [n], ties taken out (Biometrika 33, 1945); NaN where either has no ranks.

    With ``weights`` [n], a pair counts by the product of its two.
    """
    signs = [np.sign(column[:, None] - column[None, :]) for column in (one, other)]
    pairs = np.ones((len(one), len(one))) if weights is None else np.outer(weights, weights)
    scale = math.sqrt(float((pairs * signs[0] ** 2).sum()) * float((pairs * signs[1] ** 2).sum()))
    return float((pairs * signs[0] * signs[1]).sum()) / scale if scale else math.nan


def sign_test(better: int, worse: int) -> float:
    """The two-sided p of the sign test: how likely a split at least this uneven is, were both equally good."""
    # Under p = 1/2 both tails are equal; an even split is in both, hence the cap.
    return min(1.0, 2.0 * float(special.bdtr(min(better, worse), better + worse, 0.5)))
