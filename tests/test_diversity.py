"""Optimizers that keep many different candidates: their contracts, their formulas, and ribs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_miniature import evomerge, json_of, search_file
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers import Feature, Grid, Observation
from evomerge.optimizers.base import Settings
from evomerge.optimizers.cycle_qd import CycleQdSettings
from evomerge.optimizers.dns import Dns, DnsSettings, dominated_novelty, skill_distances
from evomerge.optimizers.m2n2 import M2n2Settings, attraction, shared_credit, survivors
from evomerge.optimizers.map_elites import MapElitesSettings
from evomerge.optimizers.solved import halves, solved
from evomerge.testing.optimizers import SPACE, OptimizerContract, observed, sphere

FEATURES = (Feature("one", 0.0, 1.0, 4), Feature("other", 0.2, 0.8, 5))
MAP_ELITES = MapElitesSettings(name="map_elites", population=6)


class TestMapElites(OptimizerContract):
    features = FEATURES

    @pytest.fixture
    def settings(self) -> Settings:
        return MAP_ELITES


class TestMapElitesOnTwo(TestMapElites):
    objectives = 2


def test_map_elites_has_better_elites_than_chance() -> None:
    """In the niches that both have found; what is lost hangs on the six parameters that are no features."""
    space = [Parameter(f"p{i}", 0.0, 1.0, 0.5) for i in range(8)]

    def grid(varied: bool) -> Grid:
        settings, found = MAP_ELITES.model_copy(update={"population": 16}), Grid(FEATURES)
        optimizer = settings.build(space, 1, 3, FEATURES)
        for step in range(30):
            genomes = optimizer.ask(16) if varied else settings.build(space, 1, 100 + step, FEATURES).ask(16)
            observations = [observed(g, sphere(g[2:], 1, space[2:]), FEATURES, space) for g in genomes]
            optimizer.tell(observations)
            found = found.extend({16 * step + i: o for i, o in enumerate(observations)})
        return found

    ours, random = grid(True), grid(False)
    both = ours.cells.keys() & random.cells
    best = [np.mean([min(loss for (loss,) in grid.cells[niche].values()) for niche in both]) for grid in (ours, random)]
    assert len(both) > 10
    assert best[0] < 0.6 * best[1]


def test_map_elites_wants_features() -> None:
    with pytest.raises(InputError, match="the search has no features") as refused:
        MAP_ELITES.check(SPACE, 1, "optimizer")
    assert refused.value.place == "optimizer"


class TestDns(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return DnsSettings(name="dns", population=6, capacity=8)


class TestDnsOnTwo(TestDns):
    objectives = 2


class TestDnsByFeatures(TestDns):
    features = FEATURES


class TestM2n2(OptimizerContract):
    @pytest.fixture
    def settings(self) -> Settings:
        return M2n2Settings(name="m2n2", population=6, capacity=5)


class TestM2n2OnTwo(TestM2n2):
    objectives = 2


class TestCycleQd(OptimizerContract):
    objectives = 2
    generations = 4

    @pytest.fixture
    def settings(self) -> Settings:
        return CycleQdSettings(name="cycle_qd", population=6)


def test_cycle_qd_wants_several_tasks() -> None:
    with pytest.raises(InputError, match="takes tasks in turn"):
        CycleQdSettings(name="cycle_qd").check(SPACE, 1, "optimizer")


@pytest.mark.parametrize("kind", [DnsSettings, M2n2Settings, CycleQdSettings, MapElitesSettings])
def test_a_population_of_one_is_refused(kind: type[Settings]) -> None:
    name = kind.model_fields["name"].annotation.__args__[0]  # type: ignore[union-attr]
    with pytest.raises(InputError) as refused:
        kind(name=name, population=1).check(SPACE, 2, "optimizer", FEATURES)  # type: ignore[call-arg]
    assert refused.value.place == "optimizer.population"


# ---- items -----------------------------------------------------------------------------------------------------------


def test_items_are_solved_between_the_worst_and_the_best_of_all() -> None:
    rows = [0, -1, 5, 1], [-1, -1, 3, 0], [0, -1, 4, 0]
    table = solved([np.array(row, np.float32) for row in rows])
    assert table.tolist() == [[0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0.5, 1]]


def test_items_that_a_race_left_out_of_some_are_solved_by_none() -> None:
    """Or whoever was scored on more would look as if it solved more."""
    whole, part = [0, 0, 1, 0, 0], [1, 0, 0, np.nan, np.nan]
    assert solved([np.array(row, np.float32) for row in (whole, part)]).tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    apart = [0, np.nan, 1], [np.nan, 0, 0], [1, 1, np.nan]  # no item is known of all
    assert solved([np.array(row, np.float32) for row in apart]).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_the_two_halves_share_no_item() -> None:
    items = np.arange(7)
    judged, described = (items[half].tolist() for half in halves(7, cross_fit=True))
    assert sorted(judged + described) == items.tolist()
    assert set(judged).isdisjoint(described)
    assert [items[half].tolist() for half in halves(7, cross_fit=False)] == [items.tolist()] * 2


@pytest.mark.parametrize(("cross_fit", "gone"), [(True, 2), (False, 1)])
def test_m2n2_judges_by_half_of_the_items_or_by_all(cross_fit: bool, gone: int) -> None:
    rows = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 1]], np.float32)  # solved
    optimizer: Any = M2n2Settings(name="m2n2", capacity=2, cross_fit=cross_fit).build(SPACE, 1, 0)
    told = [Observation(np.array([p.low for p in SPACE]), [float(-row.mean())], (), [-row]) for row in rows]
    optimizer.tell(told)
    assert optimizer._members == [o for number, o in enumerate(told) if number != gone]


@pytest.mark.parametrize(("cross_fit", "fittest"), [(True, 0), (False, 1)])
def test_dns_judges_by_half_of_the_items_or_by_all(cross_fit: bool, fittest: int) -> None:
    rows = np.array([[1, 0, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1]], np.float32)  # solved
    optimizer: Any = DnsSettings(name="dns", cross_fit=cross_fit).build(SPACE, 1, 0)
    told = [Observation(np.array([p.low for p in SPACE]), [float(-row.mean())], (), [-row]) for row in rows]
    assert np.flatnonzero(np.isinf(optimizer._novelty(told))).tolist() == [fittest]


def test_an_estimate_is_no_elite() -> None:
    """Map-Elites keeps candidates that were scored on every item; what a race estimates may be luck."""
    optimizer: Any = MAP_ELITES.build(SPACE, 1, 0, FEATURES)
    whole, part = (np.array([p.low for p in SPACE]), np.array([p.high for p in SPACE]))
    optimizer.tell([Observation(whole, [0.5], (0.5, 0.5)), Observation(part, [0.1], (0.5, 0.5), complete=False)])
    assert [unit.tolist() for unit in optimizer._units.values()] == [optimizer._box.unit(whole).tolist()]


def test_dominated_novelty_by_hand() -> None:
    """The plain sum of the paper's algorithm 1: for each member the mean of its least distances to all fitter ones."""
    random = np.random.RandomState(3)
    places, losses = random.random_sample((9, 2)), random.random_sample(9)
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    novelty = dominated_novelty(losses, distances, 3)
    for i in range(9):
        fitter = sorted(distances[i, j] for j in range(9) if losses[j] < losses[i])
        assert novelty[i] == (pytest.approx(np.mean(fitter[:3])) if fitter else np.inf)


