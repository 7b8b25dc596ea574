"""An artificial search in a real space, for measuring or stressing the driver without a model."""

from __future__ import annotations

from typing import Any

from evomerge.method import find_method
from evomerge.optimizers import CmaSettings
from evomerge.search.preparing.setup import EvaluatorInfo, ObjectiveInfo, Setup
from evomerge.search.settings.sections import Budget, Confirm
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings


def made_up_space(layers: int = 8, granularity: str = "model", sources: int = 3) -> ParameterSpace:
    """Weights of several sources over a fictitious base: one per source with "model", ``layers`` + 3 with "layer"."""
    names = ("base", *(f"source {i}" for i in range(sources)))
    context = SpaceContext(
        sources=dict.fromkeys(names, ""),
        base="base",
        tokenizer="base",
        layers=layers,
        tied=False,
        method=lambda name: find_method(name, "method"),
        recipe_seed=0,
        dtype=None,
    )
    settings = ParameterSpaceSettings.model_validate({"method": "task_arithmetic", "granularity": granularity})
    return ParameterSpace(settings, context)


def made_up_setup(space: ParameterSpace, candidates: int, items: int, **others: Any) -> Setup:
    """A search for one artificial score with CMA-ES. ``others`` override fields of ``Setup``."""
    return Setup(
        **{
            "name": "made up",
            "seed": 0,
            "space": space,
            "optimizer": CmaSettings(name="cma"),
            "objectives": (ObjectiveInfo("score", 0, "acc", True, items),),
            "evaluators": (EvaluatorInfo("task", "v", items, items),),
            "budget": Budget(candidates=candidates),
            "confirm": Confirm(),
            "attempts": 1,
            **others,
        }
    )
