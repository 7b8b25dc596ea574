"""Steps on singular values: against their papers' formulas by decompositions in float64, their limits, and searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers_checkpoints import WORDS, save_model
from helpers_miniature import evomerge, export_of, newest_scored, short_search_file
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config, GptOssConfig, MixtralConfig, Phi3Config

from evomerge.blends import planned
from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.merging.arithmetic.jobs import TensorJob
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.materialise import Materialiser
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.site import Site
from evomerge.method import Value
from evomerge.recipes.stack import Blend, BlendStep, Role, StackRecipe
from evomerge.step import Step, find_step
from evomerge.testing.methods import THREADS, tensors
from evomerge.testing.steps import StepContract, plan, run

ISO, ISO_CTS = find_step("iso", "s"), find_step("iso_cts", "s")
BOOSTING, SVC = find_step("subspace_boosting", "s"), find_step("svc", "s")

Matrix = NDArray[np.float64]


class TestIso(StepContract):
    step = ISO
    values: ClassVar = {"strength": 0.6}
    tolerance: ClassVar[float] = 1e-5


class TestIsoCts(StepContract):
    step = ISO_CTS
    tolerance: ClassVar[float] = 1e-4


class TestSubspaceBoosting(StepContract):
    step = BOOSTING
    tolerance: ClassVar[float] = 1e-5


class TestSvc(StepContract):
    step = SVC
    tolerance: ClassVar[float] = 1e-5


# ---- the formulas ----------------------------------------------------------------------------------------------------


def svd(matrix: Matrix) -> Any:
    return np.linalg.svd(matrix, full_matrices=False)


def iso(change: Matrix, sources: Sequence[Matrix], strength: float) -> Matrix:
    u, s, v = svd(change)
    return (u * ((1 - strength) * s + strength * s.mean())) @ v


def iso_cts(change: Matrix, sources: Sequence[Matrix], common: float) -> Matrix:
    u, s, v = svd(change)
    own = round((len(s) - int(common * len(s))) / len(sources))
    k = len(s) - own * len(sources)
    lefts, rights = [u[:, :k]], [v[:k]]
    for source in sources:
        one, _, other = svd(source - u[:, :k] @ u[:, :k].T @ source)
        lefts.append(one[:, :own])
        rights.append(other[:own])
    (p, _, q), (x, _, y) = svd(np.hstack(lefts)), svd(np.vstack(rights))
    return p @ q @ x @ y


def boosted(change: Matrix, sources: Sequence[Matrix], beta: float) -> Matrix:
    u, s, v = svd(change)
    return (u * np.maximum(s, s[np.argmax(np.cumsum(s) / s.sum() >= beta)])) @ v


def calibrated(change: Matrix, sources: Sequence[Matrix], alpha: float) -> Matrix:
    u, s, v = svd(change)
    for r in range(len(s)):
        along, sums = u[:, r] @ change, 0.0
        for source in sources:
            own = u[:, r] @ source
            sums += max(alpha, along @ own / (own @ own))
        s[r] *= len(sources) / sums
    return (u * s) @ v


CASES: list[tuple[Step, Mapping[str, Value], Callable[..., Matrix]]] = [
    (ISO, {"strength": 1.0}, iso),
    (ISO, {"strength": 0.3}, iso),
    (ISO_CTS, {"common": 0.8}, iso_cts),
    (ISO_CTS, {"common": 0.3}, iso_cts),
    (BOOSTING, {"beta": 0.2}, boosted),
    (BOOSTING, {"beta": 0.01}, boosted),
    (BOOSTING, {"beta": 0.9}, boosted),
    (SVC, {"alpha": 0.1}, calibrated),
    (SVC, {"alpha": 1.0}, calibrated),
]
MADE = Combine({"b": -0.3, "s0": 0.8, "s1": 0.5})


def held(*shape: int) -> list[Tensor]:
    """A base and two fine-tunes of it, with something in common."""
    generator = torch.Generator().manual_seed(0)
    base, shared, *own = (torch.randn(shape, generator=generator) * 0.02 for _ in range(4))
    return [base, *(base + 0.3 * shared + 0.1 * x for x in own)]


def change_of(step: Step, values: Mapping[str, Value], given: Sequence[Tensor]) -> Matrix:
    return np.asarray((run(*plan(step, MADE, given, values)).double() - given[0].double()).numpy())


def wanted(formula: Callable[..., Matrix], given: Sequence[Tensor], number: Value) -> Matrix:
    """The formula's change, of the norm that there was before."""
    base, *sources = (tensor.double().numpy() for tensor in given)
    vectors = [source - base for source in sources]
    change = 0.8 * vectors[0] + 0.5 * vectors[1]
    made = formula(change, vectors, number)
    return np.asarray(made * np.linalg.norm(change) / np.linalg.norm(made))


