"""Attempts that take too long: what is too long, that they are ended and retried, and that no hang stops a search."""

from __future__ import annotations

import math
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_search import Killed, create_store, drive, make_setup, scores_of, simulate, table
from hypothesis import given
from hypothesis import strategies as st

from evomerge.search.driving.control import Control
from evomerge.search.driving.dispatch import Dispatcher, Pending, feed_of
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool, Simulation
from evomerge.search.settings.sections import Mode, Racing
from evomerge.search.work.deadlines import ENOUGH, FACTOR, MAX_S, MIN_S, Deadlines, recorded_attempts
from evomerge.search.work.jobs import Failed, Finished, Job, Measured, Task
from evomerge.store import EventRow, Store, acquire


def items(*counts: int) -> list[Task]:
    return [Task(evaluator, "search", range(count)) for evaluator, count in enumerate(counts)]


def learned(*attempts: tuple[list[Task], float]) -> Deadlines:
    found = Deadlines()
    for tasks, seconds in attempts:
        found.learn(tasks, seconds)
    return found


def test_a_job_without_tasks_is_bound_by_nothing_that_was_learned() -> None:
    deadlines = Deadlines()
    for _ in range(2 * ENOUGH):
        deadlines.learn([Task(0, "search", range(10))], 1.0)
    assert deadlines.bound_s([Task(0, "search", range(10))]) == MIN_S
    assert deadlines.bound_s([]) == MAX_S


@given(st.lists(st.floats(20.0, 2000.0), min_size=ENOUGH, max_size=60))
def test_the_bound_is_five_times_the_quantile_of_those_alike(seconds: list[float]) -> None:
    bound = learned(*((items(10), s) for s in seconds)).bound_s(items(10))
    twentieths = statistics.quantiles(seconds, n=20, method="inclusive")  # the standard library's own interpolation
    assert bound == pytest.approx(max(MIN_S, FACTOR * twentieths[-1]))


def test_nothing_is_known_of_few_and_short_ones_are_never_hurried() -> None:
    assert learned(*[(items(10), 100.0)] * (ENOUGH - 1)).bound_s(items(10)) == MAX_S
    assert learned(*[(items(10), 0.01)] * ENOUGH).bound_s(items(10)) == MIN_S


def test_of_more_items_more_is_allowed_and_of_fewer_not_less_than_was_seen() -> None:
    deadlines = learned(*[(items(10), 100.0)] * ENOUGH)
    assert deadlines.bound_s(items(40)) == pytest.approx(2000.0)
    assert deadlines.bound_s(items(1)) == pytest.approx(500.0), "to merge takes as long for one item as for ten"
    assert deadlines.bound_s(items(10, 5)) == MAX_S, "nobody has scored items of the second evaluator"


def test_those_of_as_many_items_count_alone_when_there_are_enough() -> None:
    screens, full = [(items(5), 60.0)] * 90, [(items(500), 300.0)] * ENOUGH
    assert learned(*screens, *full).bound_s(items(500)) == pytest.approx(1500.0)


