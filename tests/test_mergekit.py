"""mergekit configurations in and out: as people write them, there and back, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.mergekit import from_mergekit, load_recipe_file, to_mergekit
from evomerge.method import check_blend, own_methods
from evomerge.recipes.stack import Blend, Role, StackRecipe
from evomerge.vocabulary import Vocabulary
from evomerge.yaml import dump_yaml, load_yaml

METHODS = own_methods()
GRAMMARS = {name: method.mergekit for name, method in METHODS.items() if method.mergekit is not None}

# Written as the examples that people copy: a base without parameters, gradients, filters.
TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

SLERP = """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 5]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 5]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""

DARE_TIES = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters: {density: 0.53, weight: 0.4}
  - model: abacusai/Slerp-CM-mist-dpo@v2
    parameters: {density: 0.53, weight: 3e-1}
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
  lambda: 2
tokenizer_source: samir-fama/SamirGPT-v1
dtype: float32
out_dtype: bfloat16
"""


def llama(layers: int, *, tied: bool = False) -> dict[str, Role]:
    """The roles of a Llama's tensors, written down by hand."""
    parts = {
        "attention": [f"self_attn.{name}_proj.weight" for name in "qkvo"],
        "mlp": [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")],
        "norm": ["input_layernorm.weight", "post_attention_layernorm.weight"],
    }
    roles = {"model.embed_tokens.weight": Role("embedding")}
    for layer in range(layers):
        for kind, names in parts.items():
            roles |= {f"model.layers.{layer}.{name}": Role(kind, layer) for name in names}
    return roles | {"model.norm.weight": Role("norm")} | ({} if tied else {"lm_head.weight": Role("head")})


def read(text: str, layers: int = 7) -> StackRecipe:
    return from_mergekit(load_yaml(text, "m.yaml"), lambda reference: llama(layers), "m.yaml")


def made(recipe: StackRecipe, name: str, layers: int = 9) -> Blend:
    """The blend of a tensor by its name in the merged model."""
    return recipe.blend_for(llama(layers)[name], name)


# ---- in --------------------------------------------------------------------------------------------------------------


def test_ties_with_gradients_and_filters() -> None:
    recipe = read(TIES)
    assert recipe.sources == {
        "orca_mini_v3_13b": "psmathur/orca_mini_v3_13b",
        "Platypus2-13B": "garage-bAInd/Platypus2-13B",
        "WizardMath-13B-V1.0": "WizardLM/WizardMath-13B-V1.0",
        "Llama-2-13B-fp16": "TheBloke/Llama-2-13B-fp16",
    }
    assert (recipe.tokenizer, recipe.dtype) == ("Llama-2-13B-fp16", "float16")
    blends = [recipe.blends[hop.mlp] for hop in recipe.hops]
    for blend in recipe.blends:
        assert (blend.value("lambda"), blend.parameters["rescale"]) == (1.0, False)
        assert (blend.base, blend.parameters["normalize"]) == ("Llama-2-13B-fp16", True)
        assert blend.sources == ("orca_mini_v3_13b", "Platypus2-13B", "WizardMath-13B-V1.0")
    # Seven layers, t = 0, 1/6, ... 1, along (1, 0.7, 0.1) and (0, 0.3, 0.7, 1).
    densities = [b.value("density", "orca_mini_v3_13b") for b in blends]
    assert densities == pytest.approx([1, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1])
    weights = [b.value("weight", "Platypus2-13B") for b in blends]
    assert weights == pytest.approx([0, 0.15, 0.3, 0.5, 0.7, 0.85, 1])
    assert {b.value("weight", "WizardMath-13B-V1.0") for b in blends} == {0.5}
    for hop in recipe.hops:
        assert recipe.blends[hop.attention].value("weight", "WizardMath-13B-V1.0") == 0.0
        assert hop.norm == hop.attention
    # What stands outside the layers takes gradients at their start, even the head.
    assert recipe.embedding == recipe.norm == recipe.head == recipe.hops[0].attention


def test_slerp_with_gradients_under_filters() -> None:
    recipe = read(SLERP)
    assert [recipe.blends[hop.attention].value("t") for hop in recipe.hops] == pytest.approx([0, 0.5, 0.3, 0.7, 1])
    assert [recipe.blends[hop.mlp].value("t") for hop in recipe.hops] == pytest.approx([1, 0.5, 0.7, 0.3, 0])
    assert {recipe.blends[i].value("t") for i in (recipe.embedding, recipe.norm, recipe.head)} == {0.5}
    assert {blend.sources for blend in recipe.blends} == {("orca_mini_v3_13b", "Platypus2-13B")}
    assert {blend.base for blend in recipe.blends} == {None}


def test_dare_ties_with_lambda_and_a_tokenizer() -> None:
    recipe = read(DARE_TIES)
    (blend,) = recipe.blends
    assert recipe.tokenizer == "SamirGPT-v1"
    assert recipe.dtype == "bfloat16"
    assert recipe.sources["Slerp-CM-mist-dpo"] == "abacusai/Slerp-CM-mist-dpo@v2"
    assert blend.parameters == {
        "weight": {"SamirGPT-v1": 0.8, "Slerp-CM-mist-dpo": 0.6},
        "density": {"SamirGPT-v1": 0.53, "Slerp-CM-mist-dpo": 0.53},
        "normalize": False,
        "rescale": True,
        "lambda": 1.0,
    }


# As mergekit 0.1.5 resolves them: {method: what a tensor gets with only what must be given}.
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "slerp": {},
    "nuslerp": {"flatten": True, "row_wise": False},
    "multislerp": {"normalize": True},
    "karcher": {"weight": 1.0},
    "task_arithmetic": {"normalize": False, "lambda": 1.0},
    "ties": {"density": 1.0, "normalize": True, "rescale": False, "lambda": 1.0},
    "dare_linear": {"density": 1.0, "normalize": False, "rescale": True, "lambda": 1.0},
    "dare_ties": {"density": 1.0, "normalize": False, "rescale": True, "lambda": 1.0},
    "della": {"density": 1.0, "epsilon": 0.15, "normalize": True, "rescale": True, "lambda": 1.0},
    "della_linear": {"density": 1.0, "epsilon": 0.15, "normalize": False, "rescale": True, "lambda": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.01, "normalize": False, "rescale": False, "lambda": 1.0},
    "breadcrumbs_ties": {"density": 1.0, "gamma": 0.01, "normalize": False, "rescale": False, "lambda": 1.0},
    "model_stock": {"filter_wise": False},
    "sce": {"select_topk": 1.0},
    "arcee_fusion": {},
    "nearswap": {},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "passthrough": {"scale": 1.0},
}
ONE_SOURCE = {"arcee_fusion", "nearswap", "passthrough"}
BASE_IS_A_SOURCE = {"linear", "karcher", "passthrough"}
PER_SOURCE = {"weight", "density", "gamma", "scale"}


