"""Random drops from a counter-based generator: the same on every device, for every chunking, and for every candidate.

Word j of a stream is a function of the stream's key and j alone, so a mask needs no storing, export draws the mask that
was scored, and a part of a tensor can be drawn without the rest. The function is the integer hash "lowbias32" of
Wellons' hash prospector (https://nullprogram.com/blog/2018/07/31/), whose output bits each flip with every input bit
with a chance of 0.5 to within 0.0017, with 64 bits of key: half before its first step, half between its two
multiplications. Two multiplications a word are what a merge at memory speed can afford; Philox4x32-10 takes five times
as long.

An element takes 16 bits: element e of a stream is the lower (e even) or upper half of word e // 2.
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
"""A chance is resolved to a multiple of 1 / LEVELS."""


def stream_key(seed: int, source: str, tensor: str) -> tuple[int, int]:
    """The key of the stream of one tensor of one source: the first 64 bits of a SHA-256 over the three."""
    text = json.dumps([seed, source, tensor])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def random_words(first: int, count: int, key: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Words first .. first + count - 1 of a stream: int64 [count], each in [0, 2**32). ``words`` has it compiled."""
    import torch

    return _words(torch.arange(first, first + count, device=device), as_signed(key)).long() & _LOW_32


Key = tuple["int | Tensor", "int | Tensor"]
"""A stream's key as numbers of 32 bits with a sign, or as int32 tensors of no dimension that hold these."""


def as_signed(key: tuple[int, int]) -> tuple[int, int]:
    """A key with halves of -2**31 to 2**31 - 1, of the same bits."""
    first, second = (half - ((half >> 31) << 32) for half in key)
    return first, second


def element_bits(elements: Tensor, key: Key) -> Tensor:
    """The bits of elements by their numbers (int64), in the upper half of an int32 of that shape.

    Each element hashes its own word, whose other half is its neighbour's: on a GPU, where this is compiled into a pass,
    that is cheaper than to exchange it.
    """
    import torch

    words = _words(elements >> 1, key)
    return torch.where(elements & 1 == 0, words << 16, words & -LEVELS)


def turns(rows: Tensor, length: int, key: Key) -> Tensor:
    """How many places further the element stands that one meets, in rows by their numbers (int64); see ``Part``.

    The stream is another than that of the elements: that of the key with its halves exchanged.

    Args:
        length: of a row.

    Returns:
        int64 of the shape of ``rows``, each from 1 to length - 1 (1 in rows of one element, which meets itself).
    """
    return 1 + ((_words(rows, key[::-1]).long() & _LOW_32) * (length - 1) >> 32)


def _words(numbers: Tensor, key: Key) -> Tensor:
    """The words of these numbers (int64) as int32, whose products leave out what is beyond 32 bits."""
    import torch

    x = numbers.to(torch.int32) ^ key[0]
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D + key[1]
    x = (x ^ _shifted(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ _shifted(x, 16)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Words shifted to the right as if they had no sign."""
    return (words >> by) & (_LOW_32 >> by)


def level(chance: float) -> int:
    """How many of the ``LEVELS`` values that an element's bits can take keep it: 0 for never, LEVELS for always."""
    return round(min(max(chance, 0.0), 1.0) * LEVELS)


def limit(levels: int) -> int:
    """The largest int32 in whose upper half the bits of a kept element may stand, for at least one level."""
    return ((levels - (1 << 15)) << 16) - 1
