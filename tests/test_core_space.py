"""Low-rank adapters merged in core space, against the merge of their whole changes and a slow plain formula."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_checkpoints import save_model, tiny_config
from safetensors.torch import load_file, save_file
from test_adapters import GPT2, LINEAR, WEIGHTS, train
from test_low_rank_rows import opened, recipe_of
from torch import Tensor

from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.mergekit.writing import to_mergekit
from evomerge.merging import core_space
from evomerge.merging.materialise import Materialiser, check_stack
from evomerge.merging.measured.evidence import Evidence
from evomerge.method import default_parameters, find_method, own_methods
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.step import find_step
from evomerge.steps.scale import SCALE
from evomerge.testing.methods import merge

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTED = ("maths", "japanese", "wide")
ADAPTERS: dict[str, dict[str, Any]] = {  # modules differ, and the rank of the last is above the matrices'
    "maths": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_rslora": True},
    "japanese": {
        "r": 2, "lora_alpha": 3, "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 1.5},
    },
    "wide": {"r": 40, "lora_alpha": 20, "target_modules": ["q_proj", "down_proj", "lm_head", "embed_tokens"]},
}  # fmt: skip
GPT2_ADAPTERS: dict[str, dict[str, Any]] = {
    name: {"r": rank, "lora_alpha": 3, "target_modules": modules, "fan_in_fan_out": True}
    for name, rank, modules in (("maths", 3, ["c_attn", "c_proj"]), ("japanese", 2, ["c_attn"]), ("wide", 20, ["c_fc"]))
}


def family(folder: Path, config: Any, adapters: dict[str, dict[str, Any]]) -> dict[str, Source]:
    base = save_model(config, folder / "base")
    trained = {name: train(base, folder / name, seed=n, **given) for n, (name, given) in enumerate(adapters.items())}
    for adapter in trained.values():  # peft copies the base's embedding and head beside their factors
        stored = load_file(adapter / WEIGHTS)
        save_file({key: tensor for key, tensor in stored.items() if "base_layer" not in key}, adapter / WEIGHTS)
    return opened(base, **trained)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return family(tmp_path_factory.mktemp("llama"), tiny_config(), ADAPTERS)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return family(tmp_path_factory.mktemp("gpt2"), GPT2, GPT2_ADAPTERS)


@pytest.fixture(params=["llama", "gpt2"])
def sources(request: pytest.FixtureRequest) -> dict[str, Source]:
    found: dict[str, Source] = request.getfixturevalue(request.param)
    return found


WEIGHTS_OF = {"maths": 0.9, "japanese": -0.4, "wide": 0.3}


def blend_of(method: str, names: Sequence[str] = ADAPTED, **values: Any) -> Blend:
    """In core space, each source with a weight of its own, and other numbers as the method's defaults unless given."""
    parameters = default_parameters(find_method(method, "test"), names)
    if "weight" in parameters:
        parameters["weight"] = {name: WEIGHTS_OF[name] for name in names}
    for name, value in values.items():
        parameters[name] = dict.fromkeys(names, value) if isinstance(parameters[name], dict) else value
    return Blend(method=method, sources=tuple(names), base="base", parameters=parameters, basis="core")


def recipe_with(sources: dict[str, Source], *blends: Blend, dtype: Any = "float32") -> StackRecipe:
    layers = [blend for blend, _ in zip(itertools.cycle(blends), range(sources["base"].layers), strict=False)]
    return recipe_of(sources, layers, dtype=dtype)


def changes(sources: dict[str, Source], tensor: str, names: Sequence[str] = ADAPTED) -> list[Tensor]:
    """What each source changes of a tensor, as its files say it: float64."""
    shape = sources["base"].tensors[tensor].shape
    found = []
    for name in names:
        change = torch.zeros(shape, dtype=torch.float64)
        for each in sources[name].changes.get(tensor, ()):
            up, down = (sources[name]._view(entry).double() for entry in (each.up, each.down))  # type: ignore[union-attr]
            change += each.scale * ((up @ down).T if each.transposed else up @ down)  # type: ignore[union-attr]
        found.append(change)
    return found


