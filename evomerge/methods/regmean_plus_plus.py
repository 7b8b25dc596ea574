"""RegMean++: RegMean on inputs that have passed through the merged layers.

Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging" (arXiv
2508.03121): the equation of RegMean (``regmean``), where the inputs of layer l of source i are what that layer receives
after the texts of source i have passed through the merged layers 0 to l - 1. As in the authors' code, all linear
modules of a layer are observed within the source's own layer, not after merged modules of the same layer.

The inputs depend on the candidate, so nothing can be cached: a candidate costs about two forward passes over the texts
of each source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Pass
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.gram import WEIGHT
from evomerge.methods.parameters import one_weight
from evomerge.methods.regmean import nearest_on
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def regmean_plus_plus(facts: Facts, blend: Blend) -> Pass:
    """The equation in the module docstring."""
    return nearest_on(facts, blend, facts.merged_input_of)


REGMEAN_PLUS_PLUS = Method(
    "regmean_plus_plus",
    regmean_plus_plus,
    (WEIGHT, MethodParameter("off_diagonal", "blend", 0.0, 1.0, 0.9, limits=FRACTION)),
    alone=one_weight({"off_diagonal": 0.9}),  # which has no effect there
    needs=("merged_inputs",),
    title="RegMean++",
    reference="arXiv 2508.03121",
)
