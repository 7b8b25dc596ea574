"""The passes over weights, compiled: they read the sources once, compute in float32 in registers, and write once.

The functions release the GIL, so threads can run them on pieces of a tensor at the same time. Nothing here depends on
where a piece begins, so the number of threads and the size of pieces change no bit of a result.

An "array of pairs" holds a tensor as ``words`` describes: uint32 [pairs] of bfloat16, or float32 [elements].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evomerge.merging.arithmetic.words import (
    BLOCK,
    SIGN,
    U32,
    U64,
    ZERO,
    as_bits,
    as_float,
    as_signed,
    block_like,
    compiled,
    fence,
    flush,
    fma,
    pair,
    pairs,
    partner_offset,
    put_pair,
    random_words,
    upper_bits,
    with_sign,
)

HALF = np.float32(0.5)
ONE = np.float32(1)
TINY = np.float32(1e-6)
LOWEST = np.int16(-(1 << 15))
RANK_BLOCK = 256  # ``passes.RANK_BLOCK``
TAKEN = np.int16((1 << 15) - 1)  # larger than the upper bits of every number, including infinity


@compiled
def combine(sources: Any, coefficients: Any, out: Any, stream: Any) -> None:
    """``passes.Combine``: out = sum_k c_k x_k, each step a fused multiply-add in float32.

    Args:
        sources: tuple of arrays of pairs, of one dtype.
        coefficients: tuple of float32.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    for start in range(U64(0), pairs(out), U64(BLOCK)):
        count = min(U64(BLOCK), U64(pairs(out) - start))
        for i in range(count):
            x, y = pair(sources[0], start + i)
            x, y = coefficients[0] * x, coefficients[0] * y
            for k in range(1, len(sources)):
                more_x, more_y = pair(sources[k], start + i)
                x, y = fma(coefficients[k], more_x, x), fma(coefficients[k], more_y, y)
            put_pair(block, i, x, y)
        flush(block, out, start, count, stream)
    fence()


