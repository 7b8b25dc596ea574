"""The merge methods: their contract, slow formulas written apart from them, and the cases at the edges."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evomerge import plugins
from evomerge.errors import InputError
from evomerge.merging.arithmetic.drops import LEVELS, as_signed, element_bits, level, limit, stream_key
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.measured.facts import Facts
from evomerge.method import GROUP, Method, find_method, own_methods
from evomerge.recipes.stack import Blend
from evomerge.testing.methods import SEED, TENSOR, MethodContract, merge, tensors

METHODS = own_methods()
LINEAR, TASK_ARITHMETIC, SLERP = METHODS["linear"], METHODS["task_arithmetic"], METHODS["slerp"]
TIES, DARE_LINEAR, DARE_TIES = METHODS["ties"], METHODS["dare_linear"], METHODS["dare_ties"]

# ---- the contract ----------------------------------------------------------------------------------------------------


class TestLinear(MethodContract):
    method = LINEAR


class TestPassthrough(MethodContract):
    method = METHODS["passthrough"]


class TestSlerp(MethodContract):
    method = SLERP
    symmetric = False

    @pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
    def test_the_other_way_round_is_the_same_arc(self, t: float) -> None:
        base, first, second = tensors(3)
        there = self.merge(base, [first, second], self.blend({"t": t}))
        back = self.merge(base, [second, first], self.blend({"t": 1 - t}))
        assert torch.allclose(there, back, rtol=1e-6, atol=1e-6)


class TestNuslerp(MethodContract):
    method = METHODS["nuslerp"]


class TestMultislerp(MethodContract):
    method = METHODS["multislerp"]


class TestKarcher(MethodContract):
    method = METHODS["karcher"]


class TestTaskArithmetic(MethodContract):
    method = TASK_ARITHMETIC


class TestModelStock(MethodContract):
    method = METHODS["model_stock"]


class TestRam(MethodContract):
    method = METHODS["ram"]
    whole: ClassVar = {}


class TestRamplus(MethodContract):
    method = METHODS["ramplus_tl"]
    whole = None


class TestArceeFusion(MethodContract):
    method = METHODS["arcee_fusion"]
    whole = None


class TestNearswap(MethodContract):
    method = METHODS["nearswap"]
    whole = None


class TestTsv(MethodContract):
    method = METHODS["tsv"]
    tolerance: ClassVar[float] = 1e-5


class TestYoyo(MethodContract):
    method = METHODS["yoyo"]


class TestMagmax(MethodContract):
    method = METHODS["magmax"]


class TestLocalizeAndStitch(MethodContract):
    method = METHODS["localize_and_stitch"]


class TestPcb(MethodContract):
    method = METHODS["pcb"]
    whole = None


class TestResmerge(MethodContract):
    method = METHODS["resmerge"]
    tolerance: ClassVar[float] = 1e-5


class TestRegmeanPlusPlus(MethodContract):
    method = METHODS["regmean_plus_plus"]
    tolerance: ClassVar[float] = 1e-4


class TestConsensus(MethodContract):
    method = METHODS["consensus"]


def test_every_method_is_held_to_its_contract() -> None:
    for file in Path(__file__).parent.glob("test_*.py"):  # some have a file of their own, which a tier may leave out
        if "(MethodContract)" in file.read_text("utf-8"):
            importlib.import_module(file.stem)
    held = {kind.method.name for kind in MethodContract.__subclasses__()}
    assert held >= set(METHODS)


# ---- slow formulas ---------------------------------------------------------------------------------------------------
# One element at a time, in float64, each method written out by itself from its paper. Masks are the drops' own.

Rows = list[list[float]]


def slow_linear(base: list[float], rows: Rows, w: list[float], p: list[float], normalize: bool) -> list[float]:
    sums = [math.fsum(wi * row[e] for wi, row in zip(w, rows, strict=True)) for e in range(len(base))]
    if normalize and math.fsum(w) == 0:
        return [math.fsum(row[e] for row in rows) / len(rows) for e in range(len(base))]
    return [s / math.fsum(w) for s in sums] if normalize else sums


def slow_task_arithmetic(base: list[float], rows: Rows, w: list[float], p: list[float], normalize: bool) -> list[float]:
    merged = []
    for e, b in enumerate(base):
        total = math.fsum(wi * (row[e] - b) for wi, row in zip(w, rows, strict=True))
        merged.append(b + (total / math.fsum(w) if normalize and math.fsum(w) else total))
    return merged


def slow_dare_linear(base: list[float], rows: Rows, w: list[float], p: list[float], normalize: bool) -> list[float]:
    return slow_task_arithmetic(base, slow_dare(base, rows, p), w, p, normalize)


def slow_ties(base: list[float], rows: Rows, w: list[float], p: list[float], normalize: bool) -> list[float]:
    trimmed = []
    for row, density in zip(rows, p, strict=True):
        deltas = [x - b for x, b in zip(row, base, strict=True)]
        k = max(1, math.floor(density * len(base))) if density > 0 else 0
        threshold = sorted((abs(d) for d in deltas), reverse=True)[k - 1] if k else math.inf
        trimmed.append([b + (d if abs(d) >= threshold else 0.0) for d, b in zip(deltas, base, strict=True)])
    return slow_elect_and_merge(base, trimmed, w, normalize)


def slow_dare_ties(base: list[float], rows: Rows, w: list[float], p: list[float], normalize: bool) -> list[float]:
    return slow_elect_and_merge(base, slow_dare(base, rows, p), w, normalize)


def slow_dare(base: list[float], rows: Rows, p: list[float]) -> Rows:
    dropped = []
    for i, (row, density) in enumerate(zip(rows, p, strict=True)):
        bits = element_bits(torch.arange(len(base)), as_signed(stream_key(SEED, f"s{i}", TENSOR)))
        kept = (bits <= limit(level(density))).tolist()
        share = level(density) / LEVELS  # what it is resolved to
        dropped.append([b + (x - b) / share if keep else b for x, b, keep in zip(row, base, kept, strict=True)])
    return dropped


def slow_elect_and_merge(base: list[float], rows: Rows, w: list[float], normalize: bool) -> list[float]:
    merged = []
    for e, b in enumerate(base):
        deltas = [wi * (row[e] - b) for wi, row in zip(w, rows, strict=True)]
        sign = 1 if math.fsum(deltas) >= 0 else -1
        agreeing = [i for i, d in enumerate(deltas) if d * sign > 0]
        total = math.fsum(deltas[i] for i in agreeing)
        share = math.fsum(w[i] for i in agreeing)
        merged.append(b + (total / share if normalize and share else total))
    return merged


SLOW: dict[str, Callable[..., list[float]]] = {
    "linear": slow_linear,
    "task_arithmetic": slow_task_arithmetic,
    "ties": slow_ties,
    "dare_linear": slow_dare_linear,
    "dare_ties": slow_dare_ties,
}


def blend_of(method: Method, w: list[float], p: list[float], normalize: bool) -> Blend:
    names = tuple(f"s{i}" for i in range(len(w)))
    numbers = {"weight": dict(zip(names, w, strict=True)), "density": dict(zip(names, p, strict=True))}
    taken = {q.name: numbers[q.name] for q in method.parameters if q.scope == "source"}
    return Blend(method=method.name, sources=names, base="b", parameters={**taken, "normalize": normalize})


@pytest.mark.parametrize("name", SLOW)
@given(data=st.data())
def test_equals_the_slow_formula(name: str, data: st.DataObject) -> None:
    method = METHODS[name]
    count = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(1, 12))
    # On a grid where float32 is exact, so that signs at a sum of zero and ties at a threshold come out alike.
    row = st.lists(st.integers(-16, 16).map(lambda n: n / 8), min_size=size, max_size=size)
    base, *rows = (data.draw(row) for _ in range(1 + count))
    w = [data.draw(st.integers(0, 12)) / 8 for _ in range(count)]
    p = [data.draw(st.sampled_from([0.125, 0.25, 0.5, 1.0])) for _ in range(count)]
    normalize = data.draw(st.booleans())
    merged = merge(method, torch.tensor(base), [torch.tensor(row) for row in rows], blend_of(method, w, p, normalize))
    expected = SLOW[name](base, rows, w, p, normalize)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", SLOW)
def test_equals_the_slow_formula_on_weights_like_those_of_models(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 25, generator=generator).bfloat16()
    sources = [(base + 0.02 * torch.randn(40, 25, generator=generator)).bfloat16() for _ in range(3)]
    w, p = [0.7, 0.9, 0.35], [0.2, 0.53, 0.8]
    rows = [x.double().flatten().tolist() for x in (base, *sources)]
    for normalize in (False, True):
        merged = merge(METHODS[name], base, sources, blend_of(METHODS[name], w, p, normalize))
        expected = SLOW[name](rows[0], rows[1:], w, p, normalize)
        np.testing.assert_allclose(merged.flatten().numpy(), expected, rtol=1e-5, atol=1e-6)


def slerp_blend(t: float) -> Blend:
    return Blend(method="slerp", sources=("s0", "s1"), parameters={"t": t})


@given(seed=st.integers(0, 10_000), t=st.floats(0, 1))
def test_slerp_equals_a_turn_in_the_plane_of_both(seed: int, t: float) -> None:
    """Gram-Schmidt, then a rotation by t times the angle: Shoemake's geometry without his formula. Unit vectors."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 12))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    across = b - a * (a @ b)
    across /= np.linalg.norm(across)
    angle = math.atan2(float(b @ across), float(a @ b))
    expected = a * math.cos(t * angle) + across * math.sin(t * angle)
    merged = merge(SLERP, None, [torch.tensor(a).float(), torch.tensor(b).float()], slerp_blend(t))
    np.testing.assert_allclose(merged.numpy(), expected, atol=2e-6)


