"""Layers in other places: what is exported loads as it is and is the layers stacked by hand, or is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import in_own_memory, save_model
from helpers_tiers import architectures
from test_architectures import GROUPED, MODELS, SMALL
from test_paths import CPU, answer, close, open_both, path_recipe
from test_residual import LATENT, OTHERS, ROUTED, configuration
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from evomerge.checkpoints.checks import check_written
from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import layer_stack
from evomerge.commands.merge import merge
from evomerge.errors import InputError
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.stack import StackRecipe

PATH = [("a", 0), ("b", 0), ("b", 1), ("a", 0), ("a", 1), ("b", 1)]
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
    "time_step_limit": (0.0, 100.0),
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]
GEMMA_3N: dict[str, Any] = {
    "num_kv_shared_layers": 0, "laurel_rank": 4, "intermediate_size": [24, 32], "head_dim": 4, "sliding_window": 4,
    "layer_types": KINDS, "vocab_size_per_layer_input": SMALL["vocab_size"], "hidden_size_per_layer_input": 4,
}  # fmt: skip
GEMMA_4: dict[str, Any] = {
    "num_kv_shared_layers": 0, "head_dim": 4, "global_head_dim": 8, "sliding_window": 4, "layer_types": KINDS,
    "vocab_size_per_layer_input": SMALL["vocab_size"], "hidden_size_per_layer_input": 0,
}  # fmt: skip
ERNIE: dict[str, Any] = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8}

# Architectures and settings that speak of layers by number, beside those of the other tests.
MORE: dict[str, dict[str, Any]] = {
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4,
    "gemma4_text with an embedding for each layer": {**GEMMA_4, "hidden_size_per_layer_input": 4},
    "gemma4_text sharing keys": {**GEMMA_4, "num_kv_shared_layers": 1, "layer_types": KINDS[1:] * 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 8, **MAMBA,
    },
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "ernie4_5_moe all sparse": {**ERNIE, "moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "qwen2_moe every other": {**ROUTED, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 2},
    "llama4_text in turn": {
        **ROUTED, "intermediate_size_mlp": 24, "moe_layers": [0], "no_rope_layers": [1, 0],
        "layer_types": KINDS[1:] * 2,
    },
    "smollm3 in turn": {"no_rope_layers": [0, 0]},
    "deepseek_v3 all sparse": {**LATENT, "first_k_dense_replace": 0},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "minimax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
}  # fmt: skip

RIGID = {
    "rwkv", "diffllama", "gemma3n_text", "gemma4_text", "gemma4_text with an embedding for each layer",
    "gemma4_text sharing keys",
    "jamba", "qwen2_moe every other", "gpt_neo", "minimax",
    # the first layers are dense, and a path begins with two of them
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "lfm2_moe",
}  # fmt: skip


FITTING = {"gemma4_text"}  # whose last layer must have full attention, as that of the path has


def config_of(case: str) -> Any:
    if case not in MORE:
        return configuration(case)
    model_type = case.split()[0]
    shared = SMALL if model_type == "gpt_neo" or "deepseek" in model_type else GROUPED
    return CONFIG_MAPPING[model_type](**{**shared, **MORE[case]})


def save_both(config: Any, folder: Path) -> dict[str, Source]:
    for seed, name in enumerate("ab"):
        save_model(copy.deepcopy(config), folder / name, seed=seed, dtype=torch.float32)
    return open_both(folder)


def by_hand(folder: Path, path: list[tuple[str, int]]) -> Any:
    """Layers of the loaded models put into a list one after the other, with their places in the cache."""
    models = {n: AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float32).eval() for n in ("a", "b")}
    depth = models["a"].config.num_hidden_layers
    stacks = {name: list(layer_stack(model, depth)[1]) for name, model in models.items()}
    model = models["a"]
    stack = layer_stack(model, depth)[1]
    stack._modules.clear()
    for number, (name, layer) in enumerate(path):
        stack.append(copy.deepcopy(stacks[name][layer]))
        for module in stack[number].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    model.config.num_hidden_layers = len(path)
    if "layer_types" in vars(model.config):
        model.config.layer_types = [model.config.layer_types[layer] for _, layer in path]
    return model


def load(folder: Path) -> Any:
    """The folder by transformers, which must find in it what the model has and nothing else."""
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    return in_own_memory(model.eval())


@pytest.mark.parametrize("case", architectures(dict.fromkeys([*MODELS, *OTHERS, *MORE])))
def test_a_path_is_the_layers_stacked_by_hand_or_refused(case: str, tmp_path: Path) -> None:
    sources = save_both(config_of(case), tmp_path)
    assert bool(sources["a"].reordering_problem) == (case in RIGID), sources["a"].reordering_problem
    live = live_model(sources["a"], CPU, layer_buffers=4)
    recipe = path_recipe(PATH)
    if case in RIGID - FITTING:
        for make in (lambda: Materialiser(sources).write(recipe, live), lambda: write(recipe, sources, tmp_path)):
            with pytest.raises(InputError, match=r"recipe.hops: this path of 6 layers cannot be made of a"):
                make()
        assert not (tmp_path / "out").exists()
        return
    write(recipe, sources, tmp_path)
    model = load(tmp_path / "out")
    assert close(answer(model), answer(by_hand(tmp_path, PATH)))
    Materialiser(sources).write(recipe, live)
    assert torch.equal(answer(live.model), answer(model))


def write(recipe: StackRecipe, sources: dict[str, Source], folder: Path) -> None:
    write_model(recipe, sources, folder / "out", texts={})


DEEP: dict[str, tuple[str, dict[str, Any], list[int], dict[str, Any]]] = {
    "dense layers stay first": (
        "deepseek_v3", {**LATENT, "first_k_dense_replace": 1}, [0, 1, 2, 1, 2], {"first_k_dense_replace": 1},
    ),
    "more dense layers come first": (
        "deepseek_v3", {**LATENT, "first_k_dense_replace": 2}, [0, 1, 0, 2], {"first_k_dense_replace": 3},
    ),
    "fewer dense layers come first": (
        "glm4_moe", {**ROUTED, "first_k_dense_replace": 2}, [0, 2, 2, 2], {"first_k_dense_replace": 1},
    ),
    "layers named by number": (
        "qwen3_moe", {**ROUTED, "mlp_only_layers": [1]}, [1, 0, 1, 2], {"mlp_only_layers": [0, 2]},
    ),
    "sparse layers named": (
        "llama4_text", {**ROUTED, "intermediate_size_mlp": 24, "moe_layers": [0, 1, 2]}, [2, 1, 0, 2],
        {"moe_layers": [0, 1, 2, 3]},
    ),
    "sparse layers from and to": (
        "ernie4_5_moe",
        {**ERNIE, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
        [0, 1, 1, 1, 2], {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    ),
    "turns of experts that are kept": (
        "qwen2_moe", {**ROUTED, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 2}, [0, 1, 2, 1], {},
    ),
    "its own constants": ("diffllama", {}, [0, 1], {}),
    "heads of a layer's own": ("gemma4_text", {**GEMMA_4, "layer_types": [*KINDS, KINDS[1]]}, [0, 2, 0, 1], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", DEEP)
def test_what_is_said_of_layers_by_number_is_said_anew(case: str, tmp_path: Path) -> None:
    model_type, settings, layers, said = DEEP[case]
    shared = SMALL if model_type == "deepseek_v3" else GROUPED
    config = CONFIG_MAPPING[model_type](**{**shared, **settings, "num_hidden_layers": 3})
    sources = save_both(config, tmp_path)
    path = [("ab"[number % 2], layer) for number, layer in enumerate(layers)]
    write(path_recipe(path), sources, tmp_path)
    assert close(answer(load(tmp_path / "out")), answer(by_hand(tmp_path, path)))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.items() >= said.items()


REFUSED: dict[str, tuple[str, dict[str, Any], list[int], str]] = {
    "dense layers later": (
        "deepseek_v3", {**LATENT, "first_k_dense_replace": 1}, [0, 1, 0, 2], "mlp as DeepseekV3MoE, not",
    ),
    "turns of experts": (
        "qwen2_moe", {**ROUTED, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 2}, [0, 1, 1], "mlp as",
    ),
    "an embedding for each layer": (
        "gemma3n_text", {**GEMMA_3N, "layer_types": KINDS[1:] * 3, "intermediate_size": [24] * 3}, [0, 1],
        r"embed_tokens_per_layer.weight, .* has a part for each layer: \[32, 12\]; 2 layers need \[32, 8\]",
    ),
    "a constant of the place": ("diffllama", {}, [0, 2], "self_attn.lambda_init is 0.3555"),
    "the last of another kind": (
        "gemma4_text", {**GEMMA_4, "layer_types": [*KINDS, KINDS[1]]}, [1, 2, 0], "full_attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    model_type, settings, layers, problem = REFUSED[case]
    shared = SMALL if model_type == "deepseek_v3" else GROUPED
    sources = save_both(CONFIG_MAPPING[model_type](**{**shared, **settings, "num_hidden_layers": 3}), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=problem) as refused:
        write(path_recipe([("a", layer) for layer in layers]), sources, tmp_path)
    assert refused.value.place == "recipe.hops"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merge_of_layers_that_cannot_leave_their_places_is_refused(tmp_path: Path) -> None:
    settings = {**GROUPED, **GEMMA_3N, "layer_types": KINDS[1:] * 2, "intermediate_size": 24}
    model = save_model(CONFIG_MAPPING["gemma3n_text"](**settings), tmp_path / "model")
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": [0, stop]}]} for stop in (1, 2)],
    }
    (tmp_path / "merge.yaml").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="has a part for each layer"):
        merge(tmp_path / "merge.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    """Whatever a configuration comes to say, the tensors are held against it before any is written."""
    source = save_both(config_of("llama"), tmp_path)["a"]
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    check_written(source.config, shapes, "out")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, problem in (
        ({**shapes, name: (3, 16)}, "shape"),
        ({**shapes, "model.layers.1.more.weight": (3, 16)}, "model.layers.1.more.weight is not a tensor of it"),
        ({key: shape for key, shape in shapes.items() if key != name}, f"{name} is missing"),
    ):
        with pytest.raises(InputError, match=problem):
            check_written(source.config, changed, "out")
