"""Figures: what they show against plain formulas from the store, and that every state of a search can be drawn."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_figures as made
import numpy as np
import optuna
import pytest
import test_elites
from fastapi import FastAPI
from helpers_search import SOURCES, drive, make_setup
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update
from starlette.testclient import TestClient

from evomerge.genome import Parameter
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.curse import curse_of
from evomerge.report.svg import DARK, LIGHT
from evomerge.search.settings.sections import Racing
from evomerge.service import problems
from evomerge.service.api import figures as api
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.figures import NAMES, FigureOptions, Name, draw, draw_path, draw_recipe, style
from evomerge.service.figures import recipe as figure_recipe
from evomerge.service.figures.progress import growth
from evomerge.service.figures.recipe import share_in
from evomerge.service.figures.style import MARKS, is_empty, without_notes, words_of
from evomerge.service.figures.workers import AttemptSpan, attempts_of, idle_share, stops_of
from evomerge.service.projection import MAX_PARAMETERS, genes_of, projection_of
from evomerge.service.reading import PerState, columns_of, confirmed_values, thinned
from evomerge.service.root import Root
from evomerge.store import CandidateRow, Estimate, EventRow, NewCandidate, Store, acquire, tables
from evomerge.store.events import CopyingState, TeamChosen, event_rows

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Searches of every kind, by name."""
    folder = tmp_path_factory.mktemp("root")
    made.search(folder, "two", made.two_objectives())
    made.search(folder, "failing", make_setup(candidates=30), made.failing)
    made.search(folder, "constrained", made.constrained())
    made.search(folder, "paths", made.paths(), made.path_scores)
    made.create(folder, "empty", make_setup(objectives=2))
    return folder


@pytest.fixture
def two(root: Path) -> Iterator[Store]:
    with Store.open(root / "two" / "search.db") as store:
        yield store


def trace(drawn: Any, name: str) -> Any:
    (found,) = (each for each in drawn.data if each.name == name)
    return found


def own(store: Store) -> list[CandidateRow]:
    """Candidates with scores of their own."""
    return [row for row in store.candidates() if row.objectives and row.same_as is None]


# ---- niches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_cell_of_the_grid_is_the_best_of_its_niche(tmp_path: Path, axes: int) -> None:
    plain = test_elites.setup_of(niches=False, candidates=40)
    features = (*plain.features, replace(plain.features[1], name="again", bins=2))[:axes]
    made.search(tmp_path, "niches", replace(plain, features=features), test_elites.simulate)
    with Store.open(tmp_path / "niches" / "search.db") as store:
        drawn, rows = draw(store, "grid"), [row for row in store.candidates() if row.niche and row.eligible]
    (cells,) = drawn.data
    wanted: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for row in rows:
        x, y, *_ = [*(row.niche or []), 0]
        wanted.setdefault((x, y), []).append((row.objectives["o0"].mean, -row.number))
    assert np.isfinite(np.array(cells.z, dtype=float)).sum() == len(wanted) > 2
    for (x, y), there in wanted.items():
        assert (cells.z[y][x], -int(cells.customdata[y][x])) == max(there)
    assert f"of {3 ** min(axes, 2) * (2 if axes == 3 else 1)} niches" in words_of(drawn)


def test_values_beyond_the_range_of_a_feature_are_counted(tmp_path: Path) -> None:
    plain = test_elites.setup_of(niches=False, candidates=20)
    made.search(tmp_path, "niches", replace(plain, features=plain.features[1:]), test_elites.simulate)
    with Store.open(tmp_path / "niches" / "search.db") as store:
        drawn = draw(store, "grid")
        values = [row.objectives["size"].mean for row in store.candidates() if "size" in row.objectives]
    beyond = sum(not 0.2 <= value <= 0.8 for value in values)  # the range of size
    assert 0 < beyond < len(values)
    assert f"{beyond} of {len(values)} candidates lie beyond the range of size" in words_of(drawn)


def test_without_features_there_is_no_grid(two: Store) -> None:
    assert is_empty(draw(two, "grid"))


# ---- teams -----------------------------------------------------------------------------------------------------------


def with_team(folder: Path) -> list[int]:
    """A search whose team is two of the shortlist and a source; its members."""
    made.search(folder, "team", made.two_objectives(30))
    with Store.open(folder / "team" / "search.db") as store, acquire(store):
        chosen = [*list(confirmed_values(store, columns_of(store)))[:2], 0]
        store.record_event(TeamChosen(candidates=chosen, curve=[(5, 0.4, 0.3), (12, 0.5, 0.3), (30, 0.7, 0.35)]))
    return chosen