def least(method: str) -> dict[str, Any]:
    """A configuration with only what the method must be told."""
    others = 1 if method in {*ONE_SOURCE, "slerp"} else 2
    models: list[dict[str, Any]] = [{"model": f"x/{name}"} for name in "ab"[:others]]
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if method not in {*BASE_IS_A_SOURCE, "nuslerp", "multislerp"}:
        config["base_model"] = "x/base"
    if "weight" in GRAMMARS[method].names:
        config["parameters"] = {"weight": 0.5}
    if "t" in GRAMMARS[method].names:
        config["parameters"] = {"t": 0.3}
    return config


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_are_those_of_mergekit(method: str) -> None:
    config = least(method)
    recipe = from_mergekit(config, lambda reference: llama(2))
    (blend,) = recipe.blends
    sources = blend.sources if method != "slerp" else ("base", "a")
    expected = {
        name: dict.fromkeys(sources, value) if name in PER_SOURCE or (name, value) == ("epsilon", 0.15) else value
        for name, value in {**config.get("parameters", {}), **DEFAULTS[method]}.items()
    }
    assert blend.method == method
    assert blend.parameters == expected
    assert blend.base == ("base" if "base_model" in config and method != "slerp" else None)
    assert blend.sources == sources
    assert not recipe.tensors


def test_every_method_of_mergekits_is_read() -> None:
    assert set(GRAMMARS) == set(DEFAULTS)
    assert set(GRAMMARS) <= set(METHODS)


@pytest.mark.parametrize("method", DEFAULTS)
def test_what_is_read_can_be_computed_and_is_called_the_same(method: str) -> None:
    (blend,) = from_mergekit(least(method), lambda reference: llama(2)).blends
    spec = METHODS[method]
    check_blend(blend, spec, "blend")
    scopes = {p.name: p.scope for p in spec.parameters} | dict.fromkeys(spec.switches, "switch")
    defaults = {p.name: p.default for p in spec.parameters} | dict(spec.switches)
    assert scopes.keys() == {setting.ours for setting in (*GRAMMARS[method].settings, *GRAMMARS[method].unsaid)}
    for setting in GRAMMARS[method].settings:
        kind = "switch" if setting.switch else "source" if setting.per_source else "blend"
        assert scopes[setting.ours] == kind
        if kind != "source":  # a blend may leave it out
            assert setting.absent == defaults[setting.ours]


# Layer ranges that differ, parameters at every level, filters on names in the sources and in the merged model,
# gradients of numbers and switches, a base of its own for one slice. The numbers below are what mergekit 0.1.5's
# planner finds for it, lambda and normalize apart.
SLICES = """
merge_method: della_linear
base_model: x/base
parameters:
  weight: 0.5
  epsilon: 0.1
  lambda: [1, 3]
  normalize: true
slices:
  - sources:
      - model: x/a
        layer_range: [0, 3]
        parameters:
          weight:
            - {filter: layers.1., value: 2}
            - {filter: q_proj, value: [1, 3]}
          density: [0.2, 0.4, 0.9]
      - {model: x/deep, layer_range: [3, 6]}
      - {model: x/base, layer_range: [1, 4]}
    parameters:
      density: [{filter: layers.1., value: 0.7}, {filter: mlp, value: 0.6}, {value: 0.5}]
      normalize: [{filter: norm, value: false}]
  - sources:
      - {model: x/b, layer_range: [0, 1], parameters: {weight: [0.25, 0.75], epsilon: 0.05}}
      - {model: x/a, layer_range: [2, 3]}
    base_model: x/b
    parameters: {lambda: 1, rescale: [true, false]}
"""


def test_slices_as_mergekit_plans_them() -> None:
    recipe = from_mergekit(load_yaml(SLICES, "f"), lambda reference: llama(6 if reference == "x/deep" else 4))
    assert [hop.layer for hop in recipe.hops] == [
        {"a": 0, "deep": 3, "base": 1}, {"a": 1, "deep": 4, "base": 2}, {"a": 2, "deep": 5, "base": 3}, {"b": 0, "a": 2}
    ]  # fmt: skip
    rows: list[tuple[str, dict[str, float], dict[str, float], bool, float]] = [
        # name, weights, densities, normalize, lambda
        ("model.embed_tokens.weight", {"a": 0.5, "deep": 0.5}, {"a": 0.2, "deep": 0.5}, True, 1),
        ("model.layers.0.self_attn.q_proj.weight", {"a": 1, "deep": 0.5}, {"a": 0.2, "deep": 0.5}, True, 1),
        ("model.layers.0.self_attn.k_proj.weight", {"a": 0.5, "deep": 0.5}, {"a": 0.2, "deep": 0.5}, True, 1),
        ("model.layers.1.self_attn.q_proj.weight", {"a": 2, "deep": 0.5}, {"a": 0.4, "deep": 0.5}, True, 2),
        ("model.layers.1.mlp.up_proj.weight", {"a": 2, "deep": 0.5}, {"a": 0.4, "deep": 0.6}, True, 2),
        ("model.layers.2.self_attn.q_proj.weight", {"a": 3, "deep": 0.5}, {"a": 0.9, "deep": 0.5}, True, 3),
        ("model.layers.2.input_layernorm.weight", {"a": 0.5, "deep": 0.5}, {"a": 0.9, "deep": 0.5}, False, 3),
        ("model.layers.3.mlp.up_proj.weight", {"a": 0.5}, {"a": 1}, True, 1),
        ("model.norm.weight", {"a": 0.5}, {"a": 1}, True, 1),
        ("lm_head.weight", {"a": 0.5}, {"a": 1}, True, 1),
    ]
    for name, weights, densities, normalize, scale in rows:
        blend, last = made(recipe, name), "deep" not in weights
        assert (blend.method, blend.base) == ("della_linear", "b" if last else "base")
        assert blend.parameters["density"] == densities
        assert blend.parameters["epsilon"] == dict.fromkeys(weights, 0.1)
        assert blend.parameters["rescale"] == (name != "model.layers.3.mlp.up_proj.weight")
        # b + lambda * sum w d / sum w: the same coefficients, whichever way they are written.
        coefficients = {s: scale * w / (sum(weights.values()) if normalize else 1) for s, w in weights.items()}
        read_weights = {s: blend.value("weight", s) for s in blend.sources}
        total = sum(read_weights.values()) if blend.parameters["normalize"] else 1
        assert {s: blend.value("lambda") * w / total for s, w in read_weights.items()} == pytest.approx(coefficients)
    # The first slice's q_proj stands alone beside k, v and o; where all of a part agree, nothing does.
    assert sorted(recipe.tensors) == [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 2)]


