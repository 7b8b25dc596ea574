"""Gram and the methods of papers that are points of it: contracts, formulas written apart, limits, and evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers_checkpoints import WORDS, save_model
from helpers_miniature import kept_in
from hypothesis import given as drawn_from
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config, GptOssConfig, MixtralConfig, Phi3Config

from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.merging import normal_equations
from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads
from evomerge.merging.materialise import Materialiser
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.normal_equations import Filter
from evomerge.merging.site import Site
from evomerge.method import Method, default_parameters, own_methods
from evomerge.recipes.stack import Blend, Role, StackRecipe
from evomerge.testing.methods import MethodContract, merge

METHODS = own_methods()
GRAM, WUDI, ACTMAT, SWUDI, ACE = (METHODS[name] for name in ("gram", "wudi", "actmat", "swudi", "ace"))
DATA_FREE = [GRAM, WUDI, ACTMAT, SWUDI, ACE]
THREADS = WorkerThreads(1)
SHAPES = [(60, 40), (40, 60), (12, 90), (30, 30)]
"""Tall, wide, so wide that the rows of two or three sources span only a part, square."""

Array = NDArray[np.float64]


def fine_tunes(shape: tuple[int, int], count: int, seed: int = 0, rank: int = 8, noise: float = 0.02) -> list[Tensor]:
    """A base and sources whose changes are of low rank with some noise, each of another size, as fine-tuning makes."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=random)
    sources = []
    for number in range(count):
        up, down = torch.randn((shape[0], rank), generator=random), torch.randn((rank, shape[1]), generator=random)
        change = up @ down / math.sqrt(rank) + noise * torch.randn(shape, generator=random)
        sources.append(base + 0.1 * (number + 1) * change)
    return [base, *sources]


def blend_of(method: Method, count: int, **values: Any) -> Blend:
    names = tuple(f"s{i}" for i in range(count))
    parameters = default_parameters(method, names)
    for name, value in values.items():
        of_sources = dict(zip(names, value, strict=True)) if isinstance(value, Sequence) and name == "weight" else value
        parameters[name] = of_sources
    return Blend(method=method.name, sources=names, base="b" if method.needs_base else None, parameters=parameters)


def changes_of(given: Sequence[Tensor]) -> list[Array]:
    base, *sources = given
    return [(source - base).double().numpy() for source in sources]


def near(made: Tensor, base: Tensor, change: Array, tolerance: float = 2e-5) -> bool:
    """Whether a merge is the base and this change, relative to the change's largest element."""
    off = np.abs(made.double().numpy() - base.double().numpy() - change).max()
    return bool(off <= tolerance * max(np.abs(change).max(), 1e-3))


# ---- contracts -------------------------------------------------------------------------------------------------------


class TestGram(MethodContract):
    method = GRAM
    tolerance: ClassVar[float] = 1e-5


class TestWudi(MethodContract):
    method = WUDI
    tolerance: ClassVar[float] = 1e-5
    whole = None


class TestActmat(MethodContract):
    method = ACTMAT
    tolerance: ClassVar[float] = 1e-5


class TestSwudi(MethodContract):
    method = SWUDI
    tolerance: ClassVar[float] = 1e-5


class TestAce(MethodContract):
    method = ACE
    tolerance: ClassVar[float] = 1e-5
    whole = None


# ---- slow formulas ---------------------------------------------------------------------------------------------------


def wudi_plainly(changes: Sequence[Array]) -> Array:
    """The normal equations of the paper's loss, element by element of the sum."""
    width = changes[0].shape[1]
    above, below = np.zeros(changes[0].shape), 1e-8 * np.eye(width)
    for change in changes:
        square = np.trace(change.T @ change)
        above += change @ (change.T @ change) / square
        below += change.T @ change / square
    return np.asarray(np.linalg.solve(below.T, above.T).T)