def test_of_two_alike_one_is_novel() -> None:
    novelty = dominated_novelty(np.array([1.0, 1.0, 2.0]), np.zeros((3, 3)), 3)
    assert novelty.tolist() == [np.inf, 0.0, 0.0]


def test_skill_distances_by_hand() -> None:
    table = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0.0]])
    distances = skill_distances(table)  # the first item is solved by all, and the last by none
    assert distances == pytest.approx(np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0, 0, 0]]))


def test_the_credit_of_an_item_is_shared() -> None:
    table = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 1.0]])
    assert shared_credit(table) == pytest.approx([1.0, 0.5, 1.5])
    assert attraction(table, 1) == pytest.approx([0.5, 0.0, 1.5])


def test_whoever_solves_what_nobody_else_does_survives() -> None:
    table = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1.0]])
    assert survivors(table, 2) == [0, 3]


def skilled(genome: Genome, centres: NDArray[np.float64], reach: float) -> NDArray[np.float32]:
    """The loss of each item: 0 where the genome is within reach of its centre."""
    return (np.linalg.norm(centres - genome, axis=1) > reach).astype(np.float32)


@pytest.mark.parametrize("settings", [DnsSettings(name="dns", capacity=16), M2n2Settings(name="m2n2", capacity=16)])
def test_four_of_a_population_solve_more_together_than_four_of_chance(settings: Settings) -> None:
    """Each item is solved near a point of its own; no genome can be near them all."""
    space = [Parameter(f"p{i}", 0.0, 1.0, 0.5) for i in range(6)]
    centres = np.random.RandomState(1).random_sample((120, 6))

    def covered(learns: bool, seed: int) -> float:
        optimizer, known = settings.build(space, 1, seed), []
        for step in range(30):
            source = optimizer if learns else settings.build(space, 1, 1000 * seed + step)
            genomes = source.ask(16)
            items = [skilled(genome, centres, 0.55) for genome in genomes]
            known += items
            optimizer.tell([Observation(g, [float(i.mean())], (), [i]) for g, i in zip(genomes, items, strict=True)])
        left = np.ones(len(centres))
        for _ in range(4):
            left = min((left * item for item in known), key=np.sum)
        return float(1.0 - left.mean())

    assert np.mean([covered(True, seed) for seed in range(4)]) > np.mean([covered(False, seed) for seed in range(4)])