@compiled
def sparsify(
    base: Any, sources: Any, weights: Any, low: Any, high: Any, keys: Any, keep: Any, rises: Any, shares: Any,
    elect: Any, scale: Any, first: Any, row: Any, out: Any, stream: Any,
) -> None:  # fmt: skip
    """``passes.Sparsify``: out = base + scale * sum_k w_k m_k d_k, with masks m_k of zeros and ones.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype.
        weights: tuple of float32.
        low, high: tuples of float32; high may be None. Without keys an element is kept if low <= |d| < high.
        keys: tuple of two uint32 for each source, or None: an element is kept if its 16 random bits, in the upper half
            of an int32, are at most its limit.
        keep: tuple of int32: that limit; with ``rises``, the limit of an element that is not larger than its partner.
        rises: tuple of int32, or None: for how many more values of its bits an element is kept that is larger than its
            partner (see ``passes.SparsePart``); the arrays must then begin with a row.
        shares: tuple of float32, or None: divide by the sum of the shares of the sources that agree.
        elect: True, or None: keep only sources that have the sign of the sum.
        scale: float32, multiplies the sum after the division.
        first: position in the tensor, in pairs, at which the arrays begin.
        row: pairs in a row of the tensor, within which elements have their partners.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    words = np.empty((len(sources), BLOCK), np.uint32)
    sizes = np.empty((len(sources), U64(2) * row if rises is not None else U64(0)), np.int16)
    parts = np.empty((2 * len(sources), BLOCK), np.float32)
    start = U64(0)
    while start < pairs(out):
        count = min(U64(BLOCK), U64(pairs(out) - start))
        number, place = (first + start) // row, (first + start) % row
        if rises is not None:
            count = min(count, U64(row - place))
        if keys is not None:
            for k in range(len(sources)):
                bits = words[k, :count]
                random_words(bits, first + start, keys[k][0], keys[k][1])
                if rises is not None:
                    if place == 0:
                        _sizes(base, sources[k], start, sizes[k])
                    offset = partner_offset(number, U64(2) * row, keys[k][0], keys[k][1])
                    raised = np.int16(np.int16(keep[k] >> np.int32(16)) + rises[k])
                    _keep_larger(sizes[k], U64(2) * place, offset, raised, bits.view(np.int16))
        for i in range(count):
            bx, by = pair(base, start + i)
            up_x, up_y, down_x, down_y = ZERO, ZERO, ZERO, ZERO
            for k in range(len(sources)):
                x, y = pair(sources[k], start + i)
                w = HALF * weights[k] if elect is not None and shares is None else weights[k]
                x, y = _part(x - bx, y - by, w, k, i, low, high, keys, keep, words)
                if shares is not None:
                    parts[U64(2 * k), i], parts[U64(2 * k + 1), i] = x, y
                up_x, up_y = (up_x + x, up_y + y) if k else (x, y)
                down_x, down_y = (down_x + abs(x), down_y + abs(y)) if k else (abs(x), abs(y))
            if shares is not None:
                up_x = scale * _elected(up_x, parts, U64(0), i, shares)
                up_y = scale * _elected(up_y, parts, U64(1), i, shares)
            elif elect is not None:
                # The parts are halved: then the sum of all, plus the sum of their magnitudes with its sign, is the sum
                # of those with that sign. This takes two additions per part; separate sums for both signs would take
                # two more and four comparisons.
                up_x, up_y = up_x + with_sign(down_x, up_x), up_y + with_sign(down_y, up_y)
            put_pair(block, i, bx + up_x, by + up_y)
        flush(block, out, start, count, stream)
        start += count
    fence()


@compiled
def sparsify_products(
    gradient: Any, base: Any, sources: Any, weights: Any, low: Any, high: Any, elect: Any, found: Any
) -> None:
    """found[k] += <g, e_k d_k>: derivatives with respect to the weights of ``sparsify``, without keys and shares.

    Args:
        gradient, base, sources: array, array and tuple of arrays, float32 [elements].
        weights, low, high: arrays of float32 [sources]: an element counts (e_k = 1) if low <= |d_k| < high.
        elect: True if, in addition, w_k d_k must have the sign of the sum of these.
        found: float64 [sources].
    """
    total, sums = np.empty(BLOCK, np.float32), np.zeros((len(sources), BLOCK), np.float32)
    for start in range(0, len(base), BLOCK):
        end = min(start + BLOCK, len(base))
        g, b = gradient[start:end], base[start:end]
        total[:] = ZERO
        for k in range(len(sources) if elect else 0):
            x, w, least, most = sources[k][start:end], weights[k], low[k], high[k]
            for i in range(len(b)):
                d = x[i] - b[i]
                total[i] += w * d if (abs(d) >= least) & (abs(d) < most) else ZERO
        for k in range(len(sources)):
            x, w, least, most, own = sources[k][start:end], weights[k], low[k], high[k], sums[k]
            for i in range(len(b)):
                d = x[i] - b[i]
                counts = (abs(d) >= least) & (abs(d) < most)
                if elect:  # a sum of zero counts as positive
                    counts &= w * d > ZERO if total[i] >= ZERO else w * d < ZERO
                own[i] += g[i] * d if counts else ZERO
    for k in range(len(sources)):
        for i in range(BLOCK):
            found[k] += np.float64(sums[k, i])


@compiled
def _part(x: Any, y: Any, weight: Any, k: Any, i: Any, low: Any, high: Any, keys: Any, keep: Any, words: Any) -> Any:
    """The weighted differences of a pair, masked; arguments as in ``sparsify``, ``i`` the pair in its block."""
    if keys is None:
        size_x, size_y = abs(x), abs(y)
        x, y = weight * x if size_x >= low[k] else ZERO, weight * y if size_y >= low[k] else ZERO
        if high is not None:
            x, y = x if size_x < high[k] else ZERO, y if size_y < high[k] else ZERO
        return x, y
    # The bits of the lower element are below those of the upper one, where limits have only ones: no mask is needed.
    word = words[U64(k), i]
    kept_x, kept_y = as_signed(U32(word << U32(16))) <= keep[k], as_signed(word) <= keep[k]
    return weight * x if kept_x else ZERO, weight * y if kept_y else ZERO


@compiled
def _elected(total: Any, parts: Any, half: Any, i: Any, shares: Any) -> Any:
    """The sum of the parts (rows ``half``, ``half`` + 2, ...) with the sign of the total, over the sum of their shares.

    The total is -0 only if all parts are zeros, and these never agree.
    """
    sign = U32(as_bits(total) & SIGN)
    elected, agreeing = ZERO, ZERO
    for k in range(len(shares)):
        part = parts[U64(2 * k) + half, i]
        agrees = as_float(U32(as_bits(part) ^ sign)) > ZERO
        elected += part if agrees else ZERO
        agreeing += shares[k] if agrees else ZERO
    return elected / (agreeing if agreeing != ZERO else ONE)


@compiled
def _sizes(base: Any, source: Any, start: Any, sizes: Any) -> None:
    """Write the magnitudes (int16, see ``upper_bits``) of a row of a task vector, from pair ``start``, to ``sizes``."""
    for i in range(U64(len(sizes) // 2)):
        bx, by = pair(base, start + i)
        x, y = pair(source, start + i)
        sizes[U64(2) * i], sizes[U64(2) * i + U64(1)] = upper_bits(x - bx), upper_bits(y - by)


@compiled
def _keep_larger(sizes: Any, place: Any, offset: Any, high: Any, bits: Any) -> None:
    """Give the lowest bits to elements that are larger than their partners and whose bits are at most ``high``.

    Args:
        sizes: of a whole row, from ``_sizes``.
        place: position in the row of the first of ``bits``.
        offset: from an element to its partner, modulo the length of the row.
        high: int16.
        bits: int16, the random bits of elements, written.
    """
    row, count = U64(len(sizes)), U64(len(bits))
    begin = U64((place + offset) % row)
    ahead = min(count, U64(row - begin))  # from there on partners are at the beginning of the row
    for i in range(ahead):
        larger = np.int16(sizes[begin + i] - np.int16(bits[i] & np.int16(1))) < sizes[place + i]
        bits[i] = LOWEST if larger & (bits[i] <= high) else bits[i]
    for i in range(ahead, count):
        larger = np.int16(sizes[i - ahead] - np.int16(bits[i] & np.int16(1))) < sizes[place + i]
        bits[i] = LOWEST if larger & (bits[i] <= high) else bits[i]


@compiled
def select(base: Any, sources: Any, shares: Any, least: Any, out: Any, stream: Any) -> None:
    """``passes.Select``: out = base + sum_k g_k e_k d_k / sum_k g_k e_k if the d_k vary enough, else base.

    e_k is 1 where d_k has the sign of sum_k d_k (a sum of zero counts as positive), else 0.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype.
        shares: tuple of float32, the g_k.
        least: float32, the minimum ``variance``.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    for start in range(U64(0), pairs(out), U64(BLOCK)):
        count = min(U64(BLOCK), U64(pairs(out) - start))
        for i in range(count):
            bx, by = pair(base, start + i)
            varies_x, varies_y = variance(base, sources, start + i)
            sum_x, sum_y, up_x, up_y, down_x, down_y = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
            above_x, above_y, below_x, below_y = ZERO, ZERO, ZERO, ZERO
            for k in range(len(sources)):
                x, y = pair(sources[k], start + i)
                x, y, share = x - bx, y - by, shares[k]
                sum_x, sum_y = sum_x + x, sum_y + y
                up_x, up_y = up_x + share * max(x, ZERO), up_y + share * max(y, ZERO)
                down_x, down_y = down_x + share * min(x, ZERO), down_y + share * min(y, ZERO)
                above_x += share if x > ZERO else ZERO
                above_y += share if y > ZERO else ZERO
                below_x += share if x < ZERO else ZERO
                below_y += share if y < ZERO else ZERO
            x = up_x / max(above_x, TINY) if sum_x >= ZERO else down_x / max(below_x, TINY)
            y = up_y / max(above_y, TINY) if sum_y >= ZERO else down_y / max(below_y, TINY)
            put_pair(block, i, bx + (x if varies_x >= least else ZERO), by + (y if varies_y >= least else ZERO))
        flush(block, out, start, count, stream)
    fence()