def test_a_stack_of_layers_with_scales() -> None:
    recipe = from_mergekit(
        load_yaml(
            """
            merge_method: passthrough
            slices:
              - sources: [{model: x/a, layer_range: [0, 3]}]
              - sources:
                  - model: x/a
                    layer_range: [1, 3]
                    parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.5}]}
              - sources: [{model: x/b, layer_range: [5, 6]}]
            """,
            "f",
        ),
        lambda reference: llama(6 if reference == "x/b" else 3),
    )
    assert [hop.layer for hop in recipe.hops] == [0, 1, 2, 1, 2, 5]
    sources = [made(recipe, f"model.layers.{n}.mlp.up_proj.weight").sources for n in range(6)]
    assert sources == [("a",)] * 5 + [("b",)]
    scales = {
        name: made(recipe, name).value("scale", "a")
        for name, role in llama(5).items()
        if role.layer is not None and made(recipe, name).value("scale", "a") != 1
    }
    assert scales == {
        "model.layers.3.self_attn.o_proj.weight": 0.0,
        "model.layers.4.self_attn.o_proj.weight": 0.0,
        "model.layers.3.mlp.down_proj.weight": 0.5,
        "model.layers.4.mlp.down_proj.weight": 0.5,
    }
    assert set(recipe.tensors) == set(scales)
    assert (recipe.blends[recipe.embedding].sources, recipe.blends[recipe.head].sources) == (("a",), ("b",))


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.integers(2, 9))
def test_a_gradient_runs_straight_between_its_points(points: list[float], layers: int) -> None:
    recipe = from_mergekit(weighted(points), lambda reference: llama(layers))
    found = [recipe.blends[hop.mlp].value("weight", "a") for hop in recipe.hops]
    assert found == pytest.approx(np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(points)), points))


@pytest.mark.parametrize(
    ("method", "normalize", "scale", "expected"),
    [
        ("task_arithmetic", False, 2.0, ({"a": 1.0, "b": 3.0}, False, 1.0)),
        ("task_arithmetic", True, 2.0, ({"a": 0.5, "b": 1.5}, False, 1.0)),
        ("task_arithmetic", True, 1.0, ({"a": 0.5, "b": 1.5}, True, 1.0)),
        ("breadcrumbs", False, -1.0, ({"a": -0.5, "b": -1.5}, False, 1.0)),
        ("ties", False, 2.0, ({"a": 1.0, "b": 3.0}, False, 1.0)),
        ("ties", False, -1.0, ({"a": 0.5, "b": 1.5}, False, -1.0)),  # it would turn the election round
        ("della", True, 2.0, ({"a": 0.5, "b": 1.5}, True, 2.0)),  # divided by weights that differ between elements
    ],
)
def test_lambda_goes_into_the_weights_where_it_can(
    method: str, normalize: bool, scale: float, expected: tuple[Any, ...]
) -> None:
    models = [{"model": f"x/{name}", "parameters": {"weight": w}} for name, w in (("a", 0.5), ("b", 1.5))]
    config = {"merge_method": method, "models": models, "base_model": "x/base"}
    parameters = {"normalize": normalize, "lambda": scale}
    (blend,) = from_mergekit(config | {"parameters": parameters}, lambda reference: llama(2)).blends
    assert tuple(blend.parameters[name] for name in ("weight", "normalize", "lambda")) == expected


def test_weights_that_cancel_are_not_divided_by() -> None:
    models = [{"model": f"x/{name}", "parameters": {"weight": w}} for name, w in (("a", -1), ("b", 1))]
    config = {"merge_method": "task_arithmetic", "models": models, "base_model": "x/base"}
    (blend,) = from_mergekit(
        config | {"parameters": {"normalize": True, "lambda": 2}}, lambda reference: llama(2)
    ).blends
    assert blend.parameters["weight"] == {"a": -2.0, "b": 2.0}


def test_a_base_alone_is_copied() -> None:
    for method in ("ties", "sce", "ram"):
        config = {"merge_method": method, "base_model": "x/base", "models": [{"model": "x/base"}]}
        (blend,) = from_mergekit(config, lambda reference: llama(2)).blends
        assert (blend.method, blend.sources, blend.parameters) == ("passthrough", ("base",), {"scale": {"base": 1.0}})


def test_what_a_base_model_is_hangs_on_the_method() -> None:
    models = [{"model": "x/a"}, {"model": "x/b"}]
    config = {"models": models, "base_model": "x/base", "parameters": {"weight": 1}}
    linear = from_mergekit({"merge_method": "linear", **config}, lambda reference: llama(2)).blends[0]
    assert (linear.sources, linear.base) == (("a", "b", "base"), None)  # it is mixed like the rest
    nuslerp = from_mergekit({"merge_method": "nuslerp", **config}, lambda reference: llama(2)).blends[0]
    assert (nuslerp.sources, nuslerp.base) == (("a", "b"), "base")
    # Beside slices that leave it out, it only gives configuration and tokenizer.
    config = sliced([0, 2]) | {"base_model": "x/base"}
    recipe = from_mergekit(config, lambda reference: llama(2))
    assert (recipe.tokenizer, recipe.blends[0].sources) == ("base", ("a",))


