"""RegMean++: RegMean whose inputs have come through the merged layers.

Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging" (arXiv
2508.03121): the equation of RegMean (``regmean``), where the inputs of layer l of source i are what that layer is given
when the texts of source i have gone through the merged layers 0 to l - 1. As in the authors' code, all linear parts of
a layer are observed within the source's own layer, not behind parts of it that are merged already.

The inputs follow from the numbers of a candidate, so that nothing of them is kept: a candidate costs about two runs of
a model over the texts of each source.
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
    """See the module's text."""
    return nearest_on(facts, blend, facts.merged_input_of)


REGMEAN_PLUS_PLUS = Method(
    "regmean_plus_plus",
    regmean_plus_plus,
    (WEIGHT, MethodParameter("off_diagonal", "blend", 0.0, 1.0, 0.9, limits=FRACTION)),
    alone=one_weight({"off_diagonal": 0.9}),  # which does not count there
    needs=("merged_inputs",),
    title="RegMean++",
    reference="arXiv 2508.03121",
)