def test_slerp_weighs_the_tensors_as_they_are() -> None:
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0])  # a right angle: both factors are sin(pi / 4)
    merged = merge(SLERP, None, [first, second], slerp_blend(0.5))
    assert merged.tolist() == pytest.approx([2 * math.sqrt(0.5), 5 * math.sqrt(0.5)], rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0], [2.0, 4.0]),
        ([1.0, 2.0], [-1.0, -2.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e-30, 0.0], [1e-30, 1e-34]),
    ],
)
def test_slerp_of_tensors_without_an_angle_is_the_straight_line(first: list[float], second: list[float]) -> None:
    merged = merge(SLERP, None, [torch.tensor(first), torch.tensor(second)], slerp_blend(0.25))
    expected = [0.75 * a + 0.25 * b for a, b in zip(first, second, strict=True)]
    assert merged.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-36)


# ---- edges -----------------------------------------------------------------------------------------------------------


def trimmed(delta: Tensor, density: float) -> Tensor:
    return merge(TIES, torch.zeros_like(delta), [delta], blend_of(TIES, [1.0], [density], False))


def test_trim_keeps_all_that_are_as_large_as_the_last_one_kept() -> None:
    delta = torch.tensor([1.0, -3.0, 2.0, -2.0, 0.5, 2.0])
    assert trimmed(delta, 0.34).tolist() == [0.0, -3.0, 2.0, -2.0, 0.0, 2.0]  # k = 2, and 2.0 stands three times
    assert trimmed(delta, 0.1).tolist() == [0.0, -3.0, 0.0, 0.0, 0.0, 0.0]  # at least one
    assert trimmed(delta, 0.0).tolist() == [0.0] * 6
    assert torch.equal(trimmed(delta, 1.0), delta)