def test_a_tied_head_is_the_embedding() -> None:
    config = weighted([{"filter": "embed", "value": 3}, {"value": 1}])
    recipe = from_mergekit(config, lambda reference: llama(2, tied=True))
    assert recipe.head == recipe.embedding != recipe.norm


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ("x/m@v1+y/lora@v2", "x/m@v1+y/lora@v2"),
        ({"model": "x/m", "lora": "y/lora"}, "x/m+y/lora"),
        ({"model": {"path": "x/m", "revision": "v1"}, "lora": {"path": "y/lora"}}, "x/m@v1+y/lora"),
        ({"model": {"path": "x/m"}, "lora": None}, "x/m"),
    ],
)
def test_models_in_all_their_forms(given: Any, reference: str) -> None:
    config = {"merge_method": "linear", "models": [{"model": given}], "base_model": given, "parameters": {"weight": 1}}
    recipe = from_mergekit(config | {"tokenizer_source": given}, lambda reference: llama(1))
    assert list(recipe.sources.values()) == [reference]


def test_filters_know_the_tensors_of_any_architecture() -> None:
    names = {"attention": ["attn.c_attn", "attn.c_proj"], "mlp": ["mlp.c_fc", "mlp.c_proj"], "norm": ["ln_1", "ln_2"]}
    roles = {"wte.weight": Role("embedding"), "wpe.weight": Role("embedding")}
    for kind, stems in names.items():
        roles |= {
            f"h.{n}.{stem}.{leaf}": Role(kind, n) for n in range(2) for stem in stems for leaf in ("weight", "bias")
        }
    config = weighted([{"filter": "c_proj.bias", "value": 0}, {"filter": "wpe", "value": 2}, {"value": 1}])
    recipe = from_mergekit(config, lambda reference: roles | {"ln_f.weight": Role("norm")})
    assert recipe.tensors == {f"h.{n}.{part}.c_proj.bias": 1 for n in range(2) for part in ("attn", "mlp")} | {
        "wpe.weight": 2
    }
    assert to_mergekit(recipe, lambda reference: roles | {"ln_f.weight": Role("norm")})["models"] == [
        {
            "model": "x/a",
            "parameters": {
                "weight": [{"filter": "c_proj.bias", "value": 0.0}, {"filter": "wpe", "value": 2.0}, {"value": 1.0}]
            },
        }
    ]


def test_the_nearest_level_that_has_a_value_wins() -> None:
    recipe = read(
        """
        merge_method: task_arithmetic
        base_model: x/base
        parameters: {weight: 0.1}
        slices:
          - sources:
              - {model: x/a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 0.9}]}}
              - {model: x/b, layer_range: [0, 2]}
              - {model: x/base, layer_range: [0, 2]}
            parameters: {weight: 0.2}
          - sources:
              - {model: x/a, layer_range: [2, 3]}
              - {model: x/b, layer_range: [2, 3], parameters: {weight: [0.3, 0.4]}}
              - {model: x/base, layer_range: [2, 3]}
        """
    )
    assert [hop.layer for hop in recipe.hops] == [0, 1, 2]
    values = [
        [recipe.blends[index].value("weight", source) for source in "ab"]
        for index in (recipe.hops[0].mlp, recipe.hops[0].attention, recipe.hops[2].mlp, recipe.embedding, recipe.head)
    ]
    # A slice of one layer takes the end of a gradient, the head its start: so does mergekit.
    assert values == [[0.9, 0.2], [0.2, 0.2], [0.1, 0.4], [0.2, 0.2], [0.1, 0.3]]


def test_models_of_one_name_get_two() -> None:
    models = [{"model": f"{org}/chat", "parameters": {"weight": 1}} for org in ("x", "y")]
    models += [{"model": "./z/chat/", "parameters": {"weight": 1}}, {"model": "x/m@v1+y/lora@v2"}]
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    recipe = from_mergekit(config, lambda reference: llama(1))
    assert recipe.sources == {"chat": "x/chat", "chat-2": "y/chat", "chat-3": "./z/chat/", "m+lora": "x/m@v1+y/lora@v2"}


LINEAR = {"merge_method": "linear", "models": [{"model": "x/a", "parameters": {"weight": 1}}]}
SIMPLE = {"models": [{"model": "x/a"}]}
ARITHMETIC = LINEAR | {"merge_method": "task_arithmetic", "base_model": "x/base"}


def weighted(setting: Any) -> dict[str, Any]:
    return LINEAR | {"models": [{"model": "x/a", "parameters": {"weight": setting}}]}


