"""Random drops from a counter-based generator: the same on every device, for every chunking, and for every candidate.

Word j of a stream is a function of the stream's key and of j alone. So masks are not stored, an export draws the mask
that was scored, and a part of a tensor can be drawn without the rest. The function is the integer hash "lowbias32" of
Wellons' hash prospector (https://nullprogram.com/blog/2018/07/31/), in which each input bit flips each output bit with
a probability within 0.0017 of 0.5. A key of 64 bits is added: half before its first step, half between its two
multiplications. A merge at the speed of memory can afford no more than two multiplications per word; Philox4x32-10
takes five times as long.

An element takes 16 bits: element e of a stream is the lower (e even) or upper (e odd) half of word e // 2.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOW_32 = 0xFFFFFFFF
LEVELS = 1 << 16
"""Probabilities are rounded to multiples of 1 / LEVELS."""


def stream_key(seed: int, source: str, tensor: str) -> tuple[int, int]:
    """The key of the stream for one tensor of one source: the first 64 bits of a SHA-256 of the three arguments.

    Returns:
        Two halves, each in [0, 2**32).
    """
    text = json.dumps([seed, source, tensor])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def random_words(first: int, count: int, key: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Words first .. first + count - 1 of a stream: int64 [count], each in [0, 2**32).

    ``words.random_words`` is the compiled form.
    """
    import torch

    return _words(torch.arange(first, first + count, device=device), as_signed(key)).long() & _LOW_32


Key = tuple["int | Tensor", "int | Tensor"]
"""A stream's key as two signed 32-bit numbers, or as two int32 scalar tensors."""


def as_signed(key: tuple[int, int]) -> tuple[int, int]:
    """A key with the same bits, read as signed 32-bit numbers (-2**31 to 2**31 - 1)."""
    first, second = (half - ((half >> 31) << 32) for half in key)
    return first, second


def element_bits(elements: Tensor, key: Key) -> Tensor:
    """The random bits of elements, in the upper half of an int32.

    Each element hashes its own word, though its neighbour uses the other half of the same word: on a GPU, where this is
    compiled into a pass, hashing twice is cheaper than exchanging the word.

    Args:
        elements: int64, positions in the stream.

    Returns:
        int32 of the shape of ``elements``.
    """
    import torch

    words = _words(elements >> 1, key)
    return torch.where(elements & 1 == 0, words << 16, words & -LEVELS)


def partner_offsets(rows: Tensor, length: int, key: Key) -> Tensor:
    """The distance from an element to its partner, by row: element i is compared with i + offset, modulo ``length``.

    See ``passes.SparsePart.rise``. The offsets have a stream of their own, whose key is that of the elements with its
    halves exchanged.

    Args:
        rows: int64, numbers of rows of the tensor.
        length: of a row.

    Returns:
        int64 of the shape of ``rows``, from 1 to length - 1 (1 in rows of one element, which is its own partner).
    """
    return 1 + ((_words(rows, key[::-1]).long() & _LOW_32) * (length - 1) >> 32)


def _words(numbers: Tensor, key: Key) -> Tensor:
    """The words at these positions (int64), computed in int32, where products overflow to their lower 32 bits."""
    import torch

    x = numbers.to(torch.int32) ^ key[0]
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D + key[1]
    x = (x ^ _shifted(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ _shifted(x, 16)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Words shifted to the right as unsigned numbers."""
    return (words >> by) & (_LOW_32 >> by)


def level(chance: float) -> int:
    """For how many of the ``LEVELS`` values of its bits an element is kept: 0 for never, ``LEVELS`` for always.

    Args:
        chance: probability to be kept; values outside 0 to 1 are clipped.
    """
    return round(min(max(chance, 0.0), 1.0) * LEVELS)


def limit(levels: int) -> int:
    """The largest int32 from ``element_bits`` with which an element is kept, for ``levels`` (at least 1) of LEVELS."""
    return ((levels - (1 << 15)) << 16) - 1
