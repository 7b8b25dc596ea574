"""Tiny model folders for the tests of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(29))]


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def save_model(config: Any, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **save: Any) -> Path:
    """Write a random model and its tokenizer; weights of order 0.1, so that bf16 rounding shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    save_tokenizer(folder)
    return folder


def in_own_memory(model: Any) -> Any:
    """A loaded model with its weights copied out of the mapped file.

    Some processors multiply matrices in another order, with other rounding, if they do not begin at a multiple of the
    vector width. Otherwise the last digit would depend on where weights are in a file.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def save_tokenizer(folder: Path, words: list[str] = WORDS, **special: str | list[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
