"""Scale: the whole change, multiplied.

Every merge has a size, and what it is worth follows that more than its direction: the lambda of task arithmetic
(Ilharco et al., arXiv 2212.04089) for what a method has made, whichever it is. By layer it is LiNeS (Wang et al.,
arXiv 2410.17146), which a search space lays out as ``profile: lines``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.changes import scaled
from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import base_of
from evomerge.method import MethodParameter
from evomerge.recipes.stack import Blend
from evomerge.step import Step, Values

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def scale(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """b + f (m - b)."""
    return scaled(base_of(blend), made, float(values["factor"]))


SCALE = Step(
    "scale",
    scale,
    # A method may make next to nothing, which is to be as large as others make it: factors beyond 100 have been needed.
    (MethodParameter("factor", "blend", low=0.0, high=2.0, default=1.0, limits=(0.0, 1e4)),),
    neutral={"factor": 1.0},
    factor=lambda values: float(values["factor"]),
    in_any_basis=True,
    keeps_derivatives=True,
    differentiable=("factor",),
    title="scaled change",
    reference="arXiv 2212.04089",
)
