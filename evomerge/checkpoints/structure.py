"""The model that a checked config.json describes, built on the meta device to examine its modules and tensors."""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import CONFIG_MAPPING
from transformers.core_model_loading import build_glob_alternation

from evomerge.checkpoints.config import first_line
from evomerge.errors import InputError
from evomerge.printable import printable

_MAX_TENSORS = 60_000  # of a model as transformers builds it, where all experts of a layer share a tensor
_MAX_BUFFER_BYTES = 500_000_000

_MAX = {"num_hidden_layers": 1_000, "hidden_size": 1_000_000, "vocab_size": 10_000_000}


def parse_config(config: Mapping[str, Any], place: str) -> Any:
    """The transformers configuration of a checked config.json.

    Raises:
        InputError: an unknown model type, fields of the wrong type, sizes that no model has.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        known = printable(str(model_type), 100)
        near = difflib.get_close_matches(known, list(CONFIG_MAPPING.keys()), 1)
        raise InputError(
            place,
            f"config.json: model_type {known!r} is unknown to transformers",
            f"Did you mean {near[0]!r}?" if near else "Upgrade transformers, or choose another model.",
        )
    kind = CONFIG_MAPPING[model_type]
    if methods := [key for key in config if key.startswith("__") or callable(getattr(kind, key, None))]:
        problem = f"config.json: {printable(methods[0], 100)} would replace a method of transformers' configuration"
        raise InputError(place, problem, "Delete the key from a copy.")
    try:
        # transformers 5 writes an infinity as {"__float__": "Infinity"}, since JSON has none.
        parsed = kind.from_dict(kind._decode_special_floats(copy.deepcopy(dict(config))))
        text = text_config(parsed)
    except Exception as error:  # an unusual value may raise anything inside a configuration class
        raise InputError(place, f"config.json is not a configuration of {model_type}: {first_line(error)}") from error
    for field, most in _MAX.items():
        value = getattr(text, field, None)
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(place, f"config.json: {field} is {value!r}; it must be a whole number from 1 to {most:,}")
    return parsed


def text_config(parsed: Any) -> Any:
    """The part of a transformers configuration for its text model; for a text model alone, all of it."""
    return parsed.get_text_config(decoder=True)


def takes_images(parsed: Any) -> bool:
    """Whether the configuration is that of a model that also reads images: a text model with other parts."""
    return text_config(parsed) is not parsed


def decoder_of(model: Any) -> Any:
    """The module with the text model, from embedding to last norm; for a text model, the model itself."""
    return model.get_decoder() if takes_images(model.config) else model


def module_name(model: Any, wanted: Any) -> str:
    """The name of a module inside a model."""
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name


def empty_model(parsed: Any, place: str, dtype: torch.dtype = torch.float32, most_tensors: int = _MAX_TENSORS) -> Any:
    """The generative model of a configuration on the meta device, which has all modules and takes no memory.

    Tensors have the dtypes that they would have after loading a checkpoint in ``dtype``.

    Args:
        most_tensors: a configuration that needs more is refused while it is built.

    Raises:
        InputError: transformers has no such model for it, or cannot build it.
    """
    kind = "model of images and texts" if takes_images(parsed) else "causal language model"
    try:
        with torch.device("meta"), _bounded(most_tensors):
            model = auto_class(parsed).from_config(copy.deepcopy(parsed), dtype=dtype, trust_remote_code=False)
    except Exception as error:  # values that are valid in a configuration may still raise anything in the model
        problem = f"config.json describes no {kind} that transformers can build: {first_line(error)}"
        raise InputError(place, problem) from error
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if (buffers := sum(buffer.nbytes for buffer in model.buffers())) > _MAX_BUFFER_BYTES + weights:
        raise InputError(place, f"config.json asks for tables of {buffers:,} bytes besides the weights")
    tensors = model.state_dict(keep_vars=True)
    for name in loaded_in_float32(model, dtype):
        tensors[name].data = tensors[name].data.float()
    return model


def auto_class(parsed: Any) -> Any:
    """The class of transformers that builds and loads the model of a configuration."""
    # This import takes two seconds.
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if takes_images(parsed) else AutoModelForCausalLM


def loaded_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Names of tensors that transformers loads in float32 whatever ``dtype`` is: biases of routers, for example."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    pattern = build_glob_alternation(list(plan))[0]
    return {name for name in model.state_dict() if pattern.search(name)}


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Limit the number of tensors in modules that this thread builds: a small config.json can ask for millions."""
    thread, counts = threading.get_ident(), {"tensors": 0, "modules": 0}

    def count(kind: str, limit: int) -> Callable[..., None]:
        def counted(*_: object) -> None:
            if threading.get_ident() == thread:
                counts[kind] += 1
                if counts[kind] > limit:
                    raise ValueError(f"it asks for more than {most:,} tensors")

        return counted

    hooks = (
        register_module_parameter_registration_hook(count("tensors", most)),
        register_module_module_registration_hook(count("modules", 10 * most)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model that a checkpoint must have: parameters, tied ones once, and persistent buffers."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True).keys()
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def tied_names(model: Any) -> dict[str, str]:
    """Further names of stored parameters, such as that of a tied head's weight, with the name that is stored."""
    stored = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: stored[parameter] for name, parameter in every if stored[parameter] != name}


def layer_stack(model: Any, layers: int) -> tuple[str, nn.ModuleList]:
    """The name and the modules of the stack of layers: the outermost list of ``layers`` modules in the decoder.

    Raises:
        LookupError: no list of modules has that length.
    """
    decoder = decoder_of(model)
    within = "" if decoder is model else module_name(model, decoder)
    named = decoder.named_modules(prefix=within)
    stacks = [(n, m) for n, m in named if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not stacks:
        raise LookupError(f"{type(model).__name__} has no list of {layers} layers")
    return min(stacks, key=lambda stack: stack[0].count("."))
