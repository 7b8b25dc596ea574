"""RegMean: the linear layer whose outputs are closest to those of each source's own layer on its own inputs.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (arXiv 2212.09849), equation 2 and section
3.3: for W_i [out, in], the inputs' Gram matrices G_i [in, in] and weights c_i,

    W = (sum_i c_i W_i G~_i) (sum_i c_i G~_i)^-1,    G~ = a G + (1 - a) diag(G).

All parameters other than weights of linear layers are averaged with these weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from evomerge.merging.arithmetic.passes import Combine, Pass, TensorFunction
from evomerge.merging.plans import number, values
from evomerge.method import FRACTION, Method, MethodParameter
from evomerge.methods.gram import WEIGHT
from evomerge.methods.parameters import one_weight
from evomerge.recipes.stack import Blend

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merging.measured.facts import Facts
    from evomerge.merging.measured.inputs import LayerInput

_RIDGE = 1e-6
"""A ridge towards the weighted mean, relative to the mean of the diagonal. Channels that no text reaches leave the sum
singular, and sources that no text reached (experts of a mixture) have no usable Gram matrix."""


def regmean(facts: Facts, blend: Blend) -> Pass:
    """The equation in the module docstring."""
    return nearest_on(facts, blend, facts.input_of)


def nearest_on(facts: Facts, blend: Blend, input_of: Callable[[str], LayerInput]) -> Pass:
    """The linear layer closest to the sources' own on some inputs; for other tensors, a weighted mean.

    Args:
        input_of: maps a source's name to the inputs of its layer.
    """
    weights, off = values(blend, "weight"), number(blend, "off_diagonal", 0.9)
    if not any(weights):  # the limit as all go to zero equally
        weights = [1.0] * len(weights)
    shares = {name: w / sum(weights) for name, w in zip(blend.sources, weights, strict=True) if w}
    if not facts.site.is_matrix or len(shares) == 1:
        return Combine(shares)
    import torch

    from evomerge.merging.normal_equations import Filter, input_side, nearest_by_grams

    inputs = [input_of(name) for name in shares]

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        sides = [input_side(tensor, given.axis) for tensor, given in zip(tensors, inputs, strict=True)]
        c = list(shares.values())
        grams = torch.stack([given.gram.to(sides[0].device, torch.float64) for given in inputs])
        own = grams.diagonal(dim1=1, dim2=2).clone()
        grams *= off
        grams.diagonal(dim1=1, dim2=2).copy_(own)
        mean = float((own.mean(dim=1) * own.new_tensor(c)).sum())
        return input_side(nearest_by_grams(sides, list(grams), c, c, Filter(_RIDGE * mean)), inputs[0].axis)

    return TensorFunction(tuple(shares), whole)


REGMEAN = Method(
    "regmean",
    regmean,
    (WEIGHT, MethodParameter("off_diagonal", "blend", 0.0, 1.0, 0.9, limits=FRACTION)),
    alone=one_weight(),
    needs=("calibration",),
    title="RegMean",
    reference="arXiv 2212.09849",
)