def actmat_plainly(changes: Sequence[Array], weights: Sequence[float]) -> Array:
    above = sum(w * d @ d.T @ d for w, d in zip(weights, changes, strict=True))
    below = sum(w * d.T @ d for w, d in zip(weights, changes, strict=True))
    return np.asarray(above @ np.linalg.pinv(below, rcond=1e-12, hermitian=True))


def swudi_plainly(changes: Sequence[Array], time: float, share: float) -> Array:
    squares = [np.sum(d * d) for d in changes]
    below = sum(d.T @ d / s for d, s in zip(changes, squares, strict=True))
    above = sum(d @ d.T @ d / s for d, s in zip(changes, squares, strict=True))
    values, vectors = np.linalg.eigh(below)
    values = np.maximum(values, 1e-8)
    passed = 1 - np.exp(-values * time)
    passed[: len(values) - math.ceil(len(values) * share)] = 0.0
    start = sum(changes)
    taken = start @ vectors * passed @ vectors.T
    return np.asarray(start - taken + above @ vectors * (passed / values) @ vectors.T)


def ace_plainly(changes: Sequence[Array]) -> Array:
    width = changes[0].shape[1]
    sizes = np.array([np.sum(d * d) for d in changes])
    logs = np.log(sizes)
    uneven = logs.var(ddof=1) > 0.3 * logs.mean() ** 2
    covariances, sums, above = [], np.zeros((width, width)), np.zeros(changes[0].shape)
    for d in changes:
        centred = d - d.mean(axis=0)
        covariance = centred.T @ centred
        divisor = np.trace(covariance) if uneven else 1.0
        covariances.append(covariance / divisor)
        ridged = covariance / divisor + 0.01 / divisor * np.eye(width)
        sums += ridged
        above += centred @ ridged
    prior = np.mean(sum(covariances), axis=0) / (sizes.mean() if uneven else 1.0)
    made = above @ np.linalg.inv(sums + np.outer(np.ones(width), prior))
    if uneven:
        residual = made + sum(d @ (c - sums / len(changes)) for d, c in zip(changes, covariances, strict=True))
        u, s, v = np.linalg.svd(residual, full_matrices=False)
        kept = int(0.3 * len(s))
        made = made + s[:kept].mean() * u[:, :kept] @ v[:kept]
    return np.asarray(made)


def gram_plainly(
    changes: Sequence[Array],
    weights: Sequence[float],
    norm: float,
    log_eps: float,
    start: float,
    flow: bool,
    rank: float,
) -> Array:
    """By the eigenvalues of C, for all of the box."""
    width = changes[0].shape[1]
    shares = [w / np.sum(d * d) ** norm for w, d in zip(weights, changes, strict=True)]
    below = sum(c * d.T @ d for c, d in zip(shares, changes, strict=True))
    above = sum(c * d @ d.T @ d for c, d in zip(shares, changes, strict=True))
    eps = 10.0**log_eps * np.trace(below) / width
    values, vectors = np.linalg.eigh(below)
    values = np.maximum(values, 0)
    filtered = np.where(values > 1e-13 * eps, -np.expm1(-values / eps) / np.maximum(values, 1e-300), 1 / eps)
    filtered = filtered if flow else 1 / (values + eps)
    filtered[: width - math.ceil(rank * width)] = 0.0
    begin = start * sum(w * d for w, d in zip(weights, changes, strict=True)) / sum(weights)
    return np.asarray(begin + (above - begin @ below) @ vectors * filtered @ vectors.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_is_the_plain_formula(shape: tuple[int, int]) -> None:
    given = fine_tunes(shape, 3)
    made = merge(WUDI, given[0], given[1:], blend_of(WUDI, 3, **{"lambda": 0.7}))
    assert near(made, given[0], 0.7 * wudi_plainly(changes_of(given)))


@pytest.mark.parametrize("shape", SHAPES)
def test_actmat_is_the_plain_formula(shape: tuple[int, int]) -> None:
    given, weights = fine_tunes(shape, 3), (0.3, 1.2, 0.8)
    made = merge(ACTMAT, given[0], given[1:], blend_of(ACTMAT, 3, weight=weights))
    assert near(made, given[0], gram_plainly(changes_of(given), weights, 0.0, -8.0, 0.0, flow=False, rank=1.0))
    assert near(made, given[0], actmat_plainly(changes_of(given), weights), 1e-3)  # all but the weakest directions


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.5, 0.85, 1.0])
def test_swudi_is_the_plain_formula(shape: tuple[int, int], share: float) -> None:
    given = fine_tunes(shape, 3)
    made = merge(SWUDI, given[0], given[1:], blend_of(SWUDI, 3, log_t=math.log10(300), rank=share, **{"lambda": 0.2}))
    assert near(made, given[0], 0.2 * swudi_plainly(changes_of(given), 300.0, share))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(1.0, 1.5, 0.8), (1e-4, 1.0, 30.0)])