@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 1000))
def test_trim_keeps_the_largest(size: int, density: float, seed: int) -> None:
    delta = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    kept = trimmed(delta, density) != 0
    assert int(kept.sum()) == (max(1, int(density * size)) if density > 0 else 0)
    if kept.any() and not kept.all():
        assert delta[kept].abs().min() > delta[~kept].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_trimmed_to_within_the_upper_bits(dtype: torch.dtype) -> None:
    delta = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).to(dtype).float()
    kept = trimmed(delta.to(dtype), 0.3) != 0
    assert 0.3 <= float(kept.float().mean()) < 0.31
    assert delta[kept].abs().min() > delta[~kept].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_source_in_a_mean_keeps_its_very_bits(dtype: torch.dtype) -> None:
    source = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, -65504.0])]).to(dtype)
    for weight in (1.0, 0.3, 0.0):  # normalised: all the same
        merged = merge(LINEAR, None, [source], blend_of(LINEAR, [weight], [1], True)).to(dtype)
        assert torch.equal(merged.view(torch.uint8), source.view(torch.uint8))
    merged = merge(LINEAR, None, [source], blend_of(LINEAR, [1.0], [1], False)).to(dtype)
    assert torch.equal(merged.view(torch.uint8), source.view(torch.uint8))


def test_a_mean_over_weights_that_are_all_zero_counts_all_the_same() -> None:
    merged = merge(LINEAR, None, [torch.tensor([1.0]), torch.tensor([3.0])], blend_of(LINEAR, [0, 0], [1, 1], True))
    assert merged.tolist() == [2.0]


