"""RegMean++: against plain transformers in float64, live against export, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import WORDS, save_model, tiny_config
from helpers_miniature import evomerge, export_of, newest_scored, search_file, short_search_file, write_texts
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig
from transformers.pytorch_utils import Conv1D

from evomerge.calibration import Calibration
from evomerge.checkpoints.live import NotFiniteError
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.materialise import check_stack
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts
from evomerge.merging.measured.merged_inputs import MergedInputs
from evomerge.recipes.stack import Blend, StackRecipe

LINES = {
    "a": ("w1 w2 w3 w4 w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14 w15 w16"),
    "b": ("w20 w21 w22 w23 w1 w9 w3 w3 w24", "w5 w25 w26"),
}
TEXTS = Calibration(None, 8, own={name: lambda lines=lines: lines for name, lines in LINES.items()})  # type: ignore[misc]
NAMES = tuple(LINES)
LLAMA = tiny_config(num_hidden_layers=3)
GPT2 = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)


def opened(config: Any, folder: Path) -> dict[str, Source]:
    saved = [save_model(config, folder / name, seed=n, dtype=torch.float32) for n, name in enumerate(NAMES)]
    return {name: open_source(name, str(path), place=name) for name, path in zip(NAMES, saved, strict=True)}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return opened(LLAMA, tmp_path_factory.mktemp("llamas"))


def blend(weights: Sequence[float] = (0.7, 1.2), off_diagonal: float = 0.8) -> Blend:
    parameters = {"weight": dict(zip(NAMES, weights, strict=True)), "off_diagonal": off_diagonal}
    return Blend(method="regmean_plus_plus", sources=NAMES, parameters=parameters)


def recipe_of(sources: dict[str, Source], blends: Sequence[Blend] = (), outside: Blend | None = None) -> StackRecipe:
    """A recipe with a blend for each layer; the first also outside them."""
    layers = sources["a"].layers
    blends = blends or [blend()] * layers
    first = outside or blends[0]
    return StackRecipe.compose(
        sources={name: name for name in sources},
        tokenizer="a",
        embedding=first,
        hops=[(layer, each, each, each) for layer, each in enumerate(blends)],
        norm=first,
        head=first,
        calibration=TEXTS.digest,
    )


def builder(sources: dict[str, Source], evidence: Evidence | None = None, texts: Calibration = TEXTS) -> StackBuilder:
    return StackBuilder(BuildContext(sources, "a", evidence or Evidence(), calibration=texts))


def by_hand(sources: dict[str, Source], weights: Sequence[float], off_diagonal: float) -> dict[str, Tensor]:
    """The merge in float64: for each source and layer the whole model is run, with that one layer of the source."""
    models = [AutoModelForCausalLM.from_pretrained(s.folder, dtype=torch.float64).eval() for s in sources.values()]
    merged = copy.deepcopy(models[0])

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        return sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)

    state = merged.state_dict()
    for name in state:
        state[name].copy_(mean([model.state_dict()[name] for model in models]))
    is_llama = hasattr(merged, "model")
    stack = merged.model.layers if is_llama else merged.transformer.h
    stacks = [model.model.layers if is_llama else model.transformer.h for model in models]
    weights = [weight / sum(weights) for weight in weights]
    for layer in range(len(stack)):
        linear = [n for n, m in stack[layer].named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
        above = dict.fromkeys(linear, 0.0)
        below = dict.fromkeys(linear, 0.0)
        kept = copy.deepcopy(stack[layer])
        for w, layers, name in zip(weights, stacks, sources, strict=True):
            stack[layer].load_state_dict(layers[layer].state_dict())
            for part, gram in grams(merged, stack[layer], linear, LINES[name]).items():
                shrunk = w * (off_diagonal * gram + (1 - off_diagonal) * gram.diag().diag())
                module = layers[layer].get_submodule(part)
                side = module.weight.T if isinstance(module, Conv1D) else module.weight
                above[part], below[part] = above[part] + side @ shrunk, below[part] + shrunk
        stack[layer].load_state_dict(kept.state_dict())
        for part in linear:
            module = stack[layer].get_submodule(part)
            ridge = 1e-6 * below[part].diagonal().mean() * torch.eye(len(below[part]), dtype=torch.float64)
            before = module.weight.T if isinstance(module, Conv1D) else module.weight  # the weighted mean
            solved = (above[part] + before @ ridge) @ torch.linalg.inv(below[part] + ridge)
            module.weight.data.copy_(solved.T if isinstance(module, Conv1D) else solved)
    return merged.state_dict()


@torch.no_grad()
def grams(model: Any, layer: Any, linear: Sequence[str], lines: Sequence[str]) -> dict[str, Tensor]:
    """X^T X / tokens of what linear parts of a layer are given."""
    rows: dict[str, list[Tensor]] = {part: [] for part in linear}
    hooks = [
        layer.get_submodule(part).register_forward_hook(lambda m, given, out, part=part: rows[part].append(given[0][0]))
        for part in linear
    ]
    for line in lines:
        model(torch.tensor([[WORDS.index(word) for word in line.split()][:8]]))
    for hook in hooks:
        hook.remove()
    stacked = {part: torch.cat(found) for part, found in rows.items()}
    return {part: x.T @ x / len(x) for part, x in stacked.items()}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_it_is_what_plain_transformers_give_layer_by_layer(config: Any, tmp_path: Path) -> None:
    sources = opened(config, tmp_path)
    live = builder(sources).write(recipe_of(sources))
    wanted = by_hand(sources, (0.7, 1.2), 0.8)
    for name, tensor in live.tensors.items():
        theirs = wanted[sources["a"].parts[name].tensor]
        assert (tensor - theirs).abs().max() < 1e-4 * theirs.abs().max(), name


def written(sources: dict[str, Source], recipe: StackRecipe, *before: StackRecipe) -> dict[str, Tensor]:
    """The live model's tensors after this recipe, of a new live model that others were written into before."""
    made = builder(sources)
    for earlier in before:
        made.write(earlier)
    return {name: tensor.clone() for name, tensor in made.write(recipe).tensors.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def layer_blends(*last: float) -> list[Blend]:
    return [blend(), blend((0.3, 0.9)), blend(last)]


LINEAR = Blend(method="linear", sources=NAMES, parameters={"weight": {"a": 0.5, "b": 0.5}, "normalize": True})


def test_it_is_not_what_the_sources_own_inputs_give(llamas: dict[str, Source]) -> None:
    """The first layer is given the merged embedding, later ones what merged layers make of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Facts, "merged_input_of", Facts.input_of)
        own = written(llamas, recipe_of(llamas))
    ours = written(llamas, recipe_of(llamas))
    stored = "model.layers.2.mlp.down_proj.weight"
    assert (own[stored] - ours[stored]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "before",
    [
        lambda s: recipe_of(s, layer_blends(0.2, 0.6)),  # the last layer alone is made anew
        lambda s: recipe_of(s, [blend((0.1, 0.9)), *layer_blends(0.9, 0.4)[1:]]),  # all, after another first layer
        lambda s: recipe_of(s, layer_blends(0.9, 0.4), outside=LINEAR),  # all, after another embedding
        lambda s: recipe_of(s, [LINEAR] * 3),
        lambda s: recipe_of(s, layer_blends(0.9, 0.4)),
    ],
)
def test_what_was_written_before_leaves_no_trace(llamas: dict[str, Source], before: Any) -> None:
    recipe = recipe_of(llamas, layer_blends(0.9, 0.4))
    assert_equal(written(llamas, recipe), written(llamas, recipe, before(llamas)))


def test_layers_before_the_first_that_changed_are_not_observed_again(
    llamas: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = builder(llamas), []
    made.write(recipe_of(llamas, layer_blends(0.2, 0.6)))
    observe = MergedInputs.observe
    monkeypatch.setattr(MergedInputs, "observe", lambda self, layer: seen.append(layer) or observe(self, layer))
    made.write(recipe_of(llamas, layer_blends(0.9, 0.4)))
    assert seen == [2]
    made.write(recipe_of(llamas, layer_blends(0.9, 0.4)))
    assert seen == [2]


@pytest.mark.parametrize("blends", [layer_blends(0.9, 0.4), [blend(), LINEAR, blend()]])
def test_an_export_is_the_live_model_bit_for_bit(
    llamas: dict[str, Source], tmp_path: Path, blends: Sequence[Blend]
) -> None:
    recipe = recipe_of(llamas, blends).model_copy(update={"dtype": "bfloat16"})
    context = BuildContext(llamas, "a", Evidence(), dtype=torch.bfloat16, calibration=TEXTS)
    live = StackBuilder(context).write(recipe).tensors
    other = StackBuilder(context)
    other.write(recipe_of(llamas, [LINEAR] * 3).model_copy(update={"dtype": "bfloat16"}))
    other.export(recipe, tmp_path / "out", texts={})
    assert_equal(dict(live), load_file(tmp_path / "out" / "model.safetensors"))


def test_kept_tokens_stand_for_texts_that_are_gone(llamas: dict[str, Source], tmp_path: Path) -> None:
    contents = {name: name for name in llamas}
    first = builder(llamas, Evidence(tmp_path, contents)).write(recipe_of(llamas)).tensors

    def gone() -> Sequence[str]:
        raise InputError("calibration.file", "there is no such file")

    texts = Calibration(None, 8, TEXTS.digest, dict.fromkeys(NAMES, gone))
    again = builder(llamas, Evidence(tmp_path, contents), texts).write(recipe_of(llamas)).tensors
    assert_equal(dict(first), dict(again))


def test_one_source_alone_comes_out_as_it_was(llamas: dict[str, Source]) -> None:
    tensors = written(llamas, recipe_of(llamas, [blend((0.0, 1.0), 0.0)] * 3))
    for name, tensor in tensors.items():
        assert (tensor - llamas["b"].read(name)).abs().max() < 1e-4, name


def test_layers_out_of_their_places_are_refused_by_name(llamas: dict[str, Source]) -> None:
    plain = recipe_of(llamas)
    for hops in ((0, 1, 1), (1, 0, 2)):
        moved = plain.model_copy(update={"hops": tuple(plain.hops[number] for number in hops)})
        with pytest.raises(InputError, match="regmean_plus_plus makes each layer") as refused:
            check_stack(moved, llamas)
        assert refused.value.place == "recipe.hops"
    scaled = plain.model_copy(update={"hops": (plain.hops[0].model_copy(update={"scale": 1.1}), *plain.hops[1:])})
    with pytest.raises(InputError, match="unscaled"):
        check_stack(scaled, llamas)


def test_what_merged_layers_make_nan_of_is_said_with_its_layer(
    llamas: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.merging.normal_equations.nearest_by_grams", lambda sides, *rest: sides[0] * torch.inf)
    with pytest.raises(NotFiniteError, match="what layer 1 is given on the texts of a"):
        builder(llamas).write(recipe_of(llamas))
    with pytest.raises(InputError, match="recipe: gives NaN or Inf in what layer 1 is given on the texts of a"):
        builder(llamas).export(recipe_of(llamas), tmp_path / "out", texts={})


def test_experts_that_are_computed_as_one_are_refused_by_name(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    sources = opened(config, tmp_path)
    with pytest.raises(InputError, match=r"block_sparse_moe.* cannot be observed"):
        builder(sources).write(recipe_of(sources))


def test_a_path_through_layers_is_refused_before_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("a line that is long enough\n" * 2)
    space = {"kind": "hybrid_space", "method": "regmean_plus_plus"}
    file = search_file(tmp_path, space=space, calibration={"file": "t.txt", "prompts": 2})
    assert evomerge("validate", file) == 2
    assert "space.method: regmean_plus_plus computes each layer" in capsys.readouterr().err
    assert evomerge("validate", search_file(tmp_path, space={"method": "regmean_plus_plus"})) == 2
    assert "regmean_plus_plus needs calibration" in capsys.readouterr().err


@pytest.mark.nightly
def test_it_is_searched_resumed_and_exported_without_its_texts(tmp_path: Path) -> None:
    """Verifying an export loads it with plain transformers: it must score item by item as the live model did."""
    write_texts(tmp_path / "t.jsonl", slice(4))
    write_texts(tmp_path / "m.jsonl", slice(4, 8))
    file = short_search_file(
        tmp_path,
        space={"method": "regmean_plus_plus", "granularity": 3},
        calibration={"file": "t.jsonl", "sources": {"maths": "m.jsonl"}, "prompts": 4, "tokens": 32},
    )
    search = tmp_path / "search"
    assert evomerge("search", file, "--dir", search) == 0
    assert evomerge("resume", search, "--set", "budget.candidates=10") == 0
    row = newest_scored(search)
    assert export_of(row, search, tmp_path / "out") == 0
    texts = [f"--calibration={tmp_path / 't.jsonl'}", f"--calibration=maths={tmp_path / 'm.jsonl'}"]
    assert evomerge("merge", tmp_path / "out/recipe.yaml", tmp_path / "a", *texts, "--prompts=4", "--tokens=32") == 0
    for text in tmp_path.glob("*.jsonl"):
        text.unlink()
    assert export_of(row, search, tmp_path / "b", "--no-verify") == 0
    ours, *others = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "a", "b"))
    assert all(other == ours for other in others)
