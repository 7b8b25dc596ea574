"""How much a routed model uses its experts: measured during scoring, and stored with the scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from pydantic import Field

from evomerge.recipes.base import Frozen


class ExpertUse(Frozen):
    """How much the tokens of a task use each expert.

    Attributes:
        experts: by name; the base last, if routers may abstain.
        tokens: the number of tokens, without padding.
        shares: for each layer, the share of each expert in the sum of all gates; empty for layers without routers.
        entropy: for each layer, the entropy of a token's normalised gates, in nats, averaged over tokens; None without
            routers.
    """

    experts: tuple[str, ...]
    tokens: int = Field(ge=0)
    shares: tuple[tuple[float, ...], ...]
    entropy: tuple[float | None, ...]

    @property
    def mean_shares(self) -> tuple[float, ...]:
        """The share of each expert, averaged over layers with routers."""
        known = [shares for shares in self.shares if shares]
        return tuple(fmean(of) for of in zip(*known, strict=True))

    @property
    def variation_within(self) -> float | None:
        """The coefficient of variation of shares within each half of the experts, averaged over halves and layers."""
        halves = [half for shares in self.shares for half in _halves(self._own(shares)) if half]
        return fmean(map(variation, halves)) if halves else None

    @property
    def variation_between(self) -> float | None:
        """That of the two halves' mean shares, averaged over layers (LoRAMoE's groups, arXiv 2312.09979)."""
        both = [[fmean(half) for half in _halves(self._own(shares)) if half] for shares in self.shares if shares]
        return fmean(map(variation, both)) if both else None

    def _own(self, shares: Sequence[float]) -> Sequence[float]:
        """The shares of experts, without that of the base."""
        return shares[: len(self.experts) - (self.experts[-1:] == (BASE,))]


BASE = "base alone"
"""The name of abstaining among experts: no source has a name with a space."""


def variation(numbers: Sequence[float]) -> float:
    """The coefficient of variation, standard deviation over mean; 0 if all are 0."""
    mean = fmean(numbers)
    return math.sqrt(fmean((number - mean) ** 2 for number in numbers)) / mean if mean else 0.0


def _halves(shares: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    return shares[: len(shares) // 2], shares[len(shares) // 2 :]


def together(uses: Iterable[ExpertUse]) -> ExpertUse | None:
    """Combine the use in several passes of one model; None if there is none."""
    known = [use for use in uses if use.tokens]
    if not known:
        return None
    total = sum(use.tokens for use in known)

    def mean(numbers: Iterable[float]) -> float:
        return round(sum(use.tokens * number for use, number in zip(known, numbers, strict=True)) / total, 4)

    shares = tuple(
        tuple(mean(of_expert) for of_expert in zip(*of_layer, strict=True))
        for of_layer in zip(*(use.shares for use in known), strict=True)
    )
    entropy = tuple(
        None if None in of_layer else mean(number for number in of_layer if number is not None)
        for of_layer in zip(*(use.entropy for use in known), strict=True)
    )
    return ExpertUse(experts=known[0].experts, tokens=total, shares=shares, entropy=entropy)
