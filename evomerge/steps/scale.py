"""Scale: multiplies the whole change.

Every merge has a size, which affects its quality more than its direction does. This is the lambda of task arithmetic
(Ilharco et al., arXiv 2212.04089), for any method. With one factor per layer it is LiNeS (Wang et al., arXiv
2410.17146), which a search space offers as ``profile: lines``.
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
    # A method may compute a tiny change that is to be scaled up to the usual size: factors over 100 have been needed.
    (MethodParameter("factor", "blend", low=0.0, high=2.0, default=1.0, limits=(0.0, 1e4)),),
    neutral={"factor": 1.0},
    factor=lambda values: float(values["factor"]),
    in_any_basis=True,
    keeps_derivatives=True,
    differentiable=("factor",),
    title="scaled change",
    reference="arXiv 2212.04089",
)
