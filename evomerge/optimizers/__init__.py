"""Optimizers with an ask-and-tell interface. Each file holds one algorithm and its settings in the search file.

To add one, write a file here, or declare a ``Settings`` subclass under a package's entry point ``evomerge.optimizers``.
"""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from evomerge.faults import read_part
from evomerge.optimizers.base import Best, Keeps, Observation, Optimizer, Settings
from evomerge.optimizers.catcma import CatCmaSettings
from evomerge.optimizers.cma_es import CmaSettings
from evomerge.optimizers.elites import Feature, Grid
from evomerge.optimizers.lq_cma import LqCmaSettings
from evomerge.optimizers.optuna_samplers import OptunaSettings
from evomerge.optimizers.proxy_descent import ProxyDescentSettings
from evomerge.optimizers.soups import SoupSettings


def _of_its_name(value: object) -> object:
    return read_part(value, "evomerge.optimizers", "name", "optimizer", Settings)


OptimizerSettings = Annotated[SerializeAsAny[Settings], BeforeValidator(_of_its_name)]
"""The ``optimizer:`` section of the search file; its ``name`` selects the settings class."""

__all__ = [
    "Best",
    "CatCmaSettings",
    "CmaSettings",
    "Feature",
    "Grid",
    "Keeps",
    "LqCmaSettings",
    "Observation",
    "Optimizer",
    "OptimizerSettings",
    "OptunaSettings",
    "ProxyDescentSettings",
    "SoupSettings",
]
