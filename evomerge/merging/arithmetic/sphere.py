"""Means on a sphere, as coefficients of the vectors, computed from the matrix of their inner products alone.

A vector in the span of x_1 ... x_n is represented by its coefficients c; the inner product of two is c^T G c', where
G is the matrix of inner products. So the iterations here take almost no time compared with reading the weights once.

All arrays are float64. ``inner`` is G [n, n], and ``weights`` and results are [n]; the vectors need not be of unit
length.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_SMALL = 1e-8  # what mergekit adds to lengths before it divides by them
_BALANCED = 1e-6  # a mean of directions shorter than this has no direction: about 100 rounding errors of inner products


def slerp(inner: Vector, t: float, colinear: float) -> Vector:
    """Coefficients of sin((1-t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, where a is the angle between the two.

    Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985). A zero vector has no direction; as in
    mergekit, it counts as orthogonal to the other.

    Args:
        inner: [2, 2] inner products of x_1 and x_2.
        t: position between x_1 (0) and x_2 (1).
        colinear: from this |cos a| on, interpolate linearly instead: 1 - t and t.

    Returns:
        [2] coefficients.
    """
    norms = math.sqrt(inner[0, 0]), math.sqrt(inner[1, 1])
    cosine = inner[0, 1] / (norms[0] * norms[1]) if all(norms) else 0.0
    if abs(cosine) >= colinear:
        return np.array([1 - t, t])
    angle = math.acos(cosine)
    return np.array([math.sin((1 - t) * angle), math.sin(t * angle)]) / math.sin(angle)


def multislerp(inner: Vector, weights: Vector) -> Vector:
    """Coefficients of the barycentre of directions, in the tangent space at their weighted mean, at the mean length.

    The rule of mergekit's multislerp (Goddard): for unit vectors u_i, and m the direction of sum_i w_i u_i, the tangent
    v = sum_i w_i (u_i - <u_i, m> m) is followed from m, and the result has the weighted mean of the lengths. If the
    directions cancel out, there is no m, and the result is the plain weighted mean. A zero vector has no direction, and
    counts only in the mean length.

    Args:
        inner: [n, n] inner products.
        weights: [n], the w_i.

    Returns:
        [n] coefficients.
    """
    norms = np.sqrt(np.diag(inner))
    # Coefficients of unit vectors. For a zero vector any would do; 0 avoids dividing by zero.
    directions = np.divide(1, norms, where=norms > 0, out=np.zeros_like(norms))
    if _norm(weights * directions, inner) < _BALANCED:
        return weights
    units = np.diag(np.where(norms > 0, 1 / (norms + _SMALL), 0.0))  # row i: coefficients of u_i
    mean = weights @ units
    length = _norm(mean, inner)
    if length < _SMALL:
        return weights
    mean = mean / length
    tangent = weights @ (units - np.outer(units @ inner @ mean, mean))
    angle = _norm(tangent, inner) + _SMALL
    barycentre = mean * math.cos(angle) + tangent * (math.sin(angle) / angle)
    return np.asarray(barycentre * (norms @ weights))


def karcher(inner: Vector, weights: Vector, steps: int = 10, tolerance: float = 1e-5) -> Vector:
    """Coefficients of the Karcher mean of directions (the point of least mean squared angle), at the mean length.

    Karcher, "Riemannian center of mass and mollifier smoothing" (1977), by gradient descent: the current point moves
    along the mean of the logarithms of all points there. A vector that is shorter than ``tolerance`` has no direction,
    and counts only in the mean length; one opposite to the current point has no defined logarithm, and is left out of
    that step.

    Args:
        inner: [n, n] inner products.
        weights: [n], of sum 1.
        steps: at most this many.
        tolerance: stop when a step is shorter than this, in radians.

    Returns:
        [n] coefficients.
    """
    norms = np.sqrt(np.diag(inner))
    valid = norms > tolerance
    if not valid.any():
        return np.zeros_like(weights)
    shares = weights[valid] / (weights[valid].sum() or 1.0)
    units = np.diag(1 / np.where(valid, norms, 1.0))[valid]
    mean = shares @ units
    length = _norm(mean, inner)
    mean = units[0] if length < tolerance else mean / length
    for _ in range(steps):
        cosines = np.clip(units @ inner @ mean, -1.0, 1.0)
        angles = np.arccos(cosines)
        far = (angles >= tolerance) & (angles <= math.pi - tolerance)
        pulls = shares[far] * angles[far] / np.sin(angles[far])
        tangent = pulls @ (units[far] - np.outer(cosines[far], mean)) if far.any() else np.zeros_like(mean)
        step = _norm(tangent, inner)
        if step < tolerance:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean = mean / (_norm(mean, inner) or 1.0)
    return np.asarray(mean * (norms @ weights))


def stock_ratio(inner: Vector) -> float:
    """How far to go from the base (0) to the mean of the sources (1): n cos / (1 + (n - 1) cos).

    Jang et al., "Model Stock: all we need is just a few fine-tuned models" (arXiv 2403.19522), equation 5 for n models;
    cos is the mean cosine between two task vectors. The ratio is 0 if the quotient is not finite.

    Args:
        inner: [n, n] inner products of the task vectors.
    """
    count = len(inner)
    norms = np.sqrt(np.diag(inner))
    products = np.maximum(np.outer(norms, norms), 1e-6)
    cosines = np.clip(inner / products, -1.0, 1.0)[np.triu_indices(count, 1)]
    cosine = float(cosines.mean()) if count > 1 else 1.0
    below = 1 + (count - 1) * cosine
    return 0.0 if abs(below) < 1e-6 else count * cosine / below


def _norm(coefficients: Vector, inner: Vector) -> float:
    """The length of the vector with these coefficients."""
    return math.sqrt(max(float(coefficients @ inner @ coefficients), 0.0))
