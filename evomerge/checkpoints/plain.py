"""A model as plain transformers loads it, with nothing of ours in between."""

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
    """A model as plain transformers loads it; adapters are folded into it, as a search does.

    Args:
        device: where it is; several devices share out its layers.
        dtype: of its weights; that in which they are stored when None.

    Raises:
        InputError: transformers cannot load it, or it holds or computes NaN or Inf.
    """
    if source.adapters:
        live = live_model(source, device, dtype)
        load_weights(live, ((name, source.read(name)) for name in source.tensors))
        for name in source.tensors:  # not read again
            source.release(name)
    else:
        disable_progress_bar()  # it would run through our own
        try:
            model = auto_class(parse_config(source.config, source.place)).from_pretrained(
                source.folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
        except Exception as error:  # whatever strange settings do inside transformers
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
    except Exception as error:  # of a model whose settings have it compute something else
        raise InputError(source.place, f"cannot be scored: {first_line(error)}") from error
    return live
