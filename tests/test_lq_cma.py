"""lq-CMA-ES: the contract, the library's own loop, and that it needs fewer candidates than CMA-ES."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.optimizers import Best, CmaSettings, LqCmaSettings, Observation
from evomerge.optimizers.base import Settings, random_state
from evomerge.optimizers.lq_cma import MAX_PARAMETERS
from evomerge.optimizers.scalarisation import Chebyshev
from evomerge.testing.optimizers import SPACE, OptimizerContract, sphere

Vector = NDArray[np.float64]
LQ = LqCmaSettings(name="lq_cma")


class TestLqCma(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return LQ


class TestLqCmaSmallestWithRestarts(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return LqCmaSettings(name="lq_cma", population=3, sigma=1 / 4, x0="default", restarts=2)


class TestLqCmaChebyshev(OptimizerContract):
    objectives = 2

    @pytest.fixture
    def settings(self) -> Settings:
        return LqCmaSettings(name="lq_cma", scalarisation=Chebyshev(name="chebyshev", weights=(1, 2)))


def reals(n: int) -> list[Parameter]:
    return [Parameter(f"p{i}", 0.0, 1.0, 0.5) for i in range(n)]


def ellipsoid(n: int, condition: float, rotated: bool) -> Callable[[Vector], float]:
    """A quadratic whose optimum, 0, lies off the centre of the unit box; axes of lengths 1 to root of ``condition``."""
    optimum = 0.3 + 0.4 * np.random.RandomState(7).random_sample(n)
    basis = np.linalg.qr(np.random.RandomState(1).standard_normal((n, n)))[0] if rotated else np.eye(n)
    widths = condition ** (np.arange(n) / (n - 1))
    return lambda x: float((widths * (basis @ (x - optimum)) ** 2).sum())


def mistakes(loss: Callable[[Vector], float]) -> Callable[[Vector], float]:
    """The same, with a quartic part: no quadratic fits it everywhere, so tau is not always good enough."""
    return lambda x: loss(x) ** 0.5 + 20 * float(((x - 0.4) ** 4).sum())


def rugged(x: Vector) -> float:
    """Nothing that a model could learn."""
    return float(np.sin(1e4 * x).sum())


def search(optimizer: Any, loss: Callable[[Vector], float], most: int, target: float = -np.inf) -> tuple[int, float]:
    """How many candidates until the first below ``target``, or ``most``; and the best loss."""
    count, best = 0, np.inf
    while count < most and best >= target:
        genomes = optimizer.ask(min(optimizer.population, most - count))
        losses = [loss(g) for g in genomes]
        optimizer.tell([Observation(g, [x]) for g, x in zip(genomes, losses, strict=True)])
        first = next((i + 1 for i, x in enumerate(losses) if x < target), len(losses))
        count, best = count + first, min(best, *losses, np.inf)
    return count, best


@pytest.mark.parametrize(
    ("n", "loss"),
    [(5, ellipsoid(5, 100, True)), (5, mistakes(ellipsoid(5, 100, True))), (6, rugged)],
    ids=["quadratic", "quartic", "rugged"],
)
def test_lq_cma_is_the_library(n: int, loss: Callable[[Vector], float]) -> None:
    """Candidate by candidate and bit by bit, against the library's loop with its function called inside."""
    numbers = random_state(0)
    scored: list[bytes] = []

    def function(x: Vector) -> float:
        scored.append(x.tobytes())
        return loss(x)

    options = {"bounds": [0, 1], "randn": lambda *shape: numbers.standard_normal(shape), "seed": np.nan, "verbose": -9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma
        from cma.fitness_models import SurrogatePopulation

        es = cma.CMAEvolutionStrategy([0.5] * n, 1 / 6, options)
        surrogate = SurrogatePopulation(function)
        surrogate.model.set_xoffset(-0.5)
        sizes = []
        for generation in range(1, 16):
            numbers = random_state(11, generation)
            points, before = es.ask(), len(scored)
            es.tell(points, surrogate(points))
            es.inject([es.boundary_handler.inverse(np.clip(surrogate.model.xopt, 0, 1))])
            sizes.append(len(scored) - before)
    assert len(set(sizes)) > 1  # generations of which some points were scored, and different numbers of them
    assert (9 in sizes) == (loss is rugged)  # of 9, all, in parts of 5, 3 and 1

    optimizer = LQ.build(reals(n), 1, 11)
    ours: list[bytes] = []
    while len(ours) < len(scored):
        genomes = optimizer.ask(optimizer.population)
        ours += [g.tobytes() for g in genomes]
        optimizer.tell([Observation(g, [loss(g)]) for g in reversed(genomes)])
    assert ours == scored


@pytest.mark.parametrize(("n", "condition", "rotated", "gain"), [(4, 1.0, False, 8), (6, 100.0, True, 8)])
def test_needs_fewer_candidates_than_cma(n: int, condition: float, rotated: bool, gain: float) -> None:
    """Medians over five seeds to 1e-4: a fraction of cma's, and at most 1.3 times those of ``cma.fmin_lq_surr2``."""
    loss, target, most = ellipsoid(n, condition, rotated), 1e-4, 2000

    def of(settings: Settings) -> float:
        return float(np.median([search(settings.build(reals(n), 1, seed), loss, most, target)[0] for seed in range(5)]))

    def library(seed: int) -> int:
        counted = itertools.count(1)
        hits: list[int] = []

        def function(x: Sequence[float]) -> float:
            number, value = next(counted), loss(np.asarray(x))
            hits.extend([number] if value < target else [])
            return value

        options = {"bounds": [0, 1], "seed": seed + 1, "ftarget": target, "maxfevals": most, "verbose": -9}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cma

            cma.fmin_lq_surr2(function, [0.5] * n, 1 / 6, options)
        return hits[0]

    state = np.random.get_state()
    theirs = float(np.median([library(seed) for seed in range(5)]))
    np.random.set_state(state)
    assert of(LQ) * gain < of(CmaSettings(name="cma"))
    assert of(LQ) <= 1.3 * theirs


def test_asks_for_as_many_as_the_model_needs() -> None:
    """Five points before there is a model; the better it is, the fewer. Half of them are parents."""
    optimizer = LQ.build(reals(6), 1, 3)
    loss = ellipsoid(6, 10, True)
    assert (optimizer.population, optimizer.keeps) == (5, Best(2))
    search(optimizer, loss, 100)  # by then the model ranks all points right, however a processor rounds
    asked = []
    for _ in range(5):
        asked.append((optimizer.population, optimizer.keeps))
        search(optimizer, loss, optimizer.population)
    assert asked == [(1, Best(1))] * 5


def test_baselines_enter_the_model() -> None:
    """As many as a full model needs: the first genomes asked for are then the best of the generation, in order."""
    loss = ellipsoid(4, 10, True)
    optimizer = LQ.build(reals(4), 1, 0)
    marks = random_state(5).random_sample((30, 4))
    optimizer.tell([Observation(mark, [loss(mark)]) for mark in marks])
    assert optimizer.population == 1
    whole = optimizer.ask(8)
    assert [loss(g) for g in whole] == sorted(loss(g) for g in whole)


def test_the_order_of_telling_plays_no_part() -> None:
    def tell(order: int) -> list[bytes]:
        optimizer = LQ.build(reals(5), 1, 4)
        loss = mistakes(ellipsoid(5, 100, True))
        for _ in range(12):
            optimizer.tell([Observation(g, [loss(g)]) for g in optimizer.ask(optimizer.population)[::order]])
        return [g.tobytes() for g in optimizer.ask(3)]

    assert tell(1) == tell(-1)


def test_points_are_rated_anew_when_the_range_of_an_objective_widens() -> None:
    """Whichever of two baselines shows the end of the front first, the model is the same."""
    settings = LqCmaSettings(name="lq_cma", scalarisation=Chebyshev(name="chebyshev", weights=(1, 1)))
    points = random_state(2).random_sample((30, 4))
    results = [
        Observation(p, [float(p[0] ** 2), 100.0 * float(p[1]) ** 4 + (1000.0 if i == 29 else 0.0)])
        for i, p in enumerate(points)
    ]

    def first(order: int) -> list[bytes]:
        optimizer = settings.build(reals(4), 2, 1)
        for result in results[::order]:
            optimizer.tell([result])
        return [g.tobytes() for g in optimizer.ask(8)]

    assert first(1) == first(-1)


@pytest.mark.parametrize("wall", [False, True])
def test_failures_do_not_ruin_the_model(wall: bool) -> None:
    """A third fails at random, or all beyond a wall before the optimum: still better than cma, which has no model."""
    loss, fails = ellipsoid(5, 30, True), random_state(9)
    edge = float(0.25 + 0.4 * np.random.RandomState(7).random_sample())

    def failing(genome: Vector) -> float:
        failed = genome[0] > edge if wall else fails.random_sample() < 1 / 3
        return np.inf if failed else loss(genome)

    def of(settings: Settings) -> float:
        return float(np.median([search(settings.build(reals(5), 1, seed), failing, 120)[1] for seed in range(3)]))

    assert of(LQ) < 0.5 * of(CmaSettings(name="cma"))


def test_finds_whole_numbers_and_choices() -> None:
    """The best of six values and of three, with both reals to a hundredth of their range."""
    for seed in range(2):
        optimizer = LQ.build(SPACE, 1, seed)
        best = search(optimizer, lambda g: sphere(g)[0], 80)[1]
        cells = min((x / 5 - 0.7) ** 2 for x in range(6)) + min((x / 2 - 0.7) ** 2 for x in range(3))
        assert best < cells + 2 * 0.01**2


def test_late_results_are_foreign() -> None:
    """What was asked for beyond need, and told when its generation is over."""
    optimizer = LQ.build(reals(3), 1, 0)
    loss = ellipsoid(3, 3, False)
    search(optimizer, loss, 30)
    genomes = optimizer.ask(5)
    optimizer.tell([Observation(g, [loss(g)]) for g in genomes[:1]])  # one was wanted: the generation is over
    following = optimizer.ask(1)
    optimizer.tell([Observation(g, [loss(g)]) for g in genomes[1:]])
    optimizer.tell([Observation(g, [loss(g)]) for g in following])
    assert search(optimizer, loss, 30, 1e-9)[1] < 1e-9


@pytest.mark.parametrize(
    ("settings", "parameters", "objectives", "place", "words"),
    [
        (LQ, reals(3), 2, "optimizer", r"lq_cma takes one objective"),
        (LqCmaSettings(name="lq_cma", population=2), reals(3), 1, "optimizer.population", "is 2. Give 3 or more"),
        (LQ, reals(MAX_PARAMETERS + 1), 1, "optimizer", "at most 40 parameters.*has 41.*903 coefficients.*Use cma"),
    ],
)
def test_check_refuses(
    settings: LqCmaSettings, parameters: list[Parameter], objectives: int, place: str, words: str
) -> None:
    with pytest.raises(InputError, match=words) as raised:
        settings.check(parameters, objectives, "optimizer")
    assert raised.value.place == place


def test_check_takes_the_most_parameters() -> None:
    LQ.check(reals(MAX_PARAMETERS), 1, "optimizer")
