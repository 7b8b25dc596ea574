"""Task arithmetic around a fit: each tensor takes as much of every source as the fit to right answers found best.

W = b + sum_i w_i c_i d_i, where the c_i of each tensor are fitted to right answers before the search, on separate items
(``evomerge.merging.fitting.coefficients``): one number per tensor and source, as in layer-wise AdaMerging (Yang et al.,
arXiv 2310.02575, section 3.2). With all weights at 1 this is the fit itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.plans import added, base_of, values
from evomerge.method import Method, MethodParameter
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from evomerge.merging.measured.facts import Facts


def fitted(facts: Facts, blend: Blend) -> Pass:
    """The equation in the module docstring."""
    base = base_of(blend)
    wanted = facts.coefficients_of(base, blend.sources)
    return added(base, blend.sources, [w * c for w, c in zip(values(blend, "weight"), wanted, strict=True)])


FITTED = Method(
    "fitted",
    fitted,
    (MethodParameter("weight", "source", low=0.0, high=2.0, default=1.0, share=True),),
    needs_base=True,
    needs=("fit",),
    differentiable=("weight",),
    title="fitted coefficients",
    reference="arXiv 2310.02575",
)
