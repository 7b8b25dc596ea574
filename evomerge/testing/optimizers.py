"""The contract of an optimizer, as tests to inherit.

class TestMine(OptimizerContract):
    @pytest.fixture
    def settings(self):
        return MySettings(name="mine", population=6)
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings

from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import OPTIMIZER_MEMBERS, Best, Observation, Optimizer, Settings
from evomerge.optimizers.elites import Feature

SPACE = (
    Parameter("weight", -1.0, 2.0, 0.5),
    Parameter("density", 0.1, 1.0, 0.6),
    Parameter("layers", 2.0, 7.0, 4.0, kind="int"),
    Parameter("method", 0.0, 2.0, 1.0, kind="choice", choices=("linear", "ties", "dare")),
)


def observed(
    genome: Genome, losses: Sequence[float], features: Sequence[Feature], parameters: Sequence[Parameter] = SPACE
) -> Observation:
    """An observation whose features are the genome's first numbers, in units of their ranges.

    Each item has its own threshold, below which it is solved.
    """
    shares = [(value - p.low) / ((p.high - p.low) or 1.0) for value, p in zip(genome, parameters, strict=True)]
    items = [(loss > np.linspace(0.0, 1.0, 9)).astype(np.float32) for loss in losses]
    return Observation(genome, losses, [shares[i % len(shares)] for i in range(len(features))], items)


def sphere(genome: Genome, objectives: int = 1, parameters: Sequence[Parameter] = SPACE) -> list[float]:
    """Squared distances, in units of each range, from a separate point for each objective (0.7, 0.2, 0.7 ...)."""
    low = np.array([p.low for p in parameters])
    width = np.array([p.high - p.low for p in parameters])
    return [float((((genome - low) / width - (0.7, 0.2)[k % 2]) ** 2).sum()) for k in range(objectives)]


def drive(
    optimizer: Optimizer,
    objectives: int,
    generations: int,
    between: Callable[[], object] = lambda: None,
    parameters: Sequence[Parameter] = SPACE,
    features: Sequence[Feature] = (),
) -> list[list[Observation]]:
    """Ask for generations, score them by ``sphere`` and tell them; ``between`` runs before every ask and tell."""
    history = []
    for _ in range(generations):
        between()
        genomes = optimizer.ask(optimizer.population)
        observations = [observed(g, sphere(g, objectives, parameters), features, parameters) for g in genomes]
        between()
        optimizer.tell(observations)
        history.append(observations)
    return history


def bits(history: Sequence[Sequence[Observation]]) -> list[list[str]]:
    """The exact representation of every genome of a history."""
    return [[o.genome.tobytes().hex() for o in generation] for generation in history]


def inside(genome: Genome, parameters: Sequence[Parameter]) -> bool:
    """Whether a genome is a point of the space with these parameters."""
    return (
        isinstance(genome, np.ndarray)
        and genome.dtype == np.float64
        and genome.shape == (len(parameters),)
        and all(p.holds(value) for p, value in zip(parameters, genome, strict=True))
    )


def _equal(some: Sequence[Genome], others: Sequence[Genome]) -> bool:
    return [genome.tobytes() for genome in some] == [genome.tobytes() for genome in others]


def run_elsewhere(
    module: str,
    name: str,
    text: str,
    space: Sequence[Parameter],
    objectives: int,
    generations: int,
    features: Sequence[Feature],
) -> None:
    """In a separate process: build an optimizer from its settings, drive it, and print its bits as JSON."""
    settings: Settings = getattr(importlib.import_module(module), name).model_validate_json(text)
    optimizer = settings.build(space, objectives, 5, features)
    history = drive(optimizer, objectives, generations, parameters=space, features=features)
    print(json.dumps(bits(history)))


class OptimizerContract:
    """The properties that a search relies on. Override ``settings``, and the class's attributes if they do not fit.

    An optimizer that accepts only some spaces, is not random or stops by itself overrides the tests that expect
    otherwise.
    """

    objectives = 1
    generations = 3
    space: Sequence[Parameter] = SPACE
    features: Sequence[Feature] = ()

    @pytest.fixture
    def settings(self) -> Settings:
        raise NotImplementedError("return the settings of the optimizer under test")

    @pytest.fixture
    def make(self, settings: Settings) -> Callable[..., Optimizer]:
        """A function that builds the optimizer: make(seed)."""

        def build(seed: int = 5) -> Optimizer:
            return settings.build(self.space, self.objectives, seed, self.features)

        return build

    @pytest.fixture(autouse=True)
    def silent_and_tidy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> Iterator[None]:
        """Around every test: no file is written, nothing is printed, logged or warned about."""
        monkeypatch.chdir(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
        assert list(tmp_path.iterdir()) == []
        printed = capfd.readouterr()
        assert (printed.out, printed.err) == ("", "")

    def _score(self, genome: Genome) -> list[float]:
        return sphere(genome, self.objectives, self.space)

    def _observed(self, genome: Genome, losses: Sequence[float] | None = None) -> Observation:
        return observed(genome, losses or self._score(genome), self.features, self.space)

    def _failed(self, genome: Genome) -> Observation:
        return Observation(genome, [np.inf] * self.objectives, [np.nan] * len(self.features), feasible=False)

    def _drive(
        self, optimizer: Optimizer, generations: int | None = None, between: Callable[[], object] = lambda: None
    ) -> list[list[Observation]]:
        return drive(optimizer, self.objectives, generations or self.generations, between, self.space, self.features)

    def test_settings_suit_the_space(self, settings: Settings) -> None:
        settings.check(self.space, self.objectives, "optimizer", self.features)

    def test_asks_for_as_many_as_told(self, make: Callable[..., Optimizer]) -> None:
        optimizer = make()
        assert not [name for name in OPTIMIZER_MEMBERS if not hasattr(optimizer, name)], "it lacks these members"
        assert optimizer.population >= 2
        assert optimizer.stopped is None
        for n in (0, 1, optimizer.population + 3, 2):
            genomes = optimizer.ask(n)
            assert len(genomes) == n
            assert all(inside(genome, self.space) for genome in genomes)
            optimizer.tell([self._observed(genome) for genome in genomes])

    def test_learns_from_some_of_a_generation(self, make: Callable[..., Optimizer]) -> None:
        optimizer = make()
        for _ in range(self.generations):
            keeps, population = optimizer.keeps, optimizer.population
            assert not isinstance(keeps, Best) or 1 <= keeps.count <= population
            genomes = optimizer.ask(population)
            assert optimizer.keeps == keeps  # for the pending generation, not the next one
            optimizer.tell([self._observed(g) for g in genomes])

    def test_generations_may_come_back_with_no_ask_in_between(self, make: Callable[..., Optimizer]) -> None:
        """With many workers and no barrier, several generations may be pending, and be told before the next ask."""
        optimizer = make(0)
        out = [genome for _ in range(3 * optimizer.population) for genome in optimizer.ask(1)]
        for genome in out:
            optimizer.tell([self._observed(genome)])
        assert all(inside(genome, self.space) for genome in optimizer.ask(optimizer.population))

    def test_to_look_at_the_favourite_changes_nothing(self, make: Callable[..., Optimizer]) -> None:
        looked, plain = make(), make()
        for _ in range(self.generations):
            favourite = looked.favourite
            assert favourite is None or inside(favourite, self.space)
            genomes = looked.ask(looked.population)
            assert _equal(genomes, plain.ask(plain.population))
            for optimizer in (looked, plain):
                optimizer.tell([self._observed(g) for g in genomes])
            if favourite is not None and looked.favourite is not None:
                assert favourite.tobytes() != looked.favourite.tobytes() or len(genomes) < looked.population

    def test_stays_inside_the_bounds(self, settings: Settings) -> None:
        @hypothesis_settings(max_examples=15, deadline=None, derandomize=True)
        @given(strategies.lists(_parameters(), min_size=1, max_size=5), strategies.integers(0, 2**40))
        def stays(parameters: list[Parameter], seed: int) -> None:
            optimizer = settings.build(parameters, self.objectives, seed, self.features)
            for _ in range(2):
                genomes = optimizer.ask(optimizer.population)
                assert all(inside(genome, parameters) for genome in genomes)
                optimizer.tell(
                    [observed(g, [float(g[0])] * self.objectives, self.features, parameters) for g in genomes]
                )

        stays()

    def test_reaches_every_value_of_int_and_choice(self, make: Callable[..., Optimizer]) -> None:
        genomes = make().ask(300)
        assert {g[2] for g in genomes} == {2, 3, 4, 5, 6, 7}
        assert {g[3] for g in genomes} == {0, 1, 2}

    def test_the_seed_decides(self, make: Callable[..., Optimizer]) -> None:
        first, again, other = (bits(self._drive(make(seed))) for seed in (5, 5, 6))
        assert first == again
        assert first[0] != other[0]

    def test_same_in_another_process(self, settings: Settings, make: Callable[..., Optimizer]) -> None:
        kind = type(settings)
        code = (
            f"from {__name__} import Feature, Parameter, run_elsewhere; run_elsewhere({kind.__module__!r}, "
            f"{kind.__qualname__!r}, {settings.model_dump_json()!r}, {tuple(self.space)}, {self.objectives}, "
            f"{self.generations}, {tuple(self.features)})"
        )
        # A different number of threads and hash seed, as on different machines of one search.
        surroundings = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=os.environ | surroundings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == bits(self._drive(make()))

    def test_blind_to_global_generators_and_neighbours(self, make: Callable[..., Optimizer]) -> None:
        neighbour = make(99)

        def noise() -> None:
            np.random.seed(0)
            random.seed(0)
            self._drive(neighbour, 1)

        undisturbed = bits(self._drive(make()))
        assert bits(self._drive(make(), between=noise)) == undisturbed

    def test_leaves_global_generators_alone(self, make: Callable[..., Optimizer]) -> None:
        np.random.seed(3)
        random.seed(3)
        before = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        self._drive(make())
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # type: ignore[index]

    def test_replay_by_asking_continues_bit_for_bit(self, make: Callable[..., Optimizer]) -> None:
        """Asks of different sizes, a baseline, a failure, tells out of order and in parts; compared at every step."""
        rebuilt = make()
        for kind, genomes, results in self._record(make()):
            if kind == "tell":
                rebuilt.tell(results)
            else:
                assert _equal(rebuilt.ask(len(genomes)), genomes)

    def test_replay_of_a_record_continues_bit_for_bit(self, make: Callable[..., Optimizer]) -> None:
        """The same record, interrupted before each of its last two asks."""
        steps = self._record(make())
        for stop in [i for i, (kind, _, _) in enumerate(steps) if kind == "ask"][-2:]:
            rebuilt = make()
            for kind, genomes, results in steps[:stop]:
                if kind == "tell":
                    rebuilt.tell(results)
                else:
                    assert _equal(rebuilt.replay(genomes), genomes)
            assert _equal(rebuilt.ask(len(steps[stop][1])), steps[stop][1])

    def _record(self, optimizer: Optimizer) -> list[tuple[str, list[Genome], list[Observation]]]:
        steps: list[tuple[str, list[Genome], list[Observation]]] = []

        def tell(genomes: Sequence[Genome], failed: int = -1) -> None:
            results = [self._observed(g) for g in genomes]
            if failed >= 0:
                results[failed] = self._failed(genomes[failed])
            optimizer.tell(results)
            steps.append(("tell", [], results))

        def ask(n: int) -> list[Genome]:
            genomes = optimizer.ask(n)
            steps.append(("ask", [g.copy() for g in genomes], []))
            return genomes

        tell([np.array([p.default for p in self.space])])
        first = ask(optimizer.population)
        tell(first[::-1], failed=1)
        second = ask(optimizer.population + 1)
        tell(second[:2])
        third = ask(2)
        tell([*third, *second[2:]])
        tell([np.array([p.high for p in self.space])])
        tell(ask(optimizer.population))
        ask(2)
        return steps

    def test_survives_generations_that_all_failed(self, make: Callable[..., Optimizer]) -> None:
        self._survives(make(), lambda genome: [np.inf] * self.objectives)

    def test_survives_generations_that_are_all_equal(self, make: Callable[..., Optimizer]) -> None:
        self._survives(make(), lambda genome: [0.25] * self.objectives)

    def _survives(self, optimizer: Optimizer, losses: Callable[[Genome], list[float]]) -> None:
        for _ in range(self.generations):
            optimizer.tell([self._observed(genome, losses(genome)) for genome in optimizer.ask(optimizer.population)])
        assert optimizer.stopped is None
        assert all(inside(genome, self.space) for genome in optimizer.ask(optimizer.population))
        self._drive(optimizer, 1)
        assert optimizer.stopped is None

    def test_survives_single_failures(self, make: Callable[..., Optimizer]) -> None:
        optimizer = make()
        for generation in range(self.generations):
            results = [self._observed(g) for g in optimizer.ask(optimizer.population)]
            failed = generation % len(results)
            results[failed] = self._failed(results[failed].genome)
            optimizer.tell(results)
        assert all(inside(genome, self.space) for genome in optimizer.ask(optimizer.population))

    def test_takes_genomes_that_it_never_asked_for(self, make: Callable[..., Optimizer]) -> None:
        optimizer = make()
        corners = [np.array([p.low for p in self.space]), np.array([p.high for p in self.space])]
        optimizer.tell([self._observed(g) for g in corners])
        optimizer.tell([self._failed(corners[0])])
        for _ in range(self.generations):
            genomes = optimizer.ask(optimizer.population)
            optimizer.tell([self._observed(g) for g in [*reversed(genomes), *corners]])
        assert all(inside(genome, self.space) for genome in optimizer.ask(3))


@strategies.composite
def _parameters(draw: strategies.DrawFn) -> Parameter:
    kind = draw(strategies.sampled_from(["real", "int", "choice"]))
    if kind == "choice":
        names = ("a", "b", "c", "d")[: draw(strategies.integers(1, 4))]
        return Parameter("p", 0.0, len(names) - 1.0, 0.0, kind="choice", choices=names)
    if kind == "int":
        low, width = draw(strategies.integers(-5, 5)), draw(strategies.integers(0, 40))
        return Parameter("p", float(low), float(low + width), float(low), kind="int")
    low_real, width_real = draw(strategies.floats(-1e3, 1e3)), draw(strategies.floats(1e-3, 1e3))
    return Parameter("p", low_real, low_real + width_real, low_real)
