"""Activations: input channels that the base relies on most are changed least.

Activation-Informed Merging (Nobari et al., arXiv 2502.02421, section 3): the change of a linear layer's weights is
reduced per input channel, in proportion to the base's own activations there on some texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.changes import rescaled
from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import base_of
from evomerge.method import MethodParameter
from evomerge.recipes.stack import Blend
from evomerge.step import Step, Values

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def activations(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """b + (m - b) (1 - s_c (1 - omega)) for input channel c; s_c is mean |x_c| in the base, over the layer's largest.

    Tensors that are not weights of a linear layer are unchanged (embeddings, norms, biases), and so are those whose
    inputs cannot be observed, such as experts that are computed together.
    """
    omega = float(values["omega"])
    if omega == 1 or not (facts.site.is_matrix or facts.site.role.kind == "head"):
        return made
    base = base_of(blend)
    sizes = facts.channels_of(base)
    if sizes is None or not (largest := sizes.max()) > 0:
        return made
    factor = (1 - sizes.double() / largest.double() * (1 - omega)).float()
    return rescaled(base, made, factor if facts.site.input_axis == 1 else factor[:, None])


ACTIVATIONS = Step(
    "activations",
    activations,
    # 0.4: the middle of the paper's 0.2 to 0.6.
    (MethodParameter("omega", "blend", default=0.4, limits=(0.0, 1.0)),),
    needs=("channels",),
    neutral={"omega": 1.0},
    keeps_derivatives=True,
    title="activation-informed merging",
    reference="arXiv 2502.02421",
)
