"""Searches from coarse to fine: what is tied, when it comes apart, and that nothing else changes by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_search import FakeSpace, drive, drive_dying, make_setup, table

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers import CmaSettings, Observation
from evomerge.optimizers.base import Refinement, Settings, random_state
from evomerge.optimizers.cma_es import Box, Cma
from evomerge.optimizers.coarse_to_fine import Parts
from evomerge.optimizers.scalarisation import Chebyshev
from evomerge.store import Store
from evomerge.store.events import Refined
from evomerge.testing.optimizers import SPACE, OptimizerContract
from search_spaces.places import path_outside, path_to


def layered(layers: int, kinds: Sequence[Parameter] = (Parameter("w", 0.0, 1.0, 0.5),)) -> list[Parameter]:
    """The same parameters in each of so many layers, as an adaptive space has them."""
    return [
        replace(p, name=f"layers.{i}.{p.name}", group=f"layers.{i}", places=path_to(i, layers), what=p.name)
        for i in range(layers)
        for p in kinds
    ]


def finest(parts: Parts) -> list[Refinement]:
    """Let everything come apart."""
    while parts.learn(1, 1, converged=True) is not None:
        pass
    return parts.refined


# --- places


def test_places_are_halves_of_halves() -> None:
    assert path_to(0, 8) == ("model", "layers.0-3", "layers.0-1", "layers.0")
    assert path_to(7, 8) == ("model", "layers.4-7", "layers.6-7", "layers.7")
    assert path_to(2, 5) == ("model", "layers.2-4", "layers.2")
    assert path_to(4, 5) == ("model", "layers.2-4", "layers.3-4", "layers.4")
    assert path_to(4, 5, size=2) == ("model", "layers.2-4", "layers.4")  # groups 0-1, 2-3 and 4
    assert path_to(0, 1) == ("model", "layers.0")
    assert path_to(1, 4, size=4) == ("model", "layers.0-3")
    assert path_outside("norm") == ("model", "outside the layers", "norm")


# --- parts


def test_parts_come_apart_from_the_largest() -> None:
    outside = [Parameter(n, 0.0, 1.0, 0.5, group=n, places=path_outside(n), what="w") for n in ("embedding", "norm")]
    steps = finest(Parts([*outside, *layered(6)]))
    assert [(step.places, step.numbers) for step in steps] == [
        (("model",), 3),  # what is outside, layers 0 to 2 and 3 to 5
        (("outside the layers", "layers.0-2", "layers.3-5"), 6),
        (("layers.1-2", "layers.4-5"), 8),
    ]
    assert all(step.finest == 8 for step in steps)


def test_the_closest_tied_point_has_the_mean_of_every_part() -> None:
    """Against means taken plainly, at every step from coarse to fine; the finest is the point itself."""
    parameters = layered(7, SPACE[:2])
    parts, unit = Parts(parameters), random_state(0).random_sample(14)
    assert parts.count == 2
    going = True
    while going:
        projected = parts.unit(parts.point(unit))
        assert len(set(projected.round(12))) == parts.count
        for value in set(projected.round(12)):  # what is equal is tied
            assert unit[projected.round(12) == value].mean() == pytest.approx(value)
        going = parts.learn(1, 1, converged=True) is not None
    np.testing.assert_allclose(parts.unit(parts.point(unit)), unit, atol=1e-12)


def test_directions_are_orthogonal_and_mean_what_they_meant() -> None:
    parts = Parts(layered(5))
    coarse = np.array([0.3])
    before = parts.unit(coarse)
    finest(parts)
    np.testing.assert_array_equal(parts.unit(parts.padded(coarse)), before)
    np.testing.assert_array_equal(parts.unit(coarse), before)
    directions = np.array(parts._directions)
    products = directions @ directions.T
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-12)
    assert np.abs(directions).max(axis=1) == pytest.approx(np.ones(5))
    np.testing.assert_array_equal(parts.low(parts.count), [0, -1, -1, -1, -1])


def test_parts_wait_for_candidates() -> None:
    """Three for each number, the new ones counted, and two generations."""
    parts = Parts(layered(8))
    # 2 numbers want 6 candidates and 8 of two generations, 4 want 12, 8 want 24.
    came = [told for told in range(4, 48, 4) if parts.learn(4, 4, converged=False) is not None]
    assert came == [step.told for step in parts.refined] == [8, 20, 44]
    assert parts.count == 8
    assert parts.learn(1000, 4, converged=True) is None
    assert Parts(layered(8)).expected(43, 4) == 4
    assert Parts(layered(8)).expected(44, 4) == 8
    steps = Parts(layered(8)).learn(100, 4, converged=False)
    assert steps == pytest.approx([0.5])
    parts = Parts(layered(8))
    parts.learn(100, 4, converged=False)
    assert parts.learn(100, 4, converged=False) == pytest.approx([0.5 * 0.5**0.5] * 2)


# --- the optimizer


class TestCoarseToFine(OptimizerContract):
    space = layered(4, SPACE)
    generations = 8

    @pytest.fixture
    def settings(self) -> Settings:
        return CmaSettings(name="cma", population=4)


class TestCoarseToFineOnTwo(OptimizerContract):
    objectives = 2
    space = layered(3, SPACE)

    @pytest.fixture
    def settings(self) -> Settings:
        return CmaSettings(name="cma", x0="best", scalarisation=Chebyshev(name="chebyshev", weights=(1, 2)))


def bowl(genome: Genome) -> list[float]:
    """Best where the first half of the layers is at 0.2 and the second at 0.7."""
    target = np.where(np.arange(genome.size) < genome.size / 2, 0.2, 0.7)
    return [float(((genome - target) ** 2).mean())]


def generation(optimizer: Cma) -> list[Genome]:
    genomes = optimizer.ask(optimizer.population)
    optimizer.tell([Observation(g, bowl(g)) for g in genomes])
    return genomes


def test_a_search_begins_as_the_one_over_the_whole_model_and_ends_over_layers() -> None:
    optimizer = CmaSettings(name="cma", population=10).build(layered(8), 1, 0)
    whole = CmaSettings(name="cma", population=10, diagonal=True).build([Parameter("w", 0.0, 1.0, 0.5)], 1, 0)
    np.testing.assert_array_equal(generation(optimizer), [np.repeat(g, 8) for g in whole.ask(10)])
    for _ in range(40):
        generation(optimizer)
    assert [r.numbers for r in optimizer.refined] == [2, 4, 8]
    assert optimizer.stopped is None
    np.testing.assert_allclose(optimizer.favourite, [0.2] * 4 + [0.7] * 4, atol=0.05)


def test_what_comes_apart_leaves_mean_and_steps_of_the_whole() -> None:
    def seen(optimizer: Cma) -> tuple[float, float, float]:
        genomes = np.array(optimizer.ask(4000))
        means = genomes.mean(axis=1)
        return float(means.mean()), float(means.std()), float((genomes[:, :4] - genomes[:, 4:]).std())

    optimizer = CmaSettings(name="cma", population=12, sigma=0.1).build(layered(8), 1, 3)
    generation(optimizer)
    before = seen(optimizer)
    generation(optimizer)
    assert optimizer.refined
    ahead, plain = seen(optimizer), CmaSettings(name="cma", population=12, sigma=0.1).build(layered(8)[:1], 1, 3)
    genomes = plain.ask(12)  # the same search over one number, which never comes apart
    plain.tell([Observation(g, bowl(np.repeat(g, 8))) for g in genomes])
    plain.ask(4000)
    genomes = plain.ask(12)
    plain.tell([Observation(g, bowl(np.repeat(g, 8))) for g in genomes])
    alone = np.array(plain.ask(4000))
    assert before[2] == 0.0
    assert ahead[0] == pytest.approx(alone.mean(), abs=0.01)
    assert ahead[1] == pytest.approx(alone.std(), rel=0.05)
    assert ahead[2] == pytest.approx(2 * 0.05, rel=0.05)  # half the first step to either side


def test_what_was_asked_before_parts_came_apart_is_learnt_after() -> None:
    """Without a barrier: a generation that is out while another is told, and moves the mean as it should."""
    for wanted in (0.0, 1.0):
        optimizer = CmaSettings(name="cma", population=8).build(layered(8), 1, 1)
        out, first = optimizer.ask(8), [optimizer.ask(8), optimizer.ask(8)]
        for genomes in first:
            optimizer.tell([Observation(g, [0.0]) for g in genomes])
        assert optimizer.refined
        before = optimizer.favourite.mean()
        optimizer.tell([Observation(g, [abs(wanted - float(g.mean()))]) for g in out])
        assert (optimizer.favourite.mean() > before) == (wanted == 1.0)
        assert optimizer.favourite.std() < 0.05  # they said nothing of how layers differ


def test_a_foreign_genome_pulls_parts_towards_their_means() -> None:
    target = np.array([0.0, 0.2, 0.1, 0.1, 1.0, 0.8, 0.9, 0.9])
    optimizer = CmaSettings(name="cma", population=8).build(layered(8), 1, 1)
    for _ in range(2):
        optimizer.tell([Observation(g, [0.0]) for g in optimizer.ask(8)])
    assert len(optimizer.refined) == 1
    before = optimizer.favourite
    optimizer.tell([Observation(target, [-1.0])])
    optimizer.tell([Observation(g, [0.0]) for g in optimizer.ask(8)])
    moved = optimizer.favourite - before
    assert moved[0] < moved[4]
    assert len(set(moved[:4].round(12))) == len(set(moved[4:].round(12))) == 1


def test_a_converged_search_goes_on_in_finer_parts() -> None:
    optimizer = CmaSettings(name="cma", population=300).build(layered(2), 1, 0)
    for _ in range(60):
        if optimizer.stopped:
            break
        generation(optimizer)
    assert [r.numbers for r in optimizer.refined] == [2]
    assert optimizer.stopped is not None
    assert np.abs(optimizer.favourite - [0.2, 0.7]).max() < 0.01


def in_parts(layers: int, seed: int) -> tuple[Callable[[Genome], float], int]:
    """How right a merge of three sources is, with weights that are good in sums and better layer by layer."""
    random = random_state(5, seed)
    good = np.repeat(0.5 + 0.2 * random.choice([-1, 1], 3), layers).reshape(3, layers)
    good = good + 0.2 * random.choice([-1, 1], (3, 1)) * np.linspace(-1, 1, layers) * random.choice([-1, 1], (3, 1))

    def rate(genome: Genome) -> float:
        apart = genome.reshape(layers, 3).T - good
        lost = (apart.mean(axis=1) ** 2).sum() + apart.mean(axis=1).sum() ** 2 + (apart**2).mean()
        return float(np.clip(0.9 - 2 * lost, 0.02, 0.98))

    return rate, 3 * layers


def searched(layers: int, seed: int, settings: CmaSettings, space: Sequence[Parameter], candidates: int) -> float:
    """The true rate of the mean that a search ends with, where each score is of 100 items."""
    rate, _ = in_parts(layers, seed)
    optimizer, dice = settings.build(space, 1, seed), random_state(6, seed)

    def whole(genome: Genome) -> Genome:
        return np.tile(genome, layers) if genome.size == 3 else genome

    for _ in range(candidates // optimizer.population):
        genomes = optimizer.ask(optimizer.population)
        optimizer.tell([Observation(g, [-dice.binomial(100, rate(whole(g))) / 100]) for g in genomes])
    return rate(whole(optimizer.favourite))


def test_adaptive_is_better_than_the_whole_model_and_than_layers() -> None:
    """48 numbers, 1,000 noisy candidates; means over the same seeds. scripts and figures: docs/scoring.md."""
    kinds = [Parameter(f"w{k}", 0.0, 1.0, 0.5) for k in range(3)]
    auto = CmaSettings(name="cma", population="auto").within(1000)
    of_layers = [replace(p, places=(), what="") for p in layered(16, kinds)]
    rates = {
        name: np.mean([searched(16, seed, auto, space, 1000) for seed in range(3)])
        for name, space in (("whole", kinds), ("layers", of_layers), ("adaptive", layered(16, kinds)))
    }
    assert rates["adaptive"] > max(rates["whole"], rates["layers"]) + 0.005, rates


# --- a search


class LayeredSpace(FakeSpace):
    """Weights of layers, which are tied at first."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__(layers, round_to=2)
        self.parameters = layered(layers)