def test_a_team_is_a_matrix_of_what_its_members_solve(tmp_path: Path) -> None:
    members = with_team(tmp_path)
    with Store.open(tmp_path / "team" / "search.db") as store:
        drawn = draw(store, "team")
        items = [next(s for s in store.scores(n, "held_out") if s.evaluator == "v0").metrics["acc"] for n in members]
    (cells,) = drawn.data
    assert list(cells.y) == ["at least one", *(f"c{number:04d}" for number in reversed(members))]
    together, *own = np.array(cells.z, dtype=float)
    places = [int(word.rpartition(" ")[2]) for word in cells.text[0]]
    assert sorted(places) == list(range(len(items[0])))
    for row, solved in zip(own[::-1], items, strict=True):
        assert row == pytest.approx(solved[places], abs=0.12)  # shares are kept by tenths
    assert together == pytest.approx(np.max(own, axis=0))
    columns = [tuple(column) for column in np.array(own[::-1]).T.tolist()]
    assert columns == sorted(columns, reverse=True)  # who solves the same things stands together
    assert f"Together {np.max(items, axis=0).mean():.1%}" in words_of(drawn)


def test_of_many_items_evenly_many_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_team(tmp_path)
    monkeypatch.setattr("evomerge.service.figures.team._MAX_ITEMS", 7)
    with Store.open(tmp_path / "team" / "search.db") as store:
        drawn = draw(store, "team")
    assert np.array(drawn.data[0].z).shape == (4, 7)
    assert "7 of " in words_of(drawn)


def test_the_curve_of_teams_is_what_was_written_down(tmp_path: Path) -> None:
    with_team(tmp_path)
    with Store.open(tmp_path / "team" / "search.db") as store:
        drawn = draw(store, "coverage")
    assert list(trace(drawn, "a team of 3").x) == [5, 12, 30]
    assert list(trace(drawn, "a team of 3").y) == [0.4, 0.5, 0.7]
    assert list(trace(drawn, "the best candidate").y) == [0.3, 0.3, 0.35]


# ---- the front -------------------------------------------------------------------------------------------------------


def test_the_front_shows_every_scored_candidate_where_its_scores_are(two: Store) -> None:
    drawn, rows = draw(two, "front"), {row.number: row for row in own(two)}
    seen: list[int] = []
    for each in drawn.data:
        if each.customdata is None or each.name == "held out":
            continue
        for number, x, y in zip(each.customdata, each.x, each.y, strict=True):
            assert (x, y) == (rows[number].objectives["o0"].mean, rows[number].objectives["o1"].mean)
        seen += [int(number) for number in each.customdata if each.name != "front"]
    seen += [n for n in trace(drawn, "front").customdata if rows[n].step > 0]
    assert sorted(seen) == sorted(rows)  # each once, but for baselines on the front
    assert [rows[n].label for n in trace(drawn, "sources").customdata] == ["one", "two"]
    assert [rows[n].label for n in trace(drawn, "uniform average").customdata] == ["uniform average"]


def test_what_is_marked_has_its_standard_errors_as_bars(two: Store) -> None:
    drawn, rows = draw(two, "front"), {row.number: row for row in own(two)}
    for name in ("front", "sources", "uniform average"):
        each = trace(drawn, name)
        for i, number in enumerate(each.customdata):
            assert each.error_x.array[i] == rows[number].objectives["o0"].stderr
            assert each.error_y.array[i] == rows[number].objectives["o1"].stderr
            assert f"o0 {rows[number].objectives['o0'].mean:.3f} ± " in each.hovertext[i]


@pytest.mark.parametrize(("x", "y"), [("o0", "o1"), ("o1", "o0")])
def test_the_line_of_the_front_bounds_all_that_may_win(two: Store, x: str, y: str) -> None:
    drawn = draw(two, "front", FigureOptions(x=x, y=y))
    (line,) = (each for each in drawn.data if each.mode == "lines" and each.line.color == MARKS["front"].colour)
    better = {"o0": 1.0, "o1": -1.0}  # o0 is maximised, o1 minimised
    corners: list[tuple[float, float]] = []
    for (x1, y1), (x2, y2) in itertools.pairwise(zip(line.x, line.y, strict=True)):
        corners += [(x1, y1), (x1, y2) if line.line.shape == "vh" else (x2, y1), (x2, y2)]
    rows = [row.objectives for row in own(two) if row.eligible]
    for cx, cy in corners:  # a corner is a point that the front just reaches: nobody is better in both
        assert not any(
            better[x] * row[x].mean > better[x] * cx and better[y] * row[y].mean > better[y] * cy for row in rows
        )
        assert any(
            better[x] * row[x].mean >= better[x] * cx and better[y] * row[y].mean >= better[y] * cy for row in rows
        )


