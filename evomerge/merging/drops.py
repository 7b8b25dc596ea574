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

    x = (torch.arange(first, first + count, device=device) & _LOW_32) ^ key[0]
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32
    x = (x + key[1]) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)


def random_halves(first: int, count: int, key: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """The bits of elements first .. first + count - 1, in the upper half of an int32 [count]."""
    import torch

    words = random_words(first // 2, (first + count + 1) // 2 - first // 2, key, device)
    halves = torch.stack([words << 16, words & (0xFFFF << 16)], dim=-1).view(-1)
    return halves[first % 2 : first % 2 + count].to(torch.int32)


def row_turns(first: int, rows: int, length: int, key: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """How many places further the element stands that one meets, in rows first .. first + rows - 1; see ``Part``.

    The stream is another than that of the elements: that of the key with its halves exchanged.

    Args:
        length: of a row.

    Returns:
        int64 [rows], each from 1 to length - 1 (1 in rows of one element, which meets itself).
    """
    return 1 + (random_words(first, rows, key[::-1], device) * (length - 1) >> 32)


def level(chance: float) -> int:
    """How many of the ``LEVELS`` values that an element's bits can take keep it: 0 for never, LEVELS for always."""
    return round(min(max(chance, 0.0), 1.0) * LEVELS)


def limit(levels: int) -> int:
    """The largest int32 in whose upper half the bits of a kept element may stand, for at least one level."""
    return ((levels - (1 << 15)) << 16) - 1
