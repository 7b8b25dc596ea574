"""Optuna's samplers as a search file names them; ``optuna_study`` drives them.

Optuna is imported when one of them is to propose: that takes a fifth of a second, which every command would pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.optimizers.base import Optimizer, Settings, check_population
from evomerge.optimizers.elites import Feature

SamplerName = Literal["tpe", "gp", "nsga2", "nsga3", "random", "qmc"]

MAX_PARAMETERS = {"gp": 1_000, "qmc": 21_201}
"""gp: beyond, one ask takes minutes and learns nothing. qmc: the dimensions of scipy's Sobol sequence."""


class OptunaSettings(Settings):
    """One of Optuna's samplers; each takes one objective or several, and int and choice parameters.

    ``population`` is how many genomes are asked for at once and, for nsga2 and nsga3, the size of a generation. It
    defaults to 4 + floor(3 ln n), made even for those two; Optuna's own 50 would spend a small budget on chance. gp
    fits its model to all candidates at every ask, at a cost that grows with their cube: it is for a few hundred.
    """

    name: SamplerName
    population: int | None = None

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        check_population(self.population, 2, place)
        most = MAX_PARAMETERS.get(self.name)
        if most is not None and len(parameters) > most:
            raise InputError(
                place,
                f"{self.name} takes at most {most:,} parameters, and the search space has {len(parameters):,}",
                "Use cma (or nsga2 for several objectives), or a coarser search space.",
            )

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Optimizer:
        from evomerge.optimizers.optuna_study import OptunaOptimizer

        return OptunaOptimizer(self, parameters, objectives, seed)
