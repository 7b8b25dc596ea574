"""Niches: a grid of elites, features of a search, and races that drop no elite of a niche."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_miniature import MINIATURES, evomerge, search_file
from helpers_search import FakeSpace, Killed, drive, dying, make_setup, recipe_seed, table, weights_of
from helpers_tiers import nightly_but
from hypothesis import given
from hypothesis import strategies as st

from evomerge.front import extend_front
from evomerge.optimizers import CmaSettings, Feature, Grid, Observation
from evomerge.optimizers.cma_es import Cma
from evomerge.optimizers.elites import UNKNOWN, Point
from evomerge.optimizers.map_elites import MapElitesSettings
from evomerge.search.preparing.setup import EvaluatorInfo, FeatureInfo, Setup
from evomerge.search.settings.sections import Racing
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import Store

AXES = (Feature("size", 0.0, 10.0, 5), Feature("speed", -1.0, 1.0, 4))

losses = st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf")]), min_size=2, max_size=2)
values = st.sampled_from([-5.0, 0.0, 1.9, 2.0, 9.99, 10.0, 50.0, float("nan")])
points = st.lists(st.builds(Point, losses, st.tuples(values, values)), max_size=20)

# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bin"), [(0.0, 0), (1.99, 0), (2.0, 1), (9.9, 4), (10.0, 4), (-3.0, 0), (99.0, 4), (float("inf"), 4)]
)
def test_a_value_beyond_the_range_is_in_the_bin_at_that_end(value: float, bin: int) -> None:
    assert AXES[0].bin(value) == bin


@given(points, st.randoms())
def test_a_grid_is_the_front_of_each_niche_in_whatever_order(found: list[Point], random: Any) -> None:
    numbered = list(enumerate(found))
    random.shuffle(numbered)
    grid = Grid(AXES)
    for start in range(0, len(numbered), 3):
        grid = grid.extend(dict(numbered[start : start + 3]))
    for niche in {grid.niche(point.features) for point in found} - {None}:
        there = {n: p.losses for n, p in enumerate(found) if grid.niche(p.features) == niche}
        assert grid.cells.get(niche, {}) == extend_front({}, there)
    assert list(grid.niches) == sorted(grid.niches)


@given(points)
def test_without_features_it_is_the_front(found: list[Point]) -> None:
    plain = {number: Point(point.losses) for number, point in enumerate(found)}
    assert list(Grid().extend(plain).niches) == list(extend_front({}, {n: p.losses for n, p in plain.items()}))


def test_a_candidate_has_a_place_where_no_elite_is_as_good() -> None:
    grid = Grid(AXES).extend({0: Point([1.0], (1.0, 0.9)), 1: Point([3.0], (3.0, 0.9))})
    known = [(1.0, 1.0), (0.9, 0.9)]
    assert grid.takes([0.5], known)
    assert not grid.takes([1.0], known)
    assert grid.takes([2.0], [(1.0, 3.0), (0.9, 0.9)])  # it may be in the second niche
    assert not grid.takes([3.0], [(1.0, 3.0), (0.9, 0.9)])
    assert grid.takes([9.0], [(1.0, 5.0), (0.9, 0.9)])  # one is empty
    assert grid.takes([9.0], [UNKNOWN, UNKNOWN])


# ---- in a search -----------------------------------------------------------------------------------------------------

COUNT = 240
EASE = np.random.default_rng(5).normal(0.0, 2.0, COUNT)
TASK, LENGTH, SIZE = range(3)


def setup_of(*, race: bool = False, mode: Any = "generational", niches: bool = True, candidates: int = 60) -> Setup:
    """One objective; a feature of all items, of which a race sees some, and one of a single item."""
    optimizer: Any = MapElitesSettings(name="map_elites", population=8) if niches else CmaSettings(name="cma")
    plain = make_setup(space=FakeSpace(3), optimizer=optimizer, candidates=candidates)
    return replace(
        plain,
        objectives=(replace(plain.objectives[0], items=COUNT),),
        evaluators=tuple(EvaluatorInfo(n, n, c, c) for n, c in (("task", COUNT), ("length", COUNT), ("size", 1))),
        features=(
            FeatureInfo("length", LENGTH, "acc", True, COUNT, 0.0, 1.0, 3),
            FeatureInfo("size", SIZE, "acc", True, 1, 0.2, 0.8, 3),
        ),
        racing=Racing(rungs=(20, 60)) if race else None,
        mode=mode,
    )


def simulate(job: Job) -> tuple[float, Measured | Failed]:
    weights = np.array(weights_of(job.recipe))
    return 1.0 + recipe_seed(job.recipe, "seconds") % 256 / 64, Measured(
        [{"acc": full(weights, task.evaluator, job)[list(task.indices)]} for task in job.tasks], {"score": 1.0}
    )


def full(weights: np.ndarray[Any, Any], evaluator: int, job: Any) -> np.ndarray[Any, Any]:
    """A candidate's score on every item of an evaluator."""
    recipe = job.recipe if hasattr(job, "recipe") else job
    if evaluator == SIZE:
        return np.array([weights[1]], dtype=np.float32)
    noise = np.random.default_rng(recipe_seed(recipe, evaluator)).logistic(0, 0.3, COUNT)
    ability = 2.0 - 20.0 * float(((weights - 0.6) ** 2).mean()) if evaluator == TASK else 5.0 * (weights[0] - 0.5)
    return (ability + EASE + noise > 0).astype(np.float32)