def test_stars_are_the_held_out_scores_of_the_shortlist(two: Store) -> None:
    stars = trace(draw(two, "front"), "held out")
    (event,) = two.events(kinds=("shortlist",))
    assert sorted(stars.customdata) == sorted(event.payload["candidates"])
    for number, x, error in zip(stars.customdata, stars.x, stars.error_x.array, strict=True):
        values = next(s for s in two.scores(number, "held_out") if s.evaluator == "v0").metrics["acc"]
        assert x == pytest.approx(values.mean())
        assert error == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))


def test_one_objective_is_drawn_over_candidates(root: Path) -> None:
    with Store.open(root / "constrained" / "search.db") as store:
        drawn, rows = draw(store, "front"), {row.number: row for row in own(store)}
        misses = {n for n, row in rows.items() if row.objectives["language"].mean < 0.92 and row.step > 0}
        assert misses  # or the test tests nothing
        assert set(trace(drawn, "miss a constraint").customdata) == misses
        best = trace(drawn, "best in search")
        assert list(best.x) == list(best.customdata)
        eligible = [row.objectives["o0"].mean for row in rows.values() if row.eligible]
        assert list(best.y) == [max(eligible)]


def test_what_left_its_race_is_told_apart(tmp_path: Path) -> None:
    setup = make_setup(candidates=60)
    setup = replace(setup, racing=Racing(rungs=[10, 20]))
    folder = made.create(tmp_path, "raced", setup)
    drive(folder, setup)
    with Store.open(folder / "search.db") as store:
        gone = {row.number for row in own(store) if row.objectives["o0"].n < 40 and row.step > 0}
        drawn = trace(draw(store, "front"), "estimated, left their race")
        assert gone
        assert set(drawn.customdata) == gone
        assert all("estimated from" in words for words in drawn.hovertext)


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["o0", "o1"])
@pytest.mark.parametrize("over", ["candidates", "hours"])
def test_the_history_is_the_best_of_those_before(two: Store, over: Any, objective: str) -> None:
    line = trace(draw(two, "history", FigureOptions(over=over, objective=objective)), "best so far")
    began, pick = two.search().created_at, max if objective == "o0" else min

    def place(row: CandidateRow) -> float:
        assert row.finished_at is not None
        return float(row.number) if over == "candidates" else (row.finished_at - began) / 3600

    rows = sorted((row for row in two.candidates() if row.eligible), key=place)
    best, expected = None, []
    for row in rows:
        mean = row.objectives[objective].mean
        if best is None or pick(best, mean) != best:
            best = mean
            expected.append((place(row), mean, row.number))
    assert list(zip(line.x, line.y, line.customdata, strict=True))[:-1] == expected
    assert (line.x[-1], line.y[-1]) == pytest.approx((place(rows[-1]), best))  # the line goes on to the end


def test_the_best_source_has_its_error_as_a_band(two: Store) -> None:
    drawn = draw(two, "history", FigureOptions(objective="o0"))
    source = max((row for row in two.candidates() if row.origin == "source"), key=lambda r: r.objectives["o0"].mean)
    level = trace(drawn, f"best source: {source.label}")
    mean, error = source.objectives["o0"].mean, source.objectives["o0"].stderr
    assert set(level.y) == {mean}
    (band,) = (each for each in drawn.data if each.fill == "toself")
    assert set(band.y) == {mean - error, mean + error}


def test_sources_are_drawn_also_where_they_miss_a_constraint(root: Path) -> None:
    with Store.open(root / "constrained" / "search.db") as store:
        assert not any(row.eligible for row in store.candidates(step=0))
        assert set(trace(draw(store, "history"), "best source: one").y) == {store.candidate(0).objectives["o0"].mean}


def area(points: list[tuple[float, float]], corner: tuple[float, float]) -> float:
    """The area between points and a corner, both minimised, in thin strips between all coordinates."""
    edges = sorted({x for x, _ in points if x < corner[0]} | {corner[0]})
    total = 0.0
    for low, high in itertools.pairwise(edges):
        heights = [corner[1] - y for x, y in points if x <= low and y < corner[1]]
        total += (high - low) * max(heights, default=0.0)
    return total


def test_the_hypervolume_is_the_area_that_the_front_so_far_covers(two: Store) -> None:
    drawn = draw(two, "hypervolume")
    (line,) = drawn.data
    rows = [row for row in own(two) if row.eligible]
    points = {row.number: (-row.objectives["o0"].mean, row.objectives["o1"].mean) for row in rows}
    marks = [points[row.number] for row in rows if row.step == 0]
    corner = max(x for x, _ in marks), max(y for _, y in marks)
    drawn_at = dict(zip(line.customdata[:-1], line.y[:-1], strict=True))
    now = 0.0
    for number in sorted(points):
        now = drawn_at.get(number, now)
        assert now == pytest.approx(area([p for n, p in points.items() if n <= number], corner))
    assert f"o0 {-corner[0]:.3f}, o1 {corner[1]:.3f}" in words_of(drawn)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_growth_is_the_area_of_every_prefix(points: list[tuple[int, int]]) -> None:
    losses = np.array(points, dtype=np.float64)
    at, volumes = growth(losses, np.ones(len(points), dtype=bool), np.array([5.0, 5.0]))
    assert at[0] == 0
    for end in range(len(points)):
        last = [volume for place, volume in zip(at, volumes, strict=True) if place <= end][-1]
        assert last == pytest.approx(area([(float(x), float(y)) for x, y in points[: end + 1]], (5.0, 5.0)))


