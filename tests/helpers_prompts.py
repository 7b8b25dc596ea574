"""Soft prompts and prefixes with random numbers, saved by peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM


def save_prompt(base: Path, folder: Path, *, rows: int = 4, seed: int = 0, **settings: Any) -> Path:
    """Save a soft prompt for a base; ``settings`` are those of peft's prompt tuning."""
    return _saved(
        base, folder, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows, **settings), seed
    )


def save_started_prompt(base: Path, folder: Path, *, rows: int = 4, seed: int = 0, text: str = "w1 w2 w3") -> Path:
    """Save a soft prompt that was initialised with the embedding of a text."""
    return save_prompt(
        base, folder, rows=rows, seed=seed, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(base),
    )  # fmt: skip


def save_encoded_prompt(base: Path, folder: Path, *, rows: int = 4, seed: int = 0) -> Path:
    """Save a soft prompt of P-tuning: the output of an encoder."""
    settings = {"num_virtual_tokens": rows, "encoder_hidden_size": 8}
    return _saved(base, folder, peft.PromptEncoderConfig(task_type="CAUSAL_LM", **settings), seed)


def save_multitask_prompt(base: Path, folder: Path, *, rows: int = 4, seed: int = 0, tasks: int = 1) -> Path:
    """Save a soft prompt that is multiplied by the factors of its task."""
    settings = {"num_virtual_tokens": rows, "num_tasks": tasks, "num_ranks": 2}
    return _saved(base, folder, peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **settings), seed)


def save_prefix(base: Path, folder: Path, *, rows: int = 4, seed: int = 0, **settings: Any) -> Path:
    """Save a prefix: keys and values for every layer."""
    return _saved(
        base, folder, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows, **settings), seed
    )


def prompted(base: Path, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The reference: peft's model of a base and a prompt."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
    return peft.PeftModel.from_pretrained(model, folder).eval()


def _saved(base: Path, folder: Path, config: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder
