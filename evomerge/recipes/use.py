"""How a model of experts used them: measured while it is scored, and kept beside its scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from pydantic import Field

from evomerge.recipes.base import Frozen


class ExpertUse(Frozen):
    """What the tokens of a task were given.

    Attributes:
        experts: by name; the base last, where routers may abstain.
        tokens: that passed, padding left out.
        shares: of each layer, of all that gates let through, the share of each expert; nothing of layers without
            routers.
        entropy: of each layer, of a token's gates divided by their sum, in nats, a mean over tokens; None without
            routers.
    """

    experts: tuple[str, ...]
    tokens: int = Field(ge=0)
    shares: tuple[tuple[float, ...], ...]
    entropy: tuple[float | None, ...]

    @property
    def mean_shares(self) -> tuple[float, ...]:
        """The share of each expert, a mean over layers with routers."""
        known = [shares for shares in self.shares if shares]
        return tuple(fmean(of) for of in zip(*known, strict=True))

    @property
    def variation_within(self) -> float | None:
        """The coefficient of variation of shares within each half of the experts, a mean over halves and layers."""
        halves = [half for shares in self.shares for half in _halves(self._own(shares)) if half]
        return fmean(map(variation, halves)) if halves else None

    @property
    def variation_between(self) -> float | None:
        """That of the two halves' mean shares, a mean over layers (LoRAMoE's groups, arXiv 2312.09979)."""
        both = [[fmean(half) for half in _halves(self._own(shares)) if half] for shares in self.shares if shares]
        return fmean(map(variation, both)) if both else None

    def _own(self, shares: Sequence[float]) -> Sequence[float]:
        """Those of experts, without that of the base."""
        return shares[: len(self.experts) - (self.experts[-1:] == (BASE,))]


BASE = "base alone"
"""How abstaining is called among experts: no source has a name with a space."""


def variation(numbers: Sequence[float]) -> float:
    """The coefficient of variation, standard deviation over mean; 0 where all are 0."""
    mean = fmean(numbers)
    return math.sqrt(fmean((number - mean) ** 2 for number in numbers)) / mean if mean else 0.0


def _halves(shares: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    return shares[: len(shares) // 2], shares[len(shares) // 2 :]


def together(uses: Iterable[ExpertUse]) -> ExpertUse | None:
    """The use in several passes of one model, as one; None where there is none."""
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
