"""Observes the inputs of routers while a model runs on texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from evomerge.checkpoints.live import LiveModel
from evomerge.routed.computing import watch
from evomerge.routed.sites import Place


@torch.inference_mode()
def means_over(
    live: LiveModel, places: Mapping[str, Place], texts: Iterable[Tensor], what: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The mean over all tokens of a function of the routers' inputs, by place: float32, on the CPU.

    Texts are run one at a time, so that there is no padding.

    Args:
        texts: int64 [1, tokens] each.
        what: (place, router inputs [tokens, width]) -> [tokens, ...].
    """
    sums: dict[str, Tensor] = {}
    count = 0

    def add(place: Place, values: Tensor) -> None:
        seen = place.seen(values)
        shares = what(place.name, seen.reshape(-1, seen.shape[-1])).double().sum(0) / place.heads
        sums[place.name] = sums[place.name] + shares if place.name in sums else shares

    hooks = [
        watch(live.model.get_submodule(name), place.is_output, partial(add, place)) for name, place in places.items()
    ]
    try:
        for text in texts:
            live.model(text, use_cache=False)
            count += text.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / count).float().cpu() for name, total in sums.items()}