# ---- genes -----------------------------------------------------------------------------------------------------------


def plain_study(store: Store, objective: str, direction: str) -> optuna.Study:
    """The study as Optuna itself would have it, every trial checked and stored."""
    names = [p.name for p in store.search().record.parameters]
    study = optuna.create_study(direction=direction)
    for row in own(store):
        if row.genome is not None and row.status == "done":
            study.add_trial(
                optuna.create_trial(
                    params=dict(zip(names, row.genome.tolist(), strict=True)),
                    distributions={name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names},
                    value=row.objectives[objective].mean,
                )
            )
    return study


@pytest.mark.parametrize(("objective", "direction"), [("o0", "maximize"), ("o1", "minimize")])
def test_importances_are_optunas_own(two: Store, objective: str, direction: str) -> None:
    (bars,) = draw(two, "importance", FigureOptions(objective=objective)).data
    study, evaluator = plain_study(two, objective, direction), optuna.importance.PedAnovaImportanceEvaluator()
    expected = optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert dict(zip(bars.y, bars.x, strict=True)) == pytest.approx(expected)


def test_a_slice_is_score_over_gene(two: Store) -> None:
    (points,) = draw(two, "slice", FigureOptions(parameter="w2", objective="o1")).data
    rows = {row.number: row for row in own(two)}
    assert len(points.x) == sum(row.genome is not None and row.status == "done" for row in rows.values())
    for number, x, y in zip(points.customdata, points.x, points.y, strict=True):
        genome = rows[number].genome
        assert genome is not None
        assert (x, y) == (genome[2], rows[number].objectives["o1"].mean)


def test_parallel_coordinates_are_a_line_a_candidate_up_to_a_hundred(tmp_path: Path, two: Store) -> None:
    few = draw(two, "parallel")
    assert len(few.data) - 1 == len(projection_of(two).numbers)
    assert "candidates" not in words_of(few)
    setup = make_setup(candidates=110)
    drive(made.create(tmp_path, "many", setup), setup)
    with Store.open(tmp_path / "many" / "search.db") as store:
        many = draw(store, "parallel")
        all_ = len(projection_of(store).numbers)
    assert len(many.data) - 1 == 100
    assert words_of(many).startswith(f"100 of {all_} candidates: the 50 best")


def test_many_parameters_are_told_by_means_over_layer_groups() -> None:
    parameters = [
        Parameter(f"layers.{i}.weight.{source}", 0.0, 2.0, 1.0, group=f"layers.{i}")
        for i in range(30)
        for source in ("one", "two.b")
    ]
    genomes = np.random.default_rng(0).random((5, 60))
    genes = genes_of(parameters, genomes)
    assert [gene.name for gene in genes] == ["mean weight.one", "mean weight.two.b"]
    for i, gene in enumerate(genes):
        assert gene.values(genomes) == pytest.approx(genomes[:, i::2].mean(axis=1).tolist())
        assert (gene.distribution.low, gene.distribution.high) == (0.0, 2.0)


def test_of_too_many_means_those_that_vary_most_are_taken() -> None:
    parameters = [Parameter(f"g.p{i}", 0.0, 1.0, 0.5, group="g") for i in range(MAX_PARAMETERS + 5)]
    genomes = np.random.default_rng(0).random((50, len(parameters)))
    genomes[:, :5] = 0.5
    assert [gene.name for gene in genes_of(parameters, genomes)] == [p.name for p in parameters[5:]]


def test_choices_and_whole_numbers_are_told_as_what_they_are(root: Path) -> None:
    parameters = [
        Parameter("from", 0, 2, 0, "choice", choices=("a", "b", "c")),
        Parameter("start", 0.0, 7.0, 0.0, "int"),
    ]
    source, start = genes_of(parameters, np.zeros((0, 2)))
    assert source.values(np.array([[2.0, 3.0], [0.0, 7.0]])) == ["c", "a"]
    assert start.values(np.array([[2.0, 3.0], [0.0, 7.0]])) == [3, 7]


def test_a_projected_study_can_only_be_read(two: Store) -> None:
    study = projection_of(two).study(None)
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    assert study.metric_names == ["o0", "o1"]
    for write in (study.ask, lambda: study.set_user_attr("a", 1), lambda: study.add_trial(study.trials[0])):
        with pytest.raises(RuntimeError, match="can only be read"):
            write()


