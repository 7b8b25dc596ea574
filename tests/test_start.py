"""A search that starts from another: its candidates are scored first, told first, and replayed from the record."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import MINIATURES, evomerge, short_search_file
from helpers_search import drive, drive_dying, make_setup, table

from evomerge.optimizers import CatCmaSettings, CmaSettings, LqCmaSettings
from evomerge.search.driving.candidates import START
from evomerge.search.opening.session import create_search, fingerprints_of
from evomerge.search.opening.start import shrunk, with_start
from evomerge.search.preparing.prepare import prepare
from evomerge.search.preparing.setup import Setup, StartPoint
from evomerge.search.settings.search_file import load_search_file
from evomerge.search.settings.sections import Mode
from evomerge.store import Store

NEAR = [np.full(4, 0.72), np.full(4, 0.1), np.array([0.6, 0.8, 0.7, 0.7])]


def starting(mode: Mode = "generational", candidates: int = 30) -> Setup:
    """A search from three candidates, of which two are near the optimum of the simulation."""
    setup = make_setup(candidates=candidates, optimizer=CmaSettings(name="cma").warm())
    start = tuple(StartPoint(genome, f"from coarse c{i:04d}") for i, genome in enumerate(NEAR))
    return replace(setup, mode=mode, start=start)


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_they_are_scored_and_told_before_anything_is_asked_for(mode: Mode, tmp_path: Path) -> None:
    drive(tmp_path, starting(mode))
    with Store.open(tmp_path / "search.db") as store:
        rows, steps = store.candidates(), list(store.steps())
    start = [row for row in rows if row.origin == START]
    assert [(row.step, row.label) for row in start] == [(1, f"from coarse c{i:04d}") for i in range(3)]
    assert all(np.array_equal(row.genome, near) for row, near in zip(start, NEAR, strict=True))  # type: ignore[arg-type]
    second_ask = next(at for at, step in enumerate(steps) if step.kind == "ask" and step.step == 2)
    told = {number for step in steps[:second_ask] if step.kind == "tell" for number in step.candidates}
    assert told == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("settings", [CmaSettings, LqCmaSettings, CatCmaSettings])
def test_a_search_begins_at_the_best_of_what_it_was_told(
    settings: type[CmaSettings | LqCmaSettings | CatCmaSettings], tmp_path: Path
) -> None:
    name = {CmaSettings: "cma", LqCmaSettings: "lq_cma", CatCmaSettings: "catcma"}[settings]
    optimizer = settings.model_validate({"name": name, "sigma": 0.01, "population": 8}).warm()
    drive(tmp_path, replace(starting(), optimizer=optimizer))
    with Store.open(tmp_path / "search.db") as store:
        rows = [row for row in store.candidates() if row.step <= 2]
    best = min((row for row in rows if row.step < 2 and row.genome is not None), key=lambda row: row.losses or [9.0])
    first = np.array([row.genome for row in rows if row.step == 2])
    assert np.abs(first - best.genome).max() < 0.05


def test_a_budget_that_ends_among_them_is_kept_and_can_be_raised(tmp_path: Path) -> None:
    drive(tmp_path, starting(candidates=5))
    assert [row[2] for row in table(tmp_path)] == ["source", "source", "average", START, START]
    drive(tmp_path, starting(candidates=9))
    assert [row[2] for row in table(tmp_path)][3:] == [START, START, *["cma"] * 4]


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_killed_at_every_write_it_is_the_same_search(mode: Mode, tmp_path: Path) -> None:
    drive(tmp_path / "whole", starting(mode, 12), workers=1)
    assert drive_dying(tmp_path / "killed", starting(mode, 12), lives=(1, 3), workers=1) > 6
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


def test_what_was_said_of_the_optimizer_stays() -> None:
    assert CmaSettings(name="cma").warm() == CmaSettings(name="cma", x0="best", sigma=0.1)
    assert CmaSettings(name="cma", x0="centre", sigma=0.2).warm() == CmaSettings(name="cma", x0="centre", sigma=0.2)


def test_estimates_are_shrunk_by_their_noise() -> None:
    means, errors = np.array([[0.0], [1.0], [0.8]]), np.array([[0.1], [0.5], [0.1]])
    # mean .6, variance (.36 + .16 + .04) / 3, of which noise (.01 + .25 + .01) / 3 is: .56 / 3 - .27 / 3 = .29 / 3
    kept = 0.29 / 3
    by_hand = [0.6 - 0.6 * kept / (kept + 0.01), 0.6 + 0.4 * kept / (kept + 0.25), 0.6 + 0.2 * kept / (kept + 0.01)]
    assert shrunk(means, errors)[:, 0] == pytest.approx(by_hand)
    assert by_hand[2] > by_hand[1], "the best on few items is not the best"


def test_without_noise_nothing_is_shrunk() -> None:
    means = np.array([[3.0, 1.0], [5.0, 1.0]])
    assert shrunk(means, np.zeros((2, 2))).tolist() == means.tolist()


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coarse")
    assert evomerge("search", short_search_file(folder), "--dir", folder / "coarse") == 0
    return folder / "coarse"


def test_a_layer_wise_search_starts_from_a_model_wise_one_and_goes_on_without_it(
    coarse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(coarse, earlier)
    changes = {"space": {"method": "ties", "granularity": "layer"}, "start_from": "earlier", "name": "fine"}
    file, fine = short_search_file(tmp_path, **changes), tmp_path / "fine"
    assert evomerge("search", file, "--dir", fine, "--set", "budget.candidates=7") == 0
    assert "from small c000" in capsys.readouterr().out
    with Store.open(earlier / "search.db") as store:
        weights = {row.id: row.genome for row in store.candidates() if row.step > 0}
    with Store.open(fine / "search.db") as store:
        rows, record = store.candidates(), store.search().record
    start = [row for row in rows if row.origin == START]
    assert len(rows) == 7
    assert [row.label for row in start] == [point.label for point in record.start[:2]]
    for row in start:
        assert row.genome is not None
        # Sources are in the order of the file in both, and each layer group begins with its weights.
        places = [i for i, p in enumerate(record.parameters) if ".weight." in p.name]
        for groups in row.genome[places].reshape(-1, 2):
            if "mean" not in row.label:
                assert groups.tolist() == weights[row.label.rpartition(" ")[2]].tolist()  # type: ignore[union-attr]
    shutil.rmtree(earlier)
    assert evomerge("resume", fine, "--set", "budget.candidates=9") == 0
    with Store.open(fine / "search.db") as store:
        assert [row.origin for row in store.candidates()[5:]] == [START, START, "cma", "cma"]


def test_it_has_what_it_took_before_anything_is_scored(coarse: Path, tmp_path: Path) -> None:
    """As where the page made the search and a driver comes later."""
    shutil.copytree(coarse, tmp_path / "earlier")
    prepared = with_start(prepare(load_search_file(short_search_file(tmp_path, start_from="earlier"))))
    create_search(tmp_path / "made", prepared, fingerprints_of(prepared)).close()
    shutil.rmtree(tmp_path / "earlier")
    assert evomerge("resume", tmp_path / "made", "--set", "budget.candidates=7") == 0
    with Store.open(tmp_path / "made" / "search.db") as store:
        assert [row.origin for row in store.candidates()[5:]] == [START, START]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["start_from=nowhere"], "is not the folder of a search"),
        (["base=japanese"], "that search has the base base, and this one has japanese"),
        (["sources.maths={sources}/japanese"], "the source maths is not the model that it was"),
        (["space={{kind: data_flow_space}}"], "no candidate of"),
        (
            ["objectives.mini_translate_ja.search=test[:4]", "objectives.mini_translate_ja.held_out=validation[:4]"],
            "4 held-out items of mini_translate_ja are search items of",
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused(
    settings: list[str], said: str, coarse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = short_search_file(tmp_path, start_from=str(coarse))
    changes = [word for setting in settings for word in ("--set", setting.format(sources=MINIATURES))]
    assert evomerge("validate", file, *changes) == 2
    error = capsys.readouterr().err
    assert "start_from" in error
    assert said in error
