"""Balancing losses on the use of experts, which are added to the loss on right answers while routers are fitted.

Each takes the gates of the tokens of a batch, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def switch_balance(probabilities: Tensor, top_k: int | None = None) -> Tensor:
    """N sum_e f_e p_e: 1 for perfectly balanced use with one expert per token, and k with k experts.

    f_e is the share of tokens that have expert e among their ``top_k``, and p_e its mean probability (Fedus et al.,
    "Switch Transformers", arXiv 2101.03961, equations 4 to 6; MoLA combines the tokens of all modules of a layer). A
    router that selects all experts is balanced by its first choice.

    Args:
        probabilities: [tokens, experts], before selection.
    """
    experts = probabilities.shape[-1]
    kept = 1 if top_k is None or top_k >= experts else top_k
    chosen = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    shares = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0).mean(0)
    return experts * (shares * probabilities.mean(0)).sum()


def localized_balance(gates: Tensor, kinds: Sequence[int], expert_kinds: Sequence[int], delta: float) -> Tensor:
    """var(Z) / mean(Z)^2 of all numbers Z = I * Q of a batch (LoRAMoE, arXiv 2312.09979, equations 5 and 6).

    Q_me is the sum of expert e's gates over the tokens of text m, and I_me is 1 + delta if text and expert belong to
    the same group, and 1 - delta if not. The paper divides by the mean, its code by the square of the mean, with the
    unbiased variance and 1e-10 added to the square; this follows the code.

    Args:
        gates: [texts, tokens, experts], zeros at padding.
        kinds: the group of each text.
        expert_kinds: the group of each expert.
    """
    same = torch.tensor([[kind == other for other in expert_kinds] for kind in kinds], device=gates.device)
    weighted = gates.sum(1) * torch.where(same, 1.0 + delta, 1.0 - delta)
    return weighted.var() / (weighted.mean() ** 2 + 1e-10)


def halves(experts: int) -> list[int]:
    """The groups of experts by their order, as in LoRAMoE's code: 0 for the first half, 1 for the second."""
    return [0 if number < experts // 2 else 1 for number in range(experts)]


def z_loss(logits: Tensor) -> Tensor:
    """The mean square of log sum exp (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
        logits: [tokens, experts].
    """
    return logits.logsumexp(-1).square().mean()