def rows_of(folder: Path) -> list[tuple[Any, ...]]:
    with Store.open(folder / "search.db") as store:
        return [(row.number, row.niche, row.elite) for row in store.candidates()]


def test_the_store_knows_niches_and_their_elites(tmp_path: Path) -> None:
    drive(tmp_path, setup_of(), simulation=simulate)
    with Store.open(tmp_path / "search.db") as store:
        rows = [row for row in store.candidates() if row.status == "done"]
    grid = Grid(setup_of().axes)
    for row in rows:
        assert row.niche == list(grid.niche([row.objectives[name].mean for name in ("length", "size")]) or ())
        assert (row.objectives["size"].n, row.objectives["length"].n) == (1, COUNT)
    for niche in {tuple(row.niche or ()) for row in rows}:
        there = [row for row in rows if row.niche == list(niche)]
        best = max(there, key=lambda row: (row.objectives["o0"].mean, -row.number))
        assert [row.number for row in there if row.elite] == [best.number]
    assert len({tuple(row.niche or ()) for row in rows}) > 4


def test_features_change_nothing_for_an_optimizer_that_looks_at_none(tmp_path: Path) -> None:
    setup = setup_of(niches=False, candidates=30)
    drive(tmp_path / "with", setup, simulation=simulate)
    drive(tmp_path / "without", replace(setup, features=()), simulation=simulate)
    kept = [[row[i] for i in (0, 4, 5, 6, 9, 10)] for row in table(tmp_path / "with")]
    assert kept == [[row[i] for i in (0, 4, 5, 6, 9, 10)] for row in table(tmp_path / "without")]
    assert any(elite for _, _, elite in rows_of(tmp_path / "with"))
    assert {(niche, elite) for _, niche, elite in rows_of(tmp_path / "without")} == {(None, False)}


@pytest.mark.parametrize("mode", nightly_but(["generational"], ["generational", "asynchronous"]))
@pytest.mark.parametrize("race", [False, True])
def test_killed_and_resumed_it_is_the_same_search(tmp_path: Path, race: bool, mode: str) -> None:
    setup = setup_of(race=race, mode=mode, candidates=26)
    drive(tmp_path / "whole", setup, simulation=simulate, workers=1)
    for commits in (3, 11, 20, 27):
        folder = tmp_path / f"killed {commits}"
        with dying(commits), pytest.raises(Killed):
            drive(folder, setup, simulation=simulate, workers=1)
        drive(folder, setup, simulation=simulate, workers=1)
        assert table(folder) == table(tmp_path / "whole")
        assert rows_of(folder) == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("mode", nightly_but(["generational"], ["generational", "asynchronous"]))
def test_a_race_drops_no_elite_of_a_niche(tmp_path: Path, mode: str) -> None:
    """What it drops is, scored in full, hardly ever better than the elites of its niche; and it does spare items."""
    setup = setup_of(race=True, mode=mode, candidates=160)
    drive(tmp_path, setup, simulation=simulate)
    with Store.open(tmp_path / "search.db") as store:
        rows = store.candidates()
    grid = Grid(setup.axes)
    elites = {tuple(row.niche or ()): row.objectives["o0"].mean for row in rows if row.elite}
    dropped = [row for row in rows if row.status == "eliminated"]
    wrongly = 0
    for row in dropped:
        recipe = setup.space.decode(row.genome)  # type: ignore[arg-type]
        weights = np.array(weights_of(recipe))
        score, length, size = (float(full(weights, e, recipe).mean(dtype=np.float64)) for e in (TASK, LENGTH, SIZE))
        wrongly += score > elites.get(grid.niche([length, size]), -1.0)
    assert len(dropped) > 20
    assert wrongly <= 0.02 * len(rows)