def sliced(*ranges: Any, **more: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": "x/a", "layer_range": each}], **more} for each in ranges]
    return {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LINEAR | {"densty": 1}, "there is no key 'densty'"),
        (LINEAR | {"merge_method": "tise"}, "merge_method: there is no merge method 'tise'. Did you mean 'ties'?"),
        (LINEAR | {"merge_method": ["ties"]}, "merge_method"),
        (LINEAR | {"modules": {}}, "modules: cannot be taken"),
        (LINEAR | {"dtype": "bfloat"}, "dtype: there is no dtype 'bfloat'. Did you mean 'bfloat16'?"),
        (LINEAR | {"slices": []}, "needs either `models:` or `slices:`"),
        ({"merge_method": "linear"}, "needs either `models:` or `slices:`"),
        (LINEAR | {"models": []}, "models: must be a list with at least one entry"),
        (LINEAR | {"models": ["x/a"]}, "models[0]: must be keys with values"),
        (LINEAR | {"models": [{"model": 3}]}, "models[0].model: must be a folder or a hub id"),
        (LINEAR | {"models": [{"model": {"model": "x/a", "lroa": "x"}}]}, "models[0].model: there is no key 'lroa'"),
        (LINEAR | {"models": [{"model": {"path": "x+y"}}]}, "models[0].model: 'x+y' has a + in it"),
        (
            LINEAR | {"models": [{"model": {"model": "x/a", "override_architecture": "Mine"}}]},
            "models[0].model.override_architecture: cannot be taken",
        ),
        (LINEAR | {"models": [{"modle": "x/a"}]}, "models[0]: there is no key 'modle'. Did you mean 'model'?"),
        (LINEAR | {"models": LINEAR["models"] * 2}, "models[1]: names x/a again"),
        (LINEAR | {"base_model": "x/base"}, "parameters.weight: is missing for model.layers.0.self_attn.q_proj.weight"),
        (LINEAR | {"base_model": "x/base"}, "of x/base"),
        (LINEAR | {"merge_method": "ties"}, "base_model: is missing, and ties needs it"),
        (SIMPLE | {"merge_method": "slerp"}, "base_model: is missing, and slerp needs it"),
        (LINEAR | {"merge_method": "ties", "base_model": 1}, "base_model: must be a folder or a hub id"),
        (
            SIMPLE | {"merge_method": "model_stock", "base_model": "x/a"},
            "models: name 0 models beside the base; model_stock mixes 2 or more",
        ),
        (SIMPLE | {"merge_method": "passthrough", "base_model": "x/b"}, "models: name 2 models; passthrough mixes 1"),
        (LINEAR | {"models": [{"model": "x/a"}]}, "parameters.weight: is missing for"),
        (LINEAR | {"parameters": {"density": 1}}, "parameters: there is no key 'density'"),
        (ARITHMETIC | {"parameters": {"densty": 1}}, "parameters: there is no key 'densty'"),
        (ARITHMETIC | {"parameters": {"normalize": 2}}, "parameters.normalize: must be true or false, not 2"),
        (ARITHMETIC | {"parameters": {"normalize": "yes"}}, "parameters.normalize: must be true or false, not 'yes'"),
        (SIMPLE | {"merge_method": "karcher", "parameters": {"tol": 1}}, "parameters.tol: is always 1e-05 here, not 1"),
        (weighted("much"), "models[0].parameters.weight: must be a number, a list of numbers or filters with values"),
        (weighted(True), "not True"),
        (weighted(None), "not None"),
        (weighted(float("nan")), "models[0].parameters.weight"),
        (weighted([]), "models[0].parameters.weight: is an empty list"),
        (weighted([1, "x"]), "not 'x'"),
        (weighted([1, {"value": 1}]), "models[0].parameters.weight: must be keys with values"),
        (weighted([{"filter": "mlp", "valeu": 1}]), "parameters.weight: there is no key 'valeu'"),
        (weighted([{"filter": "mlp"}]), "parameters.weight: has a filter without a value"),
        (weighted([{"filter": 3, "value": 1}]), "parameters.weight.filter: must be a part of tensors' names, not 3"),
        (weighted([{"value": [{"value": 1}]}]), "models[0].parameters.weight: must be a number"),
        (weighted([{"filter": "mlp", "value": 1}]), "parameters.weight: is missing for model.layers.0.self_attn"),
        (sliced([0, 3]), "slices[0].sources[0].layer_range: is [0, 3], but x/a has the layers 0 to 1: [0, 2]"),
        (sliced([0, 2], [-1, 1]), "slices[1].sources[0].layer_range: is [-1, 1]"),
        (sliced([2, 1]), "slices[0].sources[0].layer_range: is [2, 1]"),
        (sliced([3, 3], [0, 2]), "slices[0].sources[0].layer_range: is [3, 3]"),
        (sliced([2, 2]), "slices: take no layers at all"),
        (sliced([0, 0], [1, 1]), "slices: take no layers at all"),
        (sliced([0, 1], [1, 1], [1, 2]), "slices[1]: takes no layers"),
        (sliced([0, 0], [0, 0], [0, 2]), "slices[1]: takes no layers"),
        (sliced([0, 1.5]), "must be two whole numbers"),
        (sliced(None), "must be two whole numbers"),
        (sliced([0, 2], residual_weight=0.5), "slices[0]: residual_weight: cannot be taken"),
        (sliced([0, 2], base_model=3), "slices[0].base_model: must be a folder or a hub id"),
        (
            sliced([0, 2]) | {"merge_method": "ties", "base_model": "x/base"},
            "slices[0].sources: leave out the base model x/base",
        ),
        (
            {
                "merge_method": "karcher",
                "slices": [
                    {"sources": [{"model": "x/a", "layer_range": [0, 2]}, {"model": "x/b", "layer_range": [0, 1]}]}
                ],
            },
            "slices[0].sources: take different numbers of layers: 2 of x/a, 1 of x/b",
        ),
    ],
)
def test_what_a_recipe_cannot_hold_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_mergekit(config, lambda reference: llama(2), "m.yaml")
    assert str(caught.value).startswith("m.yaml")
    assert message in str(caught.value)


def test_slerp_starts_at_the_base_wherever_it_is_listed() -> None:
    recipe = read(SLERP.replace("base_model: psmathur/orca_mini_v3_13b", "base_model: garage-bAInd/Platypus2-13B"))
    assert {blend.sources for blend in recipe.blends} == {("Platypus2-13B", "orca_mini_v3_13b")}


@pytest.mark.parametrize(
    ("ranges", "parts"),
    [
        ((("b", [0, 0]), ("a", [0, 2])), ("b", "a", "a", "a")),  # the embedding of b
        ((("a", [0, 2]), ("b", [2, 2])), ("a", "a", "b", "b")),  # the final norm and the head of b
        ((("b", [1, 1]), ("a", [1, 2]), ("b", [0, 0])), ("b", "a", "b", "b")),  # both
    ],
)
def test_a_slice_of_no_layers_at_an_end_gives_what_lies_outside_of_the_layers(
    ranges: tuple[tuple[str, list[int]], ...], parts: tuple[str, ...]
) -> None:
    slices = [{"sources": [{"model": f"x/{name}", "layer_range": each}]} for name, each in ranges]
    recipe = from_mergekit({"merge_method": "passthrough", "slices": slices}, lambda reference: llama(2))
    layers = sum(stop - start for _, (start, stop) in ranges)
    names = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
    assert len(recipe.hops) == layers
    assert tuple(made(recipe, name).sources[0] for name in names) == parts
    written = to_mergekit(recipe, lambda reference: llama(2))
    assert [len(piece["sources"]) for piece in written["slices"]] == [1] * len(ranges)
    assert from_mergekit(written, lambda reference: llama(2)) == recipe


