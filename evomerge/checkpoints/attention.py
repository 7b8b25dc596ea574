"""Attention over a KV cache with one new token per row: on a CPU, query heads that share keys are computed together.

torch's kernel computes every query head separately and reads the keys and values of its group again for each. With
grouped queries (Ainslie et al. 2023, arXiv 2305.13245) the heads of a group attend to the same keys, so with a single
new token their queries can be treated as the tokens of one sequence: one product per group, without copying the keys
for every head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "evomerge_grouped"


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` attention, computed by groups of heads if that is faster.

    Args:
        query: [rows, heads, tokens, width].
        key, value: [rows, groups, columns, width]; heads / groups consecutive heads share a group's.
        attention_mask: bool or additive [rows or 1, 1 or heads, tokens, columns]; None masks nothing.

    Returns:
        [rows, tokens, heads, width], contiguous; and no attention weights.
    """
    rows, heads, tokens, width = query.shape
    groups = key.shape[1]
    pays = tokens == 1 and groups < heads and query.device.type == "cpu"
    of_all_heads = attention_mask is None or attention_mask.shape[1] == 1
    if not (pays and of_all_heads) or options.get("position_bias") is not None or options.get("cache") is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, heads // groups, -1)
    queries = query.reshape(rows, groups, heads // groups, width)
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, key, value, attn_mask=mask, scale=options.get("scaling")
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(_NAME, grouped_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def use_grouped_attention(model: Any) -> None:
    """Make a transformers model use grouped attention, if it uses ``sdpa`` and that can be changed."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(_NAME)
