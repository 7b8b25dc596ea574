"""The merge methods: their contract, slow formulas written apart from them, and the cases at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging import METHODS, find_method, registry
from evomerge.merging.methods import DARE_LINEAR, DARE_TIES, LINEAR, SLERP, TASK_ARITHMETIC, TIES, Method, trim
from evomerge.recipe import Blend
from evomerge.testing.methods import DROPS, MethodContract, tensors

# ---- the contract ----------------------------------------------------------------------------------------------------


class TestLinear(MethodContract):
    method = LINEAR


class TestTaskArithmetic(MethodContract):
    method = TASK_ARITHMETIC


class TestTies(MethodContract):
    method = TIES


class TestDareLinear(MethodContract):
    method = DARE_LINEAR


class TestDareTies(MethodContract):
    method = DARE_TIES


class TestSlerp(MethodContract):
    method = SLERP
    symmetric = False

    @pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
    def test_the_other_way_round_is_the_same_arc(self, t: float) -> None:
        base, first, second = tensors(3)
        there = self.merge(base, [first, second], self.blend({"t": t}))
        back = self.merge(base, [second, first], self.blend({"t": 1 - t}))
        assert torch.allclose(there, back, rtol=1e-6, atol=1e-6)


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
        kept = DROPS.keep(f"s{i}", density, torch.Size([len(base)])).tolist()
        dropped.append([b + (x - b) / density if keep else b for x, b, keep in zip(row, base, kept, strict=True)])
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
    taken = {q.name: numbers[q.name] for q in method.spec.parameters}
    return Blend(method=method.spec.name, sources=names, base="b", parameters={**taken, "normalize": normalize})


@pytest.mark.parametrize("name", SLOW)
@settings(max_examples=80, deadline=None)
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
    merged = method.merge(
        torch.tensor(base), [torch.tensor(row) for row in rows], blend_of(method, w, p, normalize), DROPS
    )
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
        merged = METHODS[name].merge(base, sources, blend_of(METHODS[name], w, p, normalize), DROPS)
        expected = SLOW[name](rows[0], rows[1:], w, p, normalize)
        np.testing.assert_allclose(merged.flatten().numpy(), expected, rtol=1e-5, atol=1e-6)


def slerp_blend(t: float) -> Blend:
    return Blend(method="slerp", sources=("s0", "s1"), parameters={"t": t})


@settings(max_examples=60, deadline=None)
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
    merged = SLERP.merge(None, [torch.tensor(a).float(), torch.tensor(b).float()], slerp_blend(t), DROPS)
    np.testing.assert_allclose(merged.numpy(), expected, atol=2e-6)


def test_slerp_weighs_the_tensors_as_they_are() -> None:
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0])  # a right angle: both factors are sin(pi / 4)
    merged = SLERP.merge(None, [first, second], slerp_blend(0.5), DROPS)
    assert merged.tolist() == pytest.approx([2 * math.sqrt(0.5), 5 * math.sqrt(0.5)], rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0], [2.0, 4.0]),
        ([1.0, 2.0], [-1.0, -2.0]),
        ([0.0, 0.0], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e-30, 0.0], [1e-30, 1e-34]),
    ],
)
def test_slerp_of_tensors_without_an_angle_is_the_straight_line(first: list[float], second: list[float]) -> None:
    merged = SLERP.merge(None, [torch.tensor(first), torch.tensor(second)], slerp_blend(0.25), DROPS)
    expected = [0.75 * a + 0.25 * b for a, b in zip(first, second, strict=True)]
    assert merged.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-36)


# ---- edges -----------------------------------------------------------------------------------------------------------


def test_trim_keeps_all_that_are_as_large_as_the_last_one_kept() -> None:
    delta = torch.tensor([1.0, -3.0, 2.0, -2.0, 0.5, 2.0])
    assert trim(delta, 0.34).tolist() == [0.0, -3.0, 2.0, -2.0, 0.0, 2.0]  # k = 2, and 2.0 stands three times
    assert trim(delta, 0.1).tolist() == [0.0, -3.0, 0.0, 0.0, 0.0, 0.0]  # at least one
    assert trim(delta, 0.0).tolist() == [0.0] * 6
    assert torch.equal(trim(delta, 1.0), delta)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 1000))
def test_trim_keeps_the_largest(size: int, density: float, seed: int) -> None:
    delta = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    kept = trim(delta, density) != 0
    assert int(kept.sum()) == (max(1, int(density * size)) if density > 0 else 0)
    if kept.any() and not kept.all():
        assert delta[kept].abs().min() > delta[~kept].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_source_in_a_mean_keeps_its_very_bits(dtype: torch.dtype) -> None:
    source = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, -65504.0])]).to(dtype)
    for weight in (1.0, 0.3, 0.0):  # normalised: all the same
        merged = LINEAR.merge(None, [source], blend_of(LINEAR, [weight], [1], True), DROPS).to(dtype)
        assert torch.equal(merged.view(torch.uint8), source.view(torch.uint8))
    merged = LINEAR.merge(None, [source], blend_of(LINEAR, [1.0], [1], False), DROPS).to(dtype)
    assert torch.equal(merged.view(torch.uint8), source.view(torch.uint8))


def test_a_mean_over_weights_that_are_all_zero_counts_all_the_same() -> None:
    merged = LINEAR.merge(
        None, [torch.tensor([1.0]), torch.tensor([3.0])], blend_of(LINEAR, [0, 0], [1, 1], True), DROPS
    )
    assert merged.tolist() == [2.0]


@pytest.mark.parametrize("method", [TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_that_are_all_zero_leave_the_base(method: Method, normalize: bool) -> None:
    base, *sources = tensors(3)
    merged = method.merge(base, sources, blend_of(method, [0, 0], [0.5, 0.5], normalize), DROPS)
    assert torch.equal(merged, base)


@pytest.mark.parametrize("method", [LINEAR, TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES])
@pytest.mark.parametrize("tiny", [5e-324, 1e-50, 1e-44, 1e-30])
def test_weights_too_small_for_float32_are_no_trouble(method: Method, tiny: float) -> None:
    base, *sources = tensors(3)
    merged = method.merge(base, sources, blend_of(method, [tiny, tiny], [1, 1], True), DROPS)
    assert torch.isfinite(merged).all()
    if method not in (TIES, DARE_TIES):  # these weigh each element for itself, in float32
        halves = method.merge(base, sources, blend_of(method, [1, 1], [1, 1], True), DROPS)
        assert torch.equal(merged, halves)


def test_ties_elects_plus_where_the_sum_is_zero() -> None:
    sources = [torch.tensor([1.0, -1.0]), torch.tensor([-2.0, 2.0])]
    merged = TIES.merge(torch.zeros(2), sources, blend_of(TIES, [1.0, 0.5], [1, 1], False), DROPS)
    assert merged.tolist() == [1.0, 1.0]


def test_dare_with_density_zero_drops_a_source() -> None:
    base, first, second = tensors(3)
    for method in (DARE_LINEAR, DARE_TIES):
        without = method.merge(base, [first], blend_of(method, [0.5], [1.0], False), DROPS)
        for density in (0.0, 1e-300):
            merged = method.merge(base, [first, second], blend_of(method, [0.5, 0.5], [1.0, density], False), DROPS)
            assert torch.equal(merged, without)


def test_dare_keeps_the_expectation() -> None:
    base, source = torch.zeros(200_000), torch.ones(200_000)
    merged = DARE_LINEAR.merge(base, [source], blend_of(DARE_LINEAR, [1.0], [0.3], False), DROPS)
    assert merged.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert float(merged.mean()) == pytest.approx(1.0, abs=0.02)


def test_weights_add_up_unless_normalised() -> None:
    base, source = torch.zeros(3), torch.ones(3)
    for method in (TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES):
        both = method.merge(base, [source, source], blend_of(method, [1, 1], [1, 1], False), DROPS)
        mean = method.merge(base, [source, source], blend_of(method, [1, 1], [1, 1], True), DROPS)
        assert both.tolist() == [2.0] * 3
        assert mean.tolist() == [1.0] * 3


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_methods_go_by_their_own_names() -> None:
    assert {name: find_method(name, "space.method") for name in METHODS} == METHODS
    assert sorted(METHODS) == ["dare_linear", "dare_ties", "linear", "slerp", "task_arithmetic", "ties"]


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"space.method: there is no merge method 'dare-ties'.*'dare_ties'"):
        find_method("dare-ties", "space.method")


def _double(base: Tensor | None, sources: list[Tensor], blend: Blend, drops: object) -> Tensor:
    return 2 * sources[0].float()


DOUBLE = Method(LINEAR.spec, _double)


def test_a_package_can_bring_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        name: EntryPoint(name, f"{__name__}:{target}", registry.GROUP)
        for name, target in (("double", "DOUBLE"), ("broken", "SLOW"))
    }
    monkeypatch.setattr(registry, "plugins", lambda group: points)
    assert find_method("double", "m") is DOUBLE
    with pytest.raises(InputError, match="is no merge method"):
        find_method("broken", "m")
    with pytest.raises(InputError, match="Did you mean 'double'"):
        find_method("doubel", "m")
