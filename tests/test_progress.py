"""How far a search is: by item scores, evenly, and the same for whoever resumes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_search import drive
from test_generation import RACE, setup_of, simulate

from evomerge.optimizers import CmaSettings
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.driving.progress import Progress
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
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
