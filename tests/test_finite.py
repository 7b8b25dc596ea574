"""The scan for NaN and infinities against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.checkpoints.finite import all_finite, first_not_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 2, 3, 40_001, 70_000])
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, bad: float, size: int) -> None:
    tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)  # a sum of these would overflow
    tensor[::2] *= -1
    assert all_finite(tensor)
    for place in {0, 1, size // 2, size - 2, size - 1} & set(range(size)):
        broken = tensor.clone()
        broken[place] = bad
        assert not all_finite(broken)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9), st.sampled_from(DTYPES[:3]))
def test_any_bits_are_judged_as_torch_does(words: list[int], dtype: torch.dtype) -> None:
    tensor = torch.tensor(words, dtype=torch.int32).view(dtype)
    assert all_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_views_of_every_kind() -> None:
    matrix = torch.zeros(6, 5, dtype=torch.bfloat16)
    matrix[2, 3] = torch.nan
    assert not all_finite(matrix.T)
    assert not all_finite(matrix[2])  # begins in the middle of a word, or is of odd length
    assert all_finite(matrix[:, :3])
    assert all_finite(matrix[:0])


def test_the_first_is_named() -> None:
    good, bad = torch.zeros(4), torch.full((4,), torch.inf)
    assert first_not_finite({"a": good, "b": bad, "c": bad}) == "b"
    assert first_not_finite({"a": good}) is None
    assert first_not_finite({}) is None
