"""Optuna's samplers, driven through ask and tell on an in-memory study.

A new sampler is created for every ask, seeded by (search seed, number of the ask). Everything else that it knows it
reads from the study, so the study's trials are its entire state.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna

from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Best, Keeps, Observation, Refinement, default_population, one_thread

GENERATION_KEYS = {"nsga2": "NSGAIISampler:generation", "nsga3": "NSGAIIISampler:generation"}
"""The key under which Optuna keeps the generation of a trial; a trial without one never becomes a parent."""

DEAR = ("tpe", "gp")
"""Samplers whose asks take up to seconds each."""

GOOD_SHARE, MAX_GOOD = 0.1, 25
"""tpe models the best tenth of all trials, at most 25, as good: the default ``gamma`` of Optuna's TPESampler."""


class OptunaOptimizer:
    """One search with one of Optuna's samplers: ``name`` and ``population`` as in ``optuna_samplers.OptunaSettings``.

    Failed candidates are told as inf, which every sampler ranks last. Genomes that were never asked for count like all
    others; for nsga2 and nsga3, baselines belong to the first generation, together with the first genomes asked for.
    """

    favourite: Genome | None = None
    wants_items = False
    refined: Sequence[Refinement] = ()
    stopped: str | None = None

    def __init__(
        self, name: str, parameters: Sequence[Parameter], objectives: int, seed: int, population: int | None = None
    ) -> None:
        default = default_population(len(parameters))
        self._name = name
        self._genetic = name in GENERATION_KEYS
        self._seed = seed
        self._asks = 0
        self._distributions = {str(i): _distribution(p) for i, p in enumerate(parameters)}
        self._asked: defaultdict[bytes, deque[optuna.Trial]] = defaultdict(deque)
        self._baselines: list[tuple[Genome, list[float]]] = []
        self.population = population or (default + default % 2 if self._genetic else default)
        with _quiet():
            self._study = optuna.create_study(directions=["minimize"] * objectives)

    @property
    def keeps(self) -> Keeps:
        match self._name:
            case "tpe":  # it treats all others as equally bad; with several objectives only the share applies
                finished: int = sum(t.state.is_finished() for t in self._study.get_trials(deepcopy=False))
                good = math.ceil(GOOD_SHARE * (finished + self.population))
                most = MAX_GOOD if len(self._study.directions) == 1 else good
                return Best(min(good, most, self.population))
            case "random" | "qmc":  # they learn nothing; only the best matters, as the result
                return Best(1)
            case _:  # nsga2, nsga3: the elite of two generations may hold all; gp fits its model to every loss
                return "all"

    def ask(self, n: int) -> list[Genome]:
        if n < 1:
            return []
        self._asks += 1
        with _quiet():
            self._study.sampler = self._sampler()
            genomes = [self._remember(self._study.ask(self._distributions)) for _ in range(n)]
            for genome, losses in self._baselines:
                self._add(genome, losses, generation=0)
        self._baselines = []
        return genomes

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        if self._name not in DEAR or not genomes:
            return self.ask(len(genomes))
        self._asks += 1
        with _quiet():
            self._study.sampler = optuna.samplers.RandomSampler(seed=0)
            for genome in genomes:
                self._study.enqueue_trial(self._values(genome))
                self._remember(self._study.ask(self._distributions))
        return list(genomes)

    def tell(self, observations: Sequence[Observation]) -> None:
        with _quiet():
            for observation in observations:
                genome, losses = observation.genome, [float(loss) for loss in observation.losses]
                if not np.all(np.isfinite(losses)):
                    losses = [np.inf] * len(losses)
                waiting = self._asked.get(genome.tobytes())
                if waiting:
                    self._study.tell(waiting.popleft(), losses)
                    if not waiting:
                        del self._asked[genome.tobytes()]
                elif self._genetic and self._asks == 0:
                    self._baselines.append(
                        (genome.copy(), losses)
                    )  # told now, they alone would form the first generation
                else:
                    self._add(genome, losses, generation=self._generation())

    def _remember(self, trial: optuna.Trial) -> Genome:
        values = trial.params  # a deep copy each time
        genome = np.array([float(values[name]) for name in self._distributions]) + 0.0
        self._asked[genome.tobytes()].append(trial)
        return genome

    def _values(self, genome: Genome) -> dict[str, float | int]:
        return {
            name: value if isinstance(distribution, optuna.distributions.FloatDistribution) else int(value)
            for (name, distribution), value in zip(self._distributions.items(), genome.tolist(), strict=True)
        }

    def _add(self, genome: Genome, losses: list[float], generation: int) -> None:
        self._study.add_trial(
            optuna.create_trial(
                params=self._values(genome),
                distributions=self._distributions,
                values=losses,
                system_attrs={GENERATION_KEYS[self._name]: generation} if self._genetic else {},
            )
        )

    def _generation(self) -> int:
        """The generation that nsga2 and nsga3 are collecting, which is the latest one asked for."""
        if not self._genetic:
            return 0
        key = GENERATION_KEYS[self._name]
        return max(int(t.system_attrs.get(key, 0)) for t in self._study.get_trials(deepcopy=False))

    def _sampler(self) -> Any:
        first, second = np.random.SeedSequence((self._seed, self._asks)).generate_state(2).tolist()
        samplers = optuna.samplers
        uniform = samplers.RandomSampler(seed=second)
        match self._name:
            case "tpe":
                # Optuna's default for several objectives treats parameters independently, at a cost that grows with
                # the number of both.
                return samplers.TPESampler(seed=first, multivariate=True, constant_liar=True)
            case "gp":
                return samplers.GPSampler(seed=first)
            case "random":
                return uniform
            case "qmc":
                # The whole sequence must use the same scrambling, so its seed is that of the search.
                return samplers.QMCSampler(scramble=True, seed=self._seed, independent_sampler=uniform)
            case "nsga2":
                sampler = samplers.NSGAIISampler(population_size=self.population, seed=first)
            case "nsga3":
                sampler = samplers.NSGAIIISampler(population_size=self.population, seed=first)
        # The sampler's own uniform numbers repeat, from the same seed, the stream that decides crossover and parents:
        # since it is reseeded for every ask, the first mutated value would depend on the choice of the parents.
        sampler.sample_independent = uniform.sample_independent
        return sampler


def _distribution(parameter: Parameter) -> Any:
    match parameter.kind:
        case "real":
            return optuna.distributions.FloatDistribution(parameter.low, parameter.high)
        case "int":
            return optuna.distributions.IntDistribution(int(parameter.low), int(parameter.high))
        case "choice":
            return optuna.distributions.CategoricalDistribution(range(int(parameter.high) + 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Use one thread, and silence Optuna's log and warnings (experimental classes, inf among the values)."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
