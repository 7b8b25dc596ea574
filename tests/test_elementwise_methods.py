"""Methods of one pass against their papers' equations, written apart from them: whole tensors in float64, no facts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.site import Site
from evomerge.method import find_method
from evomerge.recipes.stack import Blend, Role
from evomerge.testing.methods import merge, tensors

Array = NDArray[np.float64]
Numbers = Mapping[str, Any]
NAMES = ("s0", "s1", "s2")


def blend_of(method: str, numbers: Numbers, names: Sequence[str] = NAMES) -> Blend:
    """A blend in which a list has a value for each source."""
    given = {k: dict(zip(names, v, strict=True)) if isinstance(v, list) else v for k, v in numbers.items()}
    base = "b" if find_method(method, "m").needs_base else None
    return Blend(method=method, sources=tuple(names), base=base, parameters=given)


def made(method: str, base: Tensor, sources: Sequence[Tensor], numbers: Numbers) -> Tensor:
    return merge(find_method(method, "m"), base, sources, blend_of(method, numbers, NAMES[: len(sources)]))


def fine_tunes(shape: Sequence[int], dtype: torch.dtype, count: int = 3, seed: int = 0) -> list[Tensor]:
    """A base and sources such as models are.

    Sources share a part of their changes, a third of each change is zero, and that of the second source is larger.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(size: float) -> Tensor:
        return torch.randn(tuple(shape), generator=generator) * size

    base = draw(0.02)
    shared, sizes = draw(0.001), [0.001 * (1 + 3 * (k == 1)) for k in range(count)]
    changes = [(shared + draw(size)) * (torch.rand(tuple(shape), generator=generator) < 2 / 3) for size in sizes]
    return [base.to(dtype), *((base.to(dtype).float() + change).to(dtype) for change in changes)]


# ---- the equations ---------------------------------------------------------------------------------------------------


