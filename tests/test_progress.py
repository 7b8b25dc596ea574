"""How far a search is: by item scores, evenly, and the same for whoever resumes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers_search import drive, make_setup, scores_of
from test_deadlines import Notes
from test_generation import RACE, setup_of, simulate

from evomerge.inference.progress import report_answered
from evomerge.optimizers import CmaSettings
from evomerge.search.driving import dispatch
from evomerge.search.driving.control import Control
from evomerge.search.driving.dispatch import Dispatcher, Pending, feed_of
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.driving.progress import Progress
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.work.jobs import Failed, Finished, Job
from evomerge.store import Store, acquire


def test_it_is_over_when_what_is_to_come_has_come_at_the_pace_so_far() -> None:
    now, left = [0.0], [100.0]
    progress = Progress(lambda: now[0])
    progress.begin(lambda: left[0])
    assert progress.eta_s() is None
    for _ in range(3):
        now[0] += 10.0
        progress.add(20)
        left[0] -= 20
    assert progress.eta_s() == pytest.approx(20.0)
    now[0] += 4.0
    assert progress.eta_s() == pytest.approx(16.0)  # on its way to the next
    now[0] += 400.0
    assert progress.eta_s() == pytest.approx(10.0)  # which is late
    progress.begin(lambda: None)
    assert progress.eta_s() is None


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_an_eta_in_a_race_is_near_the_truth_all_along(tmp_path: Path, mode: str) -> None:
    """Seconds go by items here, as they do where answers are generated."""
    setup = setup_of(racing=RACE, candidates=61, optimizer=CmaSettings(name="cma", population=8))
    setup = type(setup)(**{**setup.__dict__, "mode": mode})
    clock, told = SimulatedClock(), list[tuple[float, float]]()
    progress = Progress(clock)
    pool = SimulatedPool(1, lambda job: (0.1 * sum(len(t.indices) for t in job.tasks), simulate(job)[1]), clock)

    def idle() -> None:
        if (eta := progress.eta_s()) is not None:
            told.append((clock(), eta))

    with (
        Store.create(tmp_path / "search.db", name="s", settings={}, fingerprints={}, environment={}) as store,
        acquire(store),
    ):
        Driver(Drive(
            setup, store, pool, Control(store.take_commands, interval_s=0.0), logs=tmp_path, idle=idle, clock=clock,
            progress=progress,
        )).run()  # fmt: skip
    whole = clock()
    ends = np.array([at + eta for at, eta in told if at > 0.25 * whole])
    assert ends.max() / ends.min() < 2, "no leaps"
    assert abs(np.median(ends) - whole) < 0.25 * whole


def test_whoever_resumes_counts_what_was_done(tmp_path: Path) -> None:
    drive(tmp_path, setup_of(racing=RACE, candidates=43), simulation=simulate)
    driver = drive(tmp_path, setup_of(racing=RACE, candidates=83), simulation=simulate)
    assert driver._told_candidates == 80
    assert driver._items_to_come() == 0


def in_process(idle: Callable[[], None], progress: Progress) -> Notes:
    """How two candidates end, of which each has its model answer three prompts."""
    setup, notes = make_setup(), Notes()
    recipe = next(iter(setup.space.baselines())).recipe
    pending = [Pending(n, 1, recipe, str(n), setup.tasks("search")) for n in range(2)]

    class Answering:
        def run(self, job: Job) -> Finished:
            try:
                for _ in range(3):
                    report_answered(1)
            except Exception as error:
                return Finished(job.candidate, job.attempt, "local", Failed("error", str(error)))
            return Finished(job.candidate, job.attempt, "local", scores_of(job))

    Dispatcher(InProcessPool(Answering), Control(list), 2, idle, progress=progress).run(feed_of(pending), notes)
    return notes


def test_what_is_done_while_waiting_is_done_while_a_model_answers_in_the_same_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_work: list[tuple[Sequence[int], int]] = []
    progress = Progress()

    def idle() -> None:
        at_work.append((progress.at_work()[0], progress.answers))

    monkeypatch.setattr(dispatch, "_CHECK_S", 0.0)
    assert in_process(idle, progress).done == [(0, 1), (1, 1)]
    assert [pair for pair in at_work if pair[1]] == [([n], count) for n in range(2) for count in (1, 2, 3)]


def test_a_store_that_is_lost_while_a_model_answers_ends_the_search_and_fails_no_candidate() -> None:
    calls: list[int] = []

    def idle() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("the store is gone")

    with pytest.raises(OSError, match="gone"):
        in_process(idle, Progress())
    assert len(calls) == 2
