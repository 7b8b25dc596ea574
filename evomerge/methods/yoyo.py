"""YOYO-Fusion: a robust mean of sources scaled to equal size, in the few directions in which they differ.

Published with the models of YOYO-AI (the card of Qwen3-30B-A3B-YOYO-V5 has the equations). With r_i the root mean
square of x_i: scale the sources to one size, u_i = x_i / r_i (1); take their geometric median m (2) and the residuals
R = U - 1 m^T (3); by singular value decomposition of R, give every source a coordinate in each of K - 1 directions (4);
in each direction take the mean with Tukey's biweight, which ignores outliers (5); move from m by these means, and scale
the result to the mean length of the sources (6).

m is an average of the u_i, so everything happens in their span and can be computed from their inner products: the
result is a linear combination. (With an elementwise median it would not be; the card prefers the geometric one.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.arithmetic.sphere import Vector
from evomerge.merging.plans import number, values
from evomerge.method import Method, MethodParameter
from evomerge.methods.parameters import one_weight, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts

_CUT = 4.685  # Tukey's constant: 95% efficient without outliers
_MAD = 1.4826  # times the median of |z|: the standard deviation if z is normally distributed
_SMALL_SQUARE = 1e-8  # what (1) adds to a mean square
_BALANCED = 1e-6  # length, relative to the sources', below which the result has no meaningful direction


def yoyo(facts: Facts, blend: Blend) -> Pass:
    """The fusion of the sources with non-zero weight; weights enter the mean (5), and are equal in the original.

    If all weights are zero, all sources count equally.
    """
    given = np.array(values(blend, "weight"))
    shares = given if given.any() else np.ones(len(given))
    used = np.flatnonzero(shares)
    names = [blend.sources[i] for i in used]
    if len(names) == 1:
        return Combine({names[0]: 1.0})
    inner = facts.inner(blend.sources)[np.ix_(used, used)]
    coefficients = _fusion(inner, facts.size, shares[used], number(blend, "cut", _CUT))
    return Combine(dict(zip(names, coefficients.tolist(), strict=True)))


def _fusion(inner: Vector, size: int, weights: Vector, cut: float) -> Vector:
    """Coefficients of the sources.

    Args:
        inner: [K, K] inner products of the x_i.
        size: elements of each.
    """
    norms, scales = np.sqrt(np.diag(inner)), np.sqrt(np.diag(inner) / size + _SMALL_SQUARE)
    points = _points(inner / np.outer(scales, scales))
    centre = _geometric_median(points)  # (2), as weights of the u_i
    left, lengths, _ = np.linalg.svd(points - centre @ points)  # (3), (4)
    kept = lengths > 1e-7 * math.sqrt(size)  # above the rounding error of inner products
    left, coordinates = left[:, kept], left[:, kept] * lengths[kept]
    robust = _biweight(coordinates, cut) * _biweight(np.linalg.norm(coordinates, axis=1, keepdims=True), cut)
    counted = weights[:, None] * robust
    sums = counted.sum(axis=0)
    mean = np.divide((counted * coordinates).sum(axis=0), sums, where=np.abs(sums) > 1e-12, out=np.zeros_like(sums))
    along = left @ (mean / lengths[kept])  # expressed as a combination of the rows of R
    fused = (centre + along - along.sum() * centre) / scales
    length, total = math.sqrt(max(fused @ inner @ fused, 0.0)), weights.sum()
    if abs(total) < 1e-12 * np.abs(weights).sum() or length <= _BALANCED * norms.max():
        return np.full(len(weights), 1 / len(weights))
    return np.asarray(fused * (norms @ weights / total) / length)  # (6)


def _points(inner: Vector) -> Vector:
    """Points with these inner products: [K, K], one per row."""
    centring = np.eye(len(inner)) - 1 / len(inner)
    squares, axes = np.linalg.eigh(centring @ inner @ centring)
    return np.asarray(axes * np.sqrt(np.maximum(squares, 0.0)))


def _geometric_median(points: Vector, steps: int = 200, tolerance: float = 1e-10) -> Vector:
    """The weights of the points, with sum 1, whose mean minimises the sum of the distances to all points.

    Computed with Weiszfeld's iteration (1937), starting from the mean, until a step is shorter than ``tolerance`` times
    the largest distance. The iteration converges very slowly to a median that is one of the points, so these are tested
    first: a point is the median if the unit vectors to the others sum to a length of at most its multiplicity (Kuhn, "A
    note on Fermat's problem", 1973).

    Args:
        points: [n, dimensions].
    """
    count = len(points)
    apart = points[:, None] - points[None]
    distances = np.linalg.norm(apart, axis=2)
    largest = distances.max()
    if largest == 0:
        return np.full(count, 1 / count)
    pulls = np.linalg.norm((apart / np.where(distances > 0, distances, 1.0)[..., None]).sum(axis=1), axis=1)
    spare = (distances == 0).sum(axis=1) - pulls  # multiplicity of each point, minus the pull of the others
    if spare.max() > 1e-9:
        return np.asarray(np.eye(count)[int(spare.argmax())])
    middle = points.mean(axis=0)
    for _ in range(steps):
        nearness = 1 / np.maximum(np.linalg.norm(points - middle, axis=1), tolerance * largest)
        shares = nearness / nearness.sum()
        before, middle = middle, shares @ points
        if np.linalg.norm(middle - before) < tolerance * largest:
            break
    return np.asarray(shares)


def _biweight(values: Vector, cut: float) -> Vector:
    """Tukey's biweight of each value in a column, relative to the median of their magnitudes."""
    sizes = np.abs(values)
    middle = np.sort(sizes, axis=0)[(len(sizes) - 1) // 2]  # the lower median
    ratios = sizes / np.maximum(cut * _MAD * middle, 1e-12)
    return np.asarray(np.maximum(1 - ratios**2, 0.0) ** 2)


YOYO = Method(
    "yoyo",
    yoyo,
    # A cut of 1.5 ignores all but the closest values, one of 10 hardly any.
    (weight(1.0, high=1.0), MethodParameter("cut", "blend", low=1.5, high=10.0, default=_CUT, limits=(0.1, 1e6))),
    alone=one_weight(),
    title="YOYO-Fusion",
    reference="huggingface.co/YOYO-AI/Qwen3-30B-A3B-YOYO-V5",
)