# ---- features that tell nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [MAP_ELITES, DnsSettings(name="dns", population=6, capacity=4)])
@pytest.mark.parametrize(
    "features",
    [(0.5, 0.5), (np.nan, 0.5), (np.nan, np.nan), (-np.inf, np.inf), (-7.0, 99.0)],
    ids=["constant", "one unknown", "unknown", "infinite", "beyond"],
)
def test_features_that_tell_nothing_are_survived(settings: Settings, features: tuple[float, float]) -> None:
    optimizer = settings.build(SPACE, 1, 5, FEATURES)
    for _ in range(4):
        genomes = optimizer.ask(optimizer.population)
        assert all(p.holds(value) for genome in genomes for p, value in zip(SPACE, genome, strict=True))
        optimizer.tell([Observation(genome, [float(genome[0])], features) for genome in genomes])


# ---- ribs ------------------------------------------------------------------------------------------------------------


UNIT = (Feature("one", 0.0, 1.0, 10), Feature("other", 0.0, 1.0, 10))
RIBS_SPACE = [Parameter(f"p{i}", 0.0, 1.0, 0.5) for i in range(6)]


def quality(genomes: NDArray[np.float64]) -> NDArray[np.float64]:
    """A standard function: the negative sphere around 0.7 of the parameters that are no features."""
    return np.asarray(-((genomes[:, 2:] - 0.7) ** 2).sum(axis=1))


def grid_scores(found: Grid) -> tuple[float, float]:
    """Coverage, and the sum of 1 + quality over the niches."""
    best = [min(loss for (loss,) in cell.values()) for cell in found.cells.values()]
    return len(best) / 100, sum(1 - loss for loss in best)


def ours(settings: Settings, seed: int, generations: int = 30) -> tuple[float, float]:
    optimizer, found = settings.build(RIBS_SPACE, 1, seed, UNIT), Grid(UNIT)
    for step in range(generations):
        genomes = optimizer.ask(16)
        scores = quality(np.array(genomes))
        observations = [Observation(g, [-float(q)], g[:2].tolist()) for g, q in zip(genomes, scores, strict=True)]
        optimizer.tell(observations)
        found = found.extend({16 * step + i: o for i, o in enumerate(observations)})
    return grid_scores(found)


def of_ribs(kind: str, seed: int, generations: int = 30) -> tuple[float, float]:
    """The same operators, seeds and budget in ribs; its emitter starts from random genomes, too."""
    archives = pytest.importorskip("ribs.archives")
    emitters = pytest.importorskip("ribs.emitters")
    if kind == "map_elites":
        archive = archives.GridArchive(solution_dim=6, dims=[10, 10], ranges=[(0, 1), (0, 1)])
    else:
        archive = archives.DNSArchive(solution_dim=6, measure_dim=2, capacity=32, k_neighbors=3)
    first = np.random.RandomState(seed).random_sample((16, 6))
    emitter = emitters.IsoLineEmitter(
        archive, iso_sigma=0.05, line_sigma=0.2, initial_solutions=first, lower_bounds=[0.0] * 6,
        upper_bounds=[1.0] * 6, batch_size=16, seed=seed,
    )  # fmt: skip
    found = Grid(UNIT)
    for step in range(generations):
        genomes = np.asarray(emitter.ask())
        scores = quality(genomes)
        added = archive.add(genomes, scores, genomes[:, :2])
        emitter.tell(genomes, scores, genomes[:, :2], added)
        points = {
            16 * step + i: Observation(g, [-float(q)], g[:2].tolist())
            for i, (g, q) in enumerate(zip(genomes, scores, strict=True))
        }
        found = found.extend(points)
    return grid_scores(found)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(MapElitesSettings(name="map_elites"), marks=pytest.mark.nightly), DnsSettings(name="dns")],
    ids=lambda settings: settings.name,
)
def test_as_good_as_ribs_on_a_standard_function(settings: Settings) -> None:
    """Coverage and the sum of qualities of all that was scored, over five seeds: no worse than ribs but for noise."""
    mine = np.array([ours(settings, seed) for seed in range(5)])
    theirs = np.array([of_ribs(settings.name, seed) for seed in range(5)])
    error = np.sqrt((mine.var(axis=0, ddof=1) + theirs.var(axis=0, ddof=1)) / 5)
    assert np.all(mine.mean(axis=0) > theirs.mean(axis=0) - 3 * error), (mine.mean(axis=0), theirs.mean(axis=0), error)


def test_dns_keeps_the_members_that_ribs_keeps() -> None:
    """One archive, fed the same candidates: the same survivors, where no two are equally fit."""
    archives = pytest.importorskip("ribs.archives")
    archive = archives.DNSArchive(solution_dim=6, measure_dim=2, capacity=8, k_neighbors=3)
    optimizer = DnsSettings(name="dns", capacity=8).build(RIBS_SPACE, 1, 0, UNIT)
    assert isinstance(optimizer, Dns)
    random = np.random.RandomState(5)
    for _ in range(6):
        genomes = random.random_sample((16, 6))
        archive.add(genomes, quality(genomes), genomes[:, :2])
        optimizer.tell(
            [Observation(g, [-float(q)], g[:2].tolist()) for g, q in zip(genomes, quality(genomes), strict=True)]
        )
        kept = {tuple(np.round(o.genome, 6)) for o in optimizer._members}
        assert kept == {tuple(np.round(solution, 6)) for solution in archive.data("solution")}


def tasks_of(genomes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Losses of two tasks that are at odds: squared distances from a point each: float64 [genomes, 2]."""
    return np.stack([((genomes - centre) ** 2).sum(axis=1) for centre in (0.7, 0.3)], axis=1)


def test_cycle_qd_keeps_the_elites_that_ribs_keeps() -> None:
    """An archive of ribs for each task, with the bins of the other: the same candidates in the same niches."""
    archives = pytest.importorskip("ribs.archives")
    optimizer: Any = CycleQdSettings(name="cycle_qd", bins=6).build(RIBS_SPACE, 2, 0)
    random = np.random.RandomState(7)
    first = random.random_sample((20, 6))
    optimizer.tell([Observation(g, pair) for g, pair in zip(first, tasks_of(first).tolist(), strict=True)])
    optimizer.ask(1)  # lays out the bins by what is known
    axes = optimizer._axes
    theirs = [archives.GridArchive(solution_dim=6, dims=[6], ranges=[(a.low, a.high)]) for a in reversed(axes)]
    for genomes in (first, random.random_sample((60, 6)), random.random_sample((60, 6))):
        losses = tasks_of(genomes)
        if genomes is not first:
            optimizer.tell([Observation(g, pair) for g, pair in zip(genomes, losses.tolist(), strict=True)])
        for task, archive in enumerate(theirs):
            archive.add(genomes, -losses[:, task], losses[:, [1 - task]])
            kept = {tuple(np.round(o.genome, 6)) for o in optimizer._archives[task].values()}
            assert kept == {tuple(np.round(solution, 6)) for solution in archive.data("solution")}


def cycled(told: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Of all candidates of a search: the niches of both tasks that are filled, and the sum of 6 - loss over these."""
    losses = tasks_of(np.concatenate(told))
    filled, sum_ = 0, 0.0
    for task in range(2):
        axis = Feature("other task", 0.0, 3.0, 20)
        points = {
            i: Observation(g, [pair[task]], [pair[1 - task]])
            for i, (g, pair) in enumerate(zip(losses, losses, strict=True))
        }
        best = [min(loss for (loss,) in cell.values()) for cell in Grid((axis,)).extend(points).cells.values()]
        filled, sum_ = filled + len(best), sum_ + sum(6.0 - loss for loss in best)
    return filled / 40, sum_


def mated(random: np.random.RandomState, elites: NDArray[np.float64]) -> NDArray[np.float64]:
    """CycleQD's children of elites, in plain words: parents by the product of scaled scores, their weighted mean."""
    losses = tasks_of(elites)
    spans = np.ptp(losses, axis=0)
    good = np.prod(0.5 + 0.3 * (losses.max(axis=0) - losses) / np.where(spans > 0, spans, 1), axis=1)
    children = []
    for _ in range(16):
        one, other = elites[random.choice(len(elites), size=2, p=good / good.sum())]
        weights = np.abs(random.normal(1.0, 0.3, 2))
        children.append((weights[0] * one + weights[1] * other) / weights.sum() + random.normal(0.0, 0.03, 6))
    return np.clip(children, 0.0, 1.0)


@pytest.mark.nightly
def test_cycle_qd_covers_as_much_as_archives_of_ribs_in_turn() -> None:
    """Two archives of ribs that take turns, with the same operators, at the same budget: no worse but for noise."""
    archives = pytest.importorskip("ribs.archives")

    def mine(seed: int) -> tuple[float, float]:
        optimizer, told = CycleQdSettings(name="cycle_qd").build(RIBS_SPACE, 2, seed), []
        for _ in range(30):
            told.append(np.array(optimizer.ask(16)))
            optimizer.tell([Observation(g, p) for g, p in zip(told[-1], tasks_of(told[-1]).tolist(), strict=True)])
        return cycled(told)

    def of_ribs_in_turn(seed: int) -> tuple[float, float]:
        random = np.random.RandomState(1000 + seed)
        told = [random.random_sample((16, 6))]
        low, high = tasks_of(told[0]).min(axis=0) * 0.85, tasks_of(told[0]).max(axis=0) * 1.15
        both = [
            archives.GridArchive(solution_dim=6, dims=[15], ranges=[(low[1 - task], high[1 - task])]) for task in (0, 1)
        ]
        for step in range(30):
            losses = tasks_of(told[-1])
            for task, archive in enumerate(both):
                archive.add(told[-1], -losses[:, task], losses[:, [1 - task]])
            if step < 29:
                told.append(mated(random, np.asarray(both[(step + 1) % 2].data("solution"))))
        return cycled(told)

    ours_, theirs = (np.array([of(seed) for seed in range(5)]) for of in (mine, of_ribs_in_turn))
    error = np.sqrt((ours_.var(axis=0, ddof=1) + theirs.var(axis=0, ddof=1)) / 5)
    assert np.all(ours_.mean(axis=0) > theirs.mean(axis=0) - 3 * error), (
        ours_.mean(axis=0),
        theirs.mean(axis=0),
        error,
    )


@pytest.mark.nightly  # test_plugins searches and resumes an archive
def test_map_elites_is_searched_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"task": "mini_math_ja", "search": "validation[:10]", "held_out": "test[:4]"}
    changes = {
        "objectives": {"sums": task | {"metric": "acc_ja"}},
        "features": {"either": task | {"metric": "acc", "range": [0, 1], "bins": 5}},
        "optimizer": {"name": "map_elites", "population": 4},
        "confirm": {"top": 1},
    }
    file = search_file(tmp_path, **changes, budget={"candidates": 9})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert evomerge("resume", tmp_path / "search", "--set", "budget.candidates=13") == 0
    rows = json_of(capsys, "top", tmp_path / "search", "--all", "--json")
    assert {row["origin"] for row in rows[5:]} == {"map_elites"}
    elites = {tuple(row["niche"]): row for row in rows if row["elite"]}
    assert len(elites) == sum(row["elite"] for row in rows)
    for row in rows:
        assert elites[tuple(row["niche"])]["scores"]["sums"]["mean"] >= row["scores"]["sums"]["mean"]
    assert evomerge("show", tmp_path / "search", rows[0]["id"]) == 0
    assert " of 5" in capsys.readouterr().out
