"""The passes over weights, compiled: they read the sources once, compute in float32 in registers, and write once.

All of them see a tensor flat and two elements at a time. bfloat16 comes as uint32 words of two neighbours, so that a
word is one load and widening it two bit operations; float32 comes as it is. What the compiler needs to know to fuse a
pass (the number of sources, their dtype, whether masks are drawn) is in the types of the arguments: ``None`` for what
is not wanted, tuples for what each source has. Each combination is compiled once and kept on disk by numba.

The functions release the GIL: threads that run them on chunks of a tensor run side by side. Nothing here depends on
where a chunk begins, so the number of threads and the size of chunks change no bit of a result.

Everything compiled stands in this one file because numba notices a change of a kept function by its file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# Numba types every sum of uint32 as uint64; to stay in 32 bits each step is cast back.
U32 = np.uint32
U64 = np.uint64  # of indices: an unsigned index cannot count from the end, which spares a test that bars vectorising
ZERO = np.float32(0)
ONE = np.float32(1)
HALF = np.float32(0.5)
TINY = np.float32(1e-6)
RANK_BINS = 128
_BLOCK = 1024  # pairs computed at a time into a buffer that stays in the first-level cache


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL, and keep the machine code on disk where numba finds a place to write to."""
    try:
        made = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither beside this file nor in a home folder, as in some containers
        made = njit(nogil=True, error_model="numpy")(function)
    return cast(Callable[..., Any], made)


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of compiled code that says itself which instructions it is."""
    return cast(Callable[..., Any], intrinsic(function))


# ---- bits ------------------------------------------------------------------------------------------------------------


@instruction
def as_float(_context: Any, _bits: Any) -> Any:
    """The float32 of these 32 bits."""
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


@instruction
def as_bits(_context: Any, _number: Any) -> Any:
    """The 32 bits of a float32."""
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


@instruction
def as_signed(_context: Any, _bits: Any) -> Any:
    """The same 32 bits as a signed number, which vector units compare in one step."""
    return types.int32(types.uint32), lambda _c, _b, _s, args: args[0]


@instruction
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a b + c, rounded once: on every machine alike, where a compiler's own choice to fuse would not be."""
    kind = types.float32
    return kind(kind, kind, kind), lambda _x, builder, _s, args: builder.fma(*args)


@compiled
def with_sign(size: Any, number: Any) -> Any:
    """A float32 that is not negative, with the sign of another."""
    return as_float(U32(as_bits(size) | U32(as_bits(number) & U32(0x80000000))))


@instruction
def _stream32(_context: Any, _to: Any, _from: Any) -> Any:
    """Copy 32 bytes between aligned addresses, past the caches."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 32).as_pointer()
        to, source = (builder.inttoptr(address, vector) for address in args)
        store = builder.store(builder.load(source, align=32), to, align=32)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@instruction
def _fence(_context: Any) -> Any:
    """Wait until streamed stores are seen by all."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# ---- pairs of elements -----------------------------------------------------------------------------------------------


def pair(array: Any, index: Any) -> Any:
    """Elements 2 index and 2 index + 1 as float32."""


@overload(pair, inline="always")  # type: ignore[untyped-decorator]
def _pair(array: Any, index: Any) -> Any:
    def of_words(array: Any, index: Any) -> Any:
        word = array[index]
        return as_float(U32(word << U32(16))), as_float(U32(word & U32(0xFFFF0000)))

    def of_floats(array: Any, index: Any) -> Any:
        return array[U64(2) * index], array[U64(2) * index + U64(1)]

    return of_words if array.dtype == types.uint32 else of_floats


def put_pair(array: Any, index: Any, first: Any, second: Any) -> Any:
    """Write elements 2 index and 2 index + 1; to bfloat16 rounded to nearest, ties to even, as torch does."""
    raise NotImplementedError("compiled code only")


@overload(put_pair, inline="always")  # type: ignore[untyped-decorator]
def _put_pair(array: Any, index: Any, first: Any, second: Any) -> Any:
    def to_words(array: Any, index: Any, first: Any, second: Any) -> Any:
        low, high = as_bits(first), as_bits(second)
        low = U32(low + U32(U32(0x7FFF) + U32(U32(low >> U32(16)) & U32(1))))
        high = U32(high + U32(U32(0x7FFF) + U32(U32(high >> U32(16)) & U32(1))))
        array[index] = U32(U32(low >> U32(16)) | U32(high & U32(0xFFFF0000)))

    def to_floats(array: Any, index: Any, first: Any, second: Any) -> Any:
        array[U64(2) * index] = first
        array[U64(2) * index + U64(1)] = second

    return to_words if array.dtype == types.uint32 else to_floats


def pairs(array: Any) -> Any:
    """How many pairs an array holds."""
    raise NotImplementedError("compiled code only")


