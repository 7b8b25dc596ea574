"""Stretches of layers: joined, they are the plain pass, bit for bit, whatever the architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers_tiers import architectures
from test_architectures import MODELS
from test_paths import deeper
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.live import for_scoring
from evomerge.checkpoints.stretch import Stretches
from evomerge.checkpoints.structure import layer_stack

TEXT = torch.arange(3, 14)[None]


@pytest.mark.parametrize("name", architectures(MODELS))
def test_stretches_joined_are_the_plain_pass(name: str) -> None:
    """Layer by layer and in longer ones, the hidden state of another text in between: what is put in counts."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**deeper(settings))
    model = for_scoring(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    layers = list(layer_stack(model, config.num_hidden_layers)[1])
    plain: list[torch.Tensor] = []

    def note(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        plain.append(given[0] if given else named["hidden_states"])

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    with torch.inference_mode():
        model(TEXT, use_cache=False)
        for hook in hooks:
            hook.remove()
        stretches = Stretches(model, layers)
        first = stretches.reach(TEXT, 0, None, 1)
        stretches.reach(TEXT.flip(1), 0, None, 2)
        second = stretches.reach(TEXT, 1, first, 2)
        assert torch.equal(first, plain[1])
        assert torch.equal(second, plain[2])
        assert torch.equal(stretches.reach(TEXT, 0, None, 2), second)
        twice = stretches.reach(TEXT, 1, first + 1, 2)
        assert not torch.equal(twice, second)
        after = model(TEXT, use_cache=False).logits
    assert torch.isfinite(after).all()
    assert not any("forward" in vars(layer) for layer in layers)
