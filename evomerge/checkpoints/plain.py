"""Loads a model with plain transformers, without any of this project's code in between."""

from __future__ import annotations

import torch
from transformers.utils.logging import disable_progress_bar

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.live import (
    LiveModel,
    NotFiniteError,
    check_live,
    for_scoring,
    live_model,
    load_weights,
    processor_opener,
)
from evomerge.checkpoints.placement import Devices, as_devices, place_model
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import auto_class, layer_stack, parse_config
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError


def plain_model(source: Source, device: Devices, dtype: torch.dtype | None) -> LiveModel:
    """A model as loaded by plain transformers; adapters are folded into its weights, as in a search.

    Args:
        device: its device; with several devices, layers are spread over them.
        dtype: the dtype of its weights; as stored if None.

    Raises:
        InputError: transformers cannot load it, or it contains or computes NaN or Inf.
    """
    if source.adapters:
        live = live_model(source, device, dtype)
        load_weights(live, ((name, source.read(name)) for name in source.tensors))
        for name in source.tensors:  # it is not read again
            source.release(name)
    else:
        disable_progress_bar()  # it would garble the project's own
        try:
            model = auto_class(parse_config(source.config, source.place)).from_pretrained(
                source.folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
        except Exception as error:  # unusual settings may raise anything inside transformers
            raise InputError(source.place, f"transformers cannot load it: {first_line(error)}") from error
        devices = as_devices(device)
        if len(devices) == 1:
            model.to(devices[0])
        else:
            place_model(model, layer_stack(model, source.layers)[1], devices, source.layers)
        opener = processor_opener(source)
        live = LiveModel(for_scoring(model), load_tokenizer(source), devices=devices, processor_of=opener)
    try:
        check_live(live)
    except NotFiniteError as error:
        raise InputError(source.place, f"cannot be scored: {error}") from error
    except Exception as error:  # inconsistent settings may raise anything
        raise InputError(source.place, f"cannot be scored: {first_line(error)}") from error
    return live
