"""What may be mixed where a recipe takes other layers of each source: sources of any depth, layers of one shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_checkpoints import save_model, tiny_config
from transformers import Gemma2Config, GPTNeoXConfig

from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.recipes.stack import Blend, StackRecipe


def copy_of(name: str) -> Blend:
    return Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}})


BOTH = Blend(method="linear", sources=("two", "four"), parameters={"weight": {"two": 0.5, "four": 0.5}})


def recipe(*hops: tuple[int | dict[str, int], Blend], **tensors: Blend) -> StackRecipe:
    return StackRecipe.compose(
        sources={"two": "2", "four": "4", "other": "4"},
        tokenizer="two",
        embedding=BOTH,
        hops=[(layer, blend, blend, blend) for layer, blend in hops],
        norm=BOTH,
        head=BOTH,
        tensors={f"model.layers.{name[1:]}.mlp.up_proj.weight": blend for name, blend in tensors.items()},
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("models")
    for name, layers in (("two", 2), ("four", 4)):
        save_model(tiny_config(num_hidden_layers=layers), folder / name)
    return {name: open_source(name, str(folder / name), place=name) for name in ("two", "four")}


def test_layers_of_sources_of_any_depth_may_be_mixed(sources: dict[str, Source]) -> None:
    long = [(0, copy_of("two")), ({"two": 1, "four": 3}, BOTH), (2, copy_of("four")), (2, copy_of("four"))]
    check_compatible(sources, recipe(*long))
    check_compatible(sources, recipe((1, copy_of("two")), h0=BOTH))
    with pytest.raises(InputError, match="differ in number of layers: 4 and 2"):
        check_compatible(sources)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (recipe((0, BOTH), (2, BOTH)), r"recipe.hops\[1\]: takes layer 2 of two, which has the layers 0 to 1"),
        (
            recipe((0, BOTH), (4, copy_of("four"))),
            r"recipe.hops\[1\]: takes layer 4 of four, which has the layers 0 to 3",
        ),
        (recipe(({"two": 0, "four": 5}, BOTH)), r"recipe.hops\[0\]: takes layer 5 of four"),
        (recipe((3, copy_of("four")), h0=BOTH), r"recipe.hops\[0\]: takes layer 3 of two"),
    ],
)
def test_a_layer_that_a_source_has_not(sources: dict[str, Source], path: StackRecipe, place: str) -> None:
    with pytest.raises(InputError, match=place):
        check_compatible(sources, path)


def test_a_tensor_apart_says_the_layer_of_each_source_as_well(sources: dict[str, Source]) -> None:
    three = Blend(method="linear", sources=("other", "four"), parameters={"weight": {"other": 0.5, "four": 0.5}})
    path = recipe(({"two": 0, "four": 1}, BOTH), h0=three)
    with pytest.raises(InputError, match=r"recipe.hops\[0\]: mixes other into a tensor, but does not say which layer"):
        check_compatible({**sources, "other": sources["four"]}, path)


def test_layers_of_another_shape_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    save_model(tiny_config(num_hidden_layers=3, intermediate_size=32), tmp_path / "wide")
    wide = {**sources, "four": open_source("four", str(tmp_path / "wide"), place="wide")}
    with pytest.raises(
        InputError,
        match=r"layer 2 of four cannot be layer 1 .*2.mlp.down_proj.weight and \S*1.mlp.down_proj.weight: \[16, 32\]",
    ):
        check_compatible(wide, recipe((0, copy_of("two")), ({"two": 0, "four": 2}, BOTH)))
    check_compatible(wide, recipe((0, copy_of("two")), (1, copy_of("two"))))  # nothing of its layers is used


def test_layers_with_other_tensors_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    save_model(tiny_config(num_hidden_layers=4, attention_bias=True), tmp_path / "biased")
    biased = {**sources, "four": open_source("four", str(tmp_path / "biased"), place="biased")}
    with pytest.raises(
        InputError, match=r"layer 3 of four cannot be layer 0 .* layer 0 of two: that has no \S*k_proj.bias"
    ):
        check_compatible(biased, recipe((3, copy_of("four"))))


def test_names_are_those_of_the_architecture(tmp_path: Path) -> None:
    """GPT-NeoX has other names for all, and a number in none of them but the layer's."""
    opened = {}
    for name, layers in (("two", 2), ("four", 4)):
        config = GPTNeoXConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        opened[name] = open_source(name, str(save_model(config, tmp_path / name)), place=name)
    check_compatible(opened, recipe((0, BOTH), ({"two": 1, "four": 3}, BOTH), (2, copy_of("four"))))


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    """A path has the settings of the tokenizer's source, where a layer with full attention would get a window."""
    kinds = {"two": ["sliding_attention", "full_attention"], "four": ["full_attention", "sliding_attention"]}
    for name, layer_types in kinds.items():
        config = Gemma2Config(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, sliding_window=4, layer_types=layer_types,
        )  # fmt: skip
        save_model(config, tmp_path / name)
    sources = {name: open_source(name, str(tmp_path / name), place=name) for name in kinds}
    path = recipe((0, copy_of("two")), (1, copy_of("four")))
    with pytest.raises(
        InputError, match="differ in layer_types of layer 1 and 1: sliding_attention and full_attention"
    ):
        check_compatible(sources, path.model_copy(update={"embedding": 0, "norm": 0, "head": 0}))
