"""Task arithmetic around a fit: every tensor has of every source as much as right answers want.

W = b + sum_i w_i c_i d_i, where the c_i of each tensor are fitted to right answers, on items of their own, before the
search (``evomerge.merging.fitting.coefficients``): one number for each tensor and source, as layer-wise AdaMerging has
them (Yang et al., arXiv 2310.02575, section 3.2). Where all weights are 1 it is the fit itself.
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
    """See the module's text."""
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