def test_ace_is_the_plain_formula(shape: tuple[int, int], sizes: Sequence[float]) -> None:
    """With even norms, and with such that it divides by them and refines the spectrum."""
    base, *sources = fine_tunes(shape, 3)
    sources = [base + size * (source - base) for size, source in zip(sizes, sources, strict=True)]
    made = merge(ACE, base, sources, blend_of(ACE, 3))
    assert near(made, base, ace_plainly(changes_of([base, *sources])), 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("norm", "log_eps", "start", "flow", "rank"),
    [
        (1.0, -2.0, 1.0, False, 1.0),
        (0.5, -4.0, 0.0, False, 1.0),
        (0.0, 0.5, 2.5, False, 0.4),
        (1.0, -3.0, 3.0, True, 0.7),
    ],
)
def test_gram_is_the_plain_formula(
    shape: tuple[int, int], norm: float, log_eps: float, start: float, flow: bool, rank: float
) -> None:
    given, weights = fine_tunes(shape, 3), (0.3, 1.2, 0.8)
    blend = blend_of(
        GRAM, 3, weight=weights, norm=norm, log_eps=log_eps, start=start, filter="flow" if flow else "ridge", rank=rank,
        **{"lambda": 0.7},
    )  # fmt: skip
    wanted = 0.7 * gram_plainly(changes_of(given), weights, norm, log_eps, start, flow, rank)
    assert near(merge(GRAM, given[0], given[1:], blend), given[0], wanted)


@pytest.mark.parametrize("shape", [(1000, 530), (400, 1320)])
def test_large_tall_and_wide_matrices_are_the_plain_formulas(shape: tuple[int, int]) -> None:
    """Above the half million elements up to which a tensor is one piece."""
    given, weights = fine_tunes(shape, 2), (0.3, 1.2)
    changes = changes_of(given)
    wanted = {
        "gram": gram_plainly(changes, weights, 1.0, -2.0, 1.0, flow=False, rank=1.0),
        "wudi": wudi_plainly(changes),
        "actmat": actmat_plainly(changes, weights),
        "swudi": swudi_plainly(changes, 300.0, 0.85),
        "ace": ace_plainly(changes),
    }
    for method in DATA_FREE:
        numbers = {"weight": weights} if any(p.name == "weight" for p in method.parameters) else {}
        made = merge(method, given[0], given[1:], blend_of(method, 2, **numbers))
        assert near(made, given[0], wanted[method.name], 1e-3 if method is ACTMAT else 1e-4), method.name


# ---- points of the box, and limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_papers_are_points_of_the_box(shape: tuple[int, int]) -> None:
    given, width = fine_tunes(shape, 3), shape[1]
    points = {
        "wudi": {"norm": 1.0, "start": 0.0, "log_eps": math.log10(1e-8 * width / 3)},
        "actmat": {"norm": 0.0, "start": 0.0, "log_eps": -8.0},
        "swudi": {"norm": 1.0, "start": 3.0, "filter": "flow", "rank": 0.85, "log_eps": math.log10(width / (3 * 300))},
    }
    for name, point in points.items():
        made = merge(METHODS[name], given[0], given[1:], blend_of(METHODS[name], 3))
        change = merge(GRAM, given[0], given[1:], blend_of(GRAM, 3, **point)) - given[0]
        assert near(made, given[0], change.double().numpy(), 1e-4), name


