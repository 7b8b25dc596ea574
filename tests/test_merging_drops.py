"""Random drops: the published test vectors, an independent generator in plain Python, and what masks promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging import drops
from evomerge.merging.drops import Drops, keep_mask, philox4x32, stream_key

# Random123's kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The generator as its paper draws it, on Python's integers."""
    left0, right0, left1, right1 = counter
    for i in range(10):
        high0, low0 = divmod(0xD2511F53 * left0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * left1, 1 << 32)
        k0 = (key[0] + i * 0x9E3779B9) % (1 << 32)
        k1 = (key[1] + i * 0xBB67AE85) % (1 << 32)
        left0, right0, left1, right1 = high1 ^ right0 ^ k0, low1, high0 ^ right1 ^ k1, low0
    return [left0, right0, left1, right1]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    first, second = words(key)
    found = philox4x32([torch.tensor([word]) for word in words(counter)], (first, second))
    assert [int(word) for word in found] == words(result)
    assert plain_philox(words(counter), words(key)) == words(result)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_equals_the_plain_generator(numbers: list[int]) -> None:
    *counter, k0, k1 = numbers
    found = philox4x32([torch.tensor([word]) for word in counter], (k0, k1))
    assert [int(word) for word in found] == plain_philox(counter, [k0, k1])


def test_mask_is_element_by_element_what_the_docstring_says() -> None:
    key = list(stream_key(3, "maths", "lm_head.weight"))
    start = 4 * (1 << 32) - 6  # across the point where the counter needs its second word
    expected = []
    for element in range(start, start + 12):
        block = element // 4
        u = plain_philox([block % (1 << 32), block >> 32, 0, 0], key)[element % 4] / 2**32
        expected.append(u < 0.6)
    assert keep_mask(3, "maths", "lm_head.weight", 0.6, start, start + 12).tolist() == expected
    assert 0 < sum(expected) < 12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_any_chunk_is_a_part_of_the_whole(one: int, other: int) -> None:
    start, stop = sorted((one, other))
    whole = keep_mask(1, "a", "w", 0.3, 0, 3000)
    assert torch.equal(keep_mask(1, "a", "w", 0.3, start, stop), whole[start:stop])


def test_size_of_the_inner_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keep_mask(1, "a", "w", 0.3, 5, 4001)
    monkeypatch.setattr(drops, "_CHUNK", 7)
    assert torch.equal(keep_mask(1, "a", "w", 0.3, 5, 4001), whole)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_higher_density_keeps_what_a_lower_one_keeps(one: float, other: float) -> None:
    low, high = sorted((one, other))
    lower, higher = (keep_mask(1, "a", "w", density, 0, 400) for density in (low, high))
    assert not (lower & ~higher).any()


def test_extremes() -> None:
    assert keep_mask(0, "a", "w", 1.0, 0, 1001).all()
    assert not keep_mask(0, "a", "w", 0.0, 0, 1001).any()
    assert not keep_mask(0, "a", "w", 1e-300, 0, 1001).any()
    assert keep_mask(0, "a", "w", 0.5, 8, 8).shape == (0,)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_keeps_the_share_that_it_should(density: float) -> None:
    n = 200_000
    kept = int(keep_mask(11, "a", "w", density, 0, n).sum())
    assert abs(kept - n * density) < 5 * math.sqrt(n * density * (1 - density))


def test_seed_source_and_tensor_each_change_the_mask() -> None:
    n = 10_000
    first = keep_mask(0, "a", "w", 0.5, 0, n)
    for other in (
        keep_mask(1, "a", "w", 0.5, 0, n),
        keep_mask(0, "b", "w", 0.5, 0, n),
        keep_mask(0, "a", "v", 0.5, 0, n),
    ):
        assert abs(int((first == other).sum()) - n / 2) < 5 * math.sqrt(n / 4)  # as two strangers agree


def test_stream_keys_do_not_run_together() -> None:
    assert stream_key(0, "a", "bc") != stream_key(0, "ab", "c")
    assert stream_key(0, "a", "w") == (3066886722, 336355000)  # fixed for ever: masks of old recipes hang on it


def test_drops_shape_the_mask_like_the_tensor() -> None:
    kept = Drops(seed=5, tensor="w").keep("a", 0.5, torch.Size((3, 7)))
    assert torch.equal(kept.flatten(), keep_mask(5, "a", "w", 0.5, 0, 21))
    assert Drops(5, "w").keep("a", 0.5, torch.Size(())).shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu() -> None:
    there = keep_mask(5, "a", "w", 0.5, 3, 300_001, device="cuda")
    assert torch.equal(there.cpu(), keep_mask(5, "a", "w", 0.5, 3, 300_001))