def test_a_slice_of_no_layers_takes_numbers_of_its_own() -> None:
    first = {
        "sources": [{"model": f"x/{name}", "layer_range": [0, 0]} for name in NAMES],
        "parameters": {"weight": [{"filter": "embed_tokens", "value": [0.25, 1]}, {"value": 1}]},
    }
    slices = [first, {"sources": [{"model": "x/a", "layer_range": [0, 2]}], "parameters": {"weight": 1}}]
    recipe = from_mergekit({"merge_method": "linear", "slices": slices}, lambda reference: llama(2))
    assert made(recipe, "model.embed_tokens.weight").parameters["weight"] == {"a": 0.25, "b": 0.25}
    assert to_mergekit(recipe, lambda reference: llama(2))["slices"][0]["sources"][1] == {
        "model": "x/b",
        "layer_range": [0, 0],
        "parameters": {"weight": 0.25},
    }


def test_models_of_different_depth_need_slices() -> None:
    config = {"merge_method": "karcher", "models": [{"model": "x/a"}, {"model": "x/deep"}]}
    with pytest.raises(InputError, match=r"models: differ in layers: x/a has 2, x/deep has 5\. Say with `slices:`"):
        from_mergekit(config, lambda reference: llama(5 if reference == "x/deep" else 2))


def test_slerp_mixes_two() -> None:
    config = load_yaml(SLERP, "f")
    config["slices"][0]["sources"].append({"model": "x/third", "layer_range": [0, 5]})
    with pytest.raises(InputError, match="name 3 models; slerp mixes 2"):
        from_mergekit(config, lambda reference: llama(5))


def test_a_file_of_mergekits_is_known_by_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(TIES)
    assert load_recipe_file(file, lambda reference: llama(7)) == read(TIES)


# ---- out -------------------------------------------------------------------------------------------------------------

SOURCES = {"base": "org/base", "a": "org/a", "b": "org/b"}
NAMES = ("a", "b")


def blend_of(method: str, **numbers: Any) -> Blend:
    """A blend with every number said, for the methods that mix a and b over a base."""
    parameters: dict[str, Any] = {
        setting.ours: dict.fromkeys(NAMES, 0.5) if setting.per_source else setting.default
        for setting in GRAMMARS[method].settings
    }
    base = "base" if GRAMMARS[method].base == "apart" else None
    return Blend(method=method, sources=NAMES, base=base, parameters=parameters | numbers)


def uniform(method: str, **numbers: Any) -> StackRecipe:
    blend = blend_of(method, **numbers)
    sources = SOURCES if blend.base else {name: SOURCES[name] for name in NAMES}
    return StackRecipe.uniform(blend, sources=sources, tokenizer="a", layers=3, dtype="bfloat16")


def write(recipe: StackRecipe) -> dict[str, Any]:
    return to_mergekit(recipe, lambda reference: llama(3))


def test_one_blend_is_written_without_slices() -> None:
    assert write(uniform("ties", weight={"a": 0.7, "b": 0.9}, normalize=False)) == {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [
            {"model": "org/a", "parameters": {"weight": 0.7, "density": 0.5}},
            {"model": "org/b", "parameters": {"weight": 0.9, "density": 0.5}},
            {"model": "org/base"},
        ],
        "parameters": {"normalize": False, "lambda": 1.0, "rescale": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "tokenizer_source": "org/a",
    }


def test_what_a_blend_leaves_out_is_written_as_it_is_meant() -> None:
    """Where mergekit's default is another: we do not normalise TIES."""
    blend = blend_of("ties").model_copy(update={"parameters": {"weight": dict.fromkeys(NAMES, 1.0), "density": 0.5}})
    config = write(StackRecipe.uniform(blend, sources=SOURCES, tokenizer="a", layers=3))
    assert config["parameters"] == {"normalize": False, "lambda": 1.0, "rescale": False}
    assert "dtype" not in config


def test_slerp_is_written_from_the_base() -> None:
    config = write(uniform("slerp", t=0.3))
    assert config["base_model"] == "org/a"
    assert config["models"] == [{"model": "org/a"}, {"model": "org/b"}]
    assert config["parameters"] == {"t": 0.3}


def test_layers_are_written_as_slices_and_parts_as_filters() -> None:
    def mix(weight: float) -> Blend:
        return blend_of("linear", weight={"a": weight, "b": 1.0})

    recipe = StackRecipe.compose(
        sources={name: SOURCES[name] for name in NAMES},
        tokenizer="b",
        embedding=mix(0.1),
        hops=[(0, mix(0.2), mix(0.3), mix(0.4)), (1, mix(0.2), mix(0.3), mix(0.4)), (2, mix(0.5), mix(0.5), mix(0.5))],
        norm=mix(0.5),
        head=mix(0.6),
    )
    config = write(recipe)
    first, second = config["slices"]
    assert first["sources"][0] == {
        "model": "org/a",
        "layer_range": [0, 2],
        "parameters": {
            "weight": [
                {"filter": "mlp", "value": 0.3},
                {"filter": "input_layernorm", "value": 0.4},
                {"filter": "post_attention_layernorm", "value": 0.4},
                {"filter": "embed_tokens", "value": 0.1},
                {"value": 0.2},
            ]
        },
    }
    assert first["sources"][1]["parameters"] == {"weight": 1.0}
    assert second["sources"][0]["layer_range"] == [2, 3]
    assert second["sources"][0]["parameters"]["weight"] == [{"filter": "lm_head", "value": 0.6}, {"value": 0.5}]
    assert config["base_model"] == "org/b"  # mergekit takes the configuration of it


def test_a_path_is_written_as_slices() -> None:
    """Layers of a are doubled by b's; each slice is a run of hops that follow each other."""
    blends = {name: Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}}) for name in NAMES}
    path = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 2)]
    recipe = StackRecipe.compose(
        sources={name: SOURCES[name] for name in NAMES},
        tokenizer="a",
        embedding=blends["a"],
        hops=[(layer, *[blends[name]] * 3) for name, layer in path],
        norm=blends["a"],
        head=blends["a"],
    )
    config = write(recipe)
    ranges = [(piece["sources"][0]["model"], piece["sources"][0]["layer_range"]) for piece in config["slices"]]
    assert ranges == [("org/a", [0, 2]), ("org/b", [1, 3]), ("org/a", [2, 3]), ("org/a", [2, 3])]
    assert config["base_model"] == "org/a"
    assert from_mergekit(config, lambda reference: llama(3)) == recipe