@pytest.mark.parametrize(("shape", "start"), [*((shape, 1.0) for shape in SHAPES), ((60, 40), 0.0), ((30, 30), 0.0)])
def test_equal_grams_give_task_arithmetic(shape: tuple[int, int], start: float) -> None:
    """Changes that are one change with its outputs turned show the same inputs."""
    (base, source), random = fine_tunes(shape, 1, noise=1.0), torch.Generator().manual_seed(1)
    turns = [torch.linalg.qr(torch.randn((shape[0], shape[0]), generator=random))[0] for _ in range(2)]
    changes = [source - base, *(turn @ (source - base) for turn in turns)]
    weights, log_eps = (0.3, 1.2, 0.5), -2.0 if start else -6.0
    blend = blend_of(GRAM, 3, weight=weights, start=start, log_eps=log_eps)
    made = merge(GRAM, base, [base + change for change in changes], blend)
    wanted = sum(w * change.double().numpy() for w, change in zip(weights, changes, strict=True)) / sum(weights)
    assert near(made, base, wanted, 1e-3 if start else 1e-2)  # rounding leaves them a little unequal


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_ridge_leaves_the_start(shape: tuple[int, int]) -> None:
    given, weights = fine_tunes(shape, 3), (0.3, 1.2, 0.5)
    made = merge(GRAM, given[0], given[1:], blend_of(GRAM, 3, weight=weights, log_eps=9.0, start=2.0))
    mean = sum(w * change for w, change in zip(weights, changes_of(given), strict=True)) / sum(weights)
    assert near(made, given[0], 2.0 * np.asarray(mean))


