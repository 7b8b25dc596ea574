"""Prototype routing: a token goes to experts on whose own texts the router sees what is most like it.

With m_e the mean of what a router sees on the texts of expert e, and m the mean of these over all experts,

    R_e = (m_e - m) / |m_e - m|,        b_e = -R_e . m

so that the logit R_e x + b_e = R_e . (x - m). Not centred, the means of different texts are all but parallel, and gates
are the same for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prototype_router(means: Tensor) -> tuple[Tensor, Tensor]:
    """R, float32 [experts, width], and b, [experts].

    Args:
        means: m_e, [experts, width]. An expert whose mean is that of all has no direction: zeros.
    """
    middle = means.double().mean(0)
    apart = means.double() - middle
    length = torch.linalg.vector_norm(apart, dim=1, keepdim=True)
    rows = torch.where(length > 0, apart / length.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return rows.float(), -(rows @ middle).float()