def holds(
    step: Step, values: Mapping[str, Value], formula: Callable[..., Matrix], shape: tuple[int, int], tolerance: float
) -> None:
    """Check that a step makes what a formula says, beside its norm within a tolerance, and of that norm."""
    given = held(*shape)
    (number,) = values.values()
    expected = wanted(formula, given, number)
    made = change_of(step, values, given)
    assert np.linalg.norm(made - expected) < tolerance * np.linalg.norm(expected)
    assert np.linalg.norm(made) == pytest.approx(np.linalg.norm(expected), rel=1e-6)


@pytest.mark.parametrize(("step", "values", "formula"), CASES, ids=lambda x: getattr(x, "name", None))
@pytest.mark.parametrize("shape", [(30, 45), (45, 30), (32, 32)])
def test_is_the_papers_formula_at_the_norm_that_there_was(
    step: Step, values: Mapping[str, Value], formula: Callable[..., Matrix], shape: tuple[int, int]
) -> None:
    holds(step, values, formula, shape, tolerance=2e-5)


@pytest.mark.parametrize(("step", "values", "formula"), [CASES[1], CASES[2], CASES[5], CASES[7]])
@pytest.mark.parametrize("shape", [(1100, 500), (500, 1100)])
def test_is_the_formula_of_large_matrices(
    step: Step, values: Mapping[str, Value], formula: Callable[..., Matrix], shape: tuple[int, int]
) -> None:
    """Of more elements than a piece has."""
    holds(step, values, formula, shape, tolerance=1e-4)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_without_strength_nothing_is_decomposed() -> None:
    given = held(30, 45)
    for step, values in ((ISO, {"strength": 0.0}), (BOOSTING, {"beta": 1.0})):
        planned, _ = plan(step, MADE, given, values)
        assert planned is MADE


def test_all_directions_in_common_are_iso() -> None:
    given = held(30, 45)
    one, other = (change_of(*case, given) for case in ((ISO_CTS, {"common": 1.0}), (ISO, {"strength": 1.0})))
    assert np.allclose(one, other, atol=1e-7)


def test_a_large_alpha_calibrates_nothing() -> None:
    given = held(30, 45)
    made = run(MADE, given)
    assert torch.allclose(run(*plan(SVC, MADE, given, {"alpha": 1e6})), made, atol=1e-7)


@pytest.mark.parametrize(("step", "values", "formula"), CASES[::2])
@pytest.mark.parametrize("factor", [2.0**80, 2.0**-80])
def test_weights_whose_squares_float32_cannot_hold_are_as_others(
    step: Step, values: Mapping[str, Value], formula: Callable[..., Matrix], factor: float
) -> None:
    given = held(30, 45)
    made = change_of(step, values, [x * factor for x in given])
    assert np.allclose(made / factor, wanted(formula, given, *values.values()), atol=1e-7)


