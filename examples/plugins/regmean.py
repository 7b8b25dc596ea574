"""RegMean: the linear layer that is nearest to what each source's own layer gives on its own inputs.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (arXiv 2212.09849), equation 2 and section
3.3: for W_i [out, in], the inputs' Gram matrices G_i [in, in] and weights c_i,

    W = (sum_i c_i W_i G~_i) (sum_i c_i G~_i)^-1,    G~ = a G + (1 - a) diag(G).

What is no weight of a linear layer is a weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.facts import Facts
from evomerge.merging.passes import Combine, Pass, Whole
from evomerge.merging.plans import number, values
from evomerge.method import Method, MethodParameter
from evomerge.recipes.stack import Blend

_RIDGE = 1e-6
"""Of the mean of the diagonal, added to it: channels that no text reaches leave the sum singular."""


def regmean(facts: Facts, blend: Blend) -> Pass:
    """See the module's text."""
    weights, off = values(blend, "weight"), number(blend, "off_diagonal", 0.9)
    if not any(weights):  # the limit where all go to zero alike
        weights = [1.0] * len(weights)
    if not facts.site.is_matrix:
        return Combine({name: w / sum(weights) for name, w in zip(blend.sources, weights, strict=True)})
    inputs = [facts.input_of(name) for name in blend.sources]

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        sides = [tensor if given.axis == 1 else tensor.T for tensor, given in zip(tensors, inputs, strict=True)]
        width, device = sides[0].shape[1], sides[0].device
        above = torch.zeros(sides[0].shape, dtype=torch.float64, device=device)
        below = torch.zeros((width, width), dtype=torch.float64, device=device)
        for w, side, given in zip(weights, sides, inputs, strict=True):
            gram = given.gram.to(device, torch.float64)
            gram = w * (off * gram + (1 - off) * torch.diag(gram.diagonal()))
            below += gram
            above += side.double() @ gram
        below.diagonal().add_(_RIDGE * below.diagonal().mean())
        merged = torch.linalg.solve(below, above, left=False).float()
        return merged if inputs[0].axis == 1 else merged.T

    return Whole(blend.sources, whole)


REGMEAN = Method(
    "regmean",
    regmean,
    (
        MethodParameter("weight", "source", 0.0, 1.5, 1.0, limits=(0.0, 1e6), share=True),
        MethodParameter("off_diagonal", "blend", 0.0, 1.0, 0.9, limits=(0.0, 1.0)),
    ),
    alone=lambda sources, source: {"weight": {name: float(name == source) for name in sources}, "off_diagonal": 0.0},
    needs=("calibration",),
    title="RegMean",
    reference="arXiv 2212.09849",
)
