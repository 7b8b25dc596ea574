"""Observers tell others of a search, such as Prometheus and experiment trackers: one a file, with its settings."""

from collections import Counter
from typing import Annotated

from pydantic import AfterValidator, Field

from evomerge.observers.base import Observer, ObserverSettings
from evomerge.observers.hub import Observers, follow
from evomerge.observers.logs import LogsSettings
from evomerge.observers.mlflow import MlflowSettings
from evomerge.observers.prometheus import PrometheusSettings
from evomerge.observers.tensorboard import TensorBoardSettings
from evomerge.observers.wandb import WandbSettings

AnyObserverSettings = Annotated[
    LogsSettings | MlflowSettings | PrometheusSettings | TensorBoardSettings | WandbSettings,
    Field(discriminator="kind"),
]
"""An entry of ``observers:`` in the search file; its ``kind`` decides which settings it takes."""


def _one_of_each(observers: tuple[AnyObserverSettings, ...]) -> tuple[AnyObserverSettings, ...]:
    if twice := [kind for kind, count in Counter(each.kind for each in observers).items() if count > 1]:
        raise ValueError(f"there are two of the kind {twice[0]!r}")
    return observers


ObserverList = Annotated[tuple[AnyObserverSettings, ...], AfterValidator(_one_of_each)]
"""What the search file says under ``observers:``: at most one of each kind."""

__all__ = [
    "AnyObserverSettings",
    "LogsSettings",
    "MlflowSettings",
    "Observer",
    "ObserverList",
    "ObserverSettings",
    "Observers",
    "PrometheusSettings",
    "TensorBoardSettings",
    "WandbSettings",
    "follow",
]
