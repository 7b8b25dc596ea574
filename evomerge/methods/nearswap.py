"""NearSwap: the source where it is close to the base, and the base moved towards it elsewhere.

alchemonaut's NearSwap, as in mergekit (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001).
"""

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

_T = 0.001


def nearswap(facts: Facts, blend: Blend) -> Pass:
    """b + min(1, t / |d|) d: the source where it is within t of the base, elsewhere the base moved towards it by t."""
    t = number(blend, "t", _T)

    def rows(tensors: Sequence[Tensor], first_row: int) -> Tensor:
        base, source = tensors
        near = (t / (base - source).abs().clamp(min=1e-6)).clamp(0, 1)
        return near * source + (1 - near) * base

    return RowFunction((base_of(blend), *blend.sources), rows)


NEARSWAP = Method(
    "nearswap",
    nearswap,
    (MethodParameter("t", "blend", low=0.0, high=0.02, default=_T),),
    needs_base=True,
    max_sources=1,
    mergekit=Grammar("apart", (for_all("t", None, _T),), most=1),
    title="NearSwap",
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
)
