"""Low-rank adapters mixed for each row of a batch: the logits of weights that were merged, by peft and by us."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers_checkpoints import save_model, tiny_config
from safetensors.torch import load_file, save_file
from test_adapters import LINEAR, WEIGHTS, train
from test_architectures import MODELS
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.live import LiveModel, NotFiniteError, live_model
from evomerge.checkpoints.low_rank_rows import LowRankRows
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.adapters.low_rank import base_recipe, coefficients, family_of, low_rank_problem
from evomerge.merging.materialise import Materialiser
from evomerge.method import own_methods
from evomerge.recipes.stack import Blend, StackRecipe

METHODS = own_methods()
CPU = torch.device("cpu")
PROMPTS = torch.arange(3, 21).reshape(3, 6)

pytestmark = pytest.mark.filterwarnings("ignore")


def opened(base: Path, **adapters: Path) -> dict[str, Source]:
    named = {"base": str(base)} | {name: f"{base}+{folder}" for name, folder in adapters.items()}
    return {name: open_source(name, reference, place=f"sources.{name}") for name, reference in named.items()}


def arithmetic(weights: dict[str, float]) -> Blend:
    return Blend(method="task_arithmetic", sources=tuple(weights), base="base", parameters={"weight": weights})


def recipe_of(sources: dict[str, Source], layers: Sequence[Blend], **changes: Any) -> StackRecipe:
    """One blend for each layer; the first one also for what is outside the layers."""
    return StackRecipe.compose(
        sources={name: source.reference for name, source in sources.items()},
        tokenizer="base",
        embedding=layers[0],
        hops=((layer, blend, blend, blend) for layer, blend in enumerate(layers)),
        norm=layers[0],
        head=layers[0],
        **changes,
    )


def loaded(sources: dict[str, Source], recipe: StackRecipe) -> LiveModel:
    """The base in float32, and all that a recipe says in its weights."""
    live = live_model(sources["base"], CPU, torch.float32)
    Materialiser(sources).write(recipe, live)
    return live


def rows_of(sources: dict[str, Source], live: LiveModel) -> LowRankRows:
    family = family_of(sources)
    return LowRankRows(live, [sources[name] for name in family.adapted], family.weights)


def shares_of(rows: LowRankRows, sources: dict[str, Source], recipe: StackRecipe) -> torch.Tensor:
    return rows.shares(coefficients(recipe, sources, family_of(sources)))


@torch.inference_mode()
def logits(live: LiveModel, prompts: torch.Tensor = PROMPTS) -> torch.Tensor:
    found: torch.Tensor = live.model(prompts, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def adapters(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of several ranks, scalings and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    settings: dict[str, dict[str, Any]] = {
        "maths": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_rslora": True},
        "japanese": {
            "r": 2, "lora_alpha": 3, "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 1.5},
        },
        "head": {"r": 3, "lora_alpha": 2, "target_modules": ["lm_head", "o_proj"]},
    }  # fmt: skip
    found = {name: train(plain, folder / name, seed=n, **each) for n, (name, each) in enumerate(settings.items())}
    tensors = load_file(found["head"] / WEIGHTS)
    del tensors["base_model.model.lm_head.base_layer.weight"]  # as with save_embedding_layers=False
    save_file(tensors, found["head"] / WEIGHTS, metadata={"format": "pt"})
    return found


def candidates(sources: dict[str, Source], layers: int, count: int) -> list[StackRecipe]:
    """Task arithmetic with weights of their own in every layer, the last one the base alone."""
    adapted, numbers = [name for name in sources if name != "base"], torch.Generator().manual_seed(7)
    found = []
    for number in range(count):
        drawn = torch.rand(layers, len(adapted), generator=numbers) * 1.6 - 0.3
        drawn *= number < count - 1
        blends = [arithmetic(dict(zip(adapted, weights, strict=True))) for weights in drawn.tolist()]
        found.append(recipe_of(sources, blends))
    return found


def test_every_row_has_the_logits_of_its_own_merged_model(plain: Path, adapters: dict[str, Path]) -> None:
    sources = opened(plain, **adapters)
    recipes = candidates(sources, 2, 3)
    live = loaded(sources, base_recipe(recipes[0], sources, family_of(sources)))
    before = logits(live)
    rows = rows_of(sources, live)
    shares = [shares_of(rows, sources, recipe) for recipe in recipes]
    with rows.mixed(shares):
        for chosen in ([2, 0, 1], [1, 1, 0]):
            rows.choose(chosen)
            found = logits(live)
            for row, candidate in enumerate(chosen):
                expected = logits(loaded(sources, recipes[candidate]))[row]
                assert torch.allclose(found[row], expected, atol=1e-5)
        for candidate, recipe in enumerate(recipes):
            rows.choose(candidate)
            assert torch.allclose(logits(live), logits(loaded(sources, recipe)), atol=1e-5)
    for number, recipe in enumerate(recipes):
        with rows.mixed(shares[number : number + 1]):
            assert torch.allclose(logits(live), logits(loaded(sources, recipe)), atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(logits(live), before)


def test_logits_are_those_of_pefts_weighted_sum(plain: Path, tmp_path: Path) -> None:
    # Without rsLoRA: peft gives the sum the first adapter's settings, and with it would scale the sum anew.
    folders = {
        "maths": train(plain, tmp_path / "maths", seed=8, r=4, lora_alpha=6, target_modules=LINEAR),
        "third": train(plain, tmp_path / "third", seed=9, r=3, lora_alpha=7, target_modules=[*LINEAR, "o_proj"]),
    }
    sources = opened(plain, **folders)
    weights = {"maths": 0.7, "third": 1.3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        reference = peft.PeftModel.from_pretrained(model, folders["maths"], adapter_name="maths")
        reference.load_adapter(folders["third"], adapter_name="third")
        reference.add_weighted_adapter(list(weights), list(weights.values()), "both", combination_type="cat")
        reference.set_adapter("both")
        merged = reference.merge_and_unload().eval()
    recipe = recipe_of(sources, [arithmetic(weights)] * 2)
    live = loaded(sources, base_recipe(recipe, sources, family_of(sources)))
    rows = rows_of(sources, live)
    with rows.mixed([shares_of(rows, sources, recipe)]), torch.inference_mode():
        assert torch.allclose(logits(live), merged(PROMPTS).logits, atol=1e-4)


TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"], "opt": ["q_proj", "fc1", "fc2"], "falcon": ["query_key_value", "dense"],
    "bloom": ["query_key_value", "dense_4h_to_h"], "qwen2_moe": ["q_proj", "shared_expert.up_proj"],
    "gptj": ["q_proj", "fc_in"], "gemma2": ["o_proj", "down_proj"], "rwkv": ["attention.key", "attention.output"],
}  # fmt: skip
"""Weights stored as inputs by outputs, biases, fused projections, rows and tokens in one dimension, no keys to keep."""


@pytest.mark.parametrize("name", TARGETS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    kind, settings = MODELS[name]
    base = save_model(getattr(transformers, kind)(**settings), tmp_path / "base")
    targets: dict[str, Any] = {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    folders = {f"a{n}": train(base, tmp_path / f"a{n}", seed=n, r=2 + n, **targets) for n in range(2)}
    sources = opened(base, **folders)
    recipes = candidates(sources, 2, 3)
    assert low_rank_problem(recipes[0], sources) is None
    live = loaded(sources, base_recipe(recipes[0], sources, family_of(sources)))
    rows = rows_of(sources, live)
    together = name != "rwkv"  # whose rows mix: `Decoder` and `Together` know of it
    with rows.mixed([shares_of(rows, sources, recipe) for recipe in recipes]):
        for row, recipe in enumerate(recipes):
            rows.choose([1, 2, 0] if together else row)
            found = logits(live)
            at = [1, 2, 0].index(row) if together else row
            assert torch.allclose(found[at], logits(loaded(sources, recipe))[at], atol=1e-4)
        rows.check_reached()


def test_numbers_that_are_not_finite_are_named(plain: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    broken = train(plain, tmp_path / "broken", r=2, target_modules=["q_proj", "o_proj"])
    tensors = load_file(broken / WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
    tensors[name][0, 0] = torch.inf
    save_file(tensors, broken / WEIGHTS, metadata={"format": "pt"})
    sources = opened(plain, maths=adapters["maths"], broken=broken)
    with_it, without, large = (
        recipe_of(sources, [arithmetic({"maths": maths, "broken": other})] * 2)
        for maths, other in ((0.5, 0.1), (0.5, 0.0), (1e39, 0.0))
    )
    live = loaded(sources, base_recipe(with_it, sources, family_of(sources)))
    rows = rows_of(sources, live)
    with pytest.raises(NotFiniteError, match=r"layers\.1\.self_attn\.o_proj"):
        shares_of(rows, sources, with_it)
    with pytest.raises(NotFiniteError, match=r"layers\.0\.self_attn\.q_proj"):
        shares_of(rows, sources, large)
    with rows.mixed([shares_of(rows, sources, without)]):
        assert torch.allclose(logits(live), logits(loaded(sources, without)), atol=1e-5)


def test_a_module_that_is_passed_by_is_noticed(
    plain: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = opened(plain, **adapters)
    recipe = candidates(sources, 2, 1)[0]
    live = loaded(sources, recipe)
    rows = rows_of(sources, live)
    with rows.mixed([shares_of(rows, sources, recipe)]):
        logits(live)
        rows.check_reached()
    mlp = live.model.get_submodule("model.layers.1.mlp")
    monkeypatch.setattr(
        mlp, "forward", lambda x: F.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    )
    with rows.mixed([shares_of(rows, sources, recipe)]):
        logits(live)
        with pytest.raises(ValueError, match=r"without calling model\.layers\.1\.mlp\.down_proj"):
            rows.check_reached()


# ---- what is no weighted sum of low-rank adapters --------------------------------------------------------------------


def refused(sources: dict[str, Source], recipe: StackRecipe | None = None) -> str:
    adapted = [name for name in sources if name != "base"]
    problem = low_rank_problem(recipe or recipe_of(sources, [arithmetic(dict.fromkeys(adapted, 0.5))] * 2), sources)
    assert problem is not None
    return problem


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "the adapter of one is a DoRA"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "the adapter of one holds lm_head.weight in full",
        ),
        ({"target_modules": ["embed_tokens"]}, "the adapter of one holds model.embed_tokens.weight in full"),
        ({"target_modules": ["embed_tokens"], "strip": True}, "the adapter of one changes the embedding"),
    ],
)
def test_other_kinds_of_adapters(plain: Path, tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    strip = settings.pop("strip", False)
    folder = train(plain, tmp_path, r=2, **settings)
    if strip:
        tensors = {name: t for name, t in load_file(folder / WEIGHTS).items() if "base_layer" not in name}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert problem in refused(opened(plain, one=folder))


def test_a_bias_that_is_moved(tmp_path: Path) -> None:
    base = save_model(transformers.GPT2Config(**MODELS["gpt2"][1]), tmp_path / "base")
    folder = train(base, tmp_path / "one", target_modules=["c_attn"], r=2, lora_bias=True, fan_in_fan_out=True)
    assert (
        refused(opened(base, one=folder))
        == "the adapter of one moves the bias transformer.h.0.attn.c_attn.bias (lora_bias)"
    )


def test_other_models(plain: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = save_model(tiny_config(), tmp_path / "other", seed=3)
    sources = opened(plain, **adapters)
    full = {**sources, "full": open_source("full", str(other), place="sources.full")}
    assert refused(full) == "full is another model than base, not an adapter of it"
    assert refused(
        {"base": sources["base"]}, recipe_of({"base": sources["base"]}, [arithmetic({"base": 1.0})] * 2)
    ) == ("no source has a low-rank adapter")
    alone = {name: source for name, source in sources.items() if name != "base"}
    blend = Blend(method="linear", sources=("maths",), parameters={"weight": {"maths": 1.0}})
    recipe = StackRecipe.uniform(blend, sources={"maths": "m"}, tokenizer="maths", layers=2)
    assert refused(alone, recipe) == "the model under the adapters is not a source itself"


def blend_of(method: str, weights: dict[str, float], **more: Any) -> Blend:
    base = "base" if METHODS[method].needs_base else None
    return Blend(method=method, sources=tuple(weights), base=base, parameters={"weight": weights, **more})


def test_recipes(plain: Path, adapters: dict[str, Path]) -> None:
    sources = opened(plain, **adapters)
    half = {"maths": 0.5, "japanese": 0.5}
    assert low_rank_problem(recipe_of(sources, [blend_of("linear", half)] * 2), sources) is None
    twice = blend_of("linear", {"maths": 1.0, "japanese": 1.0}, normalize=False)
    assert "linear gives model.embed_tokens.weight coefficients that sum to 2, not to 1" in refused(
        sources, recipe_of(sources, [twice] * 2)
    )
    ties = blend_of("ties", half, density=dict.fromkeys(half, 0.5))
    assert "ties" in refused(sources, recipe_of(sources, [ties] * 2))
    turned = Blend(method="slerp", sources=("maths", "japanese"), parameters={"t": 0.5})
    assert "slerp plans by what the weights are" in refused(sources, recipe_of(sources, [turned] * 2))
    one = arithmetic(half)
    parts = {name: source.reference for name, source in sources.items()}
    for hops, scales, problem in (
        ([1, 0], None, "not the model's own layers in their order"),
        ([0], None, "not the model's own layers in their order"),
        ([0, 1, 1], None, "not the model's own layers in their order"),
        ([0, 1], [1.0, 0.5], "scales"),
    ):
        path = [(layer, one, one, one) for layer in hops]
        recipe = StackRecipe.compose(
            sources=parts, tokenizer="base", embedding=one, hops=path, norm=one, head=one, scales=scales
        )
        assert problem in refused(sources, recipe)


def test_coefficients_are_those_of_the_plans(plain: Path, adapters: dict[str, Path]) -> None:
    sources = opened(plain, **adapters)
    second = Blend(
        method="linear",
        sources=("base", "maths", "head"),
        parameters={"weight": {"base": 1.0, "maths": 2.0, "head": 1.0}},
    )
    exception = arithmetic({"japanese": -0.25})
    name = "model.layers.1.self_attn.q_proj.weight"
    recipe = recipe_of(sources, [arithmetic({"maths": 0.5, "japanese": 1.5}), second], tensors={name: exception})
    family = family_of(sources)
    assert (family.base, family.adapted) == ("base", ("maths", "japanese", "head"))
    found = dict(zip(family.weights, coefficients(recipe, sources, family).tolist(), strict=True))
    assert found[name] == [0.0, -0.25, 0.0]
    for weight, numbers in found.items():
        if weight != name:
            assert numbers == ([0.5, 0.0, 0.25] if ".layers.1." in weight else [0.5, 1.5, 0.0]), weight
    assert set(family.weights) == {weight for source in sources.values() for weight in source.changes}