@pytest.mark.parametrize("step", [ISO, ISO_CTS, BOOSTING])
def test_changes_of_low_rank_keep_it(step: Step) -> None:
    """Adapters have no directions beside their own; what rounding adds to them is not made large."""
    base = held(40, 60)[0]
    generator = torch.Generator().manual_seed(1)
    added = [torch.randn(40, 3, generator=generator) @ torch.randn(3, 60, generator=generator) for _ in range(2)]
    given = [base, *(base + 0.01 * x for x in added)]
    made = change_of(step, {p.name: p.default for p in step.parameters}, given)
    sizes = np.linalg.svd(made, compute_uv=False)
    assert sizes[5] > 1e-2 * sizes[0]
    assert sizes[6] < 1e-5 * sizes[0]


def planned_for(site: Site, step: Step, given: Sequence[Tensor]) -> Tensor:
    """What a step makes of a tensor of another kind."""
    names = ("b", "s0", "s1")
    by_ref = {site.refs[name]: tensor for name, tensor in zip(names, given, strict=True)}
    blend = Blend(method="task_arithmetic", sources=names[1:], base="b")
    facts = Facts(site, Weights(by_ref.__getitem__, THREADS), Evidence(), 0)
    made: Pass = step.plan(facts, blend, step.values({}), MADE)
    out = torch.empty(given[0].shape)
    THREADS.run([TensorJob(made, [by_ref[site.refs[name]] for name in made.inputs], out)])
    return out


@pytest.mark.parametrize("step", [ISO, ISO_CTS, BOOSTING, SVC])
def test_what_is_no_matrix_of_a_layer_stays_as_it_is(step: Step) -> None:
    refs = {name: (name, "w") for name in ("b", "s0", "s1")}
    for role, shape in ((Role("embedding"), (30, 8)), (Role("head"), (30, 8)), (Role("mlp", 0), (30,))):
        given = held(*shape)
        assert torch.equal(planned_for(Site("w", role, shape, refs), step, given), run(MADE, given))


@pytest.mark.parametrize("step", [ISO_CTS, SVC])
def test_a_matrix_that_lies_the_other_way_round_is_the_same_layer(step: Step) -> None:
    """Directions are those of the layer's output, whichever way its weight is stored."""
    given, refs = held(30, 45), {name: (name, "w") for name in ("b", "s0", "s1")}
    straight = planned_for(Site("w", Role("mlp", 0), (30, 45), refs), step, given)
    turned = [tensor.T.contiguous() for tensor in given]
    other = planned_for(Site("w", Role("mlp", 0), (45, 30), refs, input_axis=0), step, turned)
    assert torch.allclose(straight, other.T, atol=1e-6)


def test_experts_in_one_tensor_are_matrices_of_their_own() -> None:
    given = held(3, 20, 12)
    merged = run(*plan(ISO, MADE, given, {}))
    for expert in range(3):
        alone = run(*plan(ISO, MADE, [tensor[expert].contiguous() for tensor in given], {}))
        assert torch.allclose(merged[expert], alone, atol=1e-6)


