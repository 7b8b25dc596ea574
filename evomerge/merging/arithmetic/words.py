"""Building blocks of compiled code: numba's settings, bits of floats, pairs of elements, random words.

Compiled code reads a flat tensor two elements at a time, from an "array of pairs". bfloat16 is read as uint32 words of
two neighbours each, so that a pair takes one load and two bit operations to widen; float32 is read as it is. What the
compiler must know to fuse a pass (the number of sources, their dtype, whether masks are random) is in the types of the
arguments: ``None`` turns a feature off, and a tuple has one entry for each source. numba compiles each combination
once and caches it on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from evomerge.compiling import compiler

# numba types sums of uint32 as uint64; to stay in 32 bits, each step is cast back.
U32 = np.uint32
U64 = np.uint64  # for indices: with unsigned ones numba omits its test for negative indices, which prevents vectorising
ZERO = np.float32(0)
SIGN = np.uint32(0x80000000)
BLOCK = 1024  # pairs computed at a time into a buffer that stays in the first-level cache


compiled = compiler([Path(__file__).with_name(name) for name in ("words.py", "kernels.py", "scans.py")])


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function for compiled code that generates its own LLVM instructions (numba's ``intrinsic``)."""
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
    """The same 32 bits as a signed number, which vector units compare with one instruction."""
    return types.int32(types.uint32), lambda _c, _b, _s, args: args[0]


@instruction
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a b + c, rounded once. On its own, a compiler would fuse on some machines and not on others."""
    kind = types.float32
    return kind(kind, kind, kind), lambda _x, builder, _s, args: builder.fma(*args)


@compiled
def with_sign(size: Any, number: Any) -> Any:
    """A float32 that is not negative, with the sign of another."""
    return as_float(U32(as_bits(size) | U32(as_bits(number) & SIGN)))


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
def fence(_context: Any) -> Any:
    """Wait until all threads can see streamed stores."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# ---- pairs of elements -----------------------------------------------------------------------------------------------


def pair(array: Any, index: Any) -> Any:
    """Elements 2 index and 2 index + 1 of an array of pairs, as float32."""


@overload(pair, inline="always")  # type: ignore[untyped-decorator]
def _pair(array: Any, index: Any) -> Any:
    def of_words(array: Any, index: Any) -> Any:
        word = array[index]
        return as_float(U32(word << U32(16))), as_float(U32(word & U32(0xFFFF0000)))

    def of_floats(array: Any, index: Any) -> Any:
        return array[U64(2) * index], array[U64(2) * index + U64(1)]

    return of_words if array.dtype == types.uint32 else of_floats


def put_pair(array: Any, index: Any, first: Any, second: Any) -> Any:
    """Write elements 2 index and 2 index + 1 of an array of pairs; bfloat16 is rounded to nearest, ties to even."""
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
    """The number of pairs in an array of pairs."""
    raise NotImplementedError("compiled code only")


@overload(pairs, inline="always")  # type: ignore[untyped-decorator]
def _pairs(array: Any) -> Any:
    def of_words(array: Any) -> Any:
        return U64(len(array))

    def of_floats(array: Any) -> Any:
        return U64(len(array) // 2)

    return of_words if array.dtype == types.uint32 else of_floats


@compiled
def block_like(out: Any) -> Any:
    """A buffer for a block of pairs of the dtype of ``out``, aligned for streaming."""
    buffer = np.empty(2 * BLOCK + 8, out.dtype)
    skip = (-buffer.ctypes.data % 32) // 4
    return buffer[skip : skip + 2 * BLOCK]


@compiled
def flush(block: Any, out: Any, start: Any, count: Any, stream: Any) -> None:
    """Write ``count`` computed pairs to ``out`` from pair ``start`` on.

    A plain store first reads the cache line that it overwrites; a streamed one does not, which saves a quarter of the
    memory traffic of a merge of two sources. Small tensors are better stored plainly, because the model will find them
    in the cache.
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
    """Fill ``words`` (uint32) with the random words at positions first, first + 1, ... of a stream; see ``drops``."""
    number = U32(first)
    for i in range(len(words)):
        words[i] = random_word(number, key, second_key)
        number = U32(number + U32(1))  # counting in 64 bits would take half as long as the hash itself


@compiled
def random_word(number: Any, key: Any, second_key: Any) -> Any:
    """The random word (uint32) at one position of a stream, given the lower 32 bits of the position."""
    x = U32(number ^ key)
    x = U32(U32(x ^ U32(x >> U32(16))) * U32(0x7FEB352D))
    x = U32(x + second_key)
    x = U32(U32(x ^ U32(x >> U32(15))) * U32(0x846CA68B))
    return U32(x ^ U32(x >> U32(16)))


@compiled
def partner_offset(number: Any, length: Any, key: Any, second_key: Any) -> Any:
    """The distance (uint64) from an element to its partner in row ``number``; see ``drops.partner_offsets``."""
    word = U64(random_word(U32(number), second_key, key))
    return U64(U64(1) + U64(U64(word * U64(length - U64(1))) >> U64(32)))


@compiled
def upper_bits(delta: Any) -> Any:
    """The upper 16 bits of a float32 magnitude: an int16 that sorts as magnitudes do, to about half a percent."""
    return np.int16(as_signed(U32(as_bits(delta) & U32(0x7FFFFFFF))) >> np.int32(16))
