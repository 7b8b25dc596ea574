"""Checkpoints of real sizes without weights: recorded configurations, and sparse files with real headers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "model_configs"
# The total_size in each model's own model.safetensors.index.json.
CHECKPOINT_BYTES = {
    "qwen2.5-7b": 15_231_233_024,
    "mistral-7b": 14_483_464_192,
    "llama-2-13b": 26_031_728_640,
    "qwen2.5-32b": 65_527_752_704,
    "llama-3-70b": 141_107_412_992,
    "mixtral-8x7b": 93_405_585_408,
}


def config_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return content


def sparse_checkpoint(name: str, folder: Path) -> Path:
    """A folder with a recorded config.json and a safetensors file of the right shapes, which takes no disk space."""
    folder.mkdir(parents=True)
    config = config_of(name)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    dtype = {"bfloat16": "BF16", "float16": "F16"}[config["torch_dtype"]]
    for tensor, shape in _tensors(config):
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """The names and shapes in checkpoints of Llama, Mistral, Mixtral and Qwen2."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", [vocabulary, width]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for matrix, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            yield f"{layer}.self_attn.{matrix}_proj.weight", [rows, width]
            if config["model_type"] == "qwen2" and matrix != "o":
                yield f"{layer}.self_attn.{matrix}_proj.bias", [rows]
        if config["model_type"] == "mixtral":
            yield f"{layer}.block_sparse_moe.gate.weight", [config["num_local_experts"], width]
            for expert in range(config["num_local_experts"]):
                for matrix, shape in (("w1", [inner, width]), ("w2", [width, inner]), ("w3", [inner, width])):
                    yield f"{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight", shape
        else:
            for matrix, shape in (("gate", [inner, width]), ("up", [inner, width]), ("down", [width, inner])):
                yield f"{layer}.mlp.{matrix}_proj.weight", shape
        yield f"{layer}.input_layernorm.weight", [width]
        yield f"{layer}.post_attention_layernorm.weight", [width]
    yield "model.norm.weight", [width]
    yield "lm_head.weight", [vocabulary, width]
