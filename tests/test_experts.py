"""Mixtures of experts: stored an expert a tensor, live in one tensor a layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import WORDS, edit_tensors, save_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    JambaConfig,
    MixtralConfig,
    OlmoeConfig,
    OlmoHybridConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.live import check_live, live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.writer import FolderWriter
from evomerge.errors import InputError
from evomerge.recipes.stack import Role

CPU = torch.device("cpu")
PROMPT = torch.arange(3, 15).reshape(2, 6)
EXPERTS = 12  # enough that "10" sorts before "2" as text
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROUTED: dict[str, Any] = {**SMALL, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS: dict[str, Any] = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=EXPERTS),
    "qwen2_moe": Qwen2MoeConfig(**ROUTED, shared_expert_intermediate_size=8),
    "qwen3_moe": Qwen3MoeConfig(**ROUTED, head_dim=4, mlp_only_layers=[0]),
    "olmoe": OlmoeConfig(**SMALL, num_experts=EXPERTS, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8,
        first_k_dense_replace=1, n_group=2, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(config, root / name) for name, config in MODELS.items()}


def opened(folder: Path) -> Source:
    return open_source("maths", str(folder), place="sources.maths")


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(PROMPT).logits


def live_logits(source: Source) -> torch.Tensor:
    live = live_model(source, CPU)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    check_live(live)
    with torch.inference_mode():
        return live.model(PROMPT).logits


def write(source: Source, out: Path) -> Path:
    """The source again, as an export writes it."""
    layout = [(name, entry.shape, source.read(name).dtype) for name, entry in source.tensors.items()]
    with FolderWriter(out, layout) as folder:
        for name in source.tensors:
            folder.write(name, source.read(name))
        folder.add_file(source.folder / "config.json")
    return out


def fuse(folder: Path, out: Path) -> Path:
    """The same model stored the way transformers 5 holds it: all experts of a layer in one tensor."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.copytree(folder, out)
    edit_tensors(out, lambda t: (t.clear(), t.update({n: p.clone() for n, p in model.state_dict().items()})))
    return out


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_in_the_files(folders: dict[str, Path], name: str) -> None:
    source, stored = opened(folders[name]), load_file(folders[name] / "model.safetensors")
    assert source.tensors.keys() == stored.keys()
    assert all(torch.equal(source.read(n), tensor) for n, tensor in stored.items())
    assert sum("experts.11." in n or "experts.7." in n for n in stored) >= 3
    assert source.warnings == ()


@pytest.mark.parametrize("name", MODELS)
def test_a_live_model_computes_what_transformers_loads(folders: dict[str, Path], name: str) -> None:
    assert torch.equal(live_logits(opened(folders[name])), logits(folders[name]))


@pytest.mark.parametrize("name", MODELS)
def test_experts_and_routers_are_of_the_mlp(folders: dict[str, Path], name: str) -> None:
    source = opened(folders[name])
    roles = source.roles
    inside = {role for n, role in roles.items() if ".experts." in n or n.endswith(".gate.weight")}
    assert inside <= {Role("mlp", 0), Role("mlp", 1)}
    assert Role("mlp", 1) in inside
    assert set(live_model(source, CPU).tensors) == set(roles)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_by_transformers(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    out = write(opened(folders[name]), tmp_path / "out")
    assert torch.equal(logits(out), logits(folders[name]))


@pytest.mark.parametrize("name", MODELS)
def test_fused_files_are_read_expert_by_expert(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    fused, apart = opened(fuse(folders[name], tmp_path / "fused")), opened(folders[name])
    assert not any(".experts.3." in n for n in load_file(fused.folder / "model.safetensors"))
    assert list(fused.tensors) == list(apart.tensors)
    assert all(torch.equal(fused.read(n), apart.read(n)) for n in apart.tensors)
    expert = next(n for n in fused.tensors if ".experts.3." in n)
    assert fused.read(expert).data_ptr() == fused.read(expert).data_ptr()
    assert torch.equal(live_logits(fused), logits(folders[name]))
    check_compatible({"fused": fused, "apart": apart})


def test_writing_one_expert_changes_its_rows_alone(folders: dict[str, Path]) -> None:
    live = live_model(opened(folders["qwen3_moe"]), CPU)
    load_weights(live, ((name, torch.zeros(t.shape)) for name, t in live.tensors.items()))
    name = "model.layers.1.mlp.experts.10.up_proj.weight"
    address = live.tensors[name].data_ptr()
    load_weights(live, [(name, torch.ones(8, 16))])
    expected = torch.zeros(EXPERTS, 16, 16, dtype=torch.bfloat16)
    expected[10, 8:] = 1
    assert torch.equal(live.model.model.layers[1].mlp.experts.gate_up_proj, expected)
    assert live.tensors[name].data_ptr() == address


@pytest.mark.parametrize("name", ["jamba", "olmo_hybrid"])
def test_tensors_joined_along_a_dimension_are_views_too(tmp_path: Path, name: str) -> None:
    """Another architecture's experts, and convolutions that transformers joins without stacking."""
    config: Any = {
        "jamba": lambda: JambaConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
            attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False,
        ),
        "olmo_hybrid": lambda: OlmoHybridConfig(
            **SMALL, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
    }[name]()  # fmt: skip
    source = opened(save_model(config, tmp_path / "model"))
    pieces = [part for part in source.parts.values() if part.cuts]
    assert pieces
    assert torch.equal(live_logits(source), logits(source.folder))
    assert torch.equal(logits(write(source, tmp_path / "out")), logits(source.folder))


# ---- broken ----

Change = Callable[[dict[str, torch.Tensor]], object]
UP = "model.layers.1.mlp.experts.{}.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.down_proj"

BAD: dict[str, tuple[Change, str]] = {
    "one expert too few": (
        lambda t: t.pop(UP.format(3)),
        "there are 11 experts like .*; config.json asks for 12",
    ),
    "one too many": (lambda t: t.update({UP.format(12): t[UP.format(3)].clone()}), "there are 13 experts like"),
    "none of a kind": (lambda t: [t.pop(UP.format(i)) for i in range(EXPERTS)], "missing from the files: .*up_proj"),
    "other width": (lambda t: t.update({UP.format(3): torch.zeros(9, 16)}), "up_proj.weight"),
    "both apart and fused": (lambda t: t.update({FUSED: torch.zeros(EXPERTS, 16, 8)}), "twice"),
    "fused for fewer": (
        lambda t: [
            *[t.pop(f"model.layers.1.mlp.experts.{i}.down_proj.weight") for i in range(EXPERTS)],
            t.update({FUSED: torch.zeros(EXPERTS - 1, 16, 8)}),
        ],
        r"down_proj has shape \[11, 16, 8\] in .*; config.json asks for \[12, 16, 8\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_mixtures_are_refused(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    change, words = BAD[case]
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen3_moe"], folder)
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=words):
        opened(folder)