class Notes:
    """A recorder that keeps how attempts ended, as (candidate, attempt)."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int]] = []
        self.final: list[int] = []
        self.reasons: list[str] = []

    def answer(self, pending: Pending) -> bool:
        return False

    def dispatched(self, pending: Pending) -> None:
        pass

    def measured(self, pending: Pending, finished: Finished, result: Measured) -> None:
        self.done.append((finished.candidate, finished.attempt))

    def failed(self, finished: Finished, failure: Failed, *, final: bool) -> None:
        self.reasons.append(failure.reason)
        if final:
            self.final.append(finished.candidate)

    def atomically(self) -> AbstractContextManager[None]:
        return nullcontext()

    def late(self, finished: Finished) -> None:
        raise AssertionError(finished)


def run(simulation: Simulation, candidates: int, workers: int, deadlines: Deadlines) -> tuple[Notes, float]:
    """What became of candidates of a recipe each, and the seconds that it took."""
    setup, clock, notes = make_setup(), SimulatedClock(), Notes()
    recipe = next(iter(setup.space.baselines())).recipe
    pending = [Pending(n, 1, recipe, str(n), setup.tasks("search")) for n in range(candidates)]
    pool = SimulatedPool(workers, simulation, clock)
    dispatcher = Dispatcher(pool, Control(list), 2, lambda: None, deadlines)
    assert dispatcher.run(feed_of(pending), notes)
    return notes, clock.now


def test_a_hang_of_every_worker_does_not_hang_the_search() -> None:
    """All four hang at once, each at its first candidate, before anything is known of how long one takes."""

    def all_hang(job: Job) -> tuple[float, Measured | Failed]:
        return (math.inf if job.candidate < 4 and job.attempt == 1 else 1.0), scores_of(job)

    notes, seconds = run(all_hang, candidates=20, workers=4, deadlines=Deadlines(most_s=600.0))
    assert sorted(notes.done) == [(n, 2 if n < 4 else 1) for n in range(20)]
    assert notes.reasons == ["timeout"] * 4
    assert 600 < seconds < 600 + MIN_S + 20


def test_when_everything_hangs_every_candidate_fails_and_the_search_ends() -> None:
    notes, seconds = run(lambda job: (math.inf, scores_of(job)), 6, 3, Deadlines(most_s=100.0))
    assert (notes.done, sorted(notes.final)) == ([], list(range(6)))
    assert 400 < seconds <= 4 * (100 + MIN_S), "two rounds of three, two attempts each"


def uneven(job: Job) -> tuple[float, Measured | Failed]:
    """Around half a minute, as the recipe has it."""
    seconds, found = simulate(job)
    return 25.0 + seconds, found


@pytest.mark.parametrize("mode", ["generational", "asynchronous"])
def test_a_straggler_is_ended_and_tried_again_and_a_hanging_candidate_fails(tmp_path: Path, mode: Mode) -> None:
    def slow(job: Job) -> tuple[float, Measured | Failed]:
        seconds, found = uneven(job)
        if job.candidate == 25:
            return math.inf, found
        return (20 * seconds if (job.candidate, job.attempt) == (18, 1) else seconds), found

    drive(tmp_path, replace(make_setup(candidates=40), mode=mode), simulation=slow)
    with Store.open(tmp_path / "search.db") as store:
        straggler, hanging = store.candidate(18), store.candidate(25)
        failures = [(e.candidate, e.payload["reason"]) for e in store.events(kinds=("failure",))]
        assert sum(store.counts().values()) == 40
    assert (straggler.status, straggler.attempts) == ("done", 2)
    assert (hanging.status, hanging.attempts) == ("failed", 2)
    assert sorted(failures) == [(18, "timeout"), (25, "timeout"), (25, "timeout")]


def test_what_was_ended_and_tried_again_leaves_no_trace_in_the_search(tmp_path: Path) -> None:
    def slow_at_first(job: Job) -> tuple[float, Measured | Failed]:
        seconds, found = uneven(job)
        return (20 * seconds if job.candidate > 15 and job.attempt == 1 else seconds), found

    setup = make_setup(candidates=24)
    drive(tmp_path / "slow", setup, simulation=slow_at_first)
    drive(tmp_path / "plain", setup, simulation=uneven)
    assert table(tmp_path / "slow") == table(tmp_path / "plain")
    with Store.open(tmp_path / "slow" / "search.db") as store:
        assert len(store.events(kinds=("failure",))) == 24 - 16


def event(seq: int, time: float, kind: str, candidate: int, attempt: int, items: int = 0) -> EventRow:
    return EventRow(seq, time, kind, candidate, attempt, {"items": {"v": items}})


def test_recorded_attempts_are_what_was_scored_between_dispatch_and_record() -> None:
    told = [
        ("rung", 5.0, 1, 2, 30), ("dispatch", 10.0, 2, 1, 0), ("dispatch", 11.0, 3, 1, 0), ("rung", 15.0, 2, 1, 10),
        ("dispatch", 20.0, 2, 2, 0), ("dispatch", 26.0, 2, 3, 0), ("result", 33.0, 2, 3, 40),
        ("result", 9.0, 3, 1, 40), ("dispatch", 40.0, 1, 3, 0), ("result", 50.0, 1, 3, 40),
    ]  # fmt: skip
    events = [event(i, time, kind, c, attempt, items) for i, (kind, time, c, attempt, items) in enumerate(told)]
    found = list(recorded_attempts(events, lambda each: {0: each.payload["items"]["v"]}))
    # Not of candidate 1, of which nobody knows what the first rung scored; not of 3, when the clock was set back.
    assert found == [({0: 10}, 5.0), ({0: 30}, 7.0)]


@pytest.mark.parametrize("racing", [None, Racing(rungs=(10, 20))])
def test_a_resumed_search_knows_how_long_attempts_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, racing: Racing | None
) -> None:
    """After the resume every worker hangs at once: they are ended by what the first driver saw, not by a day."""
    setup = replace(make_setup(candidates=20), racing=racing)
    clock, begun = SimulatedClock(), 1.7e9
    monkeypatch.setattr("time.time", lambda: begun + clock.now)

    def search(simulation: Simulation) -> Store:
        path = tmp_path / "search.db"
        store = Store.open(path) if path.exists() else create_store(tmp_path, setup)
        with acquire(store):
            pool = SimulatedPool(3, simulation, clock)
            Driver(Drive(setup, store, pool, Control(store.take_commands), logs=tmp_path, clock=clock)).run()
        return store

    def first(job: Job) -> tuple[float, Measured | Failed]:
        if job.candidate >= 14:
            raise Killed
        return uneven(job)

    hung: set[int] = set()

    def second(job: Job) -> tuple[float, Measured | Failed]:
        seconds, found = uneven(job)
        hang = len(hung) < 3 and job.candidate not in hung
        hung.add(job.candidate)
        return (math.inf if hang else seconds), found

    with pytest.raises(Killed):
        search(first)
    before = clock.now
    with search(second) as store:
        reasons = [each.payload["reason"] for each in store.events(kinds=("failure",))]
    assert reasons == ["timeout"] * 3
    assert clock.now - before < 30 * 60


def test_the_longest_attempt_is_what_the_search_file_says(tmp_path: Path) -> None:
    def hangs(job: Job) -> tuple[float, Measured | Failed]:
        return (math.inf if job.attempt == 1 and job.candidate == 0 else 1.0), scores_of(job)

    setup = make_setup(candidates=12)
    with create_store(tmp_path, setup) as store, acquire(store):
        clock = SimulatedClock()
        pool = SimulatedPool(3, hangs, clock)
        word = Control(store.take_commands)
        Driver(Drive(setup, store, pool, word, logs=tmp_path, clock=clock, attempt_s=1800.0)).run()
    assert 1800 < clock.now < 1800 + 2 * MIN_S
