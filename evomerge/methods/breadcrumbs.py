"""Model Breadcrumbs: task vectors without outliers and small elements; plain, and with the sign election of TIES.

Davari and Belilovsky, "Model Breadcrumbs" (arXiv 2312.06795), section 3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evomerge.mergekit.grammar import DENSITY, per_source, task_vectors
from evomerge.merging.arithmetic.passes import Pass, SparsePart
from evomerge.merging.plans import base_of
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.masked import ALL_KEPT, masked_sum, switches, windowed
from evomerge.methods.parameters import density, one_weight, scale, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def breadcrumbs(facts: Facts, blend: Blend) -> Pass:
    """b + sum_i w_i m_i d_i; masks drop the floor(gamma n) largest magnitudes and keep the next floor(p n).

    The paper masks outliers and small perturbations.
    """
    return masked_sum(facts, blend, _without_outliers, elect=False)


def breadcrumbs_ties(facts: Facts, blend: Blend) -> Pass:
    """``breadcrumbs`` with the sign election of ``ties``."""
    return masked_sum(facts, blend, _without_outliers, elect=True)


def _without_outliers(facts: Facts, blend: Blend, source: str) -> SparsePart | None:
    share, size = blend.value("density", source), facts.size
    if share >= 1:
        return windowed(facts, blend, source, 0.0, math.inf)
    kept, top = int(share * size), int(blend.value("gamma", source) * size)
    small = max(0, size - kept - top)  # outliers are kept if the density requires it
    large = size - small - kept
    if kept == 0:
        return None
    low = facts.threshold(base_of(blend), source, size - small) if small else 0.0
    return windowed(facts, blend, source, low, facts.threshold(base_of(blend), source, large) if large else math.inf)


_OUTLIERS = MethodParameter("gamma", "source", low=0.0, high=0.05, default=0.01, searched=False, limits=FRACTION)
# The paper keeps 85 to 90% of a task vector, and chooses a lambda of 0.3 to 0.5 on a validation set.
_PARAMETERS = (weight(0.4), density(0.9), _OUTLIERS, scale())
_GAMMA = per_source("gamma", 0.01)

BREADCRUMBS = Method(
    "breadcrumbs",
    breadcrumbs,
    _PARAMETERS,
    needs_base=True,
    switches=switches(rescale=False),
    alone=one_weight(ALL_KEPT),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("plain", DENSITY, _GAMMA, rescale=False),
    title="Model Breadcrumbs",
    reference="arXiv 2312.06795",
)

BREADCRUMBS_TIES = Method(
    "breadcrumbs_ties",
    breadcrumbs_ties,
    _PARAMETERS,
    needs_base=True,
    switches=switches(rescale=False),
    alone=one_weight(ALL_KEPT),
    differentiable=("weight", "lambda"),
    mergekit=task_vectors("elected", DENSITY, _GAMMA, rescale=False),
    title="Model Breadcrumbs with TIES",
    reference="arXiv 2312.06795",
)
