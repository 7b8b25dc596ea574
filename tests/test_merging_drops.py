"""Random drops: the hash written apart, the same bits however they are cut, and how they are spread."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.merging.arithmetic import words as compiled_words
from evomerge.merging.arithmetic.drops import (
    LEVELS,
    as_signed,
    element_bits,
    level,
    limit,
    partner_offsets,
    random_words,
    stream_key,
)
from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads
from evomerge.merging.arithmetic.passes import SparsePart, Sparsify

N = 200_000
KEY = stream_key(3, "maths", "lm_head.weight")


def random_halves(first: int, count: int, key: tuple[int, int], device: str = "cpu") -> torch.Tensor:
    """The bits of elements first .. first + count - 1, in the upper half of an int32 [count]."""
    return element_bits(torch.arange(first, first + count, device=device), as_signed(key))


def plain_word(number: int, key: tuple[int, int]) -> int:
    """The hash on Python's integers, as its page gives it in C, with the key where the docstring says."""
    x = number % 2**32 ^ key[0]
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x = (x + key[1]) % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_with_no_key_it_is_the_published_hash() -> None:
    """Its fixed point and two values of the reference in C (lowbias32), computed by hand from the page's code."""
    assert random_words(0, 2, (0, 0)).tolist() == [0, plain_word(1, (0, 0))]
    assert plain_word(1, (0, 0)) == 1753845952


@given(st.integers(0, 2**40), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_equals_the_plain_hash(first: int, k0: int, k1: int) -> None:
    expected = [plain_word(first + i, (k0, k1)) for i in range(5)]
    assert random_words(first, 5, (k0, k1)).tolist() == expected
    compiled = np.empty(5, np.uint32)
    compiled_words.random_words(compiled, np.uint64(first), np.uint32(k0), np.uint32(k1))
    assert compiled.tolist() == expected


def test_an_element_takes_the_half_that_the_docstring_says() -> None:
    halves = random_halves(6, 7, KEY)
    for i, bits in enumerate(halves.tolist()):
        word = plain_word((6 + i) // 2, KEY)
        half = word >> 16 if (6 + i) % 2 else word & 0xFFFF
        assert bits % 2**32 == half << 16


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_any_chunk_is_a_part_of_the_whole(one: int, other: int) -> None:
    start, stop = sorted((one, other))
    assert torch.equal(random_halves(start, stop - start, KEY), random_halves(0, 3000, KEY)[start:stop])


def kept(chance: float, seed: int = 11, source: str = "a", tensor: str = "w", n: int = N) -> torch.Tensor:
    found = level(chance)
    if found == 0:
        return torch.zeros(n, dtype=torch.bool)
    return random_halves(0, n, stream_key(seed, source, tensor)) <= limit(found)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_higher_chance_keeps_what_a_lower_one_keeps(one: float, other: float) -> None:
    low, high = (kept(chance, n=400) for chance in sorted((one, other)))
    assert not (low & ~high).any()


def test_extremes() -> None:
    assert kept(1.0).all()
    assert level(0.0) == 0 == level(1e-9)
    assert level(1.0) == LEVELS
    assert limit(LEVELS) == 2**31 - 1
    assert 0 < int(kept(1 / LEVELS, n=2_000_000).sum()) < 100


@pytest.mark.parametrize("chance", [0.01, 0.1, 0.5, 0.9])
def test_keeps_the_share_that_it_should(chance: float) -> None:
    for seed in range(5):
        count = int(kept(chance, seed).sum())
        assert abs(count - N * chance) < 5 * math.sqrt(N * chance * (1 - chance))


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 1024, 4096, 65536])
def test_elements_are_kept_independently_of_each_other(distance: int) -> None:
    """Neighbours, the halves of a word, and elements as far apart as rows are."""
    mask = kept(0.5)
    same = int((mask[:-distance] == mask[distance:]).sum())
    n = N - distance
    assert abs(same - n / 2) < 5 * math.sqrt(n / 4)


