"""mergekit configurations in and out: as people write them, there and back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.mergekit import from_mergekit, load_recipe_file, to_mergekit
from evomerge.merging import METHODS
from evomerge.recipe import Blend, Recipe, check_blend, default_parameters
from evomerge.yaml import load_yaml

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


def read(text: str, layers: int = 7) -> Recipe:
    return from_mergekit(load_yaml(text, "m.yaml"), lambda reference: layers, "m.yaml")


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
        check_blend(blend, METHODS["ties"].spec, "blend")
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
    }


def test_defaults_are_those_of_mergekit() -> None:
    models = [{"model": "x/a", "parameters": {"weight": 1}}, {"model": "x/b", "parameters": {"weight": 1}}]
    for method, normalize in (("ties", True), ("dare_ties", False), ("task_arithmetic", False), ("linear", True)):
        config = {"merge_method": method, "models": models} | ({} if method == "linear" else {"base_model": "x/base"})
        (blend,) = from_mergekit(config, lambda reference: 2).blends
        assert blend.parameters["normalize"] is normalize
        assert blend.parameters.get("density", {"a": 1.0, "b": 1.0}) == {"a": 1.0, "b": 1.0}


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
    recipe = from_mergekit(config, lambda reference: 1)
    assert recipe.sources == {"chat": "x/chat", "chat-2": "y/chat", "chat-3": "./z/chat/", "m+lora": "x/m@v1+y/lora@v2"}


def test_layers_are_asked_of_the_base() -> None:
    asked: list[str] = []
    from_mergekit(load_yaml(TIES, "f"), lambda reference: asked.append(reference) or 3)
    assert asked == ["TheBloke/Llama-2-13B-fp16"]


LINEAR = {"merge_method": "linear", "models": [{"model": "x/a", "parameters": {"weight": 1}}]}
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
        (LINEAR | {"tokenizer": {"source": "union"}}, "tokenizer_source"),
        (LINEAR | {"tokenizer_source": "union"}, "tokenizer_source: cannot be 'union'"),
        (LINEAR | {"dtype": "bfloat"}, "dtype: there is no dtype 'bfloat'. Did you mean 'bfloat16'?"),
        (LINEAR | {"slices": []}, "needs either `models:` or `slices:`"),
        ({"merge_method": "linear"}, "needs either `models:` or `slices:`"),
        (LINEAR | {"models": []}, "models: must be a list with at least one entry"),
        (LINEAR | {"models": ["x/a"]}, "models[0]: must be keys with values"),
        (LINEAR | {"models": [{"model": 3}]}, "models[0].model: must be a folder or a hub id"),
        (LINEAR | {"models": [{"modle": "x/a"}]}, "models[0]: there is no key 'modle'. Did you mean 'model'?"),
        (LINEAR | {"models": LINEAR["models"] * 2}, "models[1]: names x/a again"),
        (LINEAR | {"base_model": "x/base"}, "base_model: is none of the models, and linear uses no base"),
        (LINEAR | {"merge_method": "ties"}, "base_model: is missing, and ties needs it"),
        (LINEAR | {"merge_method": "slerp"}, "base_model: is missing, and slerp needs it"),
        (LINEAR | {"merge_method": "ties", "base_model": 1}, "base_model: must be a folder or a hub id"),
        (LINEAR | {"merge_method": "ties", "base_model": "x/a"}, "names no model beside the base"),
        (LINEAR | {"models": [{"model": "x/a"}]}, "parameters.weight: is missing for model.embed_tokens.weight"),
        (LINEAR | {"parameters": {"density": 1}}, "parameters: there is no key 'density'"),
        (ARITHMETIC | {"parameters": {"densty": 1}}, "parameters: there is no key 'densty'"),
        (ARITHMETIC | {"parameters": {"normalize": 1}}, "parameters.normalize: must be true or false, not 1"),
        (ARITHMETIC | {"parameters": {"normalize": True, "lambda": 2}}, "parameters.lambda: cannot be taken along"),
        (ARITHMETIC | {"merge_method": "ties", "parameters": {"rescale": True}}, "parameters.rescale: is always false"),
        (ARITHMETIC | {"merge_method": "dare_ties", "parameters": {"rescale": False}}, "rescale: is always true"),
        (weighted("much"), "parameters.weight: must be a number, not 'much'"),
        (weighted(True), "parameters.weight: must be a number, not True"),
        (weighted(float("nan")), "parameters.weight"),
        (weighted([]), "parameters.weight: is an empty list"),
        (weighted([1, "x"]), "must be a gradient of numbers, but holds 'x'"),
        (weighted([{"filter": "mlp", "valeu": 1}]), "parameters.weight: there is no key 'valeu'"),
        (weighted([{"filter": "o_proj", "value": 1}, {"value": 0}]), "differs between model.layers.0.self_attn.q_proj"),
        (weighted([{"filter": "mlp", "value": 1}]), "is missing for model.embed_tokens.weight"),
        (sliced([0, 2], [3, 4]), "slices[1].layer_range: is [3, 4], where layer 2 must follow"),
        (sliced([0, 2], [0, 2]), "slices[1].layer_range: is [0, 2], where layer 2 must follow"),
        (sliced([2, 2]), "slices[0].layer_range"),
        (sliced([0, 1.5]), "must be two whole numbers"),
        (sliced(None), "must be two whole numbers"),
        (sliced([0, 2], residual_weight=0.5), "slices[0]: residual_weight: cannot be taken"),
    ],
)
def test_what_a_recipe_cannot_hold_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_mergekit(config, lambda reference: 2, "m.yaml")
    assert str(caught.value).startswith("m.yaml")
    assert message in str(caught.value)


def test_slerp_starts_at_the_base_wherever_it_is_listed() -> None:
    recipe = read(SLERP.replace("base_model: psmathur/orca_mini_v3_13b", "base_model: garage-bAInd/Platypus2-13B"))
    assert {blend.sources for blend in recipe.blends} == {("Platypus2-13B", "orca_mini_v3_13b")}


def test_slerp_mixes_two() -> None:
    config = load_yaml(SLERP, "f")
    config["slices"][0]["sources"].append({"model": "x/third", "layer_range": [0, 5]})
    with pytest.raises(InputError, match="slerp mixes base_model with one other model, not with 2"):
        from_mergekit(config, lambda reference: 5)


def test_a_file_of_mergekits_is_known_by_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(TIES)
    assert load_recipe_file(file, lambda reference: 7) == read(TIES)


# ---- out -------------------------------------------------------------------------------------------------------------

SOURCES = {"base": "org/base", "a": "org/a", "b": "org/b"}
NAMES = ("a", "b")


def blend_of(method: str, **numbers: Any) -> Blend:
    spec = METHODS[method].spec
    parameters = default_parameters(spec, NAMES) | numbers
    return Blend(method=method, sources=NAMES, base="base" if spec.needs_base else None, parameters=parameters)


def uniform(method: str, **numbers: Any) -> Recipe:
    sources = SOURCES if METHODS[method].spec.needs_base else {name: SOURCES[name] for name in NAMES}
    return Recipe.uniform(blend_of(method, **numbers), sources=sources, tokenizer="a", layers=3, dtype="bfloat16")


def test_one_blend_is_written_without_slices() -> None:
    assert to_mergekit(uniform("ties", weight={"a": 0.7, "b": 0.9})) == {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [
            {"model": "org/a", "parameters": {"weight": 0.7, "density": 0.2}},
            {"model": "org/b", "parameters": {"weight": 0.9, "density": 0.2}},
        ],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "tokenizer_source": "org/a",
    }


def test_slerp_is_written_from_the_base() -> None:
    config = to_mergekit(uniform("slerp", t=0.3))
    assert config["base_model"] == "org/a"
    assert config["models"] == [{"model": "org/a"}, {"model": "org/b"}]
    assert config["parameters"] == {"t": 0.3}


def test_layers_are_written_as_slices_and_parts_as_filters() -> None:
    def mix(weight: float) -> Blend:
        return blend_of("linear", weight={"a": weight, "b": 1.0})

    recipe = Recipe.compose(
        sources={name: SOURCES[name] for name in NAMES},
        tokenizer="b",
        embedding=mix(0.1),
        hops=[(0, mix(0.2), mix(0.3), mix(0.4)), (1, mix(0.2), mix(0.3), mix(0.4)), (2, mix(0.5), mix(0.5), mix(0.5))],
        norm=mix(0.5),
        head=mix(0.6),
    )
    config = to_mergekit(recipe)
    first, second = config["slices"]
    assert first["sources"][0] == {
        "model": "org/a",
        "layer_range": [0, 2],
        "parameters": {
            "weight": [
                {"filter": "self_attn", "value": 0.2},
                {"filter": "mlp", "value": 0.3},
                {"filter": "embed_tokens", "value": 0.1},
                {"value": 0.4},
            ]
        },
    }
    assert first["sources"][1]["parameters"] == {"weight": 1.0}
    assert second["sources"][0]["layer_range"] == [2, 3]
    assert second["sources"][0]["parameters"]["weight"] == [{"filter": "lm_head", "value": 0.6}, {"value": 0.5}]
    assert "dtype" not in config


def test_a_base_stands_among_the_models_of_a_slice() -> None:
    recipe = Recipe.compose(
        sources=SOURCES,
        tokenizer="a",
        embedding=blend_of("ties"),
        hops=[(0, *[blend_of("ties", weight={"a": 0.0, "b": 1.0})] * 3)],
        norm=blend_of("ties"),
        head=blend_of("ties"),
    )
    (piece,) = to_mergekit(recipe)["slices"]
    assert piece["sources"][-1] == {"model": "org/base", "layer_range": [0, 1]}


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_there_and_back(method: str, data: st.DataObject) -> None:
    """Short names are the last parts of the references here, so that they come back too."""
    spec = METHODS[method].spec
    normalize = data.draw(st.booleans())
    number = st.sampled_from([0.0, 0.1, 0.25, 1.0, 1e-7])

    def draw() -> Blend:
        drawn: dict[str, Any] = {
            p.name: {name: data.draw(number) for name in NAMES} if p.scope == "source" else data.draw(number)
            for p in spec.parameters
        }
        return blend_of(method, **drawn, **dict.fromkeys(spec.switches, normalize))

    recipe = Recipe.compose(
        sources=SOURCES if spec.needs_base else {name: SOURCES[name] for name in NAMES},
        tokenizer=data.draw(st.sampled_from(NAMES)),
        embedding=draw(),
        hops=[(layer, draw(), draw(), draw()) for layer in range(3)],
        norm=draw(),
        head=draw(),
        dtype=data.draw(st.sampled_from([None, "float16", "float32"])),
    )
    back = from_mergekit(to_mergekit(recipe), lambda reference: 3)
    assert back == recipe
    assert back.hash == recipe.hash


def test_what_mergekit_cannot_say_is_refused() -> None:
    recipe = uniform("ties")
    ties, linear = recipe.blends[0], blend_of("linear")
    fewer = blend_of("task_arithmetic").model_copy(update={"sources": ("a",)})
    cases = [
        ({"blends": (ties, linear)}, "differ in method"),
        ({"blends": (blend_of("task_arithmetic"), fewer)}, "differ in sources"),
        ({"blends": (ties, ties.model_copy(update={"base": "a"}))}, "differ in base"),
        ({"blends": (ties, blend_of("ties", normalize=True))}, "differ in normalize"),
        ({"blends": (ties.model_copy(update={"method": "mine"}),)}, "no merge method of mergekit's 'mine'"),
        ({"blends": (ties.model_copy(update={"sources": ("a", "base")}),)}, "mix the base base as a source"),
        ({"sources": {**SOURCES, "b": "org/a"}}, "two names for one model"),
        ({"hops": recipe.hops[::-1]}, "visits layers"),
    ]
    for change, message in cases:
        with pytest.raises(InputError, match=message):
            to_mergekit(recipe.model_copy(update=change))
