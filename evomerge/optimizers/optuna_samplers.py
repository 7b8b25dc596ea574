"""The settings of Optuna's samplers; ``optuna_study`` drives the samplers.

Optuna is imported only when a sampler is needed: the import takes a fifth of a second, which every command would pay.
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
"""gp: with more, one ask takes minutes and learns nothing. qmc: the most dimensions of scipy's Sobol sequence."""


class OptunaSettings(Settings):
    """One of Optuna's samplers. All take one or more objectives, and int and choice parameters.

    ``population`` is the number of genomes asked for at once and, for nsga2 and nsga3, the size of a generation. It
    defaults to 4 + floor(3 ln n), rounded up to an even number for those two; Optuna's own default of 50 would spend a
    small budget on random genomes. gp fits its model to all candidates at every ask, at a cost that grows with the cube
    of their number, so it suits a few hundred candidates.
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

        return OptunaOptimizer(self.name, parameters, objectives, seed, self.population)
