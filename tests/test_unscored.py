"""A baseline that cannot be scored: it is said everywhere, with the cause, and not only left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_figures import create, search
from helpers_search import drive, make_setup, simulate, weights_of
from helpers_service import client_of, make_app

from evomerge.report.consoles import make_console
from evomerge.report.screen import panel
from evomerge.report.status import status_of
from evomerge.search.pools.simulated import Simulation
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.service.report import report_html
from evomerge.store import Store

WHY = "ValueError: no number in 'abc' (scores.py, line 3)"


def without(label: str, split: str) -> Simulation:
    """A person's function that fails for one source, on one split."""
    share = {"one": 1.0, "two": 0.0}[label]

    def simulation(job: Job) -> tuple[float, Measured | Failed]:
        if set(weights_of(job.recipe)) == {share} and job.tasks[0].split == split:
            return 1.0, Failed("error", WHY)
        return simulate(job)

    return simulation


@pytest.mark.parametrize(
    ("label", "split", "words"),
    [("one", "search", "could not be scored, so"), ("two", "held_out", "could not be scored on held-out items, so")],
)
@pytest.mark.parametrize("objectives", [1, 2])
def test_a_source_that_fails_is_told_with_its_cause(
    tmp_path: Path, label: str, split: str, words: str, objectives: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = search(tmp_path, "made", make_setup(objectives=objectives, candidates=20), without(label, split))
    with Store.open(folder / "search.db") as store:
        status = status_of(store)
        (found,) = status.unscored
        assert (found.label, found.origin, found.split, found.reason) == (label, "source", split, "error")
        assert label not in {gap.to for entry in status.confirmed for gap in entry.objectives["o0"].difference}
        make_console().print(panel(status))
        texts = {"terminal": " ".join(capsys.readouterr().out.split()), "report": report_html(store, folder)}
    texts["json"] = json.loads(status.model_dump_json())["conclusions"][0]
    with client_of(make_app(tmp_path), accept="text/html") as client:
        texts["page"] = client.get("/searches/made").text
    for place, text in texts.items():
        assert f"(source {label}) {words}" in text, place
        assert "no number in" in text, place


def test_while_it_runs_it_is_told_too(tmp_path: Path) -> None:
    folder = create(tmp_path, "made", make_setup(candidates=6))
    drive(folder, make_setup(candidates=6), simulation=without("one", "search"))
    with Store.open(folder / "search.db") as store:
        status = status_of(store)
    assert status.choice is None
    assert WHY in status.conclusions[0]


def test_where_all_are_scored_nothing_is_said(tmp_path: Path) -> None:
    folder = search(tmp_path, "made", make_setup(candidates=10))
    with Store.open(folder / "search.db") as store:
        assert status_of(store).unscored == []