def test_bits_are_spread_evenly_over_their_values() -> None:
    """Chi-square over 256 classes of the upper and of the lower byte: within five standard deviations of its mean."""
    bits = (random_halves(0, N, KEY) >> 16) & 0xFFFF
    for byte in (bits >> 8, bits & 0xFF):
        counts = torch.bincount(byte.long(), minlength=256).double()
        chi = float(((counts - N / 256) ** 2 / (N / 256)).sum())
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_every_bit_of_the_key_and_the_number_flips_half_of_the_word() -> None:
    generator = random.Random(0)
    for bit in range(96):
        flips = []
        for _ in range(200):
            number, k0, k1 = (generator.getrandbits(32) for _ in range(3))
            words = [number, k0, k1]
            before = plain_word(words[0], (words[1], words[2]))
            words[bit // 32] ^= 1 << bit % 32
            flips.append((before ^ plain_word(words[0], (words[1], words[2]))).bit_count())
        assert 13.5 < sum(flips) / len(flips) < 18.5, bit  # of 32; the deviation of the mean is 0.2


def test_seed_source_and_tensor_each_change_the_mask() -> None:
    first = kept(0.5)
    for other in (kept(0.5, 12), kept(0.5, source="b"), kept(0.5, tensor="v")):
        assert abs(int((first == other).sum()) - N / 2) < 5 * math.sqrt(N / 4)  # as two strangers agree


def test_stream_keys_do_not_run_together() -> None:
    assert stream_key(0, "a", "bc") != stream_key(0, "ab", "c")
    assert stream_key(0, "a", "w") == (3066886722, 336355000)  # fixed for ever: masks of old recipes hang on it


# ---- by magnitude ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**40), st.integers(1, 50_000), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_row_is_turned_by_any_number_of_places_but_its_length(first: int, length: int, k0: int, k1: int) -> None:
    found = partner_offsets(torch.arange(first, first + 3), length, as_signed((k0, k1))).tolist()
    assert all(1 <= turn < max(length, 2) for turn in found)
    key = np.uint32(k0), np.uint32(k1)
    assert found == [compiled_words.partner_offset(np.uint64(first + i), np.uint64(length), *key) for i in range(3)]


def chances(source: torch.Tensor, low: float, high: float, seeds: int) -> torch.Tensor:
    """In which share of the seeds each element of a source is kept, the base being zero."""
    base, out, total = torch.zeros_like(source), torch.empty_like(source), torch.zeros_like(source)
    for seed in range(seeds):
        key = stream_key(seed, "a", "w")
        part = SparsePart("a", 1.0, key=key, levels=level(low), rise=level(high) - level(low))
        WorkerThreads(1).run([TensorJob(Sparsify("b", (part,)), [base, source], out)])
        total += out != 0
    return total / seeds


@pytest.mark.parametrize("length", [2, 2050, 5000])
def test_rows_of_any_length_are_drawn_as_defined(length: int) -> None:
    """Longer than what the compiled pass draws at a time, and with the ring closing anywhere."""
    generator = torch.Generator().manual_seed(length)
    base, *sources = (torch.randn(9, length, generator=generator).bfloat16() for _ in range(3))
    plan = Sparsify("b", tuple(
        SparsePart(name, 1.0, key=stream_key(1, name, "w"), levels=level(0.3), rise=level(0.4)) for name in "ac"
    ))  # fmt: skip
    out = torch.empty(9, length)
    WorkerThreads(2).run([TensorJob(plan, [base, *sources], out)])
    assert torch.allclose(out, plan.run([base, *sources], 0), rtol=1e-6, atol=1e-6)


def test_the_chance_to_be_kept_rises_evenly_with_the_rank_in_the_row() -> None:
    """As mergekit's DELLA has it: the smallest of a row with the lowest chance, the largest with the highest."""
    seeds, rows, length = 1000, 16, 40
    generator = torch.Generator().manual_seed(5)
    source = torch.randn(rows, length, generator=generator) * torch.rand(rows, 1, generator=generator)
    ranks = source.abs().argsort(dim=1).argsort(dim=1)
    expected = 0.2 + 0.5 * ranks / (length - 1)
    found = chances(source, 0.2, 0.7, seeds)
    errors = (found - expected) / (expected * (1 - expected) / seeds).sqrt()
    assert errors.abs().max() < 5
    assert errors.square().mean() < 1.2  # within the noise of so many seeds, not only near it


def test_equal_magnitudes_share_the_mean_of_their_ranks() -> None:
    seeds, length = 2000, 32
    source = torch.where(torch.arange(length) < 24, 1.0, 2.0).repeat(8, 1)  # ranks 0 to 23, and 24 to 31
    source[:, ::2] *= -1
    found = chances(source, 0.1, 0.9, seeds)
    for part, rank in ((found[:, :24], 11.5), (found[:, 24:], 27.5)):
        expected = 0.1 + 0.8 * rank / (length - 1)
        assert abs(float(part.mean()) - expected) < 5 * math.sqrt(0.25 / (seeds * part.numel()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu() -> None:
    assert torch.equal(random_halves(3, 300_001, KEY, device="cuda").cpu(), random_halves(3, 300_001, KEY))
