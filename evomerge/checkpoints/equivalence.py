"""Tests whether text models of two types are equivalent, so that a text model can be merged into a vision-language one.

Vision-language families often have a text model of their own type that computes the same as a plain one: that of
Qwen2-VL is Qwen2 with positions in three dimensions, which are equal for text. There is no table of such pairs: small
versions of both are built with the same random weights and run on one text.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.layered import layer_settings, written_settings
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import parse_config, text_config

_LAYERS, _TOKENS, _INNER = 4, 12, 16
_ROUNDING = 1e-4  # relative rounding error of float32 through a few layers


def equivalence_problem(one: Source, other: Source) -> str:
    """Why the text models of two sources of different types are not equivalent; empty if they are.

    Both are built with their own width, heads and settings, but few layers, tokens and inner columns. Takes about a
    second per billion parameters of the sources.
    """
    try:
        first, second = (_small(source) for source in (one, other))
    except Exception as error:  # a type may raise anything for a reduced configuration
        return f"they could not be compared: {first_line(error)}"
    mine, theirs = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (first, second))
    if different := sorted(mine.items() ^ theirs.items()):
        name = different[0][0]
        return f"{name} is {_said(theirs.get(name))} and {_said(mine.get(name))}"
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for tensor in first.state_dict().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator) * tensor.float().std().nan_to_num(1.0))
        second.load_state_dict(first.state_dict())
        tokens = torch.arange(_TOKENS)[None] % _INNER
        ours, others = (model(tokens, use_cache=False).last_hidden_state for model in (first, second))
    if torch.allclose(ours, others, rtol=_ROUNDING, atol=_ROUNDING * float(ours.abs().max())):
        return ""
    return "with equal weights they compute otherwise"


def _said(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _small(source: Source) -> Any:
    """The text model of a source with few layers, tokens and inner columns, and its own weights."""
    from transformers import AutoModel

    text = copy.deepcopy(text_config(parse_config(source.config, source.place)))
    layers = min(source.layers, _LAYERS)
    settings = layer_settings(text.to_dict(), source.layers)
    said = [{key: setting.values[number] for key, setting in settings.items()} for number in range(layers)]
    small = {source.settings["depth"]: layers, "vocab_size": _INNER, "intermediate_size": _INNER}
    for key, value in {**small, **written_settings(settings, said)}.items():
        setattr(text, key, value)
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    torch.manual_seed(0)
    return AutoModel.from_config(text, dtype=torch.float32, trust_remote_code=False).eval()