def _change(source: Source, name: str) -> Tensor:
    """What a source adds to a base of zeros: float32."""
    change = torch.zeros(source.tensors[name].shape)
    for left, right, scale in source.low_rank(name):
        change.addmm_(left, right, alpha=scale)
    return change


def lifted(sources: dict[str, Source], recipe: StackRecipe) -> dict[str, Tensor]:
    """What a recipe adds to each tensor of the base, before it is added, as if that were zero: float64."""
    with mock.patch.object(Source, "read", _change):
        return {name: tensor.double() for name, tensor in Materialiser(sources).tensors(recipe)}


# ---- what is merged --------------------------------------------------------------------------------------------------

OF_WHOLE_CHANGES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.7}, "linear": {}, "karcher": {"weight": 0.5}, "multislerp": {}, "model_stock": {},
    "dare_linear": {"density": 1.0}, "della_linear": {"density": 1.0}, "breadcrumbs": {"density": 1.0, "gamma": 0.0},
}  # fmt: skip
"""Methods that are functions of lengths and angles alone, with numbers at which they mask nothing."""


@pytest.mark.parametrize("method", OF_WHOLE_CHANGES)
def test_what_goes_by_lengths_and_angles_is_the_merge_of_whole_changes(sources: dict[str, Source], method: str) -> None:
    blend = blend_of(method, **OF_WHOLE_CHANGES[method])
    made = lifted(sources, recipe_with(sources, blend))
    adapted = {name for source in sources.values() for name in source.changes}
    assert set(made) > adapted
    for name, tensor in made.items():
        if name not in adapted:
            assert not tensor.any(), name
            continue
        whole = [change.float() for change in changes(sources, name)]
        expected = merge(find_method(method, "test"), torch.zeros_like(whole[0]), whole, blend)
        assert torch.linalg.norm(tensor - expected) <= 1e-5 * max(map(torch.linalg.norm, whole)), name


def test_a_weighted_sum_is_that_of_the_files(sources: dict[str, Source]) -> None:
    """In float64, by hand: every scaling is there, whichever way round a weight is stored."""
    made = lifted(sources, recipe_with(sources, blend_of("task_arithmetic")))
    for name in {name for source in sources.values() for name in source.changes}:
        expected = sum(w * change for w, change in zip(WEIGHTS_OF.values(), changes(sources, name), strict=True))
        assert isinstance(expected, Tensor)
        assert torch.linalg.norm(made[name] - expected) <= 1e-6 * torch.linalg.norm(expected), name


def test_a_source_alone_is_that_source(sources: dict[str, Source]) -> None:
    for method, values in (("task_arithmetic", {}), ("ties", {"density": 1.0}), ("linear", {})):
        point = find_method(method, "test").alone
        assert point is not None
        blend = blend_of(method, **values)
        alone = point(ADAPTED, "japanese")
        blend = blend.model_copy(update={"parameters": {**blend.parameters, "weight": alone["weight"]}})
        for name, tensor in Materialiser(sources).tensors(recipe_with(sources, blend)):
            assert torch.allclose(tensor, sources["japanese"].read(name).float(), rtol=0, atol=1e-5), name


def plain_ties(cores: list[np.ndarray], density: float, weights: Sequence[float]) -> np.ndarray:
    """Trim, elect and sum, by sorting; see ``methods.ties``."""
    parts = []
    for core, weight in zip(cores, weights, strict=True):
        least = np.sort(np.abs(core), axis=None)[-max(1, int(density * core.size))]
        parts.append(weight * np.where(np.abs(core) >= least, core, 0.0))
    sign = np.where(sum(parts) >= 0, 1.0, -1.0)  # type: ignore[operator]
    return np.asarray(sum(np.where(part * sign > 0, part, 0.0) for part in parts))


