"""A search whose candidates all fail ends with an exit code that says so, and with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_miniature import evomerge, json_of, short_search_file
from helpers_search import drive, make_setup, simulate, weights_of

from evomerge.commands.failing import recorded
from evomerge.errors import InputError
from evomerge.report.failures import all_failed
from evomerge.report.status import status_of
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import Simulation
from evomerge.search.settings.folder import open_store
from evomerge.search.work.jobs import Failed, FailureReason, Job, Measured
from evomerge.search.workers.worker import Worker
from evomerge.service.drivers import Drivers
from evomerge.service.root import Root
from evomerge.store import Store, acquire

BASELINES = {0.0, 0.25, 1.0}  # of the simulated search: weights of its first source
SHIPPED = 5  # baselines of the search of miniatures


def failing(reasons: list[FailureReason]) -> Simulation:
    """The first candidates after the baselines fail, each for the next of these reasons; all others are scored."""
    left: list[FailureReason] = list(reasons)

    def simulation(job: Job) -> tuple[float, Measured | Failed]:
        if set(weights_of(job.recipe)) <= BASELINES or not left:
            return simulate(job)
        return 1.0, Failed(left.pop(0), "NaN in layer 3")

    return simulation


def error_of(folder: Path, reasons: list[FailureReason], candidates: int = 8) -> InputError | None:
    drive(folder, make_setup(candidates=candidates, attempts=1), simulation=failing(reasons), workers=1)
    with Store.open(folder / "search.db") as store:
        return all_failed(store)


def test_the_most_frequent_reason_is_told(tmp_path: Path) -> None:
    error = error_of(tmp_path, ["error", "not_finite", "not_finite", "not_finite", "error"])
    assert error is not None
    assert error.problem == "all 5 failed, 3 of them with 'not_finite', such as c0006: NaN in layer 3"


def test_one_reason_is_told_without_a_share(tmp_path: Path) -> None:
    error = error_of(tmp_path, ["error"] * 5)
    assert str(error).startswith("candidates: all 5 failed, with 'error', such as c0007: NaN in layer 3")


@pytest.mark.parametrize(("fail", "candidates"), [(4, 8), (0, 8), (0, 3)])
def test_nothing_is_told_where_one_is_scored_or_none_was_asked(tmp_path: Path, fail: int, candidates: int) -> None:
    assert error_of(tmp_path, ["error"] * fail, candidates) is None


def test_a_search_whose_candidates_all_fail_ends_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(worker: Worker, job: Job) -> Any:
        if job.candidate >= SHIPPED:
            raise ValueError("no such scorer")
        return scored(worker, job)

    scored = Worker._measure
    monkeypatch.setattr(Worker, "_measure", measure)
    folder = tmp_path / "search"
    for command in (["search", short_search_file(tmp_path), "--dir", folder], ["resume", folder]):
        assert evomerge(*command) == 1
        said = capsys.readouterr()
        assert "error: candidates: all 3 failed, with 'error', such as c0007: ValueError: no such scorer" in said.err
        assert "See logs/c0007" in said.err
        assert "evomerge resume" in said.out
    monkeypatch.undo()
    assert evomerge("resume", folder, "--set", "budget.candidates=9") == 0


def test_status_and_page_say_what_has_ended_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(driver: Driver) -> None:
        raise errors.pop(0)

    folder, errors = tmp_path / "search", [InputError("pool", "is gone", "Start it."), ValueError("an odd\nnumber")]
    monkeypatch.setattr(Driver, "run", end)
    assert evomerge("search", short_search_file(tmp_path), "--dir", folder) == 2
    assert "error: pool: is gone. Start it." in capsys.readouterr().err
    assert json_of(capsys, "status", folder, "--json")["why"] == "pool: is gone. Start it."
    assert evomerge("confirm", folder) == 2
    assert "nothing is scored yet that could be confirmed" in capsys.readouterr().err
    assert evomerge("resume", folder) == 1
    assert evomerge("status", folder) == 0
    assert "ValueError: an odd number" in capsys.readouterr().out.replace("\n", " ")
    with open_store(folder) as store:
        state = Drivers(Root.of(str(tmp_path), tmp_path)).state_of("search", store)
        assert (state.state, state.why) == ("created", "ValueError: an odd number")
        with acquire(store):
            store.set_state("running")
            with pytest.raises(InputError), recorded(store):
                raise InputError("pool", "is gone")
            assert (status_of(store).state, status_of(store).why) == ("interrupted", "pool: is gone")  # at once
            store.set_state("running")
            assert status_of(store).why == ""