@compiled
def variance(base: Any, sources: Any, index: Any) -> Any:
    """The variances over the sources of x_k - b, for the two elements of a pair: float32, from sums in float64."""
    bx, by = pair(base, index)
    sum_x, sum_y = 0.0, 0.0
    for k in range(len(sources)):
        x, y = pair(sources[k], index)
        sum_x, sum_y = sum_x + np.float64(x - bx), sum_y + np.float64(y - by)
    mean_x, mean_y = sum_x / len(sources), sum_y / len(sources)
    sum_x, sum_y = 0.0, 0.0
    for k in range(len(sources)):
        x, y = pair(sources[k], index)
        off_x, off_y = np.float64(x - bx) - mean_x, np.float64(y - by) - mean_y
        sum_x, sum_y = sum_x + off_x * off_x, sum_y + off_y * off_y
    return np.float32(sum_x / len(sources)), np.float32(sum_y / len(sources))


@compiled
def masked_mean(base: Any, sources: Any, shares: Any, lows: Any, scale: Any, out: Any, stream: Any) -> None:
    """``passes.MaskedMean``: out = base + scale * sum_k g_k m_k d_k / sum_k g_k m_k; m_k is 1 if |d_k| >= low_k.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype.
        shares, lows: tuples of float32, the g_k and low_k.
        scale: float32.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    for start in range(U64(0), pairs(out), U64(BLOCK)):
        count = min(U64(BLOCK), U64(pairs(out) - start))
        for i in range(count):
            bx, by = pair(base, start + i)
            sum_x, sum_y, by_x, by_y = ZERO, ZERO, ZERO, ZERO
            for k in range(len(sources)):
                x, y = pair(sources[k], start + i)
                x, y = x - bx, y - by
                share_x = shares[k] if abs(x) >= lows[k] else ZERO
                share_y = shares[k] if abs(y) >= lows[k] else ZERO
                sum_x, sum_y = sum_x + share_x * x, sum_y + share_y * y
                by_x, by_y = by_x + share_x, by_y + share_y
            x, y = sum_x / (by_x if by_x != ZERO else ONE), sum_y / (by_y if by_y != ZERO else ONE)
            put_pair(block, i, bx + scale * x, by + scale * y)
        flush(block, out, start, count, stream)
    fence()


@compiled
def largest(base: Any, sources: Any, weights: Any, out: Any, stream: Any) -> None:
    """``passes.Largest``: out = base + the w_k d_k of largest magnitude; of equally large ones, a positive one.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype.
        weights: tuple of float32, the w_k.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    for start in range(U64(0), pairs(out), U64(BLOCK)):
        count = min(U64(BLOCK), U64(pairs(out) - start))
        for i in range(count):
            bx, by = pair(base, start + i)
            high_x, high_y, low_x, low_y = ZERO, ZERO, ZERO, ZERO
            for k in range(len(sources)):
                x, y = pair(sources[k], start + i)
                x, y = weights[k] * (x - bx), weights[k] * (y - by)
                high_x, high_y = (max(high_x, x), max(high_y, y)) if k else (x, y)
                low_x, low_y = (min(low_x, x), min(low_y, y)) if k else (x, y)
            x, y = high_x if high_x >= -low_x else low_x, high_y if high_y >= -low_y else low_y
            put_pair(block, i, bx + x, by + y)
        flush(block, out, start, count, stream)
    fence()


