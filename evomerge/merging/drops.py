"""Random drops from a counter-based generator: the same on every device, for every chunking, and for every candidate.

The generator is Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011,
section 3.3 and table 2). It has no state: number i of a stream is a function of the stream's key and i alone. So a mask
needs no storing, export draws the mask that was scored, and a part of a tensor can be drawn without the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as the paper's Weyl sequence
_LOW_32 = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters drawn at a time: the few int64 buffers of a round then stay in a core's cache


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words for each counter.

    Args:
        counter: four int64 tensors of one shape, the counter's words from low to high, each in [0, 2**32).
        key: two words, each in [0, 2**32).

    Returns:
        Four int64 tensors of that shape, words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words fills 64 bits; int64 wraps, which leaves its bits right. Words 1 and 3 carry
        # the whole product to the next round: its upper half is masked away there, after the xor.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW_32)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW_32)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_32, (k1 + _KEY_STEPS[1]) & _LOW_32
    return c0, c1 & _LOW_32, c2, c3 & _LOW_32


def stream_key(seed: int, source: str, tensor: str) -> tuple[int, int]:
    """The key of the stream of one tensor of one source: the first 64 bits of a SHA-256 over the three."""
    text = json.dumps([seed, source, tensor])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def keep_mask(
    seed: int, source: str, tensor: str, density: float, start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Which of the elements start..stop-1 of a tensor (flattened, row-major) of a source are kept.

    Element e has the uniform number u(e) in [0, 1), word e % 4 of counter e // 4, and is kept where u(e) < density. So
    whatever a density keeps, each higher density keeps as well: a merge changes little where a density changes little.

    Args:
        density: the chance to be kept, in [0, 1]; resolved to a multiple of 2**-32.

    Returns:
        bool tensor of shape [stop - start].
    """
    threshold = round(density * 2.0**32)
    if threshold >= 2**32:
        return torch.ones(stop - start, dtype=torch.bool, device=device)
    key = stream_key(seed, source, tensor)
    first, last = start // 4, -(-stop // 4)
    kept = torch.empty((last - first, 4), dtype=torch.bool, device=device)
    for begin in range(first, last, _CHUNK):
        counters = torch.arange(begin, min(begin + _CHUNK, last), device=device)
        zeros = torch.zeros_like(counters)
        words = philox4x32((counters & _LOW_32, counters >> 32, zeros, zeros), key)
        part = kept[begin - first : begin - first + len(counters)]
        for column, word in enumerate(words):
            torch.lt(word, threshold, out=part[:, column])
    return kept.view(-1)[start - 4 * first : stop - 4 * first]


@dataclass(frozen=True, slots=True)
class Drops:
    """The random drops of one tensor of a recipe, for every source that a blend mixes."""

    seed: int
    tensor: str

    def keep(self, source: str, density: float, shape: torch.Size) -> Tensor:
        """bool mask of ``shape``: where ``source`` keeps its task vector."""
        return keep_mask(self.seed, source, self.tensor, density, 0, math.prod(shape)).view(shape)
