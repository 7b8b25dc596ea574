"""Ways to make one loss of several objectives, for optimizers that take one."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Weights = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=2)]
"""One weight above zero for each objective, in the order of the objectives."""

RHO = 0.05
"""How much the sum counts beside the maximum in ``Chebyshev``: the value of Knowles (2006)."""


class WeightedSum(BaseModel):
    """The sum of weight times loss, in the losses' own units. It cannot reach the hollow parts of a front."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["weighted_sum"]
    weights: Weights

    def __call__(
        self, losses: NDArray[np.float64], best: NDArray[np.float64], worst: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """One number for each row of ``losses`` [n, objectives]; ``best`` and ``worst`` play no part."""
        scalars: NDArray[np.float64] = (losses * np.array(self.weights)).sum(axis=1)
        return scalars


class Chebyshev(BaseModel):
    """The augmented Chebyshev distance from the best seen in each objective: it can reach every point of a front.

    Losses are first scaled by the range seen so far in the search, so the weights mean the same for objectives of any
    unit. The ends of the front must have been seen for this to be so: sources that excel in one objective each, scored
    first, show them. Knowles, ParEGO (IEEE TEC 10(1), 2006), eq. (2).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["chebyshev"]
    weights: Weights

    def __call__(
        self, losses: NDArray[np.float64], best: NDArray[np.float64], worst: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """One number for each row of ``losses`` [n, objectives]; ``best`` and ``worst`` [objectives] seen so far."""
        width = np.where(worst > best, worst - best, 1.0)
        weighted = np.array(self.weights) * (losses - best) / width
        scalars: NDArray[np.float64] = weighted.max(axis=1) + RHO * weighted.sum(axis=1)  # eq. (2)
        return scalars


Scalarisation = Annotated[WeightedSum | Chebyshev, Field(discriminator="name")]
