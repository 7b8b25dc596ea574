"""Soft prompts and prefixes on a source, as saved by peft: only headers are read until their rows are needed.

The files hold the tensor ``prompt_embeddings``: for a soft prompt [rows, width] (the output of P-tuning's encoder, not
the encoder itself), for a prefix [rows, layers * 2 * key-value heads * head width], with each layer's keys before its
values; keys have no positional encoding, which is only applied to those of the text. A multitask prompt is multiplied,
element by element, by the outer product of two small factors for its task (Wang et al., arXiv 2303.02861, equation 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.folder import check_files, has, load_json
from evomerge.checkpoints.headers import TORCH_DTYPES, TensorEntry, map_file, read_header, view_entry
from evomerge.checkpoints.prompt_configs import CONFIG, prompt_facts
from evomerge.errors import InputError
from evomerge.recipes.prompts import PromptFacts

WEIGHTS = "adapter_model.safetensors"
ROWS = "prompt_embeddings"
"""The tensor with the rows of a prompt in peft's files."""

_FACTORS = ("prefix_task_cols", "prefix_task_rows")
_AGAIN = "Save it again with peft's `save_pretrained`."
_OTHER_BASE = "Name the base that it was trained on."


@dataclass(frozen=True)
class SourcePrompt:
    """The prompt of a source.

    Attributes:
        folder: the folder of its files.
        facts: its form, size and initialisation.
        stored: its tensors by name.
        files: its own files.
        base: the base that it names, or "".
    """

    folder: Path
    facts: PromptFacts
    stored: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    base: str

    def read(self) -> Tensor:
        """Its rows [rows, columns], float32, in newly allocated memory."""
        rows = self._tensor(ROWS)
        if _FACTORS[0] in self.stored:
            columns, across = (self._tensor(name) for name in _FACTORS)
            rows *= torch.matmul(columns, across)[0]  # in the same shapes as peft, to get the same rounding
        return rows

    def check_finite(self) -> None:
        """Reject NaN and infinity. Raises InputError."""
        if not bool(torch.isfinite(self.read()).all()):
            raise InputError(str(self.folder), "has NaN or Inf in it", "Train it again, at a lower rate.")

    def _tensor(self, name: str) -> Tensor:
        entry = self.stored[name]
        return view_entry(entry, map_file(entry.file)).to(torch.float32, copy=True)


def open_prompt(folder: Path, settings: Mapping[str, Any], layers: int, place: str) -> SourcePrompt | None:
    """Open an adapter's folder if it is a prompt, and match it to its base; None for another adapter.

    Args:
        settings: the base's settings; see ``Blueprint.settings``.
        layers: the base's number of layers.

    Raises:
        InputError: it is broken, or made for another model.
    """
    check_files(folder, place)
    if not has(folder, CONFIG):
        return None
    config = load_json(folder / CONFIG, place)
    facts = prompt_facts(config, place)
    if facts is None:
        return None
    if not has(folder, WEIGHTS):
        raise InputError(place, f"the prompt {folder} holds no {WEIGHTS}", _AGAIN)
    stored = read_header(folder / WEIGHTS, place)
    _check_tensors(stored, facts, folder, place)
    _check_columns(stored[ROWS].shape[1], facts, config, settings, layers, folder, place)
    named = config.get("base_model_name_or_path")
    files = (folder / CONFIG, folder / WEIGHTS)
    return SourcePrompt(folder, facts, stored, files, named if isinstance(named, str) else "")


def _check_tensors(stored: Mapping[str, TensorEntry], facts: PromptFacts, folder: Path, place: str) -> None:
    wanted = {ROWS, *(_FACTORS if facts.kind == "MULTITASK_PROMPT_TUNING" else ())}
    if stored.keys() != wanted:
        held = ", ".join(sorted(stored)[:4]) or "nothing"
        problem = f"the prompt {folder} holds {held}, and a {facts.kind} holds {', '.join(sorted(wanted))}"
        raise InputError(place, problem, _AGAIN)
    for name, entry in stored.items():
        if entry.dtype not in TORCH_DTYPES:
            raise InputError(place, f"the prompt's {name} is stored as {entry.dtype}; use one in floating point")
    shape = stored[ROWS].shape
    if len(shape) != 2 or shape[0] != facts.rows:
        problem = f"{CONFIG}: num_virtual_tokens is {facts.rows}, but {ROWS} in {folder} has shape {list(shape)}"
        raise InputError(place, problem, _AGAIN)
    if facts.kind != "MULTITASK_PROMPT_TUNING":
        return
    columns, across = (tuple(stored[name].shape) for name in _FACTORS)
    if len(columns) != 3 or columns[:2] != (1, facts.rows) or across != (1, columns[2], shape[1]):
        problem = f"the factors of the prompt {folder} have shapes {list(columns)} and {list(across)}"
        raise InputError(place, f"{problem}, which is not one task's of {list(shape)}", "Save the prompt of one task.")


def _check_columns(
    columns: int,
    facts: PromptFacts,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    layers: int,
    folder: Path,
    place: str,
) -> None:
    """Reject a prompt of the wrong width, and a prefix for a different number of layers or key-value heads."""
    width = settings["hidden_size"]
    if facts.form == "tokens":
        if columns != width:
            problem = f"the prompt {folder} has rows of {columns} numbers, and the model has a width of {width}"
            raise InputError(place, problem, _OTHER_BASE)
        return
    heads, head = key_value_heads(settings)
    wanted = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head}
    for key, value in wanted.items():
        if config.get(key) != value:
            what = {"num_layers": "layers", "num_attention_heads": "key-value heads", "token_dim": "numbers a key"}[key]
            problem = f"the prefix {folder} is for {config.get(key)!r} {what} ({key}), and the model has {value}"
            raise InputError(place, problem, _OTHER_BASE)
    if columns != layers * 2 * heads * head:
        problem = f"the prefix {folder} has rows of {columns} numbers, not {layers} x 2 x {heads} x {head}"
        raise InputError(place, problem, _AGAIN)


def key_value_heads(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The number of key-value heads per layer, and the width of each."""
    heads = settings["num_attention_heads"]
    return settings["num_key_value_heads"] or heads, settings["head_dim"] or settings["hidden_size"] // heads