def refinements(folder: Path) -> list[Refined]:
    with Store.open(folder / "search.db") as store:
        return [event.read(Refined) for event in store.events(kinds=("refined",))]


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_killed_at_every_write_it_is_the_same_search(tmp_path: Path, mode: str) -> None:
    setup = replace(
        make_setup(space=LayeredSpace(), optimizer=CmaSettings(name="cma", population=4), candidates=35),
        mode=mode,  # type: ignore[arg-type]
    )
    drive(tmp_path / "whole", setup, workers=1)
    assert drive_dying(tmp_path / "killed", setup, lives=(1, 5), workers=1) > 12
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert [step.numbers for step in refinements(tmp_path / "whole")] == [2, 4]
    assert refinements(tmp_path / "killed") == refinements(tmp_path / "whole")


def test_what_came_apart_is_told_to_people(tmp_path: Path) -> None:
    drive(tmp_path, make_setup(space=LayeredSpace(), optimizer=CmaSettings(name="cma", population=4), candidates=15))
    (step,) = refinements(tmp_path)
    assert step.text == "model came apart after 8 candidates: 2 of 4 numbers"


# --- settings


def test_the_plan_says_how_many_numbers_are_free() -> None:
    kinds = [Parameter(f"w{k}", 0.0, 1.0, 0.5) for k in range(3)]
    settings = CmaSettings(name="cma").within(1000, tied=True)
    assert settings == CmaSettings(name="cma", population=83, diagonal=True)
    said = settings.learns(layered(34, kinds), 1000)
    assert said == "3 numbers for the whole model at first, of 102, and 48 by the end of the budget"
    assert CmaSettings(name="cma").within(None, tied=True) == CmaSettings(name="cma")
    assert CmaSettings(name="cma").learns(layered(34, kinds), None) == "3 numbers for the whole model at first, of 102"


@pytest.mark.parametrize("key", ["restarts", "diagonal"])
def test_what_does_not_go_with_tied_numbers_is_refused(key: str) -> None:
    settings = CmaSettings.model_validate({"name": "cma", key: 2 if key == "restarts" else False})
    with pytest.raises(InputError, match=rf"optimizer.{key}: does not go with granularity adaptive"):
        settings.check(layered(4), 1, "optimizer")


def test_box_is_unknown_to_parts() -> None:
    """Ints and choices are tied in the unit box: the same share of each range."""
    space = layered(2, SPACE)
    genome = CmaSettings(name="cma", population=4).build(space, 1, 0).ask(1)[0]
    unit = Box(space).unit(genome)
    np.testing.assert_array_equal(unit[:4], unit[4:])
