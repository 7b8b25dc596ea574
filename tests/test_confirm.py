"""Confirmation on a simulated pool: what is confirmed, who wins, and what happens when it does not go to its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_search import FakeSpace, drive, make_setup, scores_of, simulate

from evomerge.errors import InputError
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.search.driving.confirm import Confirmation, is_confirmed
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.estimation.preference import Preference
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool, Simulation
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Confirm
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import CandidateRow, Store, acquire


def confirm(
    folder: Path, setup: Setup, simulation: Simulation = simulate, idle: Callable[[Control], None] = lambda word: None
) -> bool:
    with Store.open(folder / "search.db") as store, acquire(store):
        word = Control(store.take_commands, interval_s=0.0)
        pool = SimulatedPool(1, simulation, SimulatedClock())
        run = Confirmation(Drive(setup, store, pool, word, logs=folder / "logs", idle=lambda: idle(word)))
        return run.run(recipe_of)


def recipe_of(row: CandidateRow) -> StackRecipe:
    return read_recipe(row.recipe, {name: name for name in json.loads(row.recipe)["sources"]})


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    with Store.open(folder / "search.db") as store:
        return [event.payload for event in store.events(kinds=(kind,))]


def test_the_winner_is_the_best_on_held_out_items(tmp_path: Path) -> None:
    setup = make_setup(candidates=60)
    drive(tmp_path, setup)
    assert confirm(tmp_path, setup)
    (shortlist,) = events(tmp_path, "shortlist")
    (winner,) = events(tmp_path, "winner")
    with Store.open(tmp_path / "search.db") as store:
        means = {}
        for number in shortlist["candidates"]:  # type: ignore[attr-defined]
            (scores,) = store.scores(number, "held_out")
            means[number] = float(scores.metrics["acc"].mean())
        assert means[winner["candidate"]] == max(means.values())  # type: ignore[index]
        for row in store.candidates(step=0):
            assert store.scores(row.number, "held_out"), "every baseline is scored beside the shortlist"
        assert store.search().state == "finished"


def test_the_shortlist_holds_as_many_finds_as_asked_for_baselines_apart(tmp_path: Path) -> None:
    """Baselines are made the best of all; they must not take the places of what the search found."""
    setup = make_setup(candidates=40)
    baselines = {mark.recipe.hash for mark in setup.space.baselines()}

    def baselines_are_best(job: Job) -> tuple[float, Measured | Failed]:
        found = scores_of(job)
        if job.recipe.hash in baselines:
            for scores in found.scores:
                scores["acc"][:] = 1.0
        return 1.0, found

    drive(tmp_path, setup, simulation=baselines_are_best)
    confirm(tmp_path, setup)
    (shortlist,) = events(tmp_path, "shortlist")
    assert len(shortlist["candidates"]) == setup.confirm.top  # type: ignore[arg-type]


def test_a_baseline_that_nothing_beats_is_the_winner(tmp_path: Path) -> None:
    """A search that found nothing better than what it started from must not name something worse."""
    setup = make_setup(candidates=40)
    best, *_ = [mark for mark in setup.space.baselines() if mark.kind == "source"]

    def a_source_is_best(job: Job) -> tuple[float, Measured | Failed]:
        found = scores_of(job)
        for scores in found.scores:
            scores["acc"][:] = float(job.recipe.hash == best.recipe.hash)
        return 1.0, found

    drive(tmp_path, setup, simulation=a_source_is_best)
    confirm(tmp_path, setup, simulation=a_source_is_best)
    (winner,) = events(tmp_path, "winner")
    with Store.open(tmp_path / "search.db") as store:
        assert store.candidate(int(str(winner["candidate"]))).label == best.label


def test_a_cached_candidate_can_win(tmp_path: Path) -> None:
    """A worker's death once let a later duplicate be scored first, and the earlier one was confirmed for ever."""
    setup = make_setup(space=FakeSpace(1, round_to=1), candidates=60)

    def odd_ones_die_once(job: Job) -> tuple[float, Measured | Failed]:
        if job.candidate % 2 and job.attempt == 1:
            return 1.0, Failed("worker_died", "killed")
        return simulate(job)

    drive(tmp_path, setup, simulation=odd_ones_die_once, workers=1)
    assert confirm(tmp_path, setup)
    (shortlist,) = events(tmp_path, "shortlist")
    with Store.open(tmp_path / "search.db") as store:
        for row in store.candidates():
            assert row.same_as is None or row.same_as < row.number
        for number in shortlist["candidates"]:  # type: ignore[attr-defined]
            assert store.scores(number, "held_out")


def test_confirming_again_scores_nothing_again(tmp_path: Path) -> None:
    setup = make_setup(candidates=40)
    drive(tmp_path, setup)
    confirm(tmp_path, setup)
    jobs: list[int] = []

    def count(job: Job) -> tuple[float, Measured | Failed]:
        jobs.append(job.candidate)
        return simulate(job)

    assert confirm(tmp_path, setup, count)
    assert jobs == []
    assert events(tmp_path, "winner")[0] == events(tmp_path, "winner")[1]


