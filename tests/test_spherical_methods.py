"""Methods that go along arcs, at the limits: vectors that are zero, equal, opposite or tiny; whole and by rows.

The formulas are written out once more, in float64 and over the elements themselves, with mergekit's rules for what has
no direction: a zero vector has a cosine of zero with everything, and vectors without an angle are mixed straight.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evomerge.merging.arithmetic.passes import Combine
from evomerge.method import own_methods
from evomerge.recipes.stack import Blend
from evomerge.testing.methods import merge, plan

METHODS = own_methods()
Array = NDArray[np.float64]

SHAPE = (6, 32)


def slow_slerp(t: float, a: Array, b: Array, straight: float) -> Array:
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    cosine = float(a.ravel() @ b.ravel()) / (lengths[0] * lengths[1]) if all(lengths) else 0.0
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < straight:
        return (1 - t) * a + t * b
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


def slow_multislerp(vectors: list[Array], w: list[float]) -> Array:
    lengths = [float(np.linalg.norm(v)) for v in vectors]
    units = [v / (n + 1e-8) for v, n in zip(vectors, lengths, strict=True)]
    mean = sum((x * u for x, u in zip(w, units, strict=True)), np.zeros_like(vectors[0]))
    directions = sum((x * v / (n or 1) for x, v, n in zip(w, vectors, lengths, strict=True)), np.zeros_like(mean))
    if np.linalg.norm(mean) < 1e-8 or np.linalg.norm(directions) < 1e-6:  # they balance
        return sum((x * v for x, v in zip(w, vectors, strict=True)), np.zeros_like(vectors[0]))
    mean = mean / np.linalg.norm(mean)
    tangent = sum((x * (u - (u * mean).sum() * mean) for x, u in zip(w, units, strict=True)), np.zeros_like(mean))
    angle = np.linalg.norm(tangent) + 1e-8
    on_sphere = mean * np.cos(angle) + tangent * (np.sin(angle) / angle)
    return np.asarray(on_sphere * float(np.dot(lengths, w)))


def slow_karcher(vectors: list[Array], w: list[float]) -> Array:
    lengths = [float(np.linalg.norm(v)) for v in vectors]
    kept = [(v / n, x) for v, n, x in zip(vectors, lengths, w, strict=True) if n > 1e-5]
    if not kept:
        return np.zeros_like(vectors[0])
    total = sum(x for _, x in kept)
    mean = sum((x / total * u for u, x in kept), np.zeros_like(vectors[0]))
    mean = kept[0][0] if np.linalg.norm(mean) < 1e-5 else mean / np.linalg.norm(mean)
    for _ in range(10):
        step = np.zeros_like(mean)
        for u, x in kept:
            angle = np.arccos(np.clip((u * mean).sum(), -1, 1))
            if 1e-5 <= angle <= np.pi - 1e-5:
                step += x / total * angle / np.sin(angle) * (u - (u * mean).sum() * mean)
        far = np.linalg.norm(step)
        if far < 1e-5:
            break
        mean = np.cos(far) * mean + np.sin(far) * step / far
        mean = mean / np.linalg.norm(mean)
    return np.asarray(mean * float(np.dot(lengths, w)))


def pairs(limit: str) -> tuple[Array, Array]:
    """Two vectors, or changes of a base, at a limit."""
    rng = np.random.default_rng(3)
    one, other = np.round(rng.normal(size=(2, *SHAPE)) * 80) / 4096  # exact in float32, also on top of the base
    few = np.zeros(SHAPE)
    few[1, 2] = other[1, 2]
    return {
        "usual": (one, other),
        "the second is zero": (one, np.zeros(SHAPE)),
        "the first is zero": (np.zeros(SHAPE), other),
        "both are zero": (np.zeros(SHAPE), np.zeros(SHAPE)),
        "rows are zero": (one * (np.arange(6) % 2)[:, None], other * (np.arange(6) % 3 > 0)[:, None]),
        "columns are zero": (one * (np.arange(32) % 2), other * (np.arange(32) % 3 > 0)),
        "equal": (one, one),
        "as good as equal": (one, one * (1 + 1e-6 * rng.normal(size=SHAPE))),
        "opposite": (one, -one),
        "opposite, of other length": (one, -3 * one),
        "the same way, three times as long": (one, 3 * one),
        "one element changed": (one, few),
        "the second is tiny": (one, other * 1e-6),
        "the first is tiny": (one * 1e-9, other),
        "the second is almost nothing": (one, other * 1e-20),
        "both are tiny": (one * 1e-22, other * 1e-22),
    }[limit]


LIMITS = [
    "usual", "the second is zero", "the first is zero", "both are zero", "rows are zero", "columns are zero", "equal",
    "as good as equal", "opposite", "opposite, of other length", "the same way, three times as long",
    "one element changed", "the second is tiny", "the first is tiny", "the second is almost nothing", "both are tiny",
]  # fmt: skip
ORIGINS = ["no base", "a base of zero", "a base"]


def blend_of(method: str, w: list[float], base: bool, **switches: bool) -> Blend:
    names = [f"s{i}" for i in range(len(w))]
    numbers = {"t": w[1]} if method == "slerp" else {"weight": dict(zip(names, w, strict=True))}
    return Blend(method=method, sources=names, base="b" if base else None, parameters={**numbers, **switches})


def check(blend: Blend, origin: str, changes: list[Array], expected: object) -> None:
    """Merge float32 tensors and compare with a formula of their changes, as float64 has them after the rounding."""
    if origin == "a base":
        base = torch.from_numpy(np.round(np.random.default_rng(9).normal(size=SHAPE) * 1024) / 1024).float()
    else:
        base = torch.zeros(SHAPE)
    sources = [(base.double() + torch.from_numpy(change)).float() for change in changes]
    exact = [(x.double() - base.double()).numpy() for x in sources]
    merged = merge(METHODS[blend.method], base if blend.base else None, sources, blend)
    change = (merged.double() - base.double()).numpy()
    right = expected(exact)  # type: ignore[operator]
    size = max(float(np.abs(x).max()) for x in [*exact, right])
    rounding = 3e-7 * float(base.abs().max())  # of the merged tensor to float32
    np.testing.assert_allclose(change, right, rtol=0, atol=2e-5 * size + rounding)


@pytest.mark.parametrize("limit", LIMITS)
def test_slerp(limit: str) -> None:
    straight = np.sin(np.arccos(0.9995))  # mergekit's rule: a |cos| of 0.9995 and more
    for t in (0.0, 0.3, 0.5):
        blend = blend_of("slerp", [1 - t, t], False)
        check(blend, "no base", list(pairs(limit)), lambda x, t=t: slow_slerp(t, *x, straight))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_nuslerp(limit: str, origin: str) -> None:
    for t in (0.25, 0.5):
        for switches in ({}, {"flatten": False}, {"flatten": False, "row_wise": True}):
            blend = blend_of("nuslerp", [1 - t, t], origin != "no base", **switches)

            def expected(x: list[Array], t: float = t, switches: dict[str, bool] = switches) -> Array:
                one, other = x
                if not switches:
                    return slow_slerp(t, one, other, 1e-6)
                if "row_wise" in switches:
                    return np.stack([slow_slerp(t, a, b, 1e-6) for a, b in zip(one.T, other.T, strict=True)], axis=1)
                return np.stack([slow_slerp(t, a, b, 1e-6) for a, b in zip(one, other, strict=True)])

            check(blend, origin, list(pairs(limit)), expected)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_multislerp(limit: str, origin: str) -> None:
    third = np.random.default_rng(4).normal(size=SHAPE) * 0.02
    for more, w in (([], [0.5, 0.5]), ([], [0.75, 0.25]), ([third], [0.5, 0.25, 0.25])):
        blend = blend_of("multislerp", w, origin != "no base")
        check(blend, origin, [*pairs(limit), *more], lambda x, w=w: slow_multislerp(x, w))


@pytest.mark.parametrize("limit", LIMITS)
def test_karcher(limit: str) -> None:
    third = np.random.default_rng(4).normal(size=SHAPE) * 0.02
    for more, w in (([], [0.5, 0.5]), ([], [0.75, 0.25]), ([third], [0.5, 0.25, 0.25])):
        check(blend_of("karcher", w, False), "no base", [*pairs(limit), *more], lambda x, w=w: slow_karcher(x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_source_that_leaves_a_tensor_as_it_was_halves_the_change_of_the_other(dtype: torch.dtype) -> None:
    """Such as an adapter on attention alone, in a tensor of the feed-forward blocks."""
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    tuned = (base + 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))).to(dtype)
    change = tuned.double() - base.double()
    for method, share in (("multislerp", 0.5), ("nuslerp", 0.5**0.5)):
        merged = merge(METHODS[method], base, [tuned, base.clone()], blend_of(method, [0.5, 0.5], True))
        assert torch.allclose(merged.double() - base.double(), share * change, atol=3e-7 * float(base.abs().max()))


def test_factors_of_the_usual_size_are_one_combination() -> None:
    base, *sources = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3))
    planned, _ = plan(METHODS["multislerp"], base, sources, blend_of("multislerp", [0.5, 0.5], True))
    assert isinstance(planned, Combine)
