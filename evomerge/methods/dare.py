"""DARE: random elements of task vectors dropped, the rest rescaled; plain, and with the sign election of TIES.

Yu et al., "Language models are super Mario" (arXiv 2311.03099), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import DENSITY, task_vectors
from evomerge.merging.arithmetic.drops import LEVELS, level
from evomerge.merging.arithmetic.passes import Pass, SparsePart
from evomerge.merging.plans import switch
from evomerge.method import Method
from evomerge.methods.masked import ALL_KEPT, masked_sum, switches
from evomerge.methods.parameters import density, equal_weights, one_weight, same_weights, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def dare_linear(facts: Facts, blend: Blend) -> Pass:
    """b + sum_i w_i (m_i / p_i) d_i, with random masks that keep an element with probability p_i.

    Drop at random, rescale by 1 / (1 - drop rate), then task arithmetic. ``rescale: false`` omits the division.
    """
    return masked_sum(facts, blend, _dropped, elect=False)


def dare_ties(facts: Facts, blend: Blend) -> Pass:
    """``dare_linear`` with the sign election of ``ties``, as in the same paper: DARE replaces trimming."""
    return masked_sum(facts, blend, _dropped, elect=True)


def _dropped(facts: Facts, blend: Blend, source: str) -> SparsePart | None:
    levels = level(blend.value("density", source))
    if levels == 0:
        return None
    factor = LEVELS / levels if switch(blend, "rescale", True) else 1.0
    return SparsePart(source, factor, key=facts.stream(source), levels=levels)


_PARAMETERS = (weight(0.5), density(0.5), scale())

DARE_LINEAR = Method(
    "dare_linear",
    dare_linear,
    _PARAMETERS,
    needs_base=True,
    switches=switches(rescale=True),
    alone=one_weight(ALL_KEPT),
    uniform=equal_weights(ALL_KEPT),
    arithmetic=same_weights(ALL_KEPT),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("plain", DENSITY, rescale=True),
    title="DARE",
    reference="arXiv 2311.03099",
)

DARE_TIES = Method(
    "dare_ties",
    dare_ties,
    _PARAMETERS,
    needs_base=True,
    switches=switches(rescale=True),
    alone=one_weight(ALL_KEPT),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("elected", DENSITY, rescale=True),
    title="DARE with TIES",
    reference="arXiv 2311.03099",
)