def yoyo(base: Array, sources: list[Array], n: Numbers) -> Array:
    """The card's steps on whole vectors."""
    x = np.stack([source.ravel() for source in sources])
    r = np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-8)
    u = x / r
    m = np.median(u, axis=0)
    for _ in range(300):
        nearness = 1 / (np.linalg.norm(u - m, axis=1, keepdims=True) + 1e-8)
        m = (nearness * u).sum(axis=0) / nearness.sum()
    residual = u - m
    directions, _, _ = np.linalg.svd(residual.T, full_matrices=False)
    z = residual @ directions[:, : len(x) - 1]

    def biweight(values: Array) -> Array:
        middle = sorted(abs(values))[(len(values) - 1) // 2]
        return np.clip(1 - (values / (n["cut"] * 1.4826 * middle)) ** 2, 0, None) ** 2

    weights = np.array(n["weight"])[:, None] * np.stack([biweight(column) for column in z.T], axis=1)
    weights *= biweight(np.linalg.norm(z, axis=1))[:, None]
    fused = m + directions[:, : len(x) - 1] @ ((weights * z).sum(axis=0) / weights.sum(axis=0))
    length = np.average(np.linalg.norm(x, axis=1), weights=n["weight"])
    return (fused * length / np.linalg.norm(fused)).reshape(base.shape)


def magmax(base: Array, sources: list[Array], n: Numbers) -> Array:
    parts = np.stack([w * (x - base) for w, x in zip(n["weight"], sources, strict=True)])
    chosen = (np.abs(parts) + 1e-15 * (parts > 0)).argmax(axis=0)  # of equal ones the positive one
    return base + n["lambda"] * np.take_along_axis(parts, chosen[None], axis=0)[0]


def consensus(base: Array, sources: list[Array], n: Numbers) -> Array:
    parts = [w * (x - base) for w, x in zip(n["weight"], sources, strict=True)]
    total = sum(parts)
    masks = [np.abs(v) > r * np.abs(total - v) for v, r in zip(parts, n["ratio"], strict=True)]
    return base + n["lambda"] * total * (sum(mask.astype(int) for mask in masks) >= n["votes"])


def localize_and_stitch(base: Array, sources: list[Array], n: Numbers) -> Array:
    """Of a model that is this one tensor; magnitudes go by the upper 16 bits of float32."""
    deltas = np.stack([x - base for x in sources])
    ranks = (np.abs(deltas).astype(np.float32).view(np.uint32) >> 16).astype(int)
    masks = []
    for rank, delta, density in zip(ranks, deltas, n["density"], strict=True):
        least = np.sort(rank, axis=None)[::-1][max(1, int(density * rank.size)) - 1]
        masks.append((rank >= least) & ((delta != 0) | (density == 1)))
    shares = np.stack(masks) * np.array(n["weight"]).reshape(-1, *[1] * base.ndim)
    total = shares.sum(axis=0)
    return base + n["lambda"] * (shares * deltas).sum(axis=0) / np.where(total > 0, total, 1)


def cabs(base: Array, sources: list[Array], n: Numbers) -> Array:
    """Block by block; magnitudes go by the upper 16 bits of float32, and of equal ones the first."""
    merged = base.copy().reshape(-1, base.shape[-1])
    free = np.ones(merged.shape, dtype=bool)
    for source in sorted(range(len(sources)), key=lambda i: -n["priority"][i]):
        delta = (sources[source] - base).reshape(merged.shape)
        ranks = (np.abs(delta).astype(np.float32).view(np.uint32) >> 16).astype(int)
        for begin in range(0, merged.shape[1], 256):
            size = min(256, merged.shape[1] - begin)
            wanted = math.ceil(round(256 * n["density"][source]) * size / 256)
            places = range(begin, begin + size)
            for row in range(len(merged)):
                left = [p for p in places if free[row, p]]
                for p in sorted(left, key=lambda p: -ranks[row, p])[:wanted]:
                    merged[row, p] += n["lambda"] * n["weight"][source] * delta[row, p]
                    free[row, p] = False
    return merged.reshape(base.shape)


def pcb(base: Array, sources: list[Array], n: Numbers) -> Array:
    """The authors' steps; where all weights have 16 bits, thresholds of magnitudes go by their upper 16 bits."""
    deltas = np.stack([(x - base).ravel() for x in sources])
    count, size = deltas.shape
    coarse = all((x.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all() for x in (base, *sources))
    ends = []
    for ordered in np.sort(np.abs(deltas), axis=1):
        pair = ordered[[int(size * n["clamp"]), int(size * (1 - n["clamp"]) - 1)]].astype(np.float32)
        ends.append((pair.view(np.uint32) & (0xFFFF0000 if coarse else 0xFFFFFFFF)).view(np.float32).astype(float))
    low, high = np.array(ends).T[..., None]
    sizes = np.clip(np.abs(deltas), low, high)
    scores = np.exp(count * ((sizes - low) / (high - low)) ** 2) * np.tanh(deltas * deltas.sum(axis=0))
    least = np.sort(scores, axis=1)[:, int(size * (1 - n["ratio"])), None].clip(0)
    shares = np.clip(scores - least, 0, None) / (scores.max(axis=1, keepdims=True) - least)
    weighted = np.array(n["weight"])[:, None] * shares * np.sign(deltas) * sizes
    return base + (weighted.sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-12)).reshape(base.shape)


def resmerge(base: Array, sources: list[Array], n: Numbers) -> Array:
    """The steps of the paper on whole matrices; of stacked experts one after another."""
    if base.ndim == 3:
        return np.stack([resmerge(base[e], [x[e] for x in sources], n) for e in range(len(base))])
    if base.ndim < 2:
        return base + n["lambda"] * sum(x - base for x in sources) / len(sources)
    heads, residuals = [], []
    for source in sources:
        u, s, v = np.linalg.svd(source - base, full_matrices=False)
        heads.append(s[0] * np.outer(u[:, 0], v[0]))
        residuals.append(source - base - heads[-1])

    def cosines(matrices: list[Array]) -> list[float]:
        pairs = itertools.combinations([matrix / np.linalg.norm(matrix) for matrix in matrices], 2)
        return [float((one * other).sum()) for one, other in pairs]

    lengths = [np.linalg.norm(residual) for residual in residuals]
    direction = sum(residual / length for residual, length in zip(residuals, lengths, strict=True))
    direction = direction / np.linalg.norm(direction)
    coherence = np.mean([(r / length * direction).sum() for r, length in zip(residuals, lengths, strict=True)])
    score = ((np.mean(cosines(residuals)) + 1) / 2 + (coherence + 1) / 2) / 2
    backbone = direction * coherence ** (n["beta"] - 0.3 * score) * np.mean(lengths)
    if coherence <= 1 / math.sqrt(len(sources)):
        backbone = sum(residuals) / len(sources)
    agreement = np.mean([max(cosine, 0.0) for cosine in cosines(heads)])
    head = sum(heads) / np.linalg.norm(sum(heads)) * n["rho"] * agreement * np.linalg.norm(backbone)
    return base + n["lambda"] * (backbone + head)


# Numbers that float32 has, where elements are compared: differences of bfloat16 weights have common multiples.
CASES: list[tuple[Callable[..., Array], Numbers]] = [
    (yoyo, {"weight": [1.0, 1.0, 1.0], "cut": 4.685}),
    (yoyo, {"weight": [0.2, 0.9, 0.5], "cut": 1.9}),
    (magmax, {"weight": [0.5, 0.5, 0.5], "lambda": 1.0}),
    (magmax, {"weight": [1.25, 0.1875, 0.875], "lambda": 0.5}),
    (localize_and_stitch, {"weight": [1.0, 1.0, 1.0], "density": [0.1, 0.1, 0.1], "lambda": 1.0}),
    (localize_and_stitch, {"weight": [1.0, 0.3, 0.7], "density": [0.05, 0.8, 1.0], "lambda": 1.3}),
    (pcb, {"weight": [1.2, 1.2, 1.2], "ratio": 0.05, "clamp": 0.01}),
    (pcb, {"weight": [0.4, 1.5, 0.9], "ratio": 0.2, "clamp": 0.03}),
    (resmerge, {"beta": 1.0, "rho": 0.2, "lambda": 1.0}),
    (resmerge, {"beta": 0.4, "rho": 0.9, "lambda": 1.3}),
    (cabs, {"weight": [1.0, 1.0, 1.0], "density": [0.25] * 3, "priority": [0.5] * 3, "lambda": 1.0}),
    (cabs, {"weight": [1.2, 0.4, 0.7], "density": [0.5, 0.1, 0.7], "priority": [0.1, 0.9, 0.3], "lambda": 0.6}),
    (consensus, {"weight": [0.5, 0.5, 0.5], "ratio": [0.375, 0.375, 0.375], "votes": 2.0, "lambda": 0.8}),
    (consensus, {"weight": [0.875, 0.25, 1.25], "ratio": [0.125, 0.5, 0.25], "votes": 1.0, "lambda": 0.6}),
    (consensus, {"weight": [0.875, 0.25, 1.25], "ratio": [0.1875, 0.25, 0.3125], "votes": 3.0, "lambda": 1.0}),
]
CASE = pytest.mark.parametrize(("formula", "numbers"), CASES, ids=lambda value: getattr(value, "__name__", ""))
ONCE = pytest.mark.parametrize(
    ("formula", "numbers"), {formula: (formula, numbers) for formula, numbers in CASES}.values(), ids=lambda value: ""
)


def check(formula: Callable[..., Array], numbers: Numbers, shape: Sequence[int], dtype: torch.dtype) -> None:
    base, *sources = fine_tunes(shape, dtype)
    origin = base.double().numpy()
    expected = formula(origin, [source.double().numpy() for source in sources], numbers)
    merged = made(formula.__name__, base, sources, numbers).double().numpy()
    assert merged.shape == tuple(shape)
    # Where a comparison is decided by float32's last digit an element may be the other one.
    off = np.abs(merged - expected) > 1e-6 * np.abs(origin).max()
    assert off.mean() <= 1e-5
    assert np.abs(expected - origin).max() > 1e-3


@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 40), (1000,), (33,), (51, 7), (3, 40, 24)], ids=str)
def test_equals_the_papers_equation(
    formula: Callable[..., Array], numbers: Numbers, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Of a matrix, a bias or norm, odd ones, and stacked experts."""
    check(formula, numbers, shape, dtype)


@ONCE
@pytest.mark.parametrize("shape", [(2100, 260), (260, 2100)], ids=["tall", "wide"])
def test_equals_the_papers_equation_on_what_is_cut_into_pieces(
    formula: Callable[..., Array], numbers: Numbers, shape: tuple[int, ...]
) -> None:
    check(formula, numbers, shape, torch.bfloat16)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_yoyo_leaves_out_who_is_far_off_and_is_a_mean_of_equals() -> None:
    _, *sources = fine_tunes((64, 48), torch.float32, count=4)
    far = sources[0] + torch.randn(64, 48, generator=torch.Generator().manual_seed(5))
    fused = made_of("yoyo", [far, *sources[1:]], {"weight": [1.0] * 4, "cut": 4.685})
    without = made_of("yoyo", sources[1:], {"weight": [1.0] * 3, "cut": 4.685})
    plain = torch.stack([far, *sources[1:]]).mean(dim=0)
    direction = torch.nn.functional.cosine_similarity
    assert direction(fused.ravel(), without.ravel(), dim=0) > 0.999
    assert direction(plain.ravel(), without.ravel(), dim=0) < 0.99
    two = made_of("yoyo", sources[:2], {"weight": [1.0, 1.0], "cut": 4.685})
    assert (
        direction(two.ravel(), (sources[0] / sources[0].norm() + sources[1] / sources[1].norm()).ravel(), dim=0)
        > 1 - 1e-6
    )


def made_of(method: str, sources: Sequence[Tensor], numbers: Numbers) -> Tensor:
    names = tuple(f"s{i}" for i in range(len(sources)))
    return merge(find_method(method, "m"), None, sources, blend_of(method, numbers, names))


def test_yoyo_has_the_mean_length_of_its_sources() -> None:
    _, *sources = fine_tunes((64, 48), torch.float32)
    fused = made_of("yoyo", [sources[0], 2 * sources[1], 3 * sources[2]], {"weight": [1.0, 1.0, 1.0], "cut": 4.685})
    norms = [float(k * source.norm()) for k, source in enumerate(sources, start=1)]
    assert float(fused.norm()) == pytest.approx(math.fsum(norms) / 3, rel=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_magmax_takes_the_positive_one_of_opposite_changes_of_one_size(sign: float) -> None:
    base = torch.zeros(3)
    one, two = sign * torch.tensor([1.0, 2.0, 0.0]), sign * torch.tensor([-1.0, 0.5, 0.0])
    merged = made("magmax", base, [one, two], {"weight": [1.0, 1.0], "lambda": 1.0})
    assert merged.tolist() == [1.0, sign * 2.0, 0.0]


def test_consensus_of_one_vote_and_no_ratio_is_task_arithmetic() -> None:
    base, *sources = tensors(4, (30, 20))
    weights = {"weight": [0.5, 0.75, 1.25], "lambda": 0.5}
    plain = made("task_arithmetic", base, sources, {**weights, "normalize": False})
    for votes in (0.0, 1.0):
        merged = made("consensus", base, sources, {**weights, "ratio": [0.0, 0.0, 0.0], "votes": votes})
        assert torch.allclose(merged, plain, atol=1e-6)


def test_consensus_with_more_votes_than_sources_is_the_base() -> None:
    base, *sources = tensors(4, (30, 20))
    numbers = {"weight": [1.0] * 3, "ratio": [0.0] * 3, "votes": 4.0, "lambda": 1.0}
    assert torch.equal(made("consensus", base, sources, numbers), base)


def test_consensus_keeps_what_two_agree_on_and_drops_what_one_wants_alone() -> None:
    base = torch.zeros(4)
    sources = [torch.tensor(row) for row in ([1.0, 1.0, 0.0, 3.0], [1.0, 0.0, 0.0, -2.0], [1.0, 0.0, 0.0, -1.0])]
    numbers = {"weight": [1.0] * 3, "ratio": [0.4] * 3, "votes": 2.0, "lambda": 1.0}
    # The last: 3 > .4 * 3, 2 > .4 * 2, 1 > .4 * 1: all three matter, though they cancel.
    assert made("consensus", base, sources, numbers).tolist() == [3.0, 0.0, 0.0, 0.0]


def test_a_stitch_of_everything_is_the_mean() -> None:
    base, *sources = tensors(4, (30, 20))
    merged = made("localize_and_stitch", base, sources, {"weight": [0.5] * 3, "density": [1.0] * 3, "lambda": 1.0})
    assert torch.allclose(merged, torch.stack(sources).mean(dim=0), atol=1e-6)


def test_a_stitch_takes_the_largest_changes_of_the_whole_model() -> None:
    """Another tensor that changes more leaves nothing of this one, one that is not changed everything."""
    base, source = fine_tunes((40, 30), torch.bfloat16, count=1)
    changed = (source != base).float().mean()
    mix = blend_of("localize_and_stitch", {"weight": [1.0], "density": [0.5], "lambda": 1.0}, ["s0"])
    method = find_method("localize_and_stitch", "m")
    for size, kept in ((1.0, 0.0), (0.0, float(changed))):
        beside = {"b": {"w": base}, "s0": {"w": base + size}}
        merged = merge(method, base, [source], mix, models=beside)
        assert float((merged != base.float()).float().mean()) == pytest.approx(kept, abs=0.01)


def test_a_stitch_of_a_sparse_change_is_not_diluted_by_what_stayed() -> None:
    base, sparse, other = torch.zeros(8), torch.zeros(8), torch.full((8,), 2.0)
    sparse[0] = 1.0
    merged = made(
        "localize_and_stitch", base, [sparse, other], {"weight": [1.0] * 2, "density": [0.9] * 2, "lambda": 1.0}
    )
    assert merged.tolist() == [1.5] + [2.0] * 7


def test_a_whole_model_is_counted_once_for_all_of_its_tensors_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    count_model = Weights.count_model
    monkeypatch.setattr(
        Weights, "count_model", lambda self, *models: counted.append(models) or count_model(self, *models)
    )
    held = dict(zip([("b", "v"), ("s", "v"), ("b", "w"), ("s", "w")], tensors(4, (7, 5)), strict=True))
    weights, evidence = Weights(held.__getitem__, WorkerThreads(1), lambda source: ["v", "w"]), Evidence()
    sites = [Site(name, Role("mlp", 0), (7, 5), {"b": ("b", name), "s": ("s", name)}) for name in ("v", "w")]
    found = {
        Facts(site, weights, evidence, 0).model_threshold("b", "s", share) for site in sites for share in (0.1, 0.6)
    }
    assert counted == [("b", "s")]
    sizes = sorted(float(size) for name in ("v", "w") for size in (held["s", name] - held["b", name]).abs().flatten())
    assert found == {sizes[-7], sizes[-42]}  # eighths, which the upper bits hold


def test_cabs_of_one_source_with_all_of_each_block_is_task_arithmetic() -> None:
    base, source = fine_tunes((9, 700), torch.bfloat16, count=1)
    numbers = {"weight": [0.7], "lambda": 0.8}
    merged = made("cabs", base, [source], {**numbers, "density": [1.0], "priority": [0.5]})
    plain = made("task_arithmetic", base, [source], {**numbers, "normalize": False})
    assert torch.allclose(merged, plain, atol=1e-8)


def test_supports_of_cabs_are_disjoint_and_go_by_priority() -> None:
    base, *sources = fine_tunes((16, 512), torch.float32, count=3)
    numbers = {"density": [0.25, 0.5, 0.5], "lambda": 1.0}

    def change(weight: list[float], priority: list[float]) -> Tensor:
        return made("cabs", base, sources, {**numbers, "weight": weight, "priority": priority}) - base

    for priority in ([0.3, 0.2, 0.1], [0.1, 0.2, 0.3]):
        tiny = 1e-30  # takes its elements, and changes none of them
        parts = [change([1.0 if i == k else tiny for i in range(3)], priority) != 0 for k in range(3)]
        assert int(sum(part.int() for part in parts).max()) == 1
        first, last = int(np.argmax(priority)), int(np.argmin(priority))
        kept = numbers["density"][first]
        sizes = (sources[first] - base).abs().view(16, 2, 256)
        largest = sizes >= sizes.topk(round(kept * 256), dim=-1).values[..., -1:]
        assert (parts[first].view_as(largest) & ~largest).float().mean() < 0.002  # half a percent of ties
        assert parts[last].float().mean() < 0.27
