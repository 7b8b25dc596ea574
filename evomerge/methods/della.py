"""DELLA: random elements of task vectors dropped, large ones less often; plain, and with the sign election of TIES.

Deep et al., "DELLA-Merging" (arXiv 2406.11617), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import DENSITY, per_source, task_vectors
from evomerge.merging.arithmetic.drops import LEVELS, level
from evomerge.merging.arithmetic.passes import Pass, SparsePart
from evomerge.merging.plans import base_of, switch
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.masked import ALL_KEPT, masked_sum, switches
from evomerge.methods.parameters import density, one_weight, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def della_linear(facts: Facts, blend: Blend) -> Pass:
    """b + sum_i w_i m_i d_i / c_i, with random masks that keep large magnitudes more often.

    Within each row the probability to be kept rises evenly with the rank of the magnitude, from p - epsilon to
    p + epsilon (epsilon is reduced if needed to stay within 0 and 1). One c_i per tensor preserves the expected L1
    norm, whereas the paper divides each element by its own probability.
    """
    return masked_sum(facts, blend, _dropped_by_rank, elect=False)


def della(facts: Facts, blend: Blend) -> Pass:
    """``della_linear`` with the sign election of ``ties``, as in the paper."""
    return masked_sum(facts, blend, _dropped_by_rank, elect=True)


def _dropped_by_rank(facts: Facts, blend: Blend, source: str) -> SparsePart | None:
    chance = blend.value("density", source)
    epsilon = min(blend.value("epsilon", source), chance, 1 - chance)
    if level(chance) == 0:
        return None
    lowest, highest = max(1, level(chance - epsilon)), max(1, level(chance + epsilon))
    kept = (lowest + (highest - lowest) * facts.mean_rank(base_of(blend), source)) / LEVELS
    factor = 1 / kept if switch(blend, "rescale", True) else 1.0
    return SparsePart(source, factor, key=facts.stream(source), levels=lowest, rise=highest - lowest)


_SPREAD = MethodParameter("epsilon", "source", low=0.0, high=0.3, default=0.15, searched=False, limits=FRACTION)
_PARAMETERS = (weight(0.5), density(0.5), _SPREAD, scale())
_EPSILON = per_source("epsilon", 0.15)

DELLA_LINEAR = Method(
    "della_linear",
    della_linear,
    _PARAMETERS,
    needs_base=True,
    switches=switches(rescale=True),
    alone=one_weight(ALL_KEPT),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("plain", DENSITY, _EPSILON, rescale=True),
    title="DELLA without election",
    reference="arXiv 2406.11617",
)

DELLA = Method(
    "della",
    della,
    _PARAMETERS,
    needs_base=True,
    switches=switches(rescale=True),
    alone=one_weight(ALL_KEPT),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("elected", DENSITY, _EPSILON, normalize=True, rescale=True),
    title="DELLA",
    reference="arXiv 2406.11617",
)
