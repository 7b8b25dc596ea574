"""How tensor parallelism divides a model: what prevents it, and what each device holds.

Every layer is on all devices: each has a share of the attention heads, of the width of feed-forward blocks, and of the
tokens of embedding and head. The rules are those of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
"""Widths of feed-forward blocks that a model may have."""


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention.

    Attributes:
        attention: number of query heads.
        keys: number of key-value heads; smaller if several query heads share one.
        size: width of a head.
    """

    attention: int
    keys: int
    size: int

    def keys_on_each(self, devices: int) -> float:
        """How many key-value heads each device has: its share, or one, which several devices then replicate."""
        return max(1.0, self.keys / devices)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model, which vision-language models keep separate."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def heads_of(config: Mapping[str, Any]) -> Heads:
    """The heads given by a config.json; one as wide as the model if it gives none, as for models without attention."""
    text = text_config(config)
    attention = _whole(text, "num_attention_heads", "n_head") or 1
    size = _whole(text, "head_dim") or _whole(text, "hidden_size", "n_embd") // attention
    return Heads(attention, _whole(text, "num_key_value_heads") or attention, size)


def _whole(text: Mapping[str, Any], *keys: str) -> int:
    """The first of these settings that is an integer; 0 if none is."""
    return next((text[key] for key in keys if type(text.get(key)) is int), 0)


def hidden_size(config: Mapping[str, Any]) -> int:
    """The width of a hidden state according to a config.json; 0 if it does not say."""
    return _whole(text_config(config), "hidden_size", "n_embd")


def sharding_problem(config: Mapping[str, Any], devices: int) -> str:
    """Why vLLM cannot divide a config.json's model among this many devices, with the arithmetic; empty if it can."""
    text, heads = text_config(config), heads_of(config)
    if heads.attention > 1 and (rest := heads.attention % devices):
        share = f"{heads.attention} / {devices} leaves {rest}"
        return f"its {heads.attention} attention heads are not divided by {devices} ({share})"
    if heads.attention > 1 and heads.keys % devices and devices % heads.keys:
        return (
            f"its {heads.keys} heads of keys and values are neither divided by {devices} nor divide it "
            f"({heads.keys} / {devices} leaves {heads.keys % devices}, "
            f"{devices} / {heads.keys} leaves {devices % heads.keys})"
        )
    for key in _WIDTHS:
        if (width := _whole(text, key)) % devices:
            return f"its {key} of {width} is not divided by {devices} ({width} / {devices} leaves {width % devices})"
    return ""


def shard_bytes(config: Mapping[str, Any], weights: int, layers: int, width: int, devices: int) -> int:
    """Bytes of weights on each of several devices.

    Args:
        weights: bytes of the whole model.
        layers: the model's number of layers.
        width: bytes of a weight.
    """
    heads = heads_of(config)
    hidden = _whole(text_config(config), "hidden_size", "n_embd")
    of_a_head = 2 * layers * hidden * heads.size * width  # the projections of its keys and values
    doubled = of_a_head * (heads.keys_on_each(devices) - heads.keys / devices)
    return round(weights / devices + doubled)