# ---- workers and failures --------------------------------------------------------------------------------------------


def test_the_timeline_has_a_bar_for_each_attempt_that_ended(root: Path) -> None:
    with Store.open(root / "failing" / "search.db") as store:
        drawn, events = draw(store, "timeline"), store.events(kinds=("result", "failure"))
    bars = {each.name: len(each.x) for each in drawn.data}
    expected: dict[str, int] = {}
    for event in events:
        how = "scored" if event.kind == "result" else f"failed: {event.payload['reason'].replace('_', ' ')}"
        expected[how] = expected.get(how, 0) + 1
    assert bars == expected
    assert {"scored", "failed: not finite", "failed: worker died"} == set(bars)
    assert {y for each in drawn.data for y in each.y} == {event.payload["worker"] for event in events}


def event(seq: int, time: float, kind: str, candidate: int | None, attempt: int | None = 1, **payload: Any) -> EventRow:
    given = {"worker": ""} if kind == "dispatch" else {}
    (row,) = event_rows([(seq, time, kind, candidate, attempt, given | payload)])
    return row


def test_attempts_run_from_dispatch_to_record_and_those_of_dead_drivers_are_left_out() -> None:
    events = [
        event(1, 10.0, "dispatch", 1),
        event(2, 11.0, "dispatch", 2),
        event(3, 14.0, "rung", 1, worker="a", items={"v": 1}),
        event(4, 15.0, "dispatch", 2, 2),  # a new driver; attempt 1 never ended
        event(5, 16.0, "dispatch", 1, 2),
        event(6, 18.0, "failure", 2, 2, worker="b", reason="out_of_memory", final=False),
        event(7, 19.0, "result", 9, worker="a"),  # its dispatch is older than these events
    ]
    assert attempts_of(events, None) == [
        AttemptSpan(1, 1, 10.0, 14.0, "a", "scored up to a rung"),
        AttemptSpan(2, 2, 15.0, 18.0, "b", "failed: out of memory"),
    ]
    assert attempts_of(events, 20.0)[-1] == AttemptSpan(1, 2, 16.0, 20.0, "not known yet", "running")


def test_a_descent_is_work_of_its_worker() -> None:
    content = {"step": 1, "steps": 2, "rate": 0.1, "passes": 8, "proxy": [1.0, 0.5], "gradient": [None], "seconds": 3.0}
    assert attempts_of([event(1, 20.0, "descent", None, None, worker="a", **content)], None) == [
        AttemptSpan(None, 1, 17.0, 20.0, "a", "followed the proxy")
    ]


def test_idle_is_what_lies_between_a_workers_attempts() -> None:
    attempts = [
        AttemptSpan(1, 1, 0.0, 4.0, "a", "scored"),
        AttemptSpan(2, 1, 6.0, 10.0, "a", "scored"),
        AttemptSpan(3, 1, 5.0, 10.0, "b", "scored"),
        AttemptSpan(4, 1, 7.0, 12.0, "b", "scored"),  # which waited until 10 for the one before it
        AttemptSpan(5, 1, 9.0, 99.0, "not known yet", "running"),
    ]
    assert idle_share(attempts) == pytest.approx(2.0 / 17.0)
    assert idle_share(attempts[4:]) is None


def test_while_a_search_stands_still_its_workers_are_not_idle() -> None:
    def state(seq: int, time: float, name: str) -> EventRow:
        return event(seq, time, "state", None, None, state=name)

    def lease(seq: int, time: float) -> EventRow:
        return event(seq, time, "lease", None, None, epoch=seq)

    def attempt(seq: int, begun: float, ended: float) -> list[EventRow]:
        return [event(seq, begun, "dispatch", seq), event(seq + 1, ended, "result", seq, worker="a")]

    scored = [*attempt(3, 0.0, 4.0), *attempt(13, 105.0, 109.0)]  # with one second of waiting, after `running`
    whole = [lease(1, -9.0), state(2, -1.0, "running"), *scored]
    halts = {
        "cut off in an attempt": [  # Ctrl-C twice: what ran then is no idleness
            event(5, 4.0, "dispatch", 9), state(6, 60.0, "cancelled"), lease(7, 90.0), state(9, 104.0, "running"),
        ],
        "killed in an attempt": [event(5, 4.0, "dispatch", 9), lease(7, 90.0), state(9, 104.0, "running")],
        "paused": [state(5, 3.0, "paused"), state(9, 104.0, "running")],
        "stopped": [state(5, 3.5, "stopped"), lease(6, 90.0), state(9, 104.0, "running")],
        "confirmed": [
            state(5, 4.0, "finished"), state(6, 4.0, "confirming"), state(7, 60.0, "finished"), lease(8, 90.0),
            state(9, 104.0, "running"),
        ],
        "killed": [lease(6, 90.0), state(9, 104.0, "running")],
        "killed, and again as it came up": [lease(6, 50.0), lease(7, 90.0), state(9, 104.0, "running")],
    }  # fmt: skip
    for name, halt in halts.items():
        events = sorted([*whole, *halt], key=lambda each: each.seq)
        assert idle_share(attempts_of(events, None), stops_of(events)) == pytest.approx(1 / 9), name
    assert stops_of(whole) == []
    assert idle_share(attempts_of(whole, None), stops_of(whole)) == pytest.approx(101 / 109)


