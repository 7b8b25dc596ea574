"""What people see of racing, the screen and constraints: on simulated searches, and on one of the miniatures."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers_miniature import MINIATURES, ROOT, evomerge, json_of, search_file
from helpers_search import SOURCES, FakeSpace, drive, make_setup, recipe_seed, weights_of

from evomerge.errors import InputError
from evomerge.optimizers import CmaSettings
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.report.candidate import score_lines, status_text
from evomerge.report.comparing import compared
from evomerge.report.curse import curse_of
from evomerge.report.entries import entry
from evomerge.report.naming import chosen
from evomerge.report.screen import cells, panel
from evomerge.report.search_status import SearchStatus
from evomerge.report.status import status_of
from evomerge.search.driving.confirm import Confirmation
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool, Simulation
from evomerge.search.preparing.setup import ConstraintInfo, EvaluatorInfo, ScreenInfo, Setup
from evomerge.search.settings.folder import FILE_NAME, open_store
from evomerge.search.settings.resuming import resumed_file
from evomerge.search.settings.sections import Racing
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import CandidateRow, Store, acquire

COUNT = 120
EASE = np.random.default_rng(5).normal(0.0, 2.0, COUNT)  # what items have in common for every candidate
TASK, SCREEN, LIMIT = range(3)


def make(least: float = 0.45, estimate: str = "item_response") -> Setup:
    plain = make_setup(space=FakeSpace(2), optimizer=CmaSettings(name="cma", population=8), candidates=60)
    return replace(
        plain,
        objectives=(replace(plain.objectives[0], items=COUNT),),
        evaluators=tuple(EvaluatorInfo(name, name, COUNT, COUNT) for name in ("task", "screen", "limit")),
        racing=Racing.model_validate({"rungs": [20, 60], "estimate": estimate}),
        screen=ScreenInfo("screen", SCREEN, "acc", True, 30, 0, least_tau=0.3, drop=0.5),
        constraints=(ConstraintInfo("limit", LIMIT, "acc", True, 80, least),),
    )


def simulate(job: Job) -> tuple[float, Measured | Failed]:
    """The objective and the screen rise as weights near 0.9; what the constraint measures falls as weights rise."""
    weights, found = np.array(weights_of(job.recipe)), []
    for task in job.tasks:
        ability = 2.0 - 20.0 * float(((weights - 0.9) ** 2).mean())
        noise = np.random.default_rng(recipe_seed(job.recipe, task.evaluator)).logistic(0, 0.3, COUNT)
        values = (ability + EASE + noise > 0).astype(np.float32)
        if task.evaluator == LIMIT:
            values = (np.arange(COUNT)[::-1] % 40 / 40 > weights.mean()).astype(np.float32)
        found.append({"acc": values[list(task.indices)]})
    return 1.0, Measured(found, {"generate": 0.01})


def searched(folder: Path, setup: Setup, simulation: Simulation = simulate) -> Path:
    """A search that is confirmed, with all that a report reads."""
    folder.mkdir(parents=True, exist_ok=True)

    def told(measure: Any) -> dict[str, Any]:
        return asdict(measure) | {"version": setup.evaluators[measure.evaluator].version}

    fingerprints = {
        "sources": {name: {} for name in SOURCES},
        "evaluators": [asdict(evaluator) for evaluator in setup.evaluators],
        "objectives": [told(o) for o in setup.objectives],
        "constraints": [told(c) for c in setup.constraints],
        "screen": None if setup.screen is None else told(setup.screen),
        "parameters": [asdict(p) for p in setup.space.parameters],
    }
    settings = {
        "sources": {"one": "x", "two": "y"}, "space": {"kind": "made_up"}, "objectives": {}, "seed": setup.seed,
        "optimizer": {"name": "cma"}, "budget": {"candidates": 60, "hours": None},
        "confirm": setup.confirm.model_dump(), "racing": None if setup.racing is None else setup.racing.model_dump(),
    }  # fmt: skip
    Store.create(
        folder / "search.db", name="made-up", settings=settings, fingerprints=fingerprints, environment={}
    ).close()  # fmt: skip
    drive(folder, setup, simulation=simulation)
    confirm(folder, setup, simulation)
    return folder


def confirm(folder: Path, setup: Setup, simulation: Simulation) -> None:
    def recipe_of(row: CandidateRow) -> StackRecipe:
        return read_recipe(row.recipe, SOURCES)

    with Store.open(folder / "search.db") as store, acquire(store):
        word = Control(store.take_commands, interval_s=0.0)
        pool = SimulatedPool(1, simulation, SimulatedClock())
        assert Confirmation(Drive(setup, store, pool, word, logs=folder / "logs")).run(recipe_of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return searched(tmp_path_factory.mktemp("searched"), make())


def read(folder: Path) -> tuple[SearchStatus, list[CandidateRow]]:
    with open_store(folder) as store:
        return status_of(store), store.candidates()


# ---- status ----------------------------------------------------------------------------------------------------------


def test_every_candidate_is_counted_once_and_every_measured_item(folder: Path) -> None:
    status, rows = read(folder)
    by = Counter(row.status for row in rows)
    counts = status.candidates.model_dump()
    assert {name: counts[name] for name in ("done", "eliminated", "failed", "cached")} == {
        name: by[name] for name in ("done", "eliminated", "failed", "cached")
    }
    assert sum(counts.values()) == 2 * counts["asked"] == 2 * len(rows)
    assert by["eliminated"] > 5
    with open_store(folder) as store:
        scored = [s for row in rows if row.same_as is None for s in store.scores(row.number, "search")]
    assert status.items == sum(len(s.items) for s in scored if s.evaluator != "screen")
    assert status.items < 0.7 * 60 * (COUNT + 80)


def test_measures_on_one_evaluator_are_counted_once(tmp_path: Path) -> None:
    setup = replace(make(least=0.2), screen=None)
    shared = replace(setup.constraints[0], evaluator=TASK)
    status, rows = read(searched(tmp_path, replace(setup, constraints=(shared,))))
    with open_store(tmp_path) as store:
        scored = [s for row in rows if row.same_as is None for s in store.scores(row.number, "search")]
    assert status.items == sum(len(s.items) for s in scored if s.evaluator == "task")


def test_constraints_are_told_of_each_entry(folder: Path) -> None:
    status, rows = read(folder)
    assert status.constraints["limit"].text == "≥ 0.45"
    entries = [*status.baselines, *status.front_entries, *status.confirmed, *status.confirmed_baselines]
    assert {shown.feasible for shown in entries} == {True, False}
    for shown in entries:
        assert shown.feasible == (shown.constraints["limit"].mean >= 0.45)
        assert set(shown.objectives) == {"o0"}
        assert cells(shown, status)[1].endswith(" missed") != shown.feasible
    assert status.best is not None
    assert status.best.feasible
    assert any(row.objectives["limit"].mean < 0.45 for row in rows if row.step > 0 and "limit" in row.objectives)


def test_what_the_driver_last_said_of_the_screen_and_item_response_is_shown(folder: Path) -> None:
    status, rows = read(folder)
    with open_store(folder) as store:
        (screen,) = store.events(kinds=("screen",), newest=1)
        fits = store.events(kinds=("item response",))
    assert status.screen is not None
    assert (status.screen.pairs, status.screen.on) == (screen.payload["pairs"], screen.payload["on"])
    assert status.screen.left_out == sum(row.status == "eliminated" and "o0" not in row.objectives for row in rows) > 0
    assert {name: found.model_dump() for name, found in status.item_response.items()} == fits[-1].payload
    assert set(status.item_response) == {"o0", "limit"}
    assert all(a.payload != b.payload for a, b in itertools.pairwise(fits))


def test_a_candidate_says_why_it_was_not_scored_on_every_item(folder: Path) -> None:
    status, rows = read(folder)
    with open_store(folder) as store:
        record = store.search().record
    told = {}
    for row in rows:
        first = next(score_lines(row, record, status), "")
        told.setdefault(status_text(row, status), []).append((row, first))
    for row, line in told["eliminated by screen"]:
        assert line.startswith("eliminated by the screen: among the poorest of its generation in acc (")
        assert cells(entry(row, record), status) == ["", ""]
    for row, line in told["eliminated by race"]:
        n = row.objectives["o0"].n
        assert n in (20, 60)
        assert line.startswith(f"eliminated by its race after {n} of 120 items of o0, {n} of 80 items of limit:")
        assert cells(entry(row, record), status)[0] == (
            f"~{row.objectives['o0'].mean:.3f} ± {row.objectives['o0'].stderr:.3f} ({n})"
        )
    whole = [line for row, line in told["done"] if row.objectives["o0"].n == COUNT]
    assert whole
    assert not any("race" in line for line in whole)


def test_two_candidates_are_compared_on_the_items_that_both_have(folder: Path) -> None:
    status, rows = read(folder)
    few = next(row.number for row in rows if "o0" in row.objectives and row.objectives["o0"].n == 20)
    more = next(row.number for row in rows if "o0" in row.objectives and row.objectives["o0"].n == 60)
    assert status.best is not None
    best = chosen_number(status.best.id)
    with open_store(folder) as store:
        for a, b, n in ((few, best, 20), (more, few, 20), (best, best, COUNT)):
            first = compared(store, a, b)[0]
            assert (first.objective, first.split, first.n, first.wanted) == ("o0", "search", n, COUNT)
            sides = []
            for number in (a, b):
                (scores,) = (s for s in store.scores(number, "search") if s.evaluator == "task")
                sides.append(dict(zip(scores.items.tolist(), scores.metrics["acc"].tolist(), strict=True)))
            both = sides[0].keys() & sides[1].keys()
            assert len(both) == n
            assert first.difference == pytest.approx(np.mean([sides[0][i] - sides[1][i] for i in both]))
        out = next(row.number for row in rows if row.status == "eliminated" and "o0" not in row.objectives)
        assert compared(store, out, best) == []


def chosen_number(name: str) -> int:
    return int(name.removeprefix("c"))


def test_the_curse_is_drawn_of_candidates_scored_on_every_item(folder: Path) -> None:
    with open_store(folder) as store:
        points = curse_of(store).points
    assert points
    assert all(point.search.n == point.held_out.n == COUNT for point in points)


# ---- confirmation ----------------------------------------------------------------------------------------------------


def held_out_limit(store: Store, number: int) -> float:
    (scores,) = (s for s in store.scores(number, "held_out") if s.evaluator == "limit")
    return float(scores.metrics["acc"].mean(dtype=np.float64))


def test_the_winner_keeps_the_constraints_on_held_out_items_too(tmp_path: Path) -> None:
    """The best by the objective is made to miss the constraint there, which it kept on the search split."""
    setup = make()
    searched(tmp_path, setup)
    status, _ = read(tmp_path)
    assert status.winner is not None
    before = chosen_number(status.winner)
    with open_store(tmp_path) as store:
        best = store.candidate(before).recipe_hash

    def best_misses(job: Job) -> tuple[float, Measured | Failed]:
        seconds, found = simulate(job)
        assert isinstance(found, Measured)
        if job.recipe.hash == best:
            for task, scores in zip(job.tasks, found.scores, strict=True):
                if task.split == "held_out" and task.evaluator == LIMIT:
                    scores["acc"][:] = 0.0
        return seconds, found

    status, _ = read(searched(tmp_path / "again", setup, best_misses))
    with open_store(tmp_path / "again") as store:
        (event,) = store.events(kinds=("winner",))
        assert event.payload["feasible"]
        assert event.payload["candidate"] != before
        assert held_out_limit(store, event.payload["candidate"]) >= 0.45
        assert {s.evaluator for s in store.scores(before, "held_out")} == {"task", "limit"}  # not the screen
    assert not next(found for found in status.confirmed if found.id == f"c{before:04d}").feasible


def test_where_no_model_keeps_them_the_winner_misses_least_and_it_is_said(tmp_path: Path) -> None:
    def none_keeps(job: Job) -> tuple[float, Measured | Failed]:
        seconds, found = simulate(job)
        assert isinstance(found, Measured)
        for task, scores in zip(job.tasks, found.scores, strict=True):
            if task.split == "held_out" and task.evaluator == LIMIT:
                scores["acc"][:] *= (np.arange(COUNT) < 40)[list(task.indices)]
        return seconds, found

    status, rows = read(searched(tmp_path, make(), none_keeps))
    with open_store(tmp_path) as store:
        (event,) = store.events(kinds=("winner",))
        limits = {row.number: held_out_limit(store, row.number) for row in rows if store.scores(row.number, "held_out")}
    assert event.payload["feasible"] is False
    assert limits[event.payload["candidate"]] == max(limits.values())
    assert status.choice is not None
    assert not status.choice.feasible


def test_a_search_without_a_feasible_candidate_confirms_baselines_and_names_no_best(tmp_path: Path) -> None:
    searched(tmp_path, make(least=1.5))
    status, _ = read(tmp_path)
    assert status.best is None
    assert status.front == []
    assert status.confirmed == []
    assert status.choice is not None
    assert not status.choice.feasible
    panel(status)
    with open_store(tmp_path) as store:
        assert chosen(store, "best") == chosen_number(status.winner or "")
        with pytest.raises(InputError, match="no front"):
            chosen(store, "knee")


# ---- the command line ------------------------------------------------------------------------------------------------

ITEMS = ROOT / "evaluators" / "tasks" / "data"


def features(folder: Path, **changes: Any) -> Path:
    """A search of the miniatures with racing, a screen and a constraint, in seconds."""
    folder.mkdir(exist_ok=True)
    data = {
        key: str(ITEMS / f"mini_math_ja.{split}.jsonl")
        for key, split in (("file", "search"), ("held_out_file", "held_out"))
    }
    content: dict[str, Any] = {
        "objectives": {
            "maths": {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:60]", "held_out": "test[:20]"}
        },
        "racing": {"rungs": [10, 30]},
        "screen": {"evaluator": "likelihood", "metric": "log_likelihood", "items": 20, "least_tau": 0.2, **data},
        "constraints": {
            "english": {
                "task": "mini_math_en", "metric": "acc", "search": "validation[:20]", "held_out": "test[:20]",
                "at_least": 0.4,
            }
        },
        "optimizer": {"name": "cma", "population": 8},
        "budget": {"candidates": 21},
    }  # fmt: skip
    return search_file(folder, **content | changes)


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("featured")
    file = features(folder, budget={"candidates": 13})
    assert evomerge("search", file, "--dir", folder / "search") == 0
    return folder / "search"


@pytest.mark.nightly  # a search of models with a race, a screen and a constraint; what is simulated above has all three
def test_the_way_of_a_person_through_a_search(featured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = json_of(capsys, "status", featured, "--json")
    counts = status["candidates"]
    assert counts["asked"] == counts["done"] + counts["eliminated"] + counts["cached"] == 13
    assert counts["eliminated"] > 0
    assert status["items"] < 13 * 80
    assert status["constraints"] == {"english": {"threshold": 0.4, "at_least": True}}
    rows = json_of(capsys, "top", featured, "--all", "--json")
    eliminated = [row for row in rows if row["status"] == "eliminated"]
    assert not any(row["eligible"] for row in eliminated)
    raced = next(row["id"] for row in rows if row["scores"].get("maths", {"n": 60})["n"] < 60)
    assert all(row["eligible"] for row in json_of(capsys, "top", featured, "--json"))
    for command, rest, words in (
        ("status", [], ("english ≥ 0.4", "missed", "eliminated", "racing: rungs 10, 30", "screen: log_likelihood")),
        ("top", ["--all"], ("english ≥ 0.4", "eliminated by", "~")),
        ("show", [eliminated[0]["id"]], ("eliminated by",)),
        ("compare", ["best", raced], ("of 60 items, and only these are compared",)),
        ("curse", [], ("held out",)),
    ):
        assert evomerge(command, featured, *rest) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for word in words:
            assert word in shown


@pytest.mark.nightly  # a search of models with a race, a screen and a constraint; what is simulated above has all three
def test_an_eliminated_candidate_can_be_exported(
    featured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json_of(capsys, "top", featured, "--all", "--json")
    name = next(row["id"] for row in rows if row["status"] == "eliminated")
    assert evomerge("export", featured, tmp_path / "out", "--candidate", name) == 0
    assert "score exactly as recorded" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "were eliminated as too poor before that" in card
    assert "Candidates had to keep english ≥ 0.4." in card


@pytest.mark.nightly  # a search of models with a race, a screen and a constraint; what is simulated above has all three
def test_the_card_of_the_winner_tells_its_constraints_on_held_out_items(featured: Path, tmp_path: Path) -> None:
    assert evomerge("export", featured, tmp_path / "out") == 0
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    status, _ = read(featured)
    value = status.confirmed_entry(status.winner or "").constraints["english"]  # type: ignore[union-attr]
    kept = "kept" if value.mean >= 0.4 else "**missed**"
    assert f"english ≥ 0.4 is {kept} with {value.mean:.3f} ± {value.stderr:.3f}" in card
    assert f"That took {status.items:,} scores of items in all." in card
    assert "Candidates were raced: scored on 10, 30 items first" in card


@pytest.mark.nightly  # a search of models with a race, a screen and a constraint; what is simulated above has all three
def test_score_shows_constraints(featured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = json_of(capsys, "status", featured, "--json")
    baseline = next(shown for shown in status["baselines"] if shown["label"] == "japanese")
    assert evomerge("score", MINIATURES / "japanese", featured / FILE_NAME, "--split", "search") == 0
    shown = capsys.readouterr().out
    assert f"english ≥ 0.4  {baseline['constraints']['english']['mean']:.3f}" in shown
    assert f"{baseline['objectives']['maths']['mean']:.3f}" in shown


@pytest.mark.nightly  # as the one before, in JSON
def test_score_has_constraints_in_json(featured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = json_of(capsys, "status", featured, "--json")
    found = json_of(capsys, "score", MINIATURES / "japanese", featured / FILE_NAME, "--split", "search", "--json")
    baseline = next(shown for shown in status["baselines"] if shown["label"] == "japanese")
    assert {name: found[name] for name in ("objectives", "constraints", "feasible")} == {
        name: baseline[name] for name in ("objectives", "constraints", "feasible")
    }


@pytest.mark.nightly  # a search of models with a race, a screen and a constraint; what is simulated above has all three
def test_a_search_file_of_an_older_program_is_no_difference(featured: Path) -> None:
    with open_store(featured) as store:
        new = store.search().settings
        older = {
            key: value for key, value in new.items() if key not in ("vocabulary", "engine", "search_on_test_items")
        }
        assert older != new

        class Older:
            """The store as a program would have written it that did not know these keys."""

            def search(self) -> Any:
                return replace(store.search(), settings=older)

            def has_scores(self) -> bool:
                return store.has_scores()

        assert resumed_file(featured, Older(), ()).name == "small"  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"racing\.rungs"):
            resumed_file(featured, Older(), ["racing.rungs=[10, 40]"])  # type: ignore[arg-type]


# ---- the plan --------------------------------------------------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], file: Path, *settings: str) -> str:
    capsys.readouterr()
    assert evomerge("validate", file, *(word for each in settings for word in ("--set", each))) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_plan_says_what_rungs_and_screen_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """60 and 20 items, rungs of 10, 30 and 60: 20, 50 and 80 in all, and 20 of the screen before."""
    text = planned(capsys, features(tmp_path))
    assert "constraint english: acc of mini_math_en ≥ 0.4, 20 of 20 search items, 20 held out" in text
    assert "log_likelihood of mini_math_ja.search on 20 items; leaves out up to 50%" in text
    assert "20, 50 items a candidate, then 80 for those that challenge the best" in text
    # 5 baselines of 100 items, and 16 candidates of 20 to 100
    assert "20 to 100 items a candidate, 40 to 70 for most, 820 to 2,100 in all" in text
    assert "warning racing" not in text
    assert "warning english: 20 search items have an uncertain mean" in text
    assert "warning mini_math_ja" not in text
    alone = planned(capsys, features(tmp_path, screen=None, constraints={}))
    assert "10 to 60 items a candidate, 10 to 30 for most, 460 to 1,260 in all" in alone


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        (["racing.rungs=[10, 500]"], "500 of its rungs are not below the 60 items that there are"),
        (["racing.rungs=[40, 50]"], "the first rung is 60 of all 80 items, so it can spare little"),
        (["optimizer={name: nsga2}"], "nsga2 learns from every candidate of a generation, so none is eliminated"),
    ],
)
def test_the_plan_warns_where_racing_cannot_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], warning: str
) -> None:
    assert f"warning racing: {warning}" in planned(capsys, features(tmp_path), *settings)


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_grades_answers_by_both_scorers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [("答えは12です。", 12), ("答えは13です。", 12), ("答えは12個です。5分かかります。", 12)]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(json.dumps({"response": text, "answer_number": right}) for text, right in answers))
    found = json_of(capsys, "agreement", file, "--json")
    assert found["answers"] == 3
    table = found["metrics"]["acc"]
    assert sum(table[name] for name in ("both", "sakana_alone", "exact_alone", "neither")) == 3
    assert (table["both"], table["neither"]) == (1, 1 + (table["exact_alone"] + table["sakana_alone"] == 0))
    assert len(found["differ"]) == table["sakana_alone"] + table["exact_alone"]
    assert evomerge("agreement", file, "--language", "ja") == 0
    assert "3 answers" in capsys.readouterr().out
    assert evomerge("agreement", file, "--language", "jp") == 2
    assert "--language" in capsys.readouterr().err


@pytest.mark.nightly  # a search of models with a race, a screen and a constraint; what is simulated above has all three
def test_the_settings_of_the_search_are_those_of_the_file(featured: Path) -> None:
    with open_store(featured) as store:
        record = store.search().record
    written = yaml.safe_load((featured / FILE_NAME).read_text())
    (constraint,) = record.constraints
    assert (constraint.name, constraint.threshold) == ("english", written["constraints"]["english"]["at_least"])
    assert record.screen is not None
    assert record.screen.metric == "log_likelihood"
    assert constraint.version == record.evaluators[constraint.evaluator].version
