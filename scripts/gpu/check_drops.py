"""Random drops on the device and on the CPU: the same bits, so that the mask that was scored is the one exported."""

from __future__ import annotations

import numpy as np
import torch
from check_passes import by_cpu, by_device
from kit import CPU, Row, Setting, check, same_bits

from evomerge.merging.arithmetic import words
from evomerge.merging.arithmetic.drops import LEVELS, as_signed, element_bits, partner_offsets, random_words, stream_key
from evomerge.merging.arithmetic.passes import SparsePart, Sparsify

_FIRST = (0, 1, (1 << 31) - 3, (1 << 33) + 5)
"""First elements for which bits are drawn: also where positions exceed 32 bits."""


def rows() -> list[Row]:
    return [
        Row("drops, random bits", _bits),
        Row("drops of dare", lambda setting: _masks(setting, rise=None)),
        Row("drops of della", lambda setting: _masks(setting, rise=30_000)),
    ]


def _bits(setting: Setting) -> str:
    count = 1001 if setting.small else 1 << 24
    for number, first in enumerate(_FIRST):
        key = stream_key(number, "source", "tensor")
        same_bits(
            random_words(first, count, key, setting.device), random_words(first, count, key), f"words from {first}"
        )
        elements, rows = torch.arange(first, first + count), torch.arange(first, first + 1001)
        on_device = element_bits(elements.to(setting.device), as_signed(key))
        same_bits(on_device, element_bits(elements, as_signed(key)), f"bits of elements from {first}")
        compiled = np.empty(count, np.uint32)
        words.random_words(compiled, np.uint64(first), np.uint32(key[0]), np.uint32(key[1]))
        expected = torch.from_numpy(compiled.astype(np.int64))
        same_bits(random_words(first, count, key, setting.device), expected, f"compiled words from {first}")
        on_device = partner_offsets(rows.to(setting.device), 4096, as_signed(key))
        same_bits(on_device, partner_offsets(rows, 4096, as_signed(key)), f"partner offsets of rows from {first}")
    return f"{len(_FIRST)} streams of {count} elements the same"


def _masks(setting: Setting, rise: int | None) -> str:
    """With a base of zeros and random sources, the nonzero elements are those that the mask keeps."""
    shape = (64, 1024) if setting.small else (1 << 15, 4096)
    random = torch.Generator(CPU).manual_seed(7)
    source = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 1, generator=random)
    source[source == 0] = 1
    tensors = {"base": torch.zeros_like(source), "one": source}
    levels = LEVELS // 4
    plan = Sparsify("base", (SparsePart("one", 1.0, key=stream_key(1, "one", "w"), levels=levels, rise=rise),))
    expected, made = by_cpu(plan, tensors), by_device(plan, tensors, setting)
    same_bits(made, expected, "what is kept")
    kept = (expected != 0).double().mean().item()
    wanted = (levels + (rise or 0) / 2) / LEVELS
    check(abs(kept - wanted) < 4 * (0.25 / source.numel()) ** 0.5 + 0.005, f"{kept:.2%} is kept, not {wanted:.2%}")
    return f"{source.numel()} elements, {kept:.2%} kept, the same ones"
