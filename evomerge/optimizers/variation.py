"""How genomes of a population give new ones, in the unit box; shared by all optimizers that keep many."""

from __future__ import annotations

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def iso_line(random: RandomState, one: Vector, other: Vector, iso: float, line: float) -> Vector:
    """Children of pairs: noise along each parameter, and a step along the line through both.

    one + iso N(0, I) + line N(0, 1) (other - one): Vassiliades & Mouret, "Discovering the elite hypervolume by
    leveraging interspecies correlation" (GECCO 2018, arXiv 1804.03906), equation 1.

    Args:
        one, other: float64 [children, parameters], points of the unit box.

    Returns:
        float64 [children, parameters], moved back into the box.
    """
    noise = iso * random.standard_normal(one.shape)
    steps = line * random.standard_normal((len(one), 1)) * (other - one)
    return np.clip(one + noise + steps, 0.0, 1.0)