def test_failures_are_counted_by_cause(root: Path) -> None:
    with Store.open(root / "failing" / "search.db") as store:
        drawn, events = draw(store, "failures"), store.events(kinds=("failure", "confirm failed"))
    for cause in ("not finite", "worker died"):
        these = [e for e in events if e.kind == "failure" and e.payload["reason"].replace("_", " ") == cause]
        line = trace(drawn, f"{cause} ({len(these)})")
        assert list(line.y) == list(range(1, len(these) + 1))
        assert list(line.customdata) == [each.candidate for each in these]
    final = sum(each.payload["final"] for each in events)
    told = f"{len(events)} attempts failed: {final} for good, {len(events) - final} to be tried again."
    assert words_of(drawn) == told
    assert "&lt;b&gt;NaN&lt;/b&gt;" in " ".join(w for each in drawn.data for w in each.hovertext)


# ---- the chosen ------------------------------------------------------------------------------------------------------


def test_the_curse_has_every_candidate_with_both_scores(two: Store) -> None:
    drawn, found = draw(two, "curse"), curse_of(two)
    assert [curse.objective for curse in found.all] == ["o0", "o1"], "a front has one for each objective"
    for axis, curse in zip(("x", "x2"), found.all, strict=True):
        places = {
            number: (x, y)
            for each in drawn.data if each.customdata is not None and each.xaxis == axis
            for number, x, y in zip(each.customdata, each.x, each.y, strict=True)
        }  # fmt: skip
        assert places == {int(p.id[1:]): (p.search.mean, p.held_out.mean) for p in curse.points}
    assert not [p for p in found.points if p.winner], "a front has none"
    diagonal = next(each for each in drawn.data if each.name == "as good as it looked")
    assert list(diagonal.x) == list(diagonal.y)


def test_constraints_tell_who_keeps_them(root: Path) -> None:
    with Store.open(root / "constrained" / "search.db") as store:
        drawn, rows = draw(store, "constraints"), own(store)
    for name, kept in (("kept", True), ("missed", False)):
        mine = [row for row in rows if (row.objectives["language"].mean >= 0.92) is kept]
        assert sorted(trace(drawn, name).customdata) == [row.number for row in mine]
    assert drawn.layout.shapes[0].y0 == drawn.layout.shapes[0].y1 == 0.92


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_the_heat_map_holds_the_weights_of_the_recipe(two: Store) -> None:
    row = two.candidate(20)
    recipe = read_recipe(row.recipe, SOURCES)
    (cells,) = draw_recipe(two, 20).data
    assert list(cells.x) == ["one", "two"]  # what the base is added to has no weight
    assert "added to base" in words_of(draw_recipe(two, 20))
    assert list(cells.y) == ["embedding", *(f"layer {i}" for i in range(4)), "norm", "head"]
    for i, hop in enumerate(recipe.hops):
        blend = recipe.blends[hop.attention]
        assert list(cells.z[i + 1]) == [blend.value("weight", "one"), blend.value("weight", "two")]
        assert f"weight {blend.value('weight', 'one'):.4g}" in cells.text[i + 1][0]


def test_heat_maps_of_a_search_have_one_scale(tmp_path: Path) -> None:
    found = []
    for name in ("model.weight.one", "model.density.one"):
        folder = made.create(tmp_path, name, make_setup())
        with Store.open(folder / "search.db") as store:
            parameter = {"name": name, "low": 0.0, "high": 1.5, "default": 0.4, "kind": "real", "choices": []}
            told = store.search().fingerprints | {"parameters": [parameter]}
            with store.transaction(writes=True) as connection:
                connection.execute(update(tables.search).values(fingerprints=told))
            recipes = [
                StackRecipe.uniform(
                    Blend(method="linear", sources=("one",), parameters={"weight": {"one": weight}}),
                    sources={"one": "x"}, tokenizer="one", layers=2,
                )
                for weight in (0.3, 0.6)
            ]  # fmt: skip
            news = [NewCandidate(i, "cma", r.canonical(), r.hash, np.zeros(4)) for i, r in enumerate(recipes)]
            with acquire(store):
                store.record_ask(1, news)
            found.append([draw_recipe(store, number).data[0].zmax for number in (0, 1)])
    assert found == [[1.5, 1.5], [1.0, 1.0]]


