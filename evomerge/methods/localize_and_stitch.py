"""Localize-and-Stitch without data: each source's largest changes over its whole model, averaged where they overlap.

He et al., "Localize-and-Stitch: efficient model merging via sparse task arithmetic" (arXiv 2408.13656), section 4: the
dataless localisation, and stitching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Combine, MaskedMean, Pass
from evomerge.merging.plans import base_of, number, values
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.parameters import equal_weights, one_weight, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts

_MIN = 2.0**-149  # the smallest positive float32


def localize_and_stitch(facts: Facts, blend: Blend) -> Pass:
    """b + lambda sum_i w_i m_i d_i / sum_i w_i m_i: the weighted mean of the sources whose mask has the element.

    m_i keeps the fraction ``density`` of the elements of the whole model that source i changed most, so layers that
    changed little contribute little. The paper takes plain means where masks overlap, which are equal weights; only
    there do weights matter.
    """
    base, shares, lows = base_of(blend), {}, {}
    for source, share, kept in zip(blend.sources, values(blend, "weight"), values(blend, "density"), strict=True):
        if share and kept > 0:
            shares[source], lows[source] = share, _low(facts, base, source, kept)
    if not shares:
        return Combine({base: 1.0})
    return MaskedMean(base, shares, lows, number(blend, "lambda", 1.0))


def _low(facts: Facts, base: str, source: str, kept: float) -> float:
    """The smallest magnitude in the mask. Unchanged elements are in it only if all elements are."""
    return max(facts.model_threshold(base, source, kept), _MIN) if kept < 1 else 0.0


_EVERYTHING = {"density": 1.0, "lambda": 1.0}

LOCALIZE_AND_STITCH = Method(
    "localize_and_stitch",
    localize_and_stitch,
    (
        weight(1.0, high=1.0),  # only their ratios matter
        # The paper keeps 1 to 10%.
        MethodParameter("density", "source", low=0.01, high=1.0, default=0.1, limits=FRACTION),
        scale(searched=True),
    ),
    needs_base=True,
    whole_models=True,
    alone=one_weight(_EVERYTHING),
    uniform=equal_weights(_EVERYTHING),
    differentiable=("weight", "lambda"),
    title="Localize-and-Stitch, dataless",
    reference="arXiv 2408.13656",
)
