"""SCE: select, calculate, erase. Wan et al., "FuseChat" (arXiv 2408.07990), section 3.3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evomerge.mergekit.grammar import Grammar, for_all
from evomerge.merging.arithmetic.passes import Pass, Select
from evomerge.merging.plans import base_of, number
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def sce(facts: Facts, blend: Blend) -> Pass:
    """b + sum_i g_i e_i d_i / sum_i g_i e_i, over the selected elements.

    Select the fraction ``select_topk`` of elements whose task vectors vary most between sources (of those that vary at
    all). Calculate for each source its share g_i of the squared norm over the selected elements. Erase (e_i = 0) the
    elements whose sign differs from that of the sum.
    """
    names, share = (base_of(blend), *blend.sources), number(blend, "select_topk", 1.0)
    least = 0.0
    if share < 1:
        # In float32, as in mergekit: 5/6 of 2304 is 1920 there, and 1919 in float64.
        least = facts.variance_threshold(names, lambda varying: int(np.float32(varying) * np.float32(share)))
    energies = facts.energies(names, least)
    whole = energies.sum()
    shares = energies / whole if whole >= 1e-6 * facts.size else np.full(len(energies), 1 / len(energies))
    return Select(names[0], dict(zip(blend.sources, shares.tolist(), strict=True)), least)


SCE = Method(
    "sce",
    sce,
    (MethodParameter("select_topk", "blend", low=0.05, high=1.0, default=1.0, limits=FRACTION),),
    needs_base=True,
    differentiable=(),
    mergekit=Grammar("apart", (for_all("select_topk", 1.0),), copies_base=True, idle=("int8_mask",)),
    title="SCE",
    reference="arXiv 2408.07990",
)