def test_weights_of_other_methods() -> None:
    slerp = Blend(method="slerp", sources=("one", "two"), parameters={"t": 0.25})
    assert [share_in(slerp, name) for name in ("one", "two")] == [0.75, 0.25]
    plain = Blend(method="karcher", sources=("one", "two", "base"), parameters={})
    assert share_in(plain, "one") == pytest.approx(1 / 3)
    assert math.isnan(share_in(slerp, "base"))


def test_a_path_is_drawn_hop_by_hop(root: Path) -> None:
    with Store.open(root / "paths" / "search.db") as store:
        number = next(row.number for row in store.candidates() if row.step > 0)
        hops = len(json.loads(store.candidate(number).recipe)["hops"])
        svg = ET.fromstring(draw_path(store, number))
        (cells,) = draw_recipe(store, number).data
    assert len([g for g in svg.iter(f"{SVG}g") if g.get("class") == "hop"]) == hops
    assert len(cells.y) == hops + 3


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", ["two", "failing", "constrained", "paths", "empty"])
def test_every_figure_of_every_search_is_json_or_says_why_not(root: Path, search: str, name: Name) -> None:
    with Store.open(root / search / "search.db") as store:
        drawn = draw(store, name)
    content = json.loads(drawn.to_json())
    assert set(content) == {"data", "layout"}
    if is_empty(drawn):
        assert words_of(drawn)
    assert content["layout"]["paper_bgcolor"] == content["layout"]["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert (search, name) in FILLED or is_empty(drawn)


EVERYWHERE = ("front", "history", "importance", "slice", "parallel", "timeline", "curse")
FILLED = {(search, name) for search in ("two", "failing", "constrained", "paths") for name in EVERYWHERE} | {
    ("two", "hypervolume"), ("failing", "failures"), ("constrained", "constraints"),
}  # fmt: skip


def test_notes_can_be_taken_out(two: Store) -> None:
    drawn = draw(two, "hypervolume")
    bare = without_notes(drawn)
    assert words_of(bare) == ""
    assert bare.layout.height < drawn.layout.height
    assert words_of(drawn)


def test_names_are_shown_as_they_are_and_never_read_as_markup(tmp_path: Path) -> None:
    folder = made.create(tmp_path, "named", make_setup())
    evil = '<a href="https://x">&</a>'
    with Store.open(folder / "search.db") as store, acquire(store):
        settings = store.search().settings
        store.update_settings(settings | {"sources": {evil: "x"}})
        blend = Blend(method="linear", sources=(evil,), parameters={"weight": {evil: 1.0}})
        recipe = StackRecipe.uniform(blend, sources={evil: "x"}, tokenizer=evil, layers=2)
        new = NewCandidate(0, "source", recipe.canonical(), recipe.hash, np.zeros(4), evil)
        store.record_ask(0, [new])
        store.record_dispatch(0, 1, evil)
        store.record_result(0, 1, [], {}, {"o0": Estimate(mean=0.5, stderr=0.1, n=40)}, evil)
        for name in NAMES:
            text = draw(store, name).to_json()
            assert "<a" not in json.dumps(json.loads(text), ensure_ascii=False)
        assert "<a" not in draw_recipe(store, 0).to_json().replace("\\u003c", "<")
        assert "&lt;a" in draw(store, "front").to_json().replace("\\u0026", "&")


def test_colours_stand_out_from_light_and_from_dark_ground() -> None:
    def luminance(colour: str) -> float:  # WCAG 2.2, "relative luminance"
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for mark in MARKS.values():
        for ground in (LIGHT["ground"], DARK["ground"]):
            high, low = sorted((luminance(mark.colour), luminance(ground)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3.0
    assert (
        len({mark.symbol for mark in MARKS.values()}) == len(MARKS) - 1
    )  # "best in search" is the front of one objective


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_thinning_takes_evenly_and_keeps_what_is_to_be_kept(n: int, most: int, data: st.DataObject) -> None:
    bits = st.lists(st.booleans(), min_size=n, max_size=n)
    mask, keep = (np.array(data.draw(bits)) for _ in range(2))
    found = thinned(mask, keep, most)
    assert not (found & ~mask).any()
    assert found[mask & keep].all()
    rest, taken = np.flatnonzero(mask & ~keep), np.flatnonzero(found & ~keep)
    assert len(taken) == min(most, len(rest))
    if most > 1 and len(rest):
        assert taken[0] == rest[0]
        assert taken[-1] == rest[-1]


def test_what_is_kept_of_a_store_is_read_again_when_something_happens(tmp_path: Path) -> None:
    folder = made.create(tmp_path, "live", make_setup())
    calls = []

    def compute(store: Store) -> int:
        calls.append(1)
        return len(calls)

    kept = PerState(compute)
    with Store.open(folder / "search.db") as store, acquire(store):
        assert [kept(store), kept(store)] == [1, 1]
        store.record_event(CopyingState(state="ended", why=""))
        assert [kept(store), kept(store)] == [2, 2]
        assert len(columns_of(store).numbers) == 0
    setup = make_setup(candidates=10)
    drive(folder, setup)
    with Store.open(folder / "search.db") as store:
        assert len(columns_of(store).numbers) == 10


def test_a_large_search_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch, two: Store) -> None:
    monkeypatch.setattr("evomerge.service.figures.front.MAX_POINTS", 7)
    monkeypatch.setattr("evomerge.service.figures.progress.MAX_POINTS", 7)
    plain = [row for row in own(two) if row.step > 0 and not row.on_front]
    assert words_of(draw(two, "front")) == f"7 of {len(plain)} candidates are drawn, evenly over the search."
    assert "candidates are drawn" in words_of(draw(two, "history"))


# ---- the API ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    app = FastAPI()
    app.state.settings = ServiceSettings(Root.of(str(root), root), None)
    app.include_router(api.router)
    problems.install(app)
    with TestClient(app) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_api_gives_every_figure(client: TestClient, name: str) -> None:
    answer = client.get(f"/api/v1/searches/two/figures/{name}")
    assert answer.status_code == 200
    api.Figure.model_validate(answer.json())


def test_the_api_gives_recipe_and_path_of_a_candidate(client: TestClient) -> None:
    answer = client.get("/api/v1/searches/paths/candidates/5/figures/recipe")
    assert answer.json()["data"][0]["type"] == "heatmap"
    picture = client.get("/api/v1/searches/paths/candidates/5/figures/path")
    assert picture.headers["content-type"].startswith("image/svg+xml")
    assert ET.fromstring(picture.text).tag == f"{SVG}svg"


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("none/figures/front", 404, None),
        ("two/figures/nothing", 422, "figure"),
        ("two/figures/front?x=o9", 422, "x"),
        ("two/figures/importance?objective=o9", 422, "objective"),
        ("two/figures/slice?parameter=w9", 422, "parameter"),
        ("two/figures/history?over=days", 422, "over"),
        ("two/candidates/4000/figures/recipe", 404, None),
        ("two/candidates/4000/figures/path", 404, None),
    ],
)
def test_what_there_is_not_is_refused_with_its_field(
    client: TestClient, path: str, status: int, field: str | None
) -> None:
    answer = client.get(f"/api/v1/searches/{path}")
    assert answer.status_code == status
    assert [fault["field"] for fault in answer.json()["faults"]] == ([] if field is None else [field])


