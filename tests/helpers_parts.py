"""One small plugin of every kind that a package can add."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from evaluators.base import EvaluatorSettings
from evomerge.genome import Parameter
from evomerge.merging.arithmetic.passes import Combine
from evomerge.method import Method
from evomerge.observers import Observer, ObserverSettings
from evomerge.optimizers import Feature, OptunaSettings
from evomerge.optimizers.base import Optimizer, Settings
from evomerge.store.rows import SearchRow
from search_spaces.parameter_space import ParameterSpaceSettings

FIRST = Method("first", lambda facts, blend: Combine({blend.sources[0]: 1.0}))


class SpaceOfPackage(ParameterSpaceSettings):
    kind: Literal["space_of_package"] = "space_of_package"  # type: ignore[assignment]
    depth: int = 3


class EvaluatorOfPackage(EvaluatorSettings):
    evaluator: Literal["evaluator_of_package"] = "evaluator_of_package"
    words: int = 5


class OptimizerOfPackage(Settings):
    name: Literal["optimizer_of_package"]
    cells: int = 10

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        pass

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Optimizer:
        return OptunaSettings(name="random").build(parameters, objectives, seed)


class ObserverOfPackage(ObserverSettings):
    kind: Literal["observer_of_package"] = "observer_of_package"
    loud: bool = False

    def build(self, folder: Path, search: SearchRow) -> Observer:
        raise NotImplementedError


NOTHING = 5
