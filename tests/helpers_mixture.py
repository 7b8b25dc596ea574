"""Tiny dense models, and recipes for mixtures of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers_checkpoints import WORDS, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from evomerge.calibration import Calibration
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.building.builders import BuildContext
from evomerge.mixture.builder import MixtureBuilder
from evomerge.recipes.mixture import MixtureRecipe
from evomerge.recipes.stack import Blend

NAMES = ("maths", "japanese", "code")
PROMPT = torch.arange(3, 27).reshape(2, 12)
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
DENSE: Mapping[str, Any] = {
    "llama": LlamaConfig(**SMALL, rms_norm_eps=1e-5),
    "llama tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama of other heads": LlamaConfig(**SMALL, head_dim=8),
    "llama 3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral of a window": MistralConfig(**SMALL, sliding_window=5),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=4),
}
TEXTS = {
    "maths": ["w1 w2 w3 w4 w5 w6 w7", "w2 w4 w1 w3 w9"],
    "japanese": ["w20 w21 w22 w23 w24 w25", "w26 w22 w20 w28"],
    "code": ["w11 w12 w13 w14 w15", "w16 w12 w18"],
}


def dense_models(config: Any, root: Path, dtype: torch.dtype = torch.float32) -> dict[str, Source]:
    """Sources of one architecture with different weights."""
    root.mkdir()
    folders = {name: save_model(config, root / name, seed=seed, dtype=dtype) for seed, name in enumerate(NAMES)}
    return {name: open_source(name, str(folder), place=f"sources.{name}") for name, folder in folders.items()}


def texts(given: Mapping[str, Sequence[str]] | None = None, tokens: int = 32) -> Calibration:
    """Calibration texts for each source."""
    own = TEXTS if given is None else given
    return Calibration(None, tokens, own={name: lambda name=name: own[name] for name in own})


def alone(source: str) -> Blend:
    return Blend(method="linear", sources=(source,), parameters={"weight": {source: 1.0}, "normalize": False})


def mean(*sources: str) -> Blend:
    weights = dict.fromkeys(sources, 1 / len(sources))
    return Blend(method="linear", sources=sources, parameters={"weight": weights, "normalize": False})


def mixture(architecture: str, sources: Mapping[str, Source], **changes: Any) -> MixtureRecipe:
    """Pure experts of the first two sources, in all layers, on the attention of their mean, unless changed."""
    first, second = list(sources)[:2]
    content = {
        "sources": {name: source.reference for name, source in sources.items()},
        "tokenizer": first,
        "architecture": architecture,
        "blends": [alone(first), alone(second), mean(first, second)],
        "rest": 2,
        "embedding": 2,
        "groups": [{"layers": 2, "slots": {first: 0, second: 1}}],
        "top_k": 2,
        "router": {"kind": "random", "rest": 2, "slots": {first: 0, second: 1}},
    }
    return MixtureRecipe.model_validate(content | changes)


def builder(sources: Mapping[str, Source], **context: Any) -> MixtureBuilder:
    return MixtureBuilder(BuildContext(sources, next(iter(sources)), **context))


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(PROMPT).logits
    return logits


def loaded(folder: Path) -> Any:
    """A folder loaded with plain transformers, without missing or unexpected tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
