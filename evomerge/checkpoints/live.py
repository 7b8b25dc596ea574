"""A live model: built once on a device, its weights then written in place for every candidate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.finite import first_not_finite
from evomerge.checkpoints.roles import model_roles
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import empty_model, parse_config, stored_tensors
from evomerge.checkpoints.tokenizer_files import open_tokenizer
from evomerge.errors import InputError
from evomerge.recipe import Role

_PROBE_TOKENS = 8


class NotFiniteError(Exception):
    """A live model holds or computes NaN or Inf. ``where`` is the tensor's name, or "logits"."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return f"NaN or Inf in {self.where}"


@dataclass
class LiveModel:
    """A model on a device, ready to be written to and scored.

    Attributes:
        model: a transformers ``PreTrainedModel`` in eval mode, without gradients.
        tokenizer: its tokenizer, padding on the left, with a padding token.
        roles: the role of every tensor that can be written, by its name in the source.
        tensors: the tensors themselves, on the device. Experts that the model holds in one are views into it.
    """

    model: Any
    tokenizer: Any
    roles: Mapping[str, Role]
    tensors: Mapping[str, torch.Tensor]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def live_model(source: Source, device: torch.device, dtype: torch.dtype | None = None) -> LiveModel:
    """Build the model of a source on a device, without its weights.

    Weights are NaN until ``load_weights`` writes them, so that a tensor nobody wrote cannot pass ``check_live``.

    Args:
        source: gives structure, tokenizer and generation settings.
        device: where the model lives.
        dtype: of its weights; that of the source when None.

    Raises:
        InputError: the tokenizer or the generation settings cannot be loaded.
    """
    model = empty_model(parse_config(source.config, source.place), source.place, dtype or source.dtype)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives every module its own memory
    stored = stored_tensors(model)
    for tensor in stored.values():
        tensor.data.fill_(torch.nan)
        # What from_pretrained does: marked tensors are passed over, so this only computes buffers such as the
        # rotary frequencies, which no file holds and to_empty has left as they came.
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
    model.eval().requires_grad_(False)
    if (source.folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
        except Exception as error:  # whatever a strange value does inside transformers
            raise InputError(source.place, f"generation_config.json cannot be used: {first_line(error)}") from error
    tensors = {name: part.of(stored[part.tensor]) for name, part in source.parts.items()}
    by_model = model_roles(model, source.layers)
    roles = {name: by_model[in_model] for name, in_model in source.names.items()}
    return LiveModel(model, load_tokenizer(source), roles, tensors)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a source, set up for generation in batches: padding on the left, with a padding token.

    Raises:
        InputError: it cannot be loaded, or has neither a padding nor an end token.
    """
    tokenizer = open_tokenizer(source)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                source.place, "its tokenizer has neither a pad_token nor an eos_token", "Name one in its configuration."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def load_weights(live: LiveModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors into the model in place, casting to its dtype. A tied head follows the embedding.

    Raises:
        KeyError: the model stores no tensor of that name (a tied head has none of its own).
        ValueError: the shapes differ.
    """
    for name, tensor in tensors:
        target = live.tensors[name]
        if tensor.shape != target.shape:  # copy_ would broadcast
            raise ValueError(f"{name} has shape {list(target.shape)}, not {list(tensor.shape)}")
        target.copy_(tensor)


@torch.inference_mode()
def check_live(live: LiveModel) -> None:
    """Refuse a model with NaN or Inf in its weights or in its logits for a short probe.

    Such a model would be scored without a word: at chance, or as perfect where the right answer is always the first.

    Raises:
        NotFiniteError: naming the tensor, or "logits".
    """
    if (name := first_not_finite(live.tensors)) is not None:
        raise NotFiniteError(name)
    probe = torch.arange(_PROBE_TOKENS, device=live.device) % live.model.config.vocab_size
    if not torch.isfinite(live.model(probe[None], use_cache=False).logits).all():
        raise NotFiniteError("logits")
