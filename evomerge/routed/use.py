"""Measures how much tokens use each expert, accumulated during passes that are made anyway."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from evomerge.recipes.use import ExpertUse
from evomerge.routed.sites import Place

_MAX_HELD = 1 << 22
"""How many gates are buffered before they are summed, since summing many places at once takes fewer operations."""


class UseMeter:
    """A listener that sums gates by place.

    Args:
        experts: their names, with the base last if it counts as an expert.
        places: the inputs of routers.
        layers: the model's number of layers.
    """

    def __init__(self, experts: Sequence[str], places: Mapping[str, Place], layers: int) -> None:
        self._experts, self._places, self._layers = tuple(experts), places, layers
        self._mask: Tensor | None = None
        self._held: list[tuple[str, Tensor]] = []
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._entropy: dict[str, Tensor] = {}
        self._tokens: dict[str, float] = {}

    def tokens(self, mask: Tensor | None) -> None:
        """See ``Listener``."""
        self._mask, self._held, self._count = mask, [], 0

    def routed(self, place: str, logits: Tensor, gates: Tensor) -> None:
        """See ``Listener``."""
        self._held.append((place, gates.detach()))
        self._count += gates.numel()
        if self._count > _MAX_HELD:
            self.done()

    def done(self) -> None:
        """Sum the buffered gates."""
        alike: dict[tuple[torch.Size, torch.device], list[tuple[str, Tensor]]] = defaultdict(list)
        for name, gates in self._held:
            alike[gates.shape, gates.device].append((name, gates))
        self._held, self._count = [], 0
        for group in alike.values():
            self._add([name for name, _ in group], torch.stack([gates for _, gates in group]).flatten(1, -2))

    def _add(self, names: Sequence[str], gates: Tensor) -> None:
        """Add the gates of several places, [places, tokens, experts], to the sums."""
        weights = of_tokens(self._mask, gates.shape[1], gates.device)
        parts = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        entropies = (torch.special.entr(parts).sum(-1) @ weights).double().cpu()
        sums, count = (weights @ gates).double().cpu(), float(weights.sum())
        for name, total, entropy in zip(names, sums, entropies, strict=True):
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._entropy[name] = self._entropy[name] + entropy if name in self._entropy else entropy
            self._tokens[name] = self._tokens.get(name, 0.0) + count

    @property
    def means(self) -> dict[str, list[float]]:
        """The mean gate of each expert, by place."""
        return {name: (total / self._tokens[name]).tolist() for name, total in self._sums.items()}

    def take(self) -> ExpertUse | None:
        """The sums since the last call; None if no token passed a router."""
        if not self._sums:
            return None
        shares: dict[int, list[Tensor]] = defaultdict(list)
        entropies: dict[int, list[float]] = defaultdict(list)
        for name, total in self._sums.items():
            layer = self._places[name].layer
            shares[layer].append(total / total.sum() if total.sum() else total)
            entropies[layer].append(float(self._entropy[name]) / max(self._tokens[name], 1.0))
        tokens = max(count / self._places[name].heads for name, count in self._tokens.items())
        self._sums, self._entropy, self._tokens = {}, {}, {}
        layers = range(self._layers)
        return ExpertUse(
            experts=self._experts,
            tokens=round(tokens),
            shares=tuple(_rounded(torch.stack(shares[n]).mean(0)) if n in shares else () for n in layers),
            entropy=tuple(round(fmean(entropies[n]), 4) if n in entropies else None for n in layers),
        )


def of_tokens(mask: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """Which of the rows that a router saw belong to tokens, float32 [rows]: 1, and 0 for padding.

    Args:
        mask: bool [texts, tokens], with one row per token or per head of a token. If the numbers do not match, as in an
            expert that receives only some tokens, or if there is no mask, all rows count.
    """
    if mask is None or rows % mask.numel():
        return torch.ones(rows, device=device)
    return mask.reshape(-1).to(device, torch.float32).repeat_interleave(rows // mask.numel())


def _rounded(numbers: Tensor) -> tuple[float, ...]:
    return tuple(round(float(number), 4) for number in numbers)
