"""What compiled code is made of: numba's settings, bits of floats, pairs of elements, random words.

Compiled code sees a tensor flat and two elements at a time. bfloat16 comes as uint32 words of two neighbours, so that a
word is one load and widening it two bit operations; float32 comes as it is. What the compiler needs to know to fuse a
pass (the number of sources, their dtype, whether masks are drawn) is in the types of the arguments: ``None`` for what
is not wanted, tuples for what each source has. Each combination is compiled once and kept on disk by numba.
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

# Numba types every sum of uint32 as uint64; to stay in 32 bits each step is cast back.
U32 = np.uint32
U64 = np.uint64  # of indices: an unsigned index cannot count from the end, which spares a test that bars vectorising
ZERO = np.float32(0)
SIGN = np.uint32(0x80000000)
BLOCK = 1024  # pairs computed at a time into a buffer that stays in the first-level cache


compiled = compiler([Path(__file__).with_name(name) for name in ("words.py", "kernels.py", "scans.py")])


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
def block_like(out: Any) -> Any:
    """Room for a block of pairs of the dtype of ``out``, aligned for streaming."""
    room = np.empty(2 * BLOCK + 8, out.dtype)
    skip = (-room.ctypes.data % 32) // 4
    return room[skip : skip + 2 * BLOCK]


@compiled
def flush(block: Any, out: Any, start: Any, count: Any, stream: Any) -> None:
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
    number = U32(first)
    for i in range(len(words)):
        words[i] = random_word(number, key, second_key)
        number = U32(number + U32(1))  # counted in 32 bits: first + i in 64 takes half as long as the hash itself


@compiled
def random_word(number: Any, key: Any, second_key: Any) -> Any:
    """One random word, by the lower 32 bits of its number."""
    x = U32(number ^ key)
    x = U32(U32(x ^ U32(x >> U32(16))) * U32(0x7FEB352D))
    x = U32(x + second_key)
    x = U32(U32(x ^ U32(x >> U32(15))) * U32(0x846CA68B))
    return U32(x ^ U32(x >> U32(16)))


@compiled
def row_turn(number: Any, length: Any, key: Any, second_key: Any) -> Any:
    """By how many places the row of this number is turned; see ``drops``."""
    word = U64(random_word(U32(number), second_key, key))
    return U64(U64(1) + U64(U64(word * U64(length - U64(1))) >> U64(32)))


@compiled
def upper_bits(delta: Any) -> Any:
    """The upper 16 bits of a magnitude, about half a percent apart, as a number that sorts as magnitudes do."""
    return np.int16(as_signed(U32(as_bits(delta) & U32(0x7FFFFFFF))) >> np.int32(16))