def test_an_optimizer_that_wants_items_is_told_them_again_on_resume(tmp_path: Path) -> None:
    told: list[list[bytes]] = []

    class Watched(Cma):
        wants_items = True

        def tell(self, observations: Sequence[Observation]) -> None:
            for o in observations:
                (items,) = o.items
                if not np.isnan(items).any():
                    assert float(items.mean(dtype=np.float64)) == pytest.approx(o.losses[0])
            told.append([o.items[0].tobytes() for o in observations])
            super().tell(observations)

    setup = replace(setup_of(race=True, niches=False, candidates=30), features=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CmaSettings, "build", lambda self, p, o, s, f: Watched(self, p, o, s))
        drive(tmp_path, setup, simulation=simulate)
        live = list(told)
        told.clear()
        drive(tmp_path, setup, simulation=simulate)
    assert told == live
    assert len(live) > 2


# ---- in a search file ------------------------------------------------------------------------------------------------

TASK_KEYS = {"task": "mini_math_ja", "search": "validation[:10]", "held_out": "test[:4]"}


@pytest.mark.parametrize(
    ("features", "changes", "place"),
    [
        ({"size": {**TASK_KEYS, "metric": "acc", "range": [1, 1]}}, {}, "features.size.range"),
        ({"size": {**TASK_KEYS, "metric": "acc", "range": [1, 0]}}, {}, "features.size.range"),
        ({"size": {**TASK_KEYS, "metric": "acc", "range": [0, float("nan")]}}, {}, "features.size.range"),
        ({"size": {**TASK_KEYS, "metric": "acc", "range": [0]}}, {}, "features.size.range"),
        ({"size": {**TASK_KEYS, "metric": "acc", "range": [0, 1], "bins": 1}}, {}, "features.size.bins"),
        ({"size": {**TASK_KEYS, "metric": "acc"}}, {}, "features.size.range"),
        ({"size": {**TASK_KEYS, "metric": "accc", "range": [0, 1]}}, {}, "features.size.metric"),
        ({"mini_translate_ja": {**TASK_KEYS, "metric": "acc", "range": [0, 1]}}, {}, "features"),
        ({"size": {"evaluator": "cost", "metric": "layers", "range": [0, 9]}}, {}, "features.size"),
        ({"size": {"evaluator": "cost", "metric": "parameters", "range": [0, 9]}}, {}, "features.size"),
        ({"size": {**TASK_KEYS, "metric": "acc", "range": [0, 1], "itemz": 4}}, {}, "features.size.itemz"),
        (
            {"size": {**TASK_KEYS, "metric": "acc", "range": [0, 1]}},
            {"optimizer": {"name": "map_elites"}, "screen": {**TASK_KEYS, "metric": "acc"}},
            "screen",
        ),
    ],
)
def test_what_is_wrong_with_features_is_said_before_anything_is_scored(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    features: dict[str, Any],
    changes: dict[str, Any],
    place: str,
    plugins_installed: None,
) -> None:
    file = search_file(tmp_path, features=features, **changes)
    assert evomerge("validate", file) == 2
    told = "".join(capsys.readouterr())
    assert place in told
    assert "Traceback" not in told


def test_json_says_the_niche(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"evaluator": "change", "model": str(MINIATURES / "base"), "metric": "change"}
    features = {
        "either": {**TASK_KEYS, "metric": "acc", "range": [0, 1], "bins": 5},
        "change": {**base, "range": [0, 0.5]},
    }
    objectives = {"sums": {**TASK_KEYS, "metric": "acc_ja"}}
    file = search_file(tmp_path, features=features, objectives=objectives, budget={"candidates": 6}, confirm={"top": 1})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    capsys.readouterr()
    assert evomerge("top", tmp_path / "search", "--all", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    for row in rows:
        either, change = (row["scores"][name]["mean"] for name in features)
        assert row["niche"] == [min(int(either * 5), 4), min(int(change * 20), 9)]
    assert rows[0]["scores"]["change"]["mean"] == 0.0  # the base itself
    assert rows[1]["scores"]["change"]["mean"] > 0.0
    assert evomerge("top", tmp_path / "search", "--all") == 0
    assert "either" in capsys.readouterr().out


def test_more_niches_than_candidates_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = {"size": {**TASK_KEYS, "metric": "acc", "range": [0, 1], "bins": 50}}
    file = search_file(tmp_path, features=features, budget={"candidates": 20})
    assert evomerge("validate", file) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "50 niches for 20 candidates, so that most are the only one of theirs; use fewer bins" in said
    assert evomerge("validate", file, "--set", "features.size.bins=5") == 0
    assert "niches for" not in "".join(capsys.readouterr())
