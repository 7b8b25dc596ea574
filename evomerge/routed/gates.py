"""Converts a router's logits to gates, which say how much of each expert a token gets.

With the logits z of a token, a temperature T and biases c, the scores are s = z / T + c, and for the K experts with the
highest scores among those present, the gates are

    softmax                  exp(s_e) / sum over kept of exp(s)        (MoLA, arXiv 2402.08562; with all kept MoLORA)
    softmax, not normalised  exp(s_e) / sum over present of exp(s)     (MoV's top-k, arXiv 2309.05444)
    sigmoid                  1.5 / (1 + exp(-s_e))

times a gain; all other gates are 0. Everything is computed in float32. This file imports only torch, and is copied
unchanged into exported folders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMOID_MOST = 1.5
"""The maximum of a sigmoid gate. Adapters were trained at scale 1; if two are needed equally, 0.75 each is suitable,
which is what an uninformed router gives."""


@dataclass(frozen=True)
class Gating:
    """How logits become gates.

    Attributes:
        gate: "softmax" or "sigmoid".
        top_k: how many experts a token uses; None for all.
        temperature: divides the logits.
        gain: multiplies the gates at the end.
        renormalised: whether softmax gates are normalised over the selected experts only.
    """

    gate: str = "softmax"
    top_k: int | None = None
    temperature: float = 1.0
    gain: float = 1.0
    renormalised: bool = True


def gates_of(logits: Tensor, how: Gating, bias: Tensor | None = None, present: Tensor | None = None) -> Tensor:
    """The gates of tokens: float32 [..., experts].

    If scores are equal, the expert that comes first is selected.

    Args:
        logits: [..., experts].
        bias: float32 [experts], added to the logits after division by the temperature.
        present: bool [experts]; None for all.
    """
    scores = logits.float()
    if how.temperature != 1.0:
        scores = scores / how.temperature
    if bias is not None:
        scores = scores + bias
    if present is not None:
        scores = scores.masked_fill(~present, -math.inf)
    if how.top_k is None or how.top_k >= scores.shape[-1]:
        gates = _sigmoid(scores) if how.gate == "sigmoid" else scores.softmax(-1)
    else:
        order = scores.sort(dim=-1, descending=True, stable=True)
        best, chosen = order.values[..., : how.top_k], order.indices[..., : how.top_k]
        if how.gate == "sigmoid":
            kept = _sigmoid(best)
        else:
            kept = best.softmax(-1) if how.renormalised else scores.softmax(-1).gather(-1, chosen)
        gates = torch.zeros_like(scores).scatter(-1, chosen, kept)
    return gates if how.gain == 1.0 else gates * how.gain


def _sigmoid(scores: Tensor) -> Tensor:
    return SIGMOID_MOST * torch.sigmoid(scores)