def test_it_is_known_beforehand_whether_anything_is_left_to_score(tmp_path: Path) -> None:
    setup = make_setup(candidates=40)

    def left(**changes: int) -> bool:
        with Store.open(tmp_path / "search.db") as store:
            versions = [evaluator.version for evaluator in setup.evaluators]
            confirm = setup.confirm.model_copy(update=changes)
            return not is_confirmed(store, confirm, Preference.of_setup(setup), versions)

    drive(tmp_path, setup)
    assert left()
    assert not confirm(tmp_path, setup, idle=lambda word: word.hear("stop"))
    assert left()
    assert confirm(tmp_path, setup)
    assert not left()
    assert not left(drawn=1)  # the best is on the shortlist
    assert left(drawn=20)
    assert left(top=setup.confirm.top + 1)
    assert left(top=1)  # another choice, among fewer


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_or_stopped_in_the_middle_it_goes_on_and_the_state_comes_right(tmp_path: Path) -> None:
    setup = make_setup(candidates=40)
    drive(tmp_path, setup)
    scored: list[int] = []

    def die_after_two(job: Job) -> tuple[float, Measured | Failed]:
        if len(scored) == 2:
            with Store.open(tmp_path / "search.db") as store:
                assert store.search().state == "confirming"
            raise Killed
        scored.append(job.candidate)
        return simulate(job)

    with pytest.raises(Killed):
        confirm(tmp_path, setup, die_after_two)
    calls = [0]

    def stop_soon(word: Control) -> None:
        calls[0] += 1
        if calls[0] == 2:
            word.hear("stop")

    assert not confirm(tmp_path, setup, idle=stop_soon)
    assert events(tmp_path, "winner") == []
    assert confirm(tmp_path, setup)
    assert len(events(tmp_path, "winner")) == 1
    with Store.open(tmp_path / "search.db") as store:
        assert store.search().state == "finished"


def test_when_nothing_can_be_confirmed_it_says_so(tmp_path: Path) -> None:
    setup = make_setup(candidates=40)
    drive(tmp_path, setup)
    with pytest.raises(InputError, match="no candidate could be scored on the held-out split: too long") as error:
        confirm(tmp_path, setup, lambda job: (1.0, Failed("error", "too long", "a traceback")))
    assert (tmp_path / error.value.hint.removeprefix("See ").removesuffix(".")).is_file()
    assert "a traceback" in next((tmp_path / "logs").glob("confirm-c*.log")).read_text()


def test_what_is_only_drawn_is_scored_when_the_winner_is_named_and_never_wins(tmp_path: Path) -> None:
    """The drawn are made perfect on held-out items: shortlist and winner are still as without them."""
    setup = make_setup(candidates=60)
    drive(tmp_path, setup)
    confirm(tmp_path, setup)
    (shortlist,) = events(tmp_path, "shortlist")
    (winner,) = events(tmp_path, "winner")
    assert shortlist["drawn"] == []
    known = {*shortlist["candidates"], *range(3)}  # type: ignore[misc]
    order: list[int] = []

    def others_are_perfect(job: Job) -> tuple[float, Measured | Failed]:
        assert len(events(tmp_path, "winner")) == 2, "the winner is named before"
        order.append(job.candidate)
        found = scores_of(job)
        for scores in found.scores:
            scores["acc"][:] = 1.0
        return 1.0, found

    assert confirm(tmp_path, replace(setup, confirm=Confirm(top=3, drawn=12)), others_are_perfect)
    again = events(tmp_path, "shortlist")[-1]
    assert again["candidates"] == shortlist["candidates"]
    assert events(tmp_path, "winner")[-1] == winner
    assert again["drawn"] == order
    with Store.open(tmp_path / "search.db") as store:
        best = [row.number for row in store.best("o0", maximise=True, k=15) if row.step > 0][:12]
    assert set(order) == set(best) - known
    assert order


def test_a_stop_while_drawing_leaves_the_winner_and_the_rest_to_do(tmp_path: Path) -> None:
    setup = replace(make_setup(candidates=60), confirm=Confirm(top=3, drawn=12))
    drive(tmp_path, setup)

    def stop_when_named(word: Control) -> None:
        if events(tmp_path, "winner"):
            word.hear("stop")

    assert not confirm(tmp_path, setup, idle=stop_when_named)
    assert len(events(tmp_path, "winner")) == 1
    assert confirm(tmp_path, setup)
    with Store.open(tmp_path / "search.db") as store:
        for number in events(tmp_path, "shortlist")[-1]["drawn"]:  # type: ignore[attr-defined]
            assert store.scores(number, "held_out")


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    setup = replace(make_setup(candidates=60), confirm=Confirm(top=3, drawn=12))
    drive(tmp_path, setup)

    def fail_when_named(job: Job) -> tuple[float, Measured | Failed]:
        return (1.0, Failed("error", "broken")) if events(tmp_path, "winner") else simulate(job)

    assert confirm(tmp_path, setup, fail_when_named)
    assert events(tmp_path, "confirm failed")
