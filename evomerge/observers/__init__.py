"""Observers report a search to other systems, such as Prometheus and experiment trackers: one per file, with settings.

To add one, add a file here or an entry point ``evomerge.observers`` in a package.
"""

from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny

from evomerge.faults import read_part
from evomerge.observers.base import Observer, ObserverSettings
from evomerge.observers.hub import Observers, follow
from evomerge.observers.logs import LogsSettings
from evomerge.observers.mlflow import MlflowSettings
from evomerge.observers.prometheus import PrometheusSettings
from evomerge.observers.tensorboard import TensorBoardSettings
from evomerge.observers.wandb import WandbSettings


def _of_their_kinds(value: object) -> object:
    if not isinstance(value, list | tuple):
        return value
    base: Any = ObserverSettings  # Any, because mypy does not accept an abstract class
    return [
        read_part(entry, "evomerge.observers", "kind", f"observers.{place}", base) for place, entry in enumerate(value)
    ]


def _one_of_each(observers: tuple[ObserverSettings, ...]) -> tuple[ObserverSettings, ...]:
    if twice := [kind for kind, count in Counter(entry.kind for entry in observers).items() if count > 1]:
        raise ValueError(f"there are two of the kind {twice[0]!r}")
    return observers


ObserverList = Annotated[
    tuple[SerializeAsAny[ObserverSettings], ...], BeforeValidator(_of_their_kinds), AfterValidator(_one_of_each)
]
"""The ``observers:`` section of the search file: at most one of each kind, and ``kind`` selects the settings class."""

__all__ = [
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