@compiled
def disjoint(base: Any, sources: Any, weights: Any, kept: Any, row: Any, out: Any, stream: Any) -> None:
    """``passes.Disjoint``: out = base + sum_k w_k m_k d_k with masks of which no two have an element in common.

    In each block, source k takes its ``kept[k]`` largest elements among those that no earlier source took.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype, that begin with a row.
        weights: tuple of float32, the w_k.
        kept: tuple of int16; of a shorter block, a source takes the same share, rounded up.
        row: pairs in a row, which is cut into blocks of ``RANK_BLOCK`` elements; the last may be shorter.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    deltas, sums = np.empty(RANK_BLOCK, np.float32), np.empty(RANK_BLOCK, np.float32)
    sizes, taken = np.empty(RANK_BLOCK, np.int16), np.empty(RANK_BLOCK, np.int16)
    start = U64(0)
    while start < pairs(out):
        count = min(U64(RANK_BLOCK // 2), U64(row - start % row))
        length = U64(2) * count
        sums[:], taken[:] = ZERO, 0
        for k in range(len(sources)):
            source, weight = sources[k], weights[k]
            for i in range(count):
                bx, by = pair(base, start + i)
                x, y = pair(source, start + i)
                deltas[U64(2) * i], deltas[U64(2) * i + U64(1)] = x - bx, y - by
            for i in range(length):
                sizes[i] = np.int16(upper_bits(deltas[i]) | taken[i])
            wanted = np.int16((np.int32(kept[k]) * np.int32(length) + np.int32(RANK_BLOCK - 1)) // np.int32(RANK_BLOCK))
            _take(sizes[: np.int64(length)], wanted)
            for i in range(length):
                sums[i] += weight * deltas[i] if sizes[i] == TAKEN else ZERO
            for i in range(length):
                taken[i] = np.int16(-1) if sizes[i] == TAKEN else taken[i]
        for i in range(count):
            bx, by = pair(base, start + i)
            put_pair(block, i, bx + sums[U64(2) * i], by + sums[U64(2) * i + U64(1)])
        flush(block, out, start, count, stream)
        start += count
    fence()


@compiled
def _take(sizes: Any, wanted: Any) -> None:
    """Overwrite the ``wanted`` largest sizes with ``TAKEN``; of equal ones, the first.

    Args:
        sizes: int16 [at most RANK_BLOCK]; negative ones are never taken.
        wanted: int16; if there are fewer, all are taken.
    """
    least = np.int16(0)
    reached = _count(sizes, least)
    if reached > wanted:
        for bit in range(14, -1, -1):
            higher = np.int16(least + np.int16(1 << bit))
            there = _count(sizes, higher)
            if there >= wanted:
                least, reached = higher, there
                if there == wanted:
                    break
    higher = np.int16(least + np.int16(1))
    end, equal = U64(len(sizes)), np.int16(wanted - _count(sizes, higher))
    if reached > wanted:  # find the element before which there are as many of the least size as are taken
        end = U64(0)
        for step in (128, 64, 32, 16, 8, 4, 2, 1):
            part = sizes[np.int64(end) : np.int64(end) + step]
            there = np.int16(_count(part, least) - _count(part, higher))
            if len(part) == step and there <= equal:
                end, equal = end + U64(step), np.int16(equal - there)
    for i in range(end):
        sizes[i] = TAKEN if sizes[i] >= least else sizes[i]
    for i in range(end, U64(len(sizes))):
        sizes[i] = TAKEN if sizes[i] >= higher else sizes[i]


@compiled
def _count(sizes: Any, least: Any) -> Any:
    """How many sizes are ``least`` or more."""
    count = np.int16(0)
    for i in range(U64(len(sizes))):
        count = np.int16(count + np.int16(sizes[i] >= least))
    return count


@compiled
def outer(
    base: Any, sources: Any, factors: Any, left: Any, right: Any, first: Any, row: Any, out: Any, stream: Any
) -> None:
    """``outer.Outer``: out = base + sum_k f_k d_k + L R, row by row, with the numbers of the row's matrix.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype, that begin with a row.
        factors: float32 [matrices, sources], the f_k.
        left: float32 [rows of all matrices, rank].
        right: float32 [matrices, rank, columns].
        first: position in the tensor, in rows, at which the arrays begin.
        row: pairs in a row.
        out: array of pairs.
        stream: write past the caches.
    """
    block, sums = block_like(out), np.empty(U64(2) * row, np.float32)
    of_each = U64(left.shape[0] // right.shape[0])
    for number in range(pairs(out) // row):
        start, matrix = U64(number) * row, U64((first + number) // of_each)
        sums[:] = ZERO
        for rank in range(U64(left.shape[1])):
            factor, line = left[first + U64(number), rank], right[matrix, rank]
            for i in range(U64(2) * row):
                sums[i] += factor * line[i]
        for k in range(len(sources)):
            source, factor = sources[k], factors[matrix, U64(k)]
            for i in range(row):
                bx, by = pair(base, start + i)
                x, y = pair(source, start + i)
                sums[U64(2) * i] += factor * (x - bx)
                sums[U64(2) * i + U64(1)] += factor * (y - by)
        for begin in range(U64(0), row, U64(BLOCK)):
            count = min(U64(BLOCK), U64(row - begin))
            for i in range(count):
                bx, by = pair(base, start + begin + i)
                put_pair(block, i, bx + sums[U64(2) * (begin + i)], by + sums[U64(2) * (begin + i) + U64(1)])
            flush(block, out, start + begin, count, stream)
    fence()


@compiled
def agreed(base: Any, sources: Any, weights: Any, ratios: Any, votes: Any, scale: Any, out: Any, stream: Any) -> None:
    """``passes.Agreed``: out = base + scale * sum_k v_k if |v_k| > r_k |sum_j v_j - v_k| for enough k, else base.

    v_k is w_k d_k.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype.
        weights, ratios: tuples of float32, the w_k and r_k.
        votes: float32, how many k are enough.
        scale: float32.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    for start in range(U64(0), pairs(out), U64(BLOCK)):
        count = min(U64(BLOCK), U64(pairs(out) - start))
        for i in range(count):
            bx, by = pair(base, start + i)
            sum_x, sum_y, for_x, for_y = ZERO, ZERO, ZERO, ZERO
            for k in range(len(sources)):
                x, y = pair(sources[k], start + i)
                sum_x, sum_y = sum_x + weights[k] * (x - bx), sum_y + weights[k] * (y - by)
            for k in range(len(sources)):
                x, y = pair(sources[k], start + i)
                x, y = weights[k] * (x - bx), weights[k] * (y - by)
                for_x += ONE if abs(x) > ratios[k] * abs(sum_x - x) else ZERO
                for_y += ONE if abs(y) > ratios[k] * abs(sum_y - y) else ZERO
            x, y = scale * sum_x if for_x >= votes else ZERO, scale * sum_y if for_y >= votes else ZERO
            put_pair(block, i, bx + x, by + y)
        flush(block, out, start, count, stream)
    fence()


