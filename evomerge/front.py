"""The Pareto front of candidates by their losses, all minimised. Dominance and hypervolumes are computed by moocore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import moocore
import numpy as np
from numpy.typing import NDArray


def nondominated(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows are not dominated by any other: a bool mask of shape [n] for ``losses`` of shape [n, m].

    Of equal rows only the first is kept. Rows of failed candidates, with infinite or missing losses, are never kept.
    """
    mask: NDArray[np.bool_] = np.asarray(np.isfinite(losses).all(axis=1))
    mask[mask] = moocore.is_nondominated(losses[mask])
    return mask


def extend_front(
    front: Mapping[int, Sequence[float]], new: Mapping[int, Sequence[float]]
) -> dict[int, Sequence[float]]:
    """The joint front of ``front`` and ``new``, each with losses by candidate number, in order of number.

    Of candidates with equal losses the lowest number stays, so the front does not depend on the order of arrival.
    """
    losses = dict(sorted({**front, **new}.items()))
    if not losses:
        return {}
    kept = nondominated(np.array(list(losses.values()), dtype=np.float64))
    return {number: point for (number, point), keep in zip(losses.items(), kept, strict=True) if keep}


def knee(losses: NDArray[np.float64]) -> int:
    """The row of ``losses`` [n, m] that is the best compromise of its front; with one objective, the best row.

    Every objective is scaled from 0 (best on the front) to 1 (worst on the front); the knee lies farthest below the
    plane where the scaled objectives sum to 1, which for two objectives is the line through the front's two ends
    (Das, "On characterizing the knee of the Pareto curve", Structural Optimization 18, 1999).

    Raises:
        ValueError: no row has finite losses.
    """
    rows = np.flatnonzero(nondominated(losses))
    if rows.size == 0:
        raise ValueError("no candidate has finite losses")
    points = losses[rows]
    best, worst = points.min(axis=0), points.max(axis=0)
    scaled = (points - best) / np.where(worst > best, worst - best, 1.0)
    return int(rows[scaled.sum(axis=1).argmin()])


def hypervolume(losses: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """The volume between ``losses`` [n, m] and ``reference`` [m]; rows that are not better everywhere add nothing."""
    finite = losses[np.isfinite(losses).all(axis=1)]
    return float(moocore.hypervolume(finite, ref=reference)) if len(finite) else 0.0