def plain_basis(vectors: Tensor) -> np.ndarray:
    left, sizes, _ = np.linalg.svd(vectors.numpy(), full_matrices=False)
    return np.asarray(left[:, sizes > 1e-10 * sizes[0]])


def test_ties_masks_elements_of_cores(sources: dict[str, Source]) -> None:
    """The variant of the paper, by a slow formula in float64: singular vectors of the factors side by side."""
    density = 0.3
    made = lifted(sources, recipe_with(sources, blend_of("ties", density=density)))
    for name in {name for source in sources.values() for name in source.changes}:
        lefts, rights = [], []
        for source in ADAPTED:
            for left, right, _ in sources[source].low_rank(name):
                lefts.append(left.double())
                rights.append(right.double())
        left, right = plain_basis(torch.cat(lefts, dim=1)), plain_basis(torch.cat(rights).T)
        cores = [left.T @ change.numpy() @ right for change in changes(sources, name)]
        expected = left @ plain_ties(cores, density, list(WEIGHTS_OF.values())) @ right.T
        assert np.linalg.norm(made[name].numpy() - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("method", ["ties", "sce", "ram"])
def test_the_order_of_sources_does_not_matter(llama: dict[str, Source], method: str) -> None:
    """Singular vectors are bases that know no order; a basis made source by source would mask other elements."""
    one, other = (lifted(llama, recipe_with(llama, blend_of(method, order))) for order in (ADAPTED, ADAPTED[::-1]))
    for name, tensor in one.items():
        assert torch.linalg.norm(tensor - other[name]) <= 1e-4 * torch.linalg.norm(tensor), name


def test_two_adapters_on_one_source_and_the_same_twice(llama: dict[str, Source], tmp_path: Path) -> None:
    """Factors that span less than there are of them: the cores are smaller, and the sum is the same."""
    base, maths = llama["base"].folder, llama["maths"].adapters[0]
    japanese = llama["japanese"].adapters[0]
    found = opened(base, maths=Path(f"{maths}+{japanese}"), japanese=japanese, wide=maths)
    made = lifted(found, recipe_with(found, blend_of("task_arithmetic")))
    for name, source in itertools.product(made, ADAPTED):
        if name in found[source].changes:
            expected = sum(w * change for w, change in zip(WEIGHTS_OF.values(), changes(found, name), strict=True))
            assert isinstance(expected, Tensor)
            assert torch.linalg.norm(made[name] - expected) <= 1e-6 * torch.linalg.norm(expected), name


def test_adapters_of_zeros_leave_the_base(llama: dict[str, Source], tmp_path: Path) -> None:
    base = llama["base"].folder
    for number, name in enumerate(ADAPTED[:2]):
        folder = train(base, tmp_path / name, seed=number, r=2, target_modules=LINEAR)
        stored = load_file(folder / WEIGHTS)
        save_file({key: torch.zeros_like(t) if "lora_B" in key else t for key, t in stored.items()}, folder / WEIGHTS)
    found = opened(base, **{name: tmp_path / name for name in ADAPTED[:2]})
    for method in ("ties", "linear", "karcher", "sce"):
        recipe = recipe_with(found, blend_of(method, ADAPTED[:2]), dtype=None)
        for name, tensor in Materialiser(found).tensors(recipe):
            assert torch.equal(tensor, found["base"].read(name)), (method, name)


@pytest.mark.nightly  # half a minute for all methods
@pytest.mark.parametrize("method", own_methods())
def test_every_method_merges_in_core_space_or_says_why_not(llama: dict[str, Source], method: str) -> None:
    own = own_methods()[method]
    names = ADAPTED[: own.max_sources]
    has_weights = any(p.name == "weight" for p in own.parameters)
    blend = blend_of(method, names, weight=0.5) if has_weights else blend_of(method, names)
    recipe = recipe_with(llama, blend)
    if own.needs or own.whole_models:
        with pytest.raises(InputError, match=r"blends\[0\]\.basis: .* depends on .*, which needs whole weights"):
            check_stack(recipe.model_copy(update={"calibration": "digest", "fit": "digest"}), llama)
        return
    made = lifted(llama, recipe)
    assert all(torch.isfinite(tensor).all() for tensor in made.values())
    assert any(tensor.any() for tensor in made.values())


@pytest.mark.parametrize("in_any_basis", [True, False])
def test_steps_work_in_core_space_where_that_is_the_same(sources: dict[str, Source], in_any_basis: bool) -> None:
    """And on whole weights where it may not be; here both give what twice the method makes."""
    blend = blend_of("ties").model_copy(update={"steps": (BlendStep(name="scale", parameters={"factor": 2.0}),)})
    expected = lifted(sources, recipe_with(sources, blend_of("ties")))
    step = replace(SCALE, in_any_basis=in_any_basis)
    with mock.patch.object(core_space, "find_step", return_value=step):
        assert core_space.steps_in_core(blend) == in_any_basis
        for name, tensor in lifted(sources, recipe_with(sources, blend)).items():
            assert torch.linalg.norm(tensor - 2 * expected[name]) <= 1e-6 * torch.linalg.norm(expected[name]), name


@pytest.mark.parametrize("name", ["iso", "iso_cts", "subspace_boosting", "svc"])
def test_steps_on_singular_values_work_in_core_space(sources: dict[str, Source], name: str) -> None:
    """As on the whole changes of a base of zeros, beside whose rounding no small singular value is lost."""
    blend = blend_of("task_arithmetic").model_copy(update={"steps": (BlendStep(name=name),)})
    step = find_step(name, "test")
    assert step.in_any_basis
    in_core = lifted(sources, recipe_with(sources, blend))
    with mock.patch.object(core_space, "find_step", return_value=replace(step, in_any_basis=False)):
        whole = lifted(sources, recipe_with(sources, blend))
    method_alone = lifted(sources, recipe_with(sources, blend_of("task_arithmetic")))
    changed = 0
    for tensor, expected in whole.items():
        assert torch.linalg.norm(in_core[tensor] - expected) <= 1e-3 * torch.linalg.norm(expected), tensor
        changed += bool(torch.linalg.norm(expected - method_alone[tensor]) > 1e-2 * torch.linalg.norm(expected))
    assert changed > 1


# ---- how it is made --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "karcher", "della"])
def test_live_is_what_is_exported(sources: dict[str, Source], method: str, dtype: Any) -> None:
    recipe = recipe_with(sources, blend_of(method), blend_of(method, weight=0.6), dtype=dtype)
    live = live_model(sources["base"], torch.device("cpu"), getattr(torch, dtype))
    materialiser = Materialiser(sources)
    materialiser.write(recipe_with(sources, blend_of(method, weight=1.1), dtype=dtype), live)
    materialiser.write(recipe, live)
    written = live.model.state_dict()
    for name, tensor in Materialiser(sources).tensors(recipe):
        assert torch.equal(written[sources["base"].parts[name].tensor], tensor), name


def test_tensors_that_no_adapter_changes_are_written_once(llama: dict[str, Source]) -> None:
    live = live_model(llama["base"], torch.device("cpu"), torch.float32)
    materialiser = Materialiser(llama)
    made: list[int] = []
    with mock.patch.object(Materialiser, "_make", lambda self, planned: made.append(len(planned))):
        for weight in (0.4, 0.5):
            materialiser.write(recipe_with(llama, blend_of("ties", weight=weight)), live)
    changed = {name for source in llama.values() for name in source.changes}
    assert made == [len(llama["base"].tensors), len(changed)]


def test_bases_are_evidence(llama: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are decomposed once for all candidates and whoever has the folder; other sources have others."""
    decomposed: list[torch.Size] = []
    basis = core_space._basis
    monkeypatch.setattr(core_space, "_basis", lambda v: [decomposed.append(v.shape), basis(v)][1])  # type: ignore[func-returns-value]
    changed = {name for source in llama.values() for name in source.changes}

    def merged(blend: Blend, contents: str = "") -> dict[str, Tensor]:
        evidence = Evidence(tmp_path, {name: name + contents for name in llama})
        return dict(Materialiser(llama, evidence=evidence).tensors(recipe_with(llama, blend)))

    first = merged(blend_of("ties"))
    assert len(decomposed) == 2 * len(changed)
    again = merged(blend_of("ties"))
    merged(blend_of("karcher"))
    assert len(decomposed) == 2 * len(changed)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    merged(blend_of("ties", ADAPTED[:2]))
    assert len(decomposed) > 2 * len(changed)
    before = len(decomposed)
    merged(blend_of("ties"), "changed")
    assert len(decomposed) == before + 2 * len(changed)


def test_recipes_say_it_and_others_are_as_before(llama: dict[str, Source]) -> None:
    core = recipe_with(llama, blend_of("ties"))
    plain = core.model_copy(update={"blends": tuple(b.model_copy(update={"basis": None}) for b in core.blends)})
    assert "basis" not in plain.canonical()
    assert '"basis":"core"' in core.canonical()
    assert core.hash != plain.hash
    assert read_recipe(core.canonical(), core.sources) == core
    assert core.lines() == [line.replace(" on base", " on base in core space") for line in plain.lines()]
    with pytest.raises(InputError, match="in core space, which mergekit cannot express"):
        to_mergekit(core, lambda reference: llama["base"].roles)


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(sources: dict[str, Source], *blends: Blend) -> InputError:
    with pytest.raises(InputError) as caught:
        check_stack(recipe_with(sources, *blends), sources)
    assert caught.value.place == "recipe.blends[0].basis"
    return caught.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "maths is a DoRA"),
        ({"modules_to_save": ["norm"]}, r"maths holds model\.\S*norm\.weight in full \(modules_to_save"),
    ],
)
def test_adapters_that_are_more_than_low_rank(
    llama: dict[str, Source], tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    base = llama["base"].folder
    found = opened(base, maths=train(base, tmp_path, r=2, target_modules=LINEAR, **settings))
    error = refused(found, blend_of("ties", ["maths"]))
    assert error.hint.startswith("Core space merges low-rank adapters (LoRA) of one base alone")
    with pytest.raises(InputError, match=words):
        check_stack(recipe_with(found, blend_of("ties", ["maths"])), found)


def test_an_adapter_that_moves_a_bias(gpt2: dict[str, Source], tmp_path: Path) -> None:
    base = gpt2["base"].folder
    settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}
    found = opened(base, maths=train(base, tmp_path, **settings))
    assert (
        "moves the bias transformer.h.0.attn.c_attn.bias (lora_bias)"
        in refused(found, blend_of("ties", ["maths"])).problem
    )


def test_what_is_no_adapter_of_the_base(llama: dict[str, Source], gpt2: dict[str, Source]) -> None:
    other = {**llama, "maths": replace(llama["maths"], folder=gpt2["base"].folder)}
    assert "maths is another model than base, not an adapter of it" in refused(other, blend_of("ties")).problem
    turned = {**llama, "base": llama["japanese"]}
    assert "the base base has an adapter itself" in refused(turned, blend_of("ties")).problem
    without = blend_of("linear").model_copy(update={"base": None})
    assert "has none" in refused(llama, without).problem


def test_an_adapter_with_nan_is_named(llama: dict[str, Source], tmp_path: Path) -> None:
    base = llama["base"].folder
    folder = train(base, tmp_path, r=2, target_modules=LINEAR)
    stored = load_file(folder / WEIGHTS)
    next(iter(stored.values()))[0, 0] = float("nan")
    save_file(stored, folder / WEIGHTS)
    found = opened(base, maths=folder)
    with pytest.raises(InputError, match=r"sources\.maths: has NaN or Inf in what its adapter changes model\.layers"):
        list(Materialiser(found).tensors(recipe_with(found, blend_of("ties", ["maths"]))))