@compiled
def rescale(
    base: Any, made: Any, factors: Any, by_row: Any, by_column: Any, first: Any, row: Any, out: Any, stream: Any
) -> None:
    """``changes.Rescale``: out = base + f (made - base).

    Args:
        base: array of pairs.
        made: array of pairs, of float32.
        factors: float32 [1]; with ``by_row`` [rows of the tensor], with ``by_column`` [elements of a row].
        by_row, by_column: True, or None.
        first: position in the tensor, in pairs, at which the arrays begin.
        row: pairs in a row of the tensor.
        out: array of pairs.
        stream: write past the caches.
    """
    block = block_like(out)
    start = U64(0)
    while start < pairs(out):
        count = min(U64(BLOCK), U64(pairs(out) - start))
        number, place = (first + start) // row, (first + start) % row
        if by_row is not None or by_column is not None:
            count = min(count, U64(row - place))
        one = factors[number] if by_row is not None else factors[0]
        for i in range(count):
            bx, by = pair(base, start + i)
            x, y = pair(made, start + i)
            if by_column is not None:
                x_factor, y_factor = factors[U64(2) * (place + i)], factors[U64(2) * (place + i) + U64(1)]
            else:
                x_factor, y_factor = one, one
            put_pair(block, i, fma(x_factor, x - bx, bx), fma(y_factor, y - by, by))
        flush(block, out, start, count, stream)
        start += count
    fence()