# ---- axes and rows that show what matters ----------------------------------------------------------------------------


@pytest.mark.parametrize("maximise", [True, False])
@pytest.mark.parametrize(("poor", "is_focused"), [(-5.8, True), (-40.0, True), (-0.2, False)])
def test_one_poor_baseline_does_not_press_all_others_into_a_point(
    poor: float, is_focused: bool, maximise: bool
) -> None:
    values = np.r_[np.linspace(-0.1, -0.05, 30), poor] * (1 if maximise else -1)
    bounds = style.focused(values, np.zeros(31, dtype=np.bool_), maximise=maximise)
    assert (bounds is not None) == is_focused
    if bounds is not None:
        assert style.is_outside(values, bounds).tolist() == [False] * 30 + [True]
        assert bounds[1] - bounds[0] < 0.1
        assert bounds[0] < bounds[1]


def test_what_must_be_seen_is_on_the_axis_however_poor() -> None:
    values = np.r_[np.linspace(0.8, 0.9, 30), -5.0]
    kept = values < 0
    assert style.focused(values, kept, maximise=True) is None
    assert style.focused(np.full(9, 0.5), np.zeros(9, dtype=np.bool_), maximise=True) is None
    assert style.focused(np.empty(0), np.empty(0, dtype=np.bool_), maximise=True) is None


def test_a_recipe_of_one_blend_is_one_row_with_its_numbers() -> None:
    blend = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 0.25, "b": 0.75}})
    other = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 0.5, "b": 0.5}})
    hops = [(i, each, each, each) for i, each in enumerate([blend] * 4 + [other] * 3)]
    common = {"sources": {"a": "a", "b": "b"}, "tokenizer": "a"}
    whole = StackRecipe.compose(**common, embedding=blend, hops=hops[:4], norm=blend, head=blend)  # type: ignore[arg-type]
    assert [name for name, *_ in figure_recipe._runs(list(figure_recipe._parts(whole)))] == ["the whole model"]
    halves = StackRecipe.compose(**common, embedding=other, hops=hops, norm=other, head=other)  # type: ignore[arg-type]
    names = [name for name, *_ in figure_recipe._runs(list(figure_recipe._parts(halves)))]
    assert names == ["embedding", "layers 0 to 3", "layers 4 to 6", "norm", "head"]
