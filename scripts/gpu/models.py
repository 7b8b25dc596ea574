"""Synthetic models, a base and two fine-tunes of it, and arithmetic items to score them on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from kit import CPU, Setting
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.checkpoints.source import Source, open_source

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("base", "one", "two")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def config(setting: Setting) -> LlamaConfig:
    """A configuration with one billion parameters, or if small with a few hundred thousand."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 14, "num_attention_heads": 16}
    if setting.small:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    made = LlamaConfig(
        **sizes, vocab_size=759 if setting.small else 32000, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    made.architectures = ["LlamaForCausalLM"]
    return made


def references(setting: Setting) -> dict[str, str]:
    """The folders of the models by name; they are made unless they exist."""
    folder = setting.folder / ("tiny" if setting.small else "models")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _make(partial, setting)
        partial.rename(folder)
    return {name: str(folder / name) for name in NAMES}


def sources(setting: Setting) -> dict[str, Source]:
    """The models, opened."""
    return {name: open_source(name, folder, place=name) for name, folder in references(setting).items()}


def items(setting: Setting) -> Path:
    """A file with sums and their answers."""
    file = setting.folder / "sums.jsonl"
    lines = [{"prompt": f"{a} + {b} = ", "answer": f"{a + b}"} for a in range(2, 12) for b in range(3, 11)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _make(folder: Path, setting: Setting) -> None:
    made = config(setting)
    with torch.device("meta"):
        model = LlamaForCausalLM(made)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    random = torch.Generator(setting.device).manual_seed(1)
    base = {name: _weights(shape, random) for name, shape in shapes.items()}
    for model_name in NAMES:
        into = folder / model_name
        into.mkdir(parents=True)
        made.save_pretrained(into)
        for file in _TOKENIZER:
            shutil.copy(ROOT / "examples/miniatures/base" / file, into)
        tensors = {
            name: (tensor if model_name == "base" else tensor + 0.002 * _normal(tensor.shape, random))
            .bfloat16()
            .to(CPU)
            for name, tensor in base.items()
        }
        save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})


def _weights(shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """Random float32 weights: near one for a norm, and as in an untrained model for a matrix."""
    return 1 + 0.01 * _normal(shape, random) if len(shape) == 1 else 0.02 * _normal(shape, random)


def _normal(shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, device=random.device).normal_(generator=random)
