"""Paths through layers: live and exported are one model, with and without cache, wherever the padding stands."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_checkpoints import in_own_memory, save_model, tiny_config
from helpers_tiers import architectures
from test_architectures import MODELS
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.live import LiveModel, check_live, live_model
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.stack import Blend, Hop, Scaling, StackRecipe

CPU = torch.device("cpu")
PROMPT = torch.arange(3, 19).reshape(2, 8)
LENGTH = PROMPT.shape[1]
LAYERS = 3
# Mamba and RWKV carry a state of their own from token to token, without attention; see test_residual for scales.
STATE = ("mamba", "rwkv")
PATH = [("a", 0), ("b", 1), ("b", 1), ("a", 1), ("b", 2), ("a", 2)]


def copy_of(name: str) -> Blend:
    return Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}})


def path_recipe(
    path: Sequence[tuple[str, int]], scales: Sequence[float] | None = None, scaling: Scaling = "stream", **more: Any
) -> StackRecipe:
    a = copy_of("a")
    return StackRecipe.compose(
        sources={"a": "a", "b": "b"},
        tokenizer="a",
        embedding=a,
        hops=[(layer, copy_of(name), copy_of(name), copy_of(name)) for name, layer in path],
        norm=a,
        head=a,
        scales=scales,
        scaling=scaling,
        **more,
    )


def deeper(settings: dict[str, Any]) -> dict[str, Any]:
    depth = next(key for key in ("num_hidden_layers", "n_layer", "n_layers") if key in settings)
    return {**settings, depth: LAYERS}


def open_both(folder: Path) -> dict[str, Source]:
    return {name: open_source(name, str(folder / name), place=f"sources.{name}") for name in ("a", "b")}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture(params=architectures(MODELS))
def folder(request: pytest.FixtureRequest, kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    if name not in kept:
        kind, settings = MODELS[name]
        kept[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        for seed, source in enumerate(("a", "b")):
            config = getattr(transformers, kind)(**deeper(settings))
            save_model(config, kept[name] / source, seed=seed, dtype=torch.float32)
    return kept[name]


@torch.inference_mode()
def answer(model: Any, tokens: torch.Tensor = PROMPT, mask: torch.Tensor | None = None) -> torch.Tensor:
    logits: torch.Tensor = model(tokens, attention_mask=mask, use_cache=False).logits
    return logits


def exported(recipe: StackRecipe, sources: dict[str, Source], out: Path) -> Any:
    write_model(recipe, sources, out, texts={})
    return in_own_memory(AutoModelForCausalLM.from_pretrained(out).eval())


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def written(recipe: StackRecipe, sources: dict[str, Source], layer_buffers: int = 2 * LAYERS) -> LiveModel:
    check_compatible(sources, recipe)
    live = live_model(sources["a"], CPU, layer_buffers=layer_buffers)
    Materialiser(sources).write(recipe, live)
    check_live(live)
    return live


def test_a_path_over_a_alone_is_a(folder: Path) -> None:
    live = written(path_recipe([("a", layer) for layer in range(LAYERS)]), open_both(folder))
    plain = in_own_memory(AutoModelForCausalLM.from_pretrained(folder / "a").eval())
    assert torch.equal(answer(live.model), answer(plain))


def test_live_and_exported_are_one_model(folder: Path, tmp_path: Path) -> None:
    sources = open_both(folder)
    live = written(path_recipe(PATH), sources)
    plain = exported(path_recipe(PATH), sources, tmp_path / "out")
    assert plain.config.num_hidden_layers == len(PATH)
    if "rwkv" in str(folder):  # plain RWKV halves the stream at every sixth layer, and what is added to it
        assert close(answer(live.model), answer(plain))
    else:
        assert torch.equal(answer(live.model), answer(plain))


@pytest.mark.parametrize("scaling", ["stream", "update"])
def test_scales_are_folded_into_a_plain_model(folder: Path, tmp_path: Path, scaling: Scaling) -> None:
    sources = open_both(folder)
    recipe = path_recipe(PATH, [0.7, 1.3, 1.1, 0.9, 1.25, 0.8], scaling)
    model = sources["a"]
    if not model.folds or (scaling == "stream" and not model.normed):
        with pytest.raises(InputError, match=r"recipe\.(hops|scaling)"):
            written(recipe, sources)
        return
    live = written(recipe, sources)
    assert not close(answer(written(path_recipe(PATH), sources).model), answer(live.model))
    assert close(answer(exported(recipe, sources, tmp_path / "out")), answer(live.model))


def test_with_a_cache_as_without(folder: Path) -> None:
    if "rwkv" in str(folder):
        pytest.skip("transformers' own RWKV gives other tokens with its state than without")
    sources = open_both(folder)
    scales = [1.1, 0.9, 1.2, 1.0, 0.8, 1.05] if sources["a"].folds else None
    live = written(path_recipe(PATH, scales, "update"), sources)
    live.model.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        cached = live.model.generate(PROMPT, use_cache=True, **settings)
        plain = live.model.generate(PROMPT, use_cache=False, **settings)
    assert torch.equal(cached, plain)
    if "mamba" in str(folder):
        return
    with torch.inference_mode():
        first = live.model(PROMPT[:, : LENGTH // 2], use_cache=True)
        rest = live.model(PROMPT[:, LENGTH // 2 :], past_key_values=first.past_key_values, use_cache=True).logits
    assert close(rest, answer(live.model)[:, LENGTH // 2 :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(folder: Path, side: str) -> None:
    if any(state in str(folder) for state in STATE):
        return  # their state takes in padding as it takes in anything; so do the models themselves
    live = written(path_recipe(PATH), open_both(folder))
    extra = torch.zeros(2, 3, dtype=torch.long)
    tokens = torch.cat([extra, PROMPT] if side == "left" else [PROMPT, extra], dim=1)
    mask = torch.cat([extra, torch.ones_like(PROMPT)] if side == "left" else [torch.ones_like(PROMPT), extra], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = {} if _takes_none(live.model) else {"position_ids": positions}
    with torch.inference_mode():
        padded = live.model(tokens, attention_mask=mask, use_cache=False, **more).logits
    inside = padded[:, 3:] if side == "left" else padded[:, :LENGTH]
    assert close(inside, answer(live.model))


def _takes_none(model: Any) -> bool:
    import inspect

    return "position_ids" not in inspect.signature(model.forward).parameters


def test_a_path_takes_no_memory_and_other_paths_find_their_layers_there(folder: Path) -> None:
    sources = open_both(folder)
    live = written(path_recipe(PATH), sources)
    assert live.stack is not None
    before = {tensor.data_ptr() for layer_buffer in live.stack.layer_buffers for tensor in layer_buffer.values()}
    materialiser = Materialiser(sources)
    expected: dict[int, torch.Tensor] = {}
    paths = [PATH, [PATH[0], *PATH[:0:-1]], [PATH[0], *PATH[1:4] * 5], [("b", layer) for layer in range(LAYERS)]]
    for _ in range(2):
        for number, path in enumerate(paths):
            materialiser.write(path_recipe(path), live)
            found = answer(live.model)
            assert torch.equal(expected.setdefault(number, found), found)
            inside = {p.data_ptr() for name, p in live.model.named_parameters() if name not in live.outside}
            assert inside <= before | {t.data_ptr() for t in live.outside.values()}


def test_layers_that_are_there_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate("ab"):
        save_model(tiny_config(num_hidden_layers=LAYERS), tmp_path / name, seed=seed)
    sources = open_both(tmp_path)
    live, materialiser = live_model(sources["a"], CPU, layer_buffers=2 * LAYERS), Materialiser(sources)
    everything = [(name, layer) for name in "ab" for layer in range(LAYERS)]
    materialiser.write(path_recipe(everything), live)
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read again"))
    materialiser._views.clear()
    materialiser.write(path_recipe(PATH, None, "update"), live)
    mixed = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 0.5, "b": 0.5}})
    recipe = path_recipe(everything)
    more = recipe.model_copy(
        update={
            "blends": (*recipe.blends, mixed),
            "hops": (*recipe.hops, Hop(layer=0, attention=2, mlp=2, norm=2)),
        }
    )
    with pytest.raises(InputError, match="is made of 7 different layers; the live model holds 6"):
        materialiser.write(more, live)


def test_over_many_paths_each_layer_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate("ab"):
        save_model(tiny_config(num_hidden_layers=LAYERS), tmp_path / name, seed=seed)
    sources = open_both(tmp_path)
    live, materialiser = live_model(sources["a"], CPU, layer_buffers=2 * LAYERS), Materialiser(sources)
    made: list[str] = []
    planned = materialiser.planned
    monkeypatch.setattr(
        materialiser, "planned", lambda merged, *given: made.append(merged.name) or planned(merged, *given)
    )
    pool = [(name, layer) for name in "ab" for layer in range(LAYERS)]
    rng = random.Random(0)
    for _ in range(40):
        materialiser.write(path_recipe(rng.choices(pool, k=rng.randint(1, 9))), live)
    outside = sum(role.layer is None for role in sources["a"].roles.values())
    in_layer = sum(role.layer == 0 for role in sources["a"].roles.values())
    assert len(made) == outside + len(pool) * in_layer


def test_masks_are_those_of_the_layer_not_of_the_hop(tmp_path: Path) -> None:
    """A layer merged by random drops is the same layer at every hop, live and exported."""
    for seed, name in enumerate("ab"):
        save_model(tiny_config(num_hidden_layers=LAYERS), tmp_path / name, seed=seed, dtype=torch.float32)
    sources = open_both(tmp_path)
    dare = Blend(
        method="dare_linear", sources=("b",), base="a", parameters={"weight": {"b": 1.0}, "density": {"b": 0.5}}
    )
    recipe = StackRecipe.compose(
        sources={"a": "a", "b": "b"}, tokenizer="a", embedding=copy_of("a"), norm=copy_of("a"), head=copy_of("a"),
        hops=[(layer, dare, dare, dare) for layer in (0, 1, 1, 2)],
    )  # fmt: skip
    plain = exported(recipe, sources, tmp_path / "out")
    assert torch.equal(answer(written(recipe, sources, layer_buffers=3).model), answer(plain))
    one, other = (plain.model.layers[hop].mlp.up_proj.weight for hop in (1, 2))
    assert torch.equal(one, other)
