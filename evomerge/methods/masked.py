"""Shared by methods that add up masked task vectors, whether the masks are by magnitude or random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Combine, Pass, SparsePart, Sparsify
from evomerge.merging.plans import base_of, number, switch, values, weights
from evomerge.method import Value
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts

Mask = Callable[["Facts", Blend, str], SparsePart | None]
"""(facts about one tensor, blend, source) -> the masked task vector, before weighting; None if nothing is kept."""

ALL_KEPT: Mapping[str, Value] = {"density": 1.0, "lambda": 1.0}
"""The parameters at which nothing is masked, and only the weights determine what is added."""


def masked_sum(facts: Facts, blend: Blend, mask: Mask, *, elect: bool) -> Pass:
    """b + lambda sum_i w_i m_i d_i.

    Args:
        elect: keep only those elements whose sign is that of the weighted sum. If the blend says ``normalize: true``,
            take their weighted mean.
    """
    base, factor = base_of(blend), number(blend, "lambda", 1.0)
    divide = elect and switch(blend, "normalize", False)
    shares = values(blend, "weight") if elect else weights(blend, normalize=False)
    parts = []
    for source, share in zip(blend.sources, shares, strict=True):
        part = mask(facts, blend, source) if share else None
        if part is not None:
            parts.append(replace(part, weight=part.weight * share * (1.0 if divide else factor), share=share))
    if not parts:
        return Combine({base: 1.0})
    return Sparsify(base, tuple(parts), elect=elect, divide=divide, scale=factor if divide else 1.0)


def windowed(facts: Facts, blend: Blend, source: str, low: float, high: float) -> SparsePart:
    """The task vector where its magnitude is in [low, high), rescaled to its full L1 norm if the blend says so."""
    factor = 1.0
    if switch(blend, "rescale", False):
        whole, kept = facts.window_sums(base_of(blend), source, low, high)
        factor = whole / kept if min(whole, kept) >= 1e-7 else 1.0
    return SparsePart(source, factor, low, high)


def switches(*, rescale: bool) -> Mapping[str, bool]:
    """The switches of all these methods, with their defaults."""
    return {"normalize": False, "rescale": rescale}
