"""Ways to combine several objectives into one loss, for optimizers that take only one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from evomerge.errors import InputError

Weights = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=2)]
"""One positive weight per objective, in the order of the objectives."""

RHO = 0.05
"""The weight of the sum relative to the maximum in ``Chebyshev``: the value of Knowles (2006)."""


class WeightedSum(BaseModel):
    """The weighted sum of losses, in the losses' own units. It cannot reach the non-convex parts of a front."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["weighted_sum"]
    weights: Weights

    def __call__(
        self, losses: NDArray[np.float64], best: NDArray[np.float64], worst: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """One number for each row of ``losses`` [n, objectives]; ``best`` and ``worst`` are not used."""
        scalars: NDArray[np.float64] = (losses * np.array(self.weights)).sum(axis=1)
        return scalars

    def slopes(
        self, losses: NDArray[np.float64], best: NDArray[np.float64], worst: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The derivative of each row's number with respect to each of its losses: float64 [n, objectives]."""
        return np.broadcast_to(np.array(self.weights, dtype=np.float64), losses.shape)


class Chebyshev(BaseModel):
    """The augmented Chebyshev distance from the best value seen in each objective; it can reach any point of a front.

    Losses are first divided by the range seen so far in the search, so that weights mean the same for objectives of any
    unit. This requires that the ends of the front have been seen; they have if sources that excel in one objective each
    were scored first. Knowles, ParEGO (IEEE TEC 10(1), 2006), eq. (2).
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

    def slopes(
        self, losses: NDArray[np.float64], best: NDArray[np.float64], worst: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The derivative of each row's number with respect to each of its losses, float64 [n, objectives]: large for
        the largest weighted loss, and small for the others.
        """
        scale = np.array(self.weights) / np.where(worst > best, worst - best, 1.0)
        largest = (scale * (losses - best)).argmax(axis=1)[:, None] == np.arange(losses.shape[1])
        return np.asarray(scale * (largest + RHO))


Scalarisation = Annotated[WeightedSum | Chebyshev, Field(discriminator="name")]


def check_scalarisation(mix: Scalarisation | None, objectives: int, optimizer: str, place: str) -> None:
    """Reject several objectives without a scalarisation, or one for a different number of objectives.

    Raises:
        InputError: naming ``place`` (``optimizer``) and the hint.
    """
    if mix is None:
        if objectives > 1:
            raise InputError(
                place,
                f"{optimizer} takes one objective, and the search has {objectives}",
                f"Add `scalarisation: {{name: chebyshev, weights: {[1] * objectives}}}` (or weighted_sum), "
                "or use an optimizer for several: nsga2, nsga3, tpe, gp, random or qmc.",
            )
        return
    if objectives == 1:
        raise InputError(f"{place}.scalarisation", "is for several objectives; the search has one", "Remove it.")
    if len(mix.weights) != objectives:
        raise InputError(
            f"{place}.scalarisation.weights",
            f"has {len(mix.weights)} weights for {objectives} objectives",
            "Give one weight for each objective, in their order.",
        )


class Scalars:
    """Combines several objectives into one loss, using the best and worst values seen of each."""

    def __init__(self, mix: Scalarisation | None, objectives: int) -> None:
        self._mix = mix
        self._best = np.full(objectives, np.inf)
        self._worst = np.full(objectives, -np.inf)

    def see(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Remember a candidate's losses and return them as float64 [objectives]; all inf if one is not finite.

        Raises:
            ValueError: the number of losses differs from the number of objectives.
        """
        losses = np.asarray(values, dtype=np.float64)
        if losses.shape != self._best.shape:
            raise ValueError(f"{losses.size} losses for {self._best.size} objectives")
        if not np.all(np.isfinite(losses)):
            return np.full(self._best.size, np.inf)
        self._best = np.minimum(self._best, losses)
        self._worst = np.maximum(self._worst, losses)
        return losses

    def of(self, losses: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """One number per candidate; inf for those that failed."""
        rows = np.array(losses, dtype=np.float64).reshape(-1, self._best.size)
        if self._mix is None:
            return rows[:, 0]
        scalars = np.full(len(rows), np.inf)
        done = np.isfinite(rows[:, 0])
        if done.any():
            scalars[done] = self._mix(rows[done], self._best, self._worst)
        return scalars
