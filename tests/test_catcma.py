"""CatCMA with Margin: the contract, the library itself, and that it optimises mixed spaces."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers import CatCmaSettings, Observation, OptunaSettings
from evomerge.optimizers.base import Settings
from evomerge.optimizers.catcma import MAX_GAUSSIAN
from evomerge.optimizers.scalarisation import Chebyshev, WeightedSum
from evomerge.testing.optimizers import SPACE, OptimizerContract, inside

CATCMA = CatCmaSettings(name="catcma")


def reals(n: int) -> list[Parameter]:
    return [Parameter(f"r{i}", 0.0, 1.0, 0.5) for i in range(n)]


def ints(n: int, high: int = 9) -> list[Parameter]:
    return [Parameter(f"i{i}", 0, high, high // 2, kind="int") for i in range(n)]


def choices(n: int, default: int = 0, names: tuple[str, ...] = ("off", "on")) -> list[Parameter]:
    return [Parameter(f"c{i}", 0, len(names) - 1, default, kind="choice", choices=names) for i in range(n)]


class TestCatCma(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return CATCMA


class TestCatCmaSmallest(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return CatCmaSettings(name="catcma", population=4, sigma=1 / 3, default_probability=0.5)


class TestCatCmaChebyshev(OptimizerContract):
    objectives = 2

    @pytest.fixture
    def settings(self) -> Settings:
        return CatCmaSettings(name="catcma", scalarisation=Chebyshev(name="chebyshev", weights=(1, 2)))


class TestCatCmaOfChoices(OptimizerContract):
    space = choices(12)

    @pytest.fixture
    def settings(self) -> Settings:
        return CATCMA

    def test_reaches_every_value_of_int_and_choice(self, make: Callable[..., Any]) -> None:
        assert {value for genome in make().ask(300) for value in genome} == {0, 1}


MIX = (1.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "parameters", "objectives", "place", "words"),
    [
        (CATCMA, reals(3), 2, "optimizer", r"catcma takes one objective.*weights: \[1, 1\]\}.*nsga2"),
        (CatCmaSettings(name="catcma", population=3), reals(3), 1, "optimizer.population", "is 3. Give 4 or more"),
        (
            CATCMA,
            [*reals(900), *ints(101), *choices(5)],
            1,
            "optimizer",
            "at most 1,000 reals and ints.*1,001.*Use cma",
        ),
        (
            CatCmaSettings(name="catcma", scalarisation=WeightedSum(name="weighted_sum", weights=MIX)),
            reals(3),
            1,
            "optimizer.scalarisation",
            "Remove it",
        ),
        (
            CatCmaSettings(name="catcma", scalarisation=WeightedSum(name="weighted_sum", weights=MIX)),
            reals(3),
            3,
            "optimizer.scalarisation.weights",
            "2 weights for 3 objectives",
        ),
    ],
)
def test_refuses_what_cannot_work(
    settings: Settings, parameters: list[Parameter], objectives: int, place: str, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        settings.check(parameters, objectives, "optimizer")
    assert caught.value.place == place


def test_takes_any_number_of_choices() -> None:
    CATCMA.check(choices(4 * MAX_GAUSSIAN), 1, "optimizer")


def test_starts_at_the_defaults() -> None:
    """A first step around the default of a real or int; a choice and an int of two values as often as asked for."""
    space = [
        Parameter("scale", -2.0, 8.0, 3.0),
        Parameter("layer", 10, 29, 25, kind="int"),
        *choices(2, default=1),
        *choices(1, default=2, names=("a", "b", "c")),
        Parameter("repeat", 1, 2, 2, kind="int"),
    ]
    first = np.array(CatCmaSettings(name="catcma", sigma=0.05, default_probability=0.8).build(space, 1, 0).ask(4000))
    # Four standard errors: 0.5 / sqrt(4000) and 0.05 * 20 / sqrt(4000) for the means, 0.4 / sqrt(4000) for the shares.
    assert abs(first[:, 0].mean() - 3.0) < 0.032
    assert first[:, 0].std() == pytest.approx(0.5, rel=0.05)
    assert abs(first[:, 1].mean() - 25) < 0.07
    assert first[:, 1].std() == pytest.approx(np.sqrt(1 + 1 / 12), rel=0.05)  # rounding adds 1/12
    for k, default in ((2, 1), (3, 1), (4, 2), (5, 2)):
        assert abs((first[:, k] == default).mean() - 0.8) < 0.026
    assert abs((first[:, 4] == 0).mean() - 0.1) < 0.02


def test_catcma_is_the_library() -> None:
    """Against cmaes told ranks of the same losses: boxes and the order of telling change nothing, ties included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cmaes import CatCMAwM

    space = [*choices(3), *ints(2, high=4), Parameter("r", -1.0, 2.0, 0.5)]
    optimizer = CATCMA.build(space, 1, 11)
    es = CatCMAwM(
        x_space=[[0, 1]],
        z_space=[[0.1, 0.3, 0.5, 0.7, 0.9]] * 2,
        c_space=[2, 2, 2],
        population_size=optimizer.population,
        mean=np.full(3, 0.5),
        sigma=1 / 6,
        cov=np.eye(3),
        cat_param=np.array([[0.9, 0.1]] * 3),
    )

    def loss(genome: Genome) -> float:
        return float(
            (genome[:3] != (1, 0, 1)).sum() + np.abs(genome[3:5] - 1).sum() + np.round((genome[5] - 1) ** 2)
        )  # with ties

    for ask in range(1, 21):
        es.reseed_rng(int(np.random.SeedSequence((11, ask)).generate_state(1)[0]))
        solutions = [es.ask() for _ in range(optimizer.population)]
        expected = [
            np.array([*s.c[:, 1], *np.round(5 * s.z - 0.5), -1 + 3 * s.x[0]], dtype=np.float64) for s in solutions
        ]
        genomes = optimizer.ask(optimizer.population)
        np.testing.assert_allclose(genomes, expected, rtol=0, atol=1e-9)
        optimizer.tell([Observation(g, [loss(g)]) for g in genomes[::-1]])
        ranked = sorted(zip(solutions, expected, strict=True), key=lambda pair: loss(pair[1]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            es.tell([(solution, float(rank)) for rank, (solution, _) in enumerate(ranked)])


MIXED = [*choices(5), *choices(3, names=("a", "b", "c")), *ints(4), *ints(2, high=20), *reals(6)]


def mixed(genome: Genome) -> float:
    """One-max of choices, a sphere of ints and one of reals: 0 at its minimum, which is no default."""
    wrong = float((genome[:8] != 1).sum())
    steps = (genome[8:14] - (1, 8, 9, 0, 3, 17)) / (9, 9, 9, 9, 20, 20)
    return wrong + float((steps**2).sum() + ((genome[14:] - 0.8) ** 2).sum())


def minimise(
    settings: Settings, space: Sequence[Parameter], loss: Callable[[Genome], float], n: int, seed: int
) -> float:
    optimizer = settings.build(space, 1, seed)
    best = np.inf
    while n > 0:
        genomes = optimizer.ask(optimizer.population)
        losses = [loss(g) for g in genomes]
        optimizer.tell([Observation(g, [x]) for g, x in zip(genomes, losses, strict=True)])
        best, n = min(best, *losses), n - len(genomes)
    return float(best)


def test_converges_on_a_mixed_space() -> None:
    chance = OptunaSettings(name="random", population=200)
    for seed in range(3):
        assert minimise(CATCMA, MIXED, mixed, 600, seed) < 0.4 * minimise(chance, MIXED, mixed, 600, seed)


@pytest.mark.parametrize(
    ("space", "target"),
    [
        (choices(1, names=("a", "b", "c", "d")), (3,)),
        (ints(1), (9,)),
        (ints(1), (3,)),
        (reals(1), (0.9,)),
        (choices(10), (0, 1) * 5),
        ([*ints(3), *ints(3, high=2)], (9, 0, 5, 2, 0, 1)),
        (reals(5), (0.0, 1.0, 0.3, 0.4, 0.9)),
    ],
    ids=["choice", "int at its end", "int", "real", "choices", "ints", "reals"],
)
def test_finds_the_best_of_spaces_of_one_kind(space: list[Parameter], target: tuple[float, ...]) -> None:
    def loss(genome: Genome) -> float:
        return float(np.abs(genome - target).sum())

    for seed in range(3):
        assert minimise(CATCMA, space, loss, 300 if len(space) == 1 else 600, seed) < 0.05


def test_400_parameters() -> None:
    space = [*choices(200), *reals(200)]
    optimizer = CATCMA.build(space, 1, 0)
    means = []
    for _ in range(40):
        genomes = optimizer.ask(optimizer.population)
        losses = [float((g[:200] != 0).sum() + ((g[200:] - 0.8) ** 2).sum()) for g in genomes]
        optimizer.tell([Observation(g, [x]) for g, x in zip(genomes, losses, strict=True)])
        means.append(np.mean(losses))
    assert inside(genomes[0], space)
    assert means[-1] < 0.5 * means[0]


def test_ints_and_choices_never_settle() -> None:
    """Ints of different sizes at their ends, choices and reals, long after they were found: all go on mutating."""
    space = [*ints(2), *ints(2, high=2), *choices(2), *reals(2)]
    target = np.array([9, 0, 2, 0, 1, 0, 0.5, 0.5])
    optimizer = CATCMA.build(space, 1, 0)
    for _ in range(150):
        genomes = optimizer.ask(optimizer.population)
        optimizer.tell([Observation(g, [float(np.abs(g - target).sum())]) for g in genomes])
    late = np.array(optimizer.ask(2000))
    rates = (late[:, :6] != target[:6]).mean(axis=0)
    margin = 1 - 0.73 ** (1 / 6)  # of the paper, for each of six ints and choices
    assert (rates > 0.5 * margin).all()
    assert (rates < 4 * margin).all()
    assert (late[:, 6:].std(axis=0) < 1e-3).all()
    assert (late[:, 6:].std(axis=0) > 2e-5).all()  # and the reals can still follow a mutation
    assert optimizer.stopped is None


def test_reals_alone_converge_and_say_so() -> None:
    optimizer = CATCMA.build(reals(3), 1, 0)
    while optimizer.stopped is None:
        optimizer.tell([Observation(g, [float(((g - 0.3) ** 2).sum())]) for g in optimizer.ask(optimizer.population)])
    assert "converged" in optimizer.stopped
    np.testing.assert_allclose(optimizer.ask(3), 0.3, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["reals", "choices", "mixed"])
def test_a_good_baseline_pulls_the_distribution_and_a_bad_one_does_nothing(kind: str) -> None:
    """Also in 200 dimensions, where a baseline is far outside what the Gaussian would give."""
    space = {"reals": reals(200), "choices": choices(60, default=1), "mixed": [*choices(30, default=1), *reals(60)]}[
        kind
    ]

    def second_generation(baseline: Genome | None) -> np.ndarray:
        optimizer = CatCmaSettings(name="catcma", sigma=0.03).build(space, 1, 0)
        if baseline is not None:
            optimizer.tell([Observation(baseline, [float(baseline.sum())])])
        first = optimizer.ask(optimizer.population)
        optimizer.tell([Observation(g, [float(g.sum())]) for g in first])
        return np.array(optimizer.ask(200))

    n = len(space)
    alone, good, bad = second_generation(None), second_generation(np.zeros(n)), second_generation(np.ones(n))
    assert good.mean() < alone.mean() - 0.002
    real = [k for k, p in enumerate(space) if p.kind == "real"]
    if real:
        assert 0.8 < good[:, real].std(axis=0).mean() / alone[:, real].std(axis=0).mean() < 1.25
    np.testing.assert_array_equal(bad, alone)


def test_surplus_genomes_take_part_as_foreign_ones() -> None:
    """The genomes of a generation beyond its population: told with it, the best of them counts, the others do not."""

    def next_generation(surplus: Sequence[float]) -> list[bytes]:
        optimizer = CatCmaSettings(name="catcma", population=6).build(SPACE, 1, 3)
        genomes = optimizer.ask(6 + len(surplus))
        losses = [*(10.0 + k for k in range(6)), *surplus]
        optimizer.tell([Observation(g, [x]) for g, x in zip(genomes, losses, strict=True)])
        return [g.tobytes() for g in optimizer.ask(4)]

    assert next_generation([20.0, 13.0, np.inf]) == next_generation([99.0, 98.0, 97.0])  # none would be a parent
    assert next_generation([1.0, 13.0, 2.0]) == next_generation([1.0, 99.0, 98.0])
    assert next_generation([1.0, 13.0, 2.0]) != next_generation([20.0, 13.0, 2.0])


def test_late_results_are_of_no_later_generation() -> None:
    def next_generation(late: bool) -> list[bytes]:
        optimizer = CatCmaSettings(name="catcma", population=6).build(SPACE, 1, 3)
        first = optimizer.ask(8)
        optimizer.tell([Observation(g, [float(k)]) for k, g in enumerate(first[:6])])
        second = optimizer.ask(6)
        if late:
            optimizer.tell([Observation(g, [99.0]) for g in first[6:]])
        optimizer.tell([Observation(g, [float(k)]) for k, g in enumerate(second)])
        return [g.tobytes() for g in optimizer.ask(4)]

    assert next_generation(late=True) == next_generation(late=False)


def test_a_genome_outside_the_bounds_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="not a point of this search space"):
        CATCMA.build(reals(2), 1, 0).tell([Observation(np.array([0.0, 2.5]), [1.0])])


def test_a_space_of_constants() -> None:
    space = [Parameter("k", 3, 3, 3, kind="int"), *choices(1, names=("only",))]
    optimizer = CATCMA.build(space, 1, 0)
    for _ in range(3):
        genomes = optimizer.ask(optimizer.population)
        assert {tuple(g) for g in genomes} == {(3.0, 0.0)}
        optimizer.tell([Observation(g, [1.0]) for g in genomes])


@pytest.mark.parametrize("space", [choices(1), choices(5), ints(1), MIXED], ids=lambda s: f"{s[0].name}-{len(s)}")
def test_long_searches_go_on(space: list[Parameter]) -> None:
    """On a plateau: the library's numbers become NaN, silently, with a single choice, unless they are held."""
    optimizer = CatCmaSettings(name="catcma", population=4).build(space, 1, 5)
    for _ in range(200):
        optimizer.tell([Observation(g, [0.0]) for g in optimizer.ask(4)])
    late = optimizer.ask(100)
    assert all(inside(genome, space) for genome in late)
    assert len({genome.tobytes() for genome in late}) > 1


@pytest.mark.nightly  # processes; test_optimizers has it of cma
def test_same_bits_on_any_number_of_threads() -> None:
    """A full covariance matrix of 100 parameters: two threads of OpenBLAS do differ from one there."""
    code = """if True:
        import hashlib, numpy as np
        from evomerge.genome import Parameter
        from evomerge.optimizers import CatCmaSettings, Observation
        scales = 10.0 ** np.arange(-50, 50)
        space = [Parameter(str(i), 0.0, 1.0, 0.5) for i in range(100)]
        optimizer = CatCmaSettings(name="catcma").build(space, 1, 1)
        for _ in range(30):
            genomes = optimizer.ask(optimizer.population)
            optimizer.tell([Observation(g, [float((scales * (g - 0.3) ** 2).sum())]) for g in genomes])
        print(hashlib.sha256(np.array(genomes).tobytes()).hexdigest())
    """
    found = set()
    for threads in ("1", "2"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1
