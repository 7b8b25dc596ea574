"""Compiled scans of weights for statistics: each adds the contribution of a piece of a tensor to the caller's array.

As in ``kernels``, inputs are arrays of pairs, of one dtype. Sums are float64 over float32 differences, in an order that
depends only on the pieces, not on the machine's vector width or the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evomerge.merging.arithmetic.kernels import variance
from evomerge.merging.arithmetic.words import U32, U64, ZERO, as_bits, as_signed, compiled, pair, pairs

_BLOCK = 512  # pairs
_LANES = 16  # independent partial sums: enough to fill the vector units of today's processors
BINS = 1 << 15  # the upper 16 bits of a float32 magnitude, whose sign bit is 0
FINE_BINS = 1 << 16  # the lower 16 bits of a float32
RANK_BINS = 128


@compiled
def inner_products(arrays: Any, total: Any) -> None:
    """Add to ``total`` (float64 [n, n], lower triangle) the inner products of x_0, x_1 - x_0, x_2 - x_0, ...

    Differences are taken first because fine-tunes of one base differ only in the last digits: inner products of task
    vectors that were derived from products of the weights would be rounding errors.
    """
    block = np.zeros((len(arrays), 2 * _BLOCK), np.float32)
    for start in range(U64(0), pairs(arrays[0]), U64(_BLOCK)):
        count = min(U64(_BLOCK), U64(pairs(arrays[0]) - start))
        if count < _BLOCK:
            block[:] = 0
        for i in range(count):
            block[0, U64(2) * i], block[0, U64(2) * i + U64(1)] = pair(arrays[0], start + i)
        for k in range(1, len(arrays)):
            row, origin = block[U64(k)], block[0]
            for i in range(count):
                x, y = pair(arrays[k], start + i)
                row[U64(2) * i] = x - origin[U64(2) * i]
                row[U64(2) * i + U64(1)] = y - origin[U64(2) * i + U64(1)]
        for k in range(len(arrays)):
            for m in range(k + 1):
                total[k, m] += _dot(block[U64(k)], block[U64(m)])


@compiled
def _dot(first: Any, second: Any) -> Any:
    lanes = np.zeros(_LANES, np.float64)
    for start in range(U64(0), U64(len(first)), U64(_LANES)):
        for j in range(U64(_LANES)):
            lanes[j] += np.float64(first[start + j]) * np.float64(second[start + j])
    total = 0.0
    for j in range(_LANES):
        total += lanes[j]
    return total


@compiled
def change(base: Any, made: Any, total: Any) -> None:
    """Add to ``total`` (float64 [1]) the squared norm of the difference between a merged tensor and the base."""
    deltas = np.zeros(2 * _BLOCK, np.float32)
    for start in range(U64(0), pairs(base), U64(_BLOCK)):
        count = min(U64(_BLOCK), U64(pairs(base) - start))
        if count < _BLOCK:
            deltas[:] = 0
        for i in range(count):
            bx, by = pair(base, start + i)
            x, y = pair(made, start + i)
            deltas[U64(2) * i], deltas[U64(2) * i + U64(1)] = x - bx, y - by
        total[0] += _dot(deltas, deltas)


@compiled
def squares(array: Any, total: Any) -> None:
    """Add to ``total`` (float64 [1]) the squared norm of one tensor."""
    values = np.zeros(2 * _BLOCK, np.float32)
    for start in range(U64(0), pairs(array), U64(_BLOCK)):
        count = min(U64(_BLOCK), U64(pairs(array) - start))
        if count < _BLOCK:
            values[:] = 0
        for i in range(count):
            values[U64(2) * i], values[U64(2) * i + U64(1)] = pair(array, start + i)
        total[0] += _dot(values, values)


@compiled
def count_deltas(base: Any, source: Any, counts: Any) -> None:
    """Add to ``counts`` (int64 [BINS]) the number of magnitudes |x - b| with each value of their upper 16 bits."""
    bins = np.empty(2 * _BLOCK, np.int32)
    for start in range(U64(0), pairs(base), U64(_BLOCK)):
        count = min(U64(_BLOCK), U64(pairs(base) - start))
        for i in range(count):
            bx, by = pair(base, start + i)
            x, y = pair(source, start + i)
            bins[U64(2) * i], bins[U64(2) * i + U64(1)] = _upper(x - bx), _upper(y - by)
        for i in range(U64(2) * count):
            counts[U64(bins[i])] += 1


@compiled
def count_deltas_in(base: Any, source: Any, upper: Any, counts: Any) -> None:
    """Add to ``counts`` (int64 [FINE_BINS]), by lower bits, the number of magnitudes whose upper bits are ``upper``."""
    for i in range(pairs(base)):
        bx, by = pair(base, i)
        x, y = pair(source, i)
        for delta in (x - bx, y - by):
            if _upper(delta) == upper:
                counts[U64(as_bits(delta) & U32(0xFFFF))] += 1


@compiled
def _upper(delta: Any) -> Any:
    return np.int32(as_signed(U32(as_bits(delta) & U32(0x7FFFFFFF))) >> np.int32(16))


@compiled
def count_values(values: Any, counts: Any) -> None:
    """As ``count_deltas``, for the magnitudes of ``values`` (float32 [values])."""
    for i in range(len(values)):
        counts[U64(_upper(values[i]))] += 1


@compiled
def count_values_in(values: Any, upper: Any, counts: Any) -> None:
    """As ``count_deltas_in``, for the magnitudes of ``values`` (float32 [values])."""
    for i in range(len(values)):
        if _upper(values[i]) == upper:
            counts[U64(as_bits(values[i]) & U32(0xFFFF))] += 1


@compiled
def window_sums(base: Any, source: Any, low: Any, high: Any, total: Any) -> None:
    """Add to ``total`` (float64 [2]) the sum of all |x - b|, and of those with low <= |x - b| < high."""
    for i in range(pairs(base)):
        bx, by = pair(base, i)
        x, y = pair(source, i)
        for delta in (x - bx, y - by):
            size = np.float64(abs(delta))
            total[0] += size
            if low <= size < high:
                total[1] += size


@compiled
def rank_sums(base: Any, source: Any, row: Any, first_bin: Any, total: Any) -> None:
    """Add to ``total`` (float64 [2]) the sum of |d|, and of |d| times its rank in its row of ``row`` pairs.

    Ranks go from 0 for the smallest to 1 for the largest; all magnitudes in one bin get their mean rank.

    Args:
        first_bin: see ``magnitude_bin``.
    """
    counts, sums = np.empty(RANK_BINS, np.int64), np.empty(RANK_BINS, np.float64)
    for number in range(pairs(base) // row):
        counts[:] = 0
        sums[:] = 0
        for i in range(U64(number) * row, U64(number + 1) * row):
            bx, by = pair(base, i)
            x, y = pair(source, i)
            for delta in (x - bx, y - by):
                bin_number = U64(magnitude_bin(delta, first_bin))
                counts[bin_number] += 1
                sums[bin_number] += np.float64(abs(delta))
        below = 0
        for j in range(RANK_BINS):
            middle = (below + 0.5 * max(counts[j] - 1, 0)) / max(2 * row - 1, 1)
            total[0] += sums[j]
            total[1] += sums[j] * min(1.0, middle)
            below += counts[j]


@compiled
def magnitude_bin(delta: Any, first_bin: Any) -> Any:
    """The bin of a magnitude (int32, 0 to RANK_BINS - 1): eight bins per factor of two, for 16 factors of two.

    Args:
        delta: float32.
        first_bin: int32, the exponent and upper three mantissa bits of the lowest bin, which also takes all smaller
            magnitudes; the highest takes all larger ones.
    """
    bin_number = np.int32(as_signed(U32(as_bits(delta) & U32(0x7FFFFFFF))) >> np.int32(20)) - first_bin
    return np.int32(min(max(np.int32(bin_number), np.int32(0)), np.int32(RANK_BINS - 1)))


@compiled
def delta_signs(arrays: Any, total: Any) -> None:
    """Add up, for each two task vectors d_k = x_(k+1) - x_0, how often their signs agree.

    Args:
        arrays: the base, then the sources.
        total: float64 [3, n, n] for n task vectors, lower triangles. Added are the number of elements where both are
            nonzero, the number of equal signs minus that of opposite ones, and (on the diagonal) the sum of |d_k|.
    """
    count_of = len(arrays) - 1
    deltas, signs = np.zeros((count_of, 2 * _BLOCK), np.float32), np.zeros((count_of, 2 * _BLOCK), np.int8)
    for start in range(U64(0), pairs(arrays[0]), U64(_BLOCK)):
        count = min(U64(_BLOCK), U64(pairs(arrays[0]) - start))
        if count < _BLOCK:
            deltas[:] = 0
        for k in range(count_of):
            delta, sign = deltas[U64(k)], signs[U64(k)]
            for i in range(count):
                bx, by = pair(arrays[0], start + i)
                x, y = pair(arrays[k + 1], start + i)
                delta[U64(2) * i], delta[U64(2) * i + U64(1)] = x - bx, y - by
            for i in range(U64(2 * _BLOCK)):
                sign[i] = np.int8(delta[i] > ZERO) - np.int8(delta[i] < ZERO)
            total[2, k, k] += _sum_of_sizes(delta)
            for m in range(k + 1):
                both, agreement = _sign_products(sign, signs[U64(m)])
                total[0, k, m] += both
                total[1, k, m] += agreement


@compiled
def _sum_of_sizes(values: Any) -> Any:
    lanes = np.zeros(_LANES, np.float64)
    for start in range(U64(0), U64(len(values)), U64(_LANES)):
        for j in range(U64(_LANES)):
            lanes[j] += np.float64(abs(values[start + j]))
    total = 0.0
    for j in range(_LANES):
        total += lanes[j]
    return total


@compiled
def _sign_products(first: Any, second: Any) -> Any:
    """For two rows of signs -1, 0, 1: the number of nonzero products, and the sum of the products."""
    both, total = np.int32(0), np.int32(0)
    for i in range(U64(len(first))):
        product = np.int8(first[i] * second[i])
        both += np.int32(product != 0)
        total += np.int32(product)
    return both, total


@compiled
def count_variances(arrays: Any, counts: Any) -> None:
    """As ``count_deltas``, for the variances of task vectors over the sources (``arrays``: the base, then sources)."""
    variances = np.empty(2 * _BLOCK, np.float32)
    for start in range(U64(0), pairs(arrays[0]), U64(_BLOCK)):
        count = _variances(arrays, start, variances)
        for i in range(count):
            counts[U64(_upper(variances[i]))] += 1


@compiled
def count_variances_in(arrays: Any, upper: Any, counts: Any) -> None:
    """As ``count_deltas_in``, for the variances that ``count_variances`` counts."""
    variances = np.empty(2 * _BLOCK, np.float32)
    for start in range(U64(0), pairs(arrays[0]), U64(_BLOCK)):
        count = _variances(arrays, start, variances)
        for i in range(count):
            if _upper(variances[i]) == upper:
                counts[U64(as_bits(variances[i]) & U32(0xFFFF))] += 1


@compiled
def energies(arrays: Any, least: Any, total: Any) -> None:
    """Add to ``total`` (float64 [sources]) each task vector's squared norm over elements of variance >= ``least``."""
    variances, deltas = np.empty(2 * _BLOCK, np.float32), np.zeros(2 * _BLOCK, np.float32)
    for start in range(U64(0), pairs(arrays[0]), U64(_BLOCK)):
        count = _variances(arrays, start, variances)
        for k in range(1, len(arrays)):
            for i in range(count // U64(2)):
                bx, by = pair(arrays[0], start + i)
                x, y = pair(arrays[k], start + i)
                deltas[U64(2) * i] = x - bx if variances[U64(2) * i] >= least else ZERO
                deltas[U64(2) * i + U64(1)] = y - by if variances[U64(2) * i + U64(1)] >= least else ZERO
            deltas[np.int64(count) :] = 0
            total[k - 1] += _dot(deltas, deltas)


@compiled
def _variances(arrays: Any, start: Any, variances: Any) -> Any:
    """Write the variances of the elements of a block of pairs to ``variances``, and return how many there are."""
    count = min(U64(_BLOCK), U64(pairs(arrays[0]) - start))
    for i in range(count):
        variances[U64(2) * i], variances[U64(2) * i + U64(1)] = variance(arrays[0], arrays[1:], start + i)
    return U64(2) * count