def test_a_base_stands_among_the_models_of_a_slice() -> None:
    recipe = StackRecipe.compose(
        sources=SOURCES,
        tokenizer="a",
        embedding=blend_of("ties"),
        hops=[(0, *[blend_of("ties", weight={"a": 0.0, "b": 1.0})] * 3)],
        norm=blend_of("ties"),
        head=blend_of("ties"),
    )
    (piece,) = write(recipe)["slices"]
    assert piece["sources"][-1] == {"model": "org/base", "layer_range": [0, 1]}


@st.composite
def recipes(draw: st.DrawFn, method: str) -> StackRecipe:
    """Recipes that mergekit can say: the same models throughout, any path, any numbers, single tensors apart."""
    grammar = GRAMMARS[method]
    names = NAMES[: grammar.most or 2]
    bases = {"apart": ["base"], "optional": ["base", None]}.get(grammar.base, [None])
    base = draw(st.sampled_from(bases))
    number = st.sampled_from([0.0, 0.1, 0.25, 1.0, 1e-7])

    def blend() -> Blend:
        parameters: dict[str, Any] = {s.ours: dict.fromkeys(names, s.default) for s in grammar.unsaid if s.per_source}
        for setting in grammar.settings:
            value = st.booleans() if setting.switch else number
            parameters[setting.ours] = {name: draw(value) for name in names} if setting.per_source else draw(value)
        if "lambda" in parameters and not (grammar.sum == "elected" and parameters["normalize"]):
            parameters["lambda"] = 1.0  # else it is read into the weights
        return Blend(method=method, sources=names, base=base, parameters=parameters)

    def layer() -> int | dict[str, int]:
        each = st.fixed_dictionaries({name: st.integers(0, 4) for name in (*names, *([base] if base else []))})
        return draw(st.integers(0, 4) | each)

    count = draw(st.integers(1, 4))
    plain = blend()
    hops = [
        (layer(), *[plain] * 3) if draw(st.booleans()) else (layer(), blend(), blend(), blend()) for _ in range(count)
    ]
    apart = draw(st.sets(st.sampled_from([n for n in llama(count) if "o_proj" in n or "gate" in n]), max_size=3))
    recipe = StackRecipe.compose(
        sources={name: SOURCES[name] for name in (*names, *([base] if base else []))},
        tokenizer=draw(st.sampled_from(names)),
        embedding=blend(),
        hops=hops,
        norm=blend(),
        head=blend(),
        dtype=draw(st.sampled_from([None, "float16", "float32"])),
        tensors=(tensors := {name: blend() for name in apart}),
    )
    different = {n: b for n, b in tensors.items() if b != recipe.blend_for(llama(count)[n])}
    return StackRecipe.compose(**_parts(recipe), tensors=different)


def _parts(recipe: StackRecipe) -> dict[str, Any]:
    blends = recipe.blends
    return {
        "sources": recipe.sources,
        "tokenizer": recipe.tokenizer,
        "embedding": blends[recipe.embedding],
        "hops": [(hop.layer, blends[hop.attention], blends[hop.mlp], blends[hop.norm]) for hop in recipe.hops],
        "norm": blends[recipe.norm],
        "head": blends[recipe.head],
        "dtype": recipe.dtype,
    }