@pytest.mark.parametrize("method", [TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_that_are_all_zero_leave_the_base(method: Method, normalize: bool) -> None:
    base, *sources = tensors(3)
    merged = merge(method, base, sources, blend_of(method, [0, 0], [0.5, 0.5], normalize))
    assert torch.equal(merged, base)


@pytest.mark.parametrize("method", [LINEAR, TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES])
@pytest.mark.parametrize("tiny", [5e-324, 1e-50, 1e-44, 1e-30])
def test_weights_too_small_for_float32_are_no_trouble(method: Method, tiny: float) -> None:
    base, *sources = tensors(3)
    merged = merge(method, base, sources, blend_of(method, [tiny, tiny], [1, 1], True))
    assert torch.isfinite(merged).all()
    if method not in (TIES, DARE_TIES):  # these weigh each element for itself, in float32
        halves = merge(method, base, sources, blend_of(method, [1, 1], [1, 1], True))
        assert torch.equal(merged, halves)


def test_ties_elects_plus_where_the_sum_is_zero() -> None:
    sources = [torch.tensor([1.0, -1.0]), torch.tensor([-2.0, 2.0])]
    merged = merge(TIES, torch.zeros(2), sources, blend_of(TIES, [1.0, 0.5], [1, 1], False))
    assert merged.tolist() == [1.0, 1.0]


def test_dare_with_density_zero_drops_a_source() -> None:
    base, first, second = tensors(3)
    for method in (DARE_LINEAR, DARE_TIES):
        without = merge(method, base, [first], blend_of(method, [0.5], [1.0], False))
        for density in (0.0, 1e-300):
            merged = merge(method, base, [first, second], blend_of(method, [0.5, 0.5], [1.0, density], False))
            assert torch.equal(merged, without)


def test_dare_keeps_the_expectation() -> None:
    base, source = torch.zeros(200_000), torch.ones(200_000)
    merged = merge(DARE_LINEAR, base, [source], blend_of(DARE_LINEAR, [1.0], [0.3], False))
    assert merged.unique().tolist() == pytest.approx([0.0, LEVELS / level(0.3)])
    assert float(merged.mean()) == pytest.approx(1.0, abs=0.02)


def test_weights_add_up_unless_normalised() -> None:
    base, source = torch.zeros(3), torch.ones(3)
    for method in (TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES):
        both = merge(method, base, [source, source], blend_of(method, [1, 1], [1, 1], False))
        mean = merge(method, base, [source, source], blend_of(method, [1, 1], [1, 1], True))
        assert both.tolist() == [2.0] * 3
        assert mean.tolist() == [1.0] * 3


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_methods_go_by_their_own_names() -> None:
    assert {name: find_method(name, "space.method") for name in METHODS} == METHODS


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"space.method: there is no merge method 'dare-ties'.*'dare_ties'"):
        find_method("dare-ties", "space.method")


def _double(facts: Facts, blend: Blend) -> Pass:
    return Combine({blend.sources[0]: 2.0})


DOUBLE = Method("double", _double)


def test_a_package_can_bring_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        name: EntryPoint(name, f"{__name__}:{target}", GROUP)
        for name, target in (("double", "DOUBLE"), ("broken", "SLOW"), ("dubble", "DOUBLE"), ("gone", "NOWHERE"))
    }
    monkeypatch.setattr(plugins, "plugins", lambda group: points)
    assert find_method("double", "m") is DOUBLE
    with pytest.raises(InputError, match="is not a merge method"):
        find_method("broken", "m")
    with pytest.raises(InputError, match="calls itself double"):
        find_method("dubble", "m")
    with pytest.raises(InputError, match=r"^m: the merge method 'gone' of .*NOWHERE cannot be loaded"):
        find_method("gone", "m")
    with pytest.raises(InputError, match="Did you mean 'double'"):
        find_method("doubel", "m")
