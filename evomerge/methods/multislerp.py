"""MultiSLERP: the barycentre of directions, in the tangent space at their mean. mergekit's multislerp (Goddard)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evomerge.mergekit.grammar import WEIGHT, Grammar, Setting
from evomerge.merging.arithmetic import sphere
from evomerge.merging.arithmetic.passes import Combine, Pass
from evomerge.merging.plans import along, weights
from evomerge.method import Method
from evomerge.methods.parameters import one_weight, weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def multislerp(facts: Facts, blend: Blend) -> Pass:
    """The barycentre of the directions of the sources, or of task vectors given a base; see ``sphere.multislerp``."""
    if len(blend.sources) == 1:
        return Combine({blend.sources[0]: 1.0})
    shares = np.array(weights(blend, normalize=True))
    if blend.base is None:
        coefficients = sphere.multislerp(facts.inner(blend.sources), shares)
        return Combine(dict(zip(blend.sources, coefficients.tolist(), strict=True)))
    return along(blend.base, blend.sources, sphere.multislerp(facts.deltas(blend.base, blend.sources), shares).tolist())


MULTISLERP = Method(
    "multislerp",
    multislerp,
    (weight(1.0, high=1.0),),
    switches={"normalize": True},
    alone=one_weight(),
    differentiable=("weight",),
    mergekit=Grammar(
        "optional", (WEIGHT, Setting("normalize_weights", "normalize", True, absent=True)), fixed={"eps": 1e-8}
    ),
    title="MultiSLERP",
)
