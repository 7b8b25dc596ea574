"""Prototype routing: a token is routed to the experts whose own texts give the router the most similar inputs.

With m_e the mean of a router's inputs on the texts of expert e, and m the mean of these over all experts,

    R_e = (m_e - m) / |m_e - m|,        b_e = -R_e . m

so that the logit R_e x + b_e = R_e . (x - m). Without centring, the means of different texts are almost parallel, and
gates are the same for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prototype_router(means: Tensor) -> tuple[Tensor, Tensor]:
    """R, float32 [experts, width], and b, [experts].

    Args:
        means: m_e, [experts, width]. An expert whose mean equals the overall mean has no direction: zeros.
    """
    middle = means.double().mean(0)
    apart = means.double() - middle
    length = torch.linalg.vector_norm(apart, dim=1, keepdim=True)
    rows = torch.where(length > 0, apart / length.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return rows.float(), -(rows @ middle).float()