@pytest.mark.parametrize("filtered", ["ridge", "flow"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_source_alone_is_that_source(shape: tuple[int, int], filtered: str) -> None:
    """From no start, on what its own change shows: where eps goes to zero."""
    base, source = fine_tunes(shape, 1)
    made = merge(GRAM, base, [source], blend_of(GRAM, 1, start=0.0, log_eps=-9.0, filter=filtered))
    assert near(made, base, changes_of([base, source])[0], 1e-4)
    for method in (WUDI, ACTMAT, SWUDI):
        assert near(merge(method, base, [source], blend_of(method, 1)), base, changes_of([base, source])[0], 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_only_ratios_of_weights_count_and_equal_norms_leave_the_exponent_nothing_to_do(shape: tuple[int, int]) -> None:
    base, *sources = fine_tunes(shape, 3)
    first = merge(GRAM, base, sources, blend_of(GRAM, 3, weight=(0.2, 0.5, 1.0)))
    assert torch.allclose(first, merge(GRAM, base, sources, blend_of(GRAM, 3, weight=(0.4, 1.0, 2.0))), atol=1e-6)
    even = [base + (source - base) / torch.linalg.norm(source - base) for source in sources]
    made = [merge(GRAM, base, even, blend_of(GRAM, 3, weight=(0.2, 0.5, 1.0), norm=norm)) for norm in (0.0, 0.5, 1.0)]
    assert all(torch.allclose(made[0], other, atol=1e-6) for other in made[1:])
    longer = [base + size * (source - base) for size, source in zip((1.0, 4.0, 0.1), even, strict=True)]
    assert not torch.allclose(
        *(merge(GRAM, base, longer, blend_of(GRAM, 3, norm=norm)) for norm in (0.0, 1.0)), atol=1e-3
    )


# ---- what is singular, zero, broken ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_source_that_changes_nothing_has_no_say(method: Method, shape: tuple[int, int]) -> None:
    """As an expert of a mixture that its training never chose; and all of them so leave the base as it is."""
    base, *sources = fine_tunes(shape, 2)
    assert torch.equal(merge(method, base, [base.clone(), base.clone()], blend_of(method, 2)), base)
    made = merge(method, base, [sources[0], base.clone(), sources[1]], blend_of(method, 3))
    assert torch.isfinite(made).all()
    if method in (WUDI, ACTMAT):  # elsewhere a mean is the start, to which it belongs
        without = merge(method, base, sources, blend_of(method, 2))
        assert torch.allclose(made, without, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_changes_of_low_rank_are_taken_whole(shape: tuple[int, int]) -> None:
    """Sources that each change inputs of their own keep all of it: what adapters of unlike tasks come near to."""
    base, random = fine_tunes(shape, 0)[0], torch.Generator().manual_seed(2)
    inputs = torch.linalg.qr(torch.randn((shape[1], 6), generator=random))[0].T
    changes = [0.1 * torch.randn((shape[0], 3), generator=random) @ inputs[3 * i : 3 * i + 3] for i in range(2)]
    for method, numbers in ((WUDI, {}), (ACTMAT, {}), (GRAM, {"start": 0.0, "log_eps": -8.0})):
        made = merge(method, base, [base + change for change in changes], blend_of(method, 2, **numbers))
        assert torch.allclose(made - base, changes[0] + changes[1], atol=1e-4), method.name


def test_a_ridge_that_rounding_loses_is_decomposed_instead() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1e-3, 0.0], dtype=torch.float64))
    rows = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    made = Filter(0.0).apply(rows, torch.zeros_like(rows), matrix)
    assert torch.allclose(made, torch.tensor([[0.25, 1e3, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: method.name)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_source_is_refused_by_name(method: Method, broken: float) -> None:
    base, *sources = fine_tunes((30, 20), 2)
    sources[1][3, 4] = broken
    with pytest.raises(InputError, match=r"up_proj\.weight has NaN or Inf in its difference to b") as refused:
        merge(method, base, sources, blend_of(method, 2))
    assert refused.value.place == "sources.s1"


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: method.name)
def test_any_numbers_within_the_limits_give_finite_matrices(method: Method) -> None:
    """Also where all changes are of rank one, and one of them is nothing."""

    @settings(max_examples=settings().max_examples // 2, deadline=None)
    @drawn_from(st.data())
    def check(data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from([(3, 5), (5, 3), (2, 9)]))
        base, *sources = fine_tunes(shape, 3, rank=1, noise=data.draw(st.sampled_from([0.0, 0.1])))
        sources[data.draw(st.integers(0, 2))] = base.clone()
        contract = type("Drawn", (MethodContract,), {"method": method})()
        assert torch.isfinite(merge(method, base, sources, contract._any_blend(data))).all()

    check()


# ---- where a tensor holds several matrices, or one the other way -----------------------------------------------------


def made_at(method: Method, given: Sequence[Tensor], evidence: Evidence | None = None, axis: int = 1) -> Tensor:
    """A merge by the method's defaults of tensors that stand as ``axis`` says."""
    blend = blend_of(method, len(given) - 1)
    names = ("b", *blend.sources)
    held = dict(zip(names, given, strict=True))
    site = Site("w", Role("mlp", 0), tuple(given[0].shape), {name: (name, "w") for name in names}, axis)
    plan = method.plan(Facts(site, Weights(lambda ref: held[ref[0]], THREADS), evidence or Evidence(), 0), blend)
    out = torch.empty(given[0].shape)
    THREADS.run([TensorJob(plan, [held[name] for name in plan.inputs], out)])
    return out


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_inputs_by_outputs_is_the_same_layer(method: Method, shape: tuple[int, int]) -> None:
    given = fine_tunes(shape, 2)
    turned = made_at(method, [tensor.T.contiguous() for tensor in given], axis=0)
    assert torch.allclose(made_at(method, given), turned.T, atol=1e-5)
    assert not torch.allclose(made_at(method, given), made_at(method, given, axis=0), atol=1e-3)


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: method.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_experts_in_one_tensor_are_matrices_of_their_own(method: Method, axis: int) -> None:
    experts = [fine_tunes((12, 30), 2, seed) for seed in range(3)]
    experts[1][1:] = [experts[1][0].clone()] * 2  # never chosen
    together = [torch.stack([expert[k] for expert in experts]) for k in range(3)]
    made = made_at(method, together, axis=axis)
    for number, expert in enumerate(experts):
        assert torch.allclose(made[number], made_at(method, expert, axis=axis), atol=1e-6)


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=64),
    "phi3": lambda: Phi3Config(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    ),
    "mixtral": lambda: MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    ),
    "gpt_oss": lambda: GptOssConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, head_dim=8, pad_token_id=0,
    ),
}  # fmt: skip
TURNED = {"gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight"), "gpt_oss": ("gate_up_proj", "down_proj")}
"""Ends of the names of what is stored as inputs by outputs."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_a_model_is_merged_by_what_it_is(kind: str, tmp_path: Path) -> None:
    """Conv1D on its own side, fused q, k and v as the one matrix that they are, experts one by one; else a mean."""
    sources = {}
    for seed, name in enumerate(("base", "a", "b")):
        folder = save_model(CONFIGS[kind](), tmp_path / name, seed=seed, dtype=torch.float32)
        sources[name] = open_source(name, str(folder), place=name)
    mix = Blend(method="gram", sources=("a", "b"), base="base", parameters=default_parameters(GRAM, ("a", "b")))
    references = {name: source.reference for name, source in sources.items()}
    recipe = StackRecipe.uniform(mix, sources=references, tokenizer="base", layers=1)
    seen = set()
    for name, made in Materialiser(sources).tensors(recipe):
        base, *tensors = (sources[each].read(name) for each in ("base", "a", "b"))
        in_layer, is_bias = sources["base"].roles[name].layer is not None, name.endswith("bias")
        ends = TURNED.get(kind, ())
        if not in_layer or base.ndim < 2 or is_bias:
            assert near(made, base, (tensors[0] + tensors[1]).double().numpy() / 2 - base.double().numpy()), name
            continue
        turned = name.endswith(ends) if ends else False
        seen.add((turned, base.ndim))
        for matrix in range(len(base) if base.ndim == 3 else 1):
            of_matrix = [x[matrix] if base.ndim == 3 else x for x in (made, base, *tensors)]
            one, *given = (x.T if turned else x for x in of_matrix)
            wanted = gram_plainly(changes_of(given), (1.0, 1.0), 1.0, -2.0, 1.0, flow=False, rank=1.0)
            assert near(one, given[0], wanted, 1e-4), name
    assert seen == {"gpt2": {(True, 2)}, "gpt_oss": {(True, 3), (False, 2)}}.get(kind, {(False, 2)})


# ---- what is computed once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_they_keep_as_much_as_they_say(method: Method, shape: tuple[int, int], tmp_path: Path) -> None:
    base, *sources = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    made_at(method, [base, *sources], Evidence(tmp_path, dict.fromkeys(("b", "s0", "s1", "s2"), "digest")))
    assert method.kept is not None
    assert method.kept(*shape, 3) == kept_in(tmp_path)


@pytest.mark.parametrize("method", DATA_FREE, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(60, 40), (12, 90)])
def test_candidates_share_what_they_follow_from(
    method: Method, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second worker, and other numbers, compute no products of task vectors, and decompose nothing that is kept."""
    counted, products = [], normal_equations.own_products
    monkeypatch.setattr(normal_equations, "own_products", lambda x: (counted.append(len(x)), products(x))[1])
    given, contents = fine_tunes(shape, 2), dict.fromkeys(("b", "s0", "s1"), "digest")
    first = made_at(method, given, Evidence(tmp_path, contents))
    if method is not GRAM and method is not ACTMAT:
        monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: pytest.fail("decomposed again"))
    assert torch.equal(made_at(method, given, Evidence(tmp_path, contents)), first)
    assert counted == [2]
