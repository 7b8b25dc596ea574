"""Arcee Fusion: the source where its difference from the base is important, the base elsewhere. As in mergekit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import Grammar, for_all
from evomerge.merging.arithmetic.passes import Pass, RowFunction
from evomerge.merging.plans import base_of, number
from evomerge.method import Method, MethodParameter
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts

_FENCE = 1.5


def arcee_fusion(facts: Facts, blend: Blend) -> Pass:
    """x where its difference from b is important, else b.

    The importance of an element is |d| times its row's Kullback-Leibler divergence between softmax(x) and softmax(b).
    It is important if that is not below median + fence (q3 - q1); ``fence`` is 1.5 in mergekit. The quartiles are exact
    ones of the whole tensor, whereas mergekit samples a million elements.
    """
    names = (base_of(blend), *blend.sources)

    def quantile(share: float) -> float:
        return facts.value_threshold("importances", names, _importance, facts.size - int(share * (facts.size - 1)))

    low, middle, high = (quantile(share) for share in (0.25, 0.5, 0.75))
    least = middle + number(blend, "fence", _FENCE) * (high - low)

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        base, source = tensors
        return source.where(_importance(tensors) >= least, base)

    return RowFunction(names, rows)


def _importance(rows: Sequence[Tensor]) -> Tensor:
    base, source = rows
    p, q = source.softmax(dim=-1) + 1e-8, base.softmax(dim=-1) + 1e-8
    return (source - base).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)


ARCEE_FUSION = Method(
    "arcee_fusion",
    arcee_fusion,
    (MethodParameter("fence", "blend", low=0.0, high=5.0, default=_FENCE),),
    needs_base=True,
    max_sources=1,
    mergekit=Grammar("apart", most=1, unsaid=(for_all("fence", _FENCE),)),
    title="Arcee Fusion",
)