@pytest.mark.parametrize("method", GRAMMARS)
@settings(max_examples=settings().max_examples // 4)
@given(data=st.data())
def test_there_and_back(method: str, data: st.DataObject) -> None:
    """Short names are the last parts of the references here, so that they come back too."""
    recipe = data.draw(recipes(method))
    config = to_mergekit(recipe, lambda reference: llama(5))
    back = from_mergekit(load_yaml(dump_yaml(config), "f"), lambda reference: llama(5))
    # Where the tokenizer must be named, mergekit lays the tokens out for it.
    assert back.vocabulary.kind == ("tokenizer" if "tokenizer_source" in config else "same")
    recipe = recipe.model_copy(update={"vocabulary": back.vocabulary})
    assert back == recipe
    assert back.hash == recipe.hash


def test_what_mergekit_cannot_say_is_refused() -> None:
    recipe = uniform("ties")
    ties, linear = recipe.blends[0], blend_of("linear")
    fewer = blend_of("task_arithmetic", weight={"a": 1.0}).model_copy(update={"sources": ("a",)})
    karcher = Blend(method="karcher", sources=NAMES, parameters={"weight": {"a": 1.0, "b": 2.0}})
    cases: list[tuple[Mapping[str, Any], str]] = [
        ({"blends": (ties, linear)}, "differ in method"),
        ({"blends": (blend_of("task_arithmetic"), fewer), "head": 1}, "lm_head.weight and .* differ in sources"),
        ({"blends": (ties, ties.model_copy(update={"base": "a"})), "norm": 1}, "a as a source, which mergekit leaves"),
        ({"blends": (ties.model_copy(update={"method": "mine"}),)}, "no merge method of mergekit's 'mine'"),
        ({"blends": (ties.model_copy(update={"sources": ("a", "base")}),)}, "mixes the base base as a source"),
        ({"blends": (blend_of("ties", mine=1.0),)}, "mine: is not a parameter of mergekit's ties"),
        ({"blends": (blend_of("slerp", t={"a": 1.0, "b": 0.0}),)}, "t: is one number for all sources"),
        ({"blends": (karcher,)}, "weight: is always 1 in mergekit's karcher"),
        ({"blends": (blend_of("model_stock", **{"lambda": 0.5}),)}, "lambda: is always 1 in mergekit's model_stock"),
        ({"blends": (ties.model_copy(update={"parameters": {}}),)}, "ties needs a value for weight"),
        ({"sources": {**SOURCES, "b": "org/a"}}, "two names for one model"),
        ({"sources": {**SOURCES, "b": "org/b+x/one+x/two"}}, "sources.b: has several adapters"),
    ]
    for change, message in cases:
        with pytest.raises(InputError, match=message):
            write(recipe.model_copy(update=change))


def test_a_last_slice_with_more_models_than_the_first_is_refused() -> None:
    one, two = blend_of("linear", weight={"a": 1.0}).model_copy(update={"sources": ("a",)}), blend_of("linear")
    recipe = StackRecipe.compose(
        sources=SOURCES,
        tokenizer="a",
        embedding=one,
        hops=[(0, one, one, one), (1, two, two, two)],
        norm=two,
        head=two,
    )
    with pytest.raises(InputError, match=r"on which mergekit 0.1.5 fails"):
        write(recipe)


def test_names_that_no_filter_tells_apart_are_refused() -> None:
    roles = {"embed.weight": Role("embedding"), "l.0.attn.w": Role("attention", 0), "l.0.attn.w2": Role("mlp", 0)}
    mixes = [Blend(method="linear", sources=("a",), parameters={"weight": {"a": w}}) for w in (1.0, 2.0)]
    recipe = StackRecipe.compose(
        sources={"a": "org/a"},
        tokenizer="a",
        embedding=mixes[0],
        hops=[(0, mixes[1], mixes[0], mixes[0])],
        norm=mixes[0],
        head=mixes[0],
    )
    with pytest.raises(InputError, match=r"no mergekit filter gives only l.0.attn.w its weight 2"):
        to_mergekit(recipe, lambda reference: roles)


# ---- vocabularies ----------------------------------------------------------------------------------------------------

TOKENS = """
merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {weight: 0.5}
  - model: org/b@v2
    parameters: {weight: 0.5}
tokenizer:
  source: union
  tokens:
    <|end|>: {source: org/a, force: true}
    <|new|>: {source: {kind: model_token, model: {path: org/b, revision: v2}, token: </s>}}
    <|old|>: {source: {kind: model_token, model: org/base, token_id: 5}}
    <|none|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
chat_template: chatml
"""


def test_tokens_with_rules() -> None:
    recipe = read(TOKENS)
    assert recipe.tokenizer == "base"
    assert recipe.vocabulary.model_dump(exclude_none=True) == {
        "kind": "union",
        "base": "base",
        "tokens": {
            "<|end|>": {"source": "a", "force": True},
            "<|new|>": {"source": {"kind": "model_token", "model": "b", "token": "</s>"}, "force": False},
            "<|old|>": {"source": {"kind": "model_token", "model": "base", "token_id": 5}, "force": False},
            "<|none|>": {"source": {"kind": "zero"}, "force": False},
        },
        "pad_to_multiple_of": 64,
        "chat_template": "chatml",
    }
    config = to_mergekit(recipe, lambda reference: llama(7))
    assert config["tokenizer"]["tokens"]["<|new|>"]["source"]["model"] == "org/b@v2"
    assert from_mergekit(load_yaml(dump_yaml(config), "f"), lambda reference: llama(7)) == recipe


@pytest.mark.parametrize(
    ("keys", "tokenizer", "vocabulary"),
    [
        ({}, "base", Vocabulary()),
        ({"chat_template": "auto"}, "base", Vocabulary(chat_template="auto")),
        ({"tokenizer_source": "union"}, "base", Vocabulary(kind="union", base="base")),
        ({"tokenizer_source": "base"}, "base", Vocabulary(kind="tokenizer", base="base")),
        ({"tokenizer_source": "org/a"}, "a", Vocabulary(kind="tokenizer", base="base")),
        ({"tokenizer": {}}, "base", Vocabulary(kind="union", base="base")),
        ({"tokenizer": {"source": {"model": "org/a"}}}, "a", Vocabulary(kind="tokenizer", base="base")),
    ],
)
def test_sources_of_tokenizers(keys: dict[str, Any], tokenizer: str, vocabulary: Vocabulary) -> None:
    models = [{"model": "org/a", "parameters": {"weight": 1}}]
    config = {"merge_method": "ties", "base_model": "org/base", "models": models, **keys}
    recipe = from_mergekit(config, lambda reference: llama(2))
    assert (recipe.tokenizer, recipe.vocabulary) == (tokenizer, vocabulary)
    again = to_mergekit(recipe, lambda reference: llama(2))
    assert from_mergekit(again, lambda reference: llama(2)) == recipe


@pytest.mark.parametrize(
    ("keys", "place", "problem"),
    [
        ({"tokenizer": {}, "tokenizer_source": "union"}, "tokenizer", "combined with tokenizer_source"),
        ({"tokenizer": {"sorce": "union"}}, "tokenizer", "no key 'sorce'"),
        ({"tokenizer": {"tokens": ["x"]}}, "tokenizer.tokens", "keys with values"),
        ({"tokenizer": {"tokens": {"x": {"source": "org/z"}}}}, "tokenizer.tokens.x.source", "not among the merged"),
        ({"tokenizer": {"tokens": {"x": {}}}}, "tokenizer.tokens.x.source", "a folder or a hub id"),
        ({"tokenizer": {"tokens": {"x": {"source": "org/a", "force": 1}}}}, "tokenizer.tokens.x.force", "true or"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "org/a"}}}}},
            "tokenizer.tokens.x.source", "either `token:`",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of", "above 0"),
        ({"chat_template": 3}, "chat_template", "a name or the text"),
    ],
)  # fmt: skip
def test_wrong_vocabularies(keys: dict[str, Any], place: str, problem: str) -> None:
    models = [{"model": "org/a", "parameters": {"weight": 1}}]
    config = {"merge_method": "ties", "base_model": "org/base", "models": models, **keys}
    with pytest.raises(InputError, match=problem) as caught:
        from_mergekit(config, lambda reference: llama(2), "m.yaml")
    assert caught.value.place == f"m.yaml: {place}"


def test_vocabularies_that_mergekit_cannot_say() -> None:
    recipe = uniform("ties")
    for vocabulary, problem in (
        (Vocabulary(kind="tokenizer", base="b"), "vocabulary.base: is org/b, but mergekit"),
        (Vocabulary(kind="tokenizer"), "vocabulary.base: is None, but mergekit"),
        (Vocabulary(kind="union", base="base"), "recipe.tokenizer: is org/a, but mergekit"),
    ):
        with pytest.raises(InputError, match=problem):
            write(recipe.model_copy(update={"vocabulary": vocabulary}))
