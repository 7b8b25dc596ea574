"""Optimizers: ask for genomes, tell their losses. One algorithm a file, each with its settings in the search file.

A package adds one by an entry point of the group ``evomerge.optimizers`` that names a subclass of ``Settings``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import Field, SerializeAsAny, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from evomerge.errors import InputError
from evomerge.faults import explain
from evomerge.optimizers.base import Best, Keeps, Observation, Optimizer, Settings
from evomerge.optimizers.catcma import CatCmaSettings
from evomerge.optimizers.cma_es import CmaSettings
from evomerge.optimizers.elites import Feature, Grid
from evomerge.optimizers.lq_cma import LqCmaSettings
from evomerge.optimizers.optuna_samplers import OptunaSettings
from evomerge.optimizers.soups import SoupSettings
from evomerge.plugins import plugins, unknown_name

GROUP = "evomerge.optimizers"

_Own = CatCmaSettings | LqCmaSettings | CmaSettings | OptunaSettings | SoupSettings


def _of_any_package(content: Any, own: ValidatorFunctionWrapHandler) -> Any:
    """The settings of an optimizer of another package, and else of one of this project's."""
    name = content.get("name") if isinstance(content, Mapping) else None
    names = [n for settings in get_args(_Own) for n in get_args(settings.model_fields["name"].annotation)]
    if isinstance(content, Settings) and not isinstance(content, _Own):
        return content
    if not isinstance(name, str) or name in names:
        return own(content)
    added = plugins(GROUP)
    if name not in added:
        raise unknown_name(name, [*names, *added], "optimizer.name", "optimizer")
    settings = added[name].load()
    if not (isinstance(settings, type) and issubclass(settings, Settings)):
        problem = f"{added[name].value} is not the settings of an optimizer"
        raise InputError("optimizer.name", problem, f"Let it name a subclass of {Settings.__qualname__}.")
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise explain(error, "optimizer", settings, content, ".") from None


OptimizerSettings = Annotated[
    SerializeAsAny[Annotated[_Own, Field(discriminator="name")]], WrapValidator(_of_any_package)
]
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
    "SoupSettings",
]
