"""Attention by groups of heads equals transformers' own."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from evomerge.checkpoints.attention import grouped_attention
from evomerge.checkpoints.live import for_scoring


def masks(rows: int, tokens: int, columns: int) -> dict[str, torch.Tensor | None]:
    shown = torch.rand(rows, 1, tokens, columns) > 0.4
    shown[..., -1] = True
    return {
        "none": None,
        "bool": shown,
        "one for all rows": shown[:1],
        "additive": torch.zeros(shown.shape).masked_fill(~shown, float("-inf")),
    }


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (8, 1), (4, 4)])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (1, 61), (1, 300), (7, 30)])
@pytest.mark.parametrize("kind", ["none", "bool", "one for all rows", "additive"])
def test_attention_equals_transformers(heads: int, groups: int, tokens: int, columns: int, kind: str) -> None:
    torch.manual_seed(0)
    rows, width = 5, 16
    query = torch.randn(rows, tokens, heads, width).transpose(1, 2)
    key, value = (torch.randn(rows, groups, columns + 3, width)[:, :, :columns] for _ in range(2))
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    mask = masks(rows, tokens, columns)[kind]
    if mask is None and tokens > 1:
        mask = torch.ones(rows, 1, tokens, columns, dtype=torch.bool)
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_mask_of_every_head_is_kept() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8)
    mask = torch.rand(2, 4, 1, 6) > 0.5
    mask[..., 0] = True
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    ours, _ = grouped_attention(module, query, key, key, mask, scaling=0.3)
    torch.testing.assert_close(ours, sdpa_attention_forward(module, query, key, key, mask, scaling=0.3)[0])


def test_model_made_for_scoring_attends_by_groups_and_generates_the_same() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    ours = LlamaForCausalLM(copy.deepcopy(config))
    ours.load_state_dict(plain.state_dict())
    for_scoring(ours)
    assert ours.config._attn_implementation != plain.config._attn_implementation == "sdpa"
    ids = torch.randint(64, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**asked), plain.generate(**asked))


def test_eager_model_stays_eager() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    assert for_scoring(LlamaForCausalLM(config)).config._attn_implementation == "eager"