@pytest.mark.parametrize("step", [ISO, ISO_CTS, BOOSTING, SVC])
def test_a_broken_source_is_refused_by_the_tensors_name(step: Step) -> None:
    given = tensors(3, (6, 8))
    given[1][2, 3] = torch.nan
    with pytest.raises(InputError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: its changes have NaN"):
        run(*plan(step, MADE, given, {}))


# ---- what is looked up -----------------------------------------------------------------------------------------------


def test_a_change_that_comes_again_is_not_decomposed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where strength alone is searched; what differs with every candidate is not kept, and bits are the same."""
    decomposed: list[int] = []
    eigh: Callable[[Tensor], Any] = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (decomposed.append(len(gram)), eigh(gram))[1])
    names, given = ("b", "s0", "s1"), held(30, 45)
    by_ref = {(name, "w"): tensor for name, tensor in zip(names, given, strict=True)}
    site = Site("w", Role("mlp", 0), (30, 45), {name: (name, "w") for name in names})
    contents = dict.fromkeys(names, "digest")
    evidence = Evidence(tmp_path, contents)

    def merged(weight: float, strength: float, evidence: Evidence) -> Tensor:
        parameters: dict[str, Any] = {"weight": {"s0": weight, "s1": 0.5}}
        numbers = {"scale": {"factor": 0.5}, "iso": {"strength": strength}}
        steps = tuple(BlendStep(name=name, parameters=values) for name, values in numbers.items())
        blend = Blend(method="task_arithmetic", sources=names[1:], base="b", parameters=parameters, steps=steps)
        made = planned(Facts(site, Weights(by_ref.__getitem__, THREADS), evidence, 0), blend)
        out = torch.empty(30, 45)
        THREADS.run([TensorJob(made, [by_ref[site.refs[name]] for name in made.inputs], out)])
        return out

    candidates = [(0.8, 0.2), (0.8, 0.4), (0.8, 0.6), (0.8, 0.8), (0.9, 0.2), (0.7, 0.2), (0.8, 0.5)]
    made = [merged(*numbers, evidence) for numbers in candidates]
    assert len(decomposed) == 2 + 2  # it is kept the second time
    kept = len(list(tmp_path.glob("*.safetensors")))
    assert kept == 2  # the spectrum, and the base's size
    fresh = [merged(*numbers, Evidence()) for numbers in candidates]
    assert all(map(torch.equal, made, fresh))
    merged(0.8, 0.5, Evidence(tmp_path, contents))
    assert len(list(tmp_path.glob("*.safetensors"))) == kept


# ---- whole models ----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "weights the other way round": GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "queries, keys and values in one": Phi3Config(**SMALL),
    "experts of their own": MixtralConfig(**SMALL, num_local_experts=3),
    "experts in one tensor": GptOssConfig(**SMALL, head_dim=4, num_local_experts=3, num_experts_per_tok=2),
}
STEPS = tuple(BlendStep(name=name) for name in ("svc", "subspace_boosting", "iso_cts", "iso"))


@pytest.mark.parametrize("steps", [(), STEPS], ids=["tsv", "steps"])
@pytest.mark.parametrize("kind", MODELS)
def test_live_models_are_those_that_are_exported(kind: str, steps: tuple[BlendStep, ...], tmp_path: Path) -> None:
    """Bit by bit, and no matrix of a layer is the base's."""
    names = ("base", "one", "two")
    places = {name: save_model(MODELS[kind], tmp_path / name, seed=seed) for seed, name in enumerate(names)}
    sources = {name: open_source(name, str(folder), place=name) for name, folder in places.items()}
    parameters: dict[str, Any] = {"weight": {"one": 0.7, "two": 0.5}}
    method = "task_arithmetic" if steps else "tsv"
    blend = Blend(method=method, sources=names[1:], base="base", parameters=parameters, steps=steps)
    recipe = StackRecipe.uniform(blend, sources=dict.fromkeys(names, ""), tokenizer="base", layers=2)
    live = live_model(sources["base"], torch.device("cpu"))
    Materialiser(sources).write(recipe, live)
    written = live.tensors
    for name, tensor in Materialiser(sources).tensors(recipe):
        assert torch.equal(written[name], tensor), name
        if tensor.ndim > 1 and sources["base"].roles[name].layer is not None:
            assert not torch.equal(tensor, sources["base"].read(name)), name


# ---- searched --------------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # a whole search; that of test_tsv.py, of the same kind of pass, is not
def test_steps_are_searched_resumed_and_exported(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"iso": {}, "svc": {"fixed": {"alpha": 0.3}}}
    file = short_search_file(tmp_path, space={"method": "ties", "steps": steps})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert evomerge("resume", tmp_path / "search", "--set", "budget.candidates=10") == 0
    assert export_of(newest_scored(tmp_path / "search"), tmp_path / "search", tmp_path / "out") == 0
