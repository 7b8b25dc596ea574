"""Means with their errors, and paired differences: what per-item scores say of a candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats takes longer to import than a status takes to show

from evomerge.store import Estimate

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its two-sided confidence interval."""

    mean: float
    low: float
    high: float


def mean_and_error(values: Values) -> Estimate:
    """Mean and standard error of per-item scores of shape [n], computed in float64; no error for a single item."""
    exact = values.astype(np.float64)
    n = len(exact)
    error = float(exact.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return Estimate(mean=float(exact.mean()), stderr=error, n=n)


def paired_difference(ours: Values, theirs: Values, confidence: float) -> Difference:
    """How much better ``ours`` is on the same items, with Student's t interval for paired samples.

    The pairing takes out what items have in common (some are hard for every model), which is most of the variance
    between models merged from the same sources.
    """
    differences = ours.astype(np.float64) - theirs.astype(np.float64)
    mean = float(differences.mean())
    if len(differences) < 2 or np.ptp(differences) == 0.0:
        return Difference(mean, mean, mean)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    reach = float(special.stdtrit(len(differences) - 1, 0.5 + confidence / 2)) * error
    return Difference(mean, mean - reach, mean + reach)


def sign_test(better: int, worse: int) -> float:
    """The two-sided p of the sign test: how likely a split at least this uneven is, were both equally good."""
    # Under p = 1/2 both tails are equal; an even split is in both, hence the cap.
    return min(1.0, 2.0 * float(special.bdtr(min(better, worse), better + worse, 0.5)))