@overload(pairs, inline="always")  # type: ignore[untyped-decorator]
def _pairs(array: Any) -> Any:
    def of_words(array: Any) -> Any:
        return U64(len(array))

    def of_floats(array: Any) -> Any:
        return U64(len(array) // 2)

    return of_words if array.dtype == types.uint32 else of_floats


@compiled
def _block_like(out: Any) -> Any:
    """Room for a block of pairs of the dtype of ``out``, aligned for streaming."""
    room = np.empty(2 * _BLOCK + 8, out.dtype)
    skip = (-room.ctypes.data % 32) // 4
    return room[skip : skip + 2 * _BLOCK]


@compiled
def _flush(block: Any, out: Any, start: Any, count: Any, stream: Any) -> None:
    """Write ``count`` computed pairs to ``out`` from pair ``start`` on.

    A plain store first reads the line that it will overwrite; a streamed one does not, which is a quarter of the
    traffic of a merge of two. Small tensors, which the model will find in the cache, are better stored plainly.
    """
    width = len(out) // pairs(out)
    size = count * width * 4
    to, source = out.ctypes.data + np.int64(start * width * 4), block.ctypes.data
    if stream and (to | source | size) & 31 == 0:
        for offset in range(0, size, 32):
            _stream32(to + offset, source + offset)
    else:
        target = out[start * width : (start + count) * width]
        for i in range(len(target)):
            target[i] = block[i]


# ---- random words ----------------------------------------------------------------------------------------------------


@compiled
def random_words(words: Any, first: Any, key: Any, second_key: Any) -> None:
    """Fill ``words`` (uint32) with the random words number first, first + 1, ... of a stream; see ``drops``."""
    for i in range(len(words)):
        x = U32(U32(first + U64(i)) ^ key)
        x = U32(U32(x ^ U32(x >> U32(16))) * U32(0x7FEB352D))
        x = U32(x + second_key)
        x = U32(U32(x ^ U32(x >> U32(15))) * U32(0x846CA68B))
        words[i] = U32(x ^ U32(x >> U32(16)))


# ---- passes ----------------------------------------------------------------------------------------------------------


@compiled
def combine(sources: Any, coefficients: Any, out: Any, stream: Any) -> None:
    """out = sum_k c_k x_k, each step a fused multiply-add in float32.

    Args:
        sources: tuple of arrays of pairs, of one dtype.
        coefficients: tuple of float32.
        out: array of pairs.
        stream: write past the caches.
    """
    block = _block_like(out)
    for start in range(U64(0), pairs(out), U64(_BLOCK)):
        count = min(U64(_BLOCK), U64(pairs(out) - start))
        for i in range(count):
            x, y = pair(sources[0], start + i)
            x, y = coefficients[0] * x, coefficients[0] * y
            for k in range(1, len(sources)):
                more_x, more_y = pair(sources[k], start + i)
                x, y = fma(coefficients[k], more_x, x), fma(coefficients[k], more_y, y)
            put_pair(block, i, x, y)
        _flush(block, out, start, count, stream)
    _fence()


@compiled
def sparsify(
    base: Any, sources: Any, weights: Any, low: Any, high: Any, keys: Any, keep: Any, ranks: Any, shares: Any,
    elect: Any, scale: Any, first: Any, row: Any, out: Any, stream: Any,
) -> None:  # fmt: skip
    """out = base + scale * sum_k w_k m_k d_k, with masks m_k of zeros and ones, and a sign elected where asked.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype.
        weights: tuple of float32.
        low, high: tuples of float32; high may be None. Without keys an element is kept where low <= |d| < high.
        keys: tuple of two uint32 for each source, or None: an element is kept where its 16 random bits, in the upper
            half of an int32, are at most its limit.
        keep: tuple of int32: that limit; with ``ranks``, the limit at rank 0.
        ranks: tuple of (table of uint8 [rows, 128], number of the table's first bin, rise of the limit with each of the
            255 ranks), or None; see ``row_ranks``.
        shares: tuple of float32, or None: divide by the sum of the shares of the sources that agree.
        elect: True, or None: only sources whose sign is that of the sum are kept.
        scale: float32, for the sum after the division.
        first: number of the tensor's pair at which these arrays begin.
        row: pairs in a row of the tensor, which ranks are counted in.
        out: array of pairs.
        stream: write past the caches.
    """
    block = _block_like(out)
    words = np.empty((len(sources), _BLOCK), np.uint32)
    limits = np.empty((2 * len(sources), _BLOCK), np.int32)
    start = U64(0)
    while start < pairs(out):
        count = min(U64(_BLOCK), U64(pairs(out) - start))
        if ranks is not None:
            count = min(count, U64(row - (first + start) % row))
            for k in range(len(sources)):
                _limits(
                    base, sources[k], start, count, ranks[k], (first + start) // row, keep[k], limits[2 * k : 2 * k + 2]
                )
        if keys is not None:
            for k in range(len(sources)):
                random_words(words[k, :count], first + start, keys[k][0], keys[k][1])
        for i in range(count):
            bx, by = pair(base, start + i)
            up_x, up_y, down_x, down_y = ZERO, ZERO, ZERO, ZERO
            above_x, above_y, below_x, below_y = ZERO, ZERO, ZERO, ZERO
            for k in range(len(sources)):
                x, y = pair(sources[k], start + i)
                x, y = x - bx, y - by
                w = weights[k]
                if ranks is not None:
                    word = words[U64(k), i]
                    x = w * x if as_signed(U32(word << U32(16))) <= limits[U64(2 * k), i] else ZERO
                    y = w * y if as_signed(U32(word & U32(0xFFFF0000))) <= limits[U64(2 * k + 1), i] else ZERO
                elif keys is not None:
                    word = words[U64(k), i]
                    x = w * x if as_signed(U32(word << U32(16))) <= keep[k] else ZERO
                    y = w * y if as_signed(word) <= keep[k] else ZERO
                else:
                    size_x, size_y = abs(x), abs(y)
                    x = w * x if size_x >= low[k] else ZERO
                    y = w * y if size_y >= low[k] else ZERO
                    if high is not None:
                        x = x if size_x < high[k] else ZERO
                        y = y if size_y < high[k] else ZERO
                if shares is None:
                    # The sum of the parts of one sign is half of the sum and the sum of magnitudes: two additions
                    # a part where keeping both signs takes two more and four comparisons.
                    up_x, up_y = up_x + x, up_y + y
                    if elect is not None:
                        down_x, down_y = down_x + abs(x), down_y + abs(y)
                else:
                    share = shares[k]
                    up_x, up_y = up_x + max(x, ZERO), up_y + max(y, ZERO)
                    down_x, down_y = down_x + min(x, ZERO), down_y + min(y, ZERO)
                    above_x += share if x > ZERO else ZERO
                    above_y += share if y > ZERO else ZERO
                    below_x += share if x < ZERO else ZERO
                    below_y += share if y < ZERO else ZERO
            if shares is not None:
                positive_x, positive_y = up_x + down_x >= ZERO, up_y + down_y >= ZERO
                share_x = above_x if positive_x else below_x
                share_y = above_y if positive_y else below_y
                up_x = scale * ((up_x if positive_x else down_x) / (share_x if share_x != ZERO else ONE))
                up_y = scale * ((up_y if positive_y else down_y) / (share_y if share_y != ZERO else ONE))
            elif elect is not None:
                up_x, up_y = HALF * (up_x + with_sign(down_x, up_x)), HALF * (up_y + with_sign(down_y, up_y))
            put_pair(block, i, bx + up_x, by + up_y)
        _flush(block, out, start, count, stream)
        start += count
    _fence()


@compiled
def select(base: Any, sources: Any, shares: Any, least: Any, out: Any, stream: Any) -> None:
    """out = base + sum_k g_k e_k d_k / sum_k g_k e_k where the d_k vary by ``least`` at least, else base.

    e_k is 1 where d_k has the sign of sum_k d_k (a sum of zero counts as positive), else 0.

    Args:
        base, sources: array and tuple of arrays of pairs, of one dtype.
        shares: tuple of float32, the g_k.
        least: float32, compared with ``variance``.
        out: array of pairs.
        stream: write past the caches.
    """
    block = _block_like(out)
    for start in range(U64(0), pairs(out), U64(_BLOCK)):
        count = min(U64(_BLOCK), U64(pairs(out) - start))
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
        _flush(block, out, start, count, stream)
    _fence()


@compiled
def variance(base: Any, sources: Any, index: Any) -> Any:
    """Variances over the sources of their differences to the base, of the two elements of a pair; sums in float64."""
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
def _limits(base: Any, source: Any, start: Any, count: Any, ranked: Any, row: Any, keep: Any, limits: Any) -> None:
    """The limits of ``count`` pairs of one row, from the ranks of their magnitudes."""
    table, first_bin, rise = ranked
    of_rank = np.empty(RANK_BINS, np.int32)
    for j in range(RANK_BINS):
        of_rank[j] = keep + rise * np.int32(table[row, U64(j)])
    for i in range(count):  # first all bins, which vectorises, then the looking up, which does not
        bx, by = pair(base, start + i)
        x, y = pair(source, start + i)
        limits[0, i], limits[1, i] = magnitude_bin(x - bx, first_bin), magnitude_bin(y - by, first_bin)
    for half in range(2):
        found = limits[half]
        for i in range(count):
            found[i] = of_rank[U64(found[i])]


@compiled
def magnitude_bin(delta: Any, first_bin: Any) -> Any:
    """The bin of a magnitude in a table of ranks: eight bins an octave, 16 octaves, the lowest taking all below."""
    found = np.int32(as_signed(U32(as_bits(delta) & U32(0x7FFFFFFF))) >> np.int32(20)) - first_bin
    return np.int32(min(max(np.int32(found), np.int32(0)), np.int32(RANK_BINS - 1)))
