"""Optimizers: ask for genomes, tell their losses. One algorithm a file, each with its settings in the search file.

A new one is a file here, or an entry point ``evomerge.optimizers`` of a package that names a subclass of ``Settings``.
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
"""What the search file says under ``optimizer:``; its ``name`` decides which settings it takes."""

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
