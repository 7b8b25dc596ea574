"""Optimizers: ask for genomes, tell their losses. One algorithm a file, each with its settings in the search file."""

from typing import Annotated

from pydantic import Field

from evomerge.optimizers.base import Best, Keeps, Observation, Optimizer
from evomerge.optimizers.catcma import CatCmaSettings
from evomerge.optimizers.cma_es import CmaSettings
from evomerge.optimizers.lq_cma import LqCmaSettings
from evomerge.optimizers.optuna_samplers import OptunaSettings
from evomerge.optimizers.soups import SoupSettings

OptimizerSettings = Annotated[
    CatCmaSettings | LqCmaSettings | CmaSettings | OptunaSettings | SoupSettings, Field(discriminator="name")
]
"""What the search file says under ``optimizer:``; its ``name`` decides which settings it takes."""

__all__ = [
    "Best",
    "CatCmaSettings",
    "CmaSettings",
    "Keeps",
    "LqCmaSettings",
    "Observation",
    "Optimizer",
    "OptimizerSettings",
    "OptunaSettings",
    "SoupSettings",
]
