"""What every pool holds to, and how a node's failed starts are paused."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import get_args

import pytest
from helpers_search import FakeSpace

from evomerge.errors import InputError
from evomerge.search.clusters.starts import (
    FIRST_PAUSE_S,
    PLACED_TOGETHER,
    TOGETHER,
    TRIES,
    TRIES_AT_FIRST,
    Starts,
    next_places,
)
from evomerge.search.pools.base import Pool
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.work.jobs import Finished, Job, Measured, NewsKind, PoolNews

RECIPE = next(FakeSpace().baselines()).recipe
GONE = InputError("sources.one", "no such file")


class PoolContract:
    """Tests of a pool; a subclass has a fixture ``pool`` whose jobs all give no scores of nothing."""

    one_process = True

    def test_every_job_comes_back_once_and_news_are_told_once(self, pool: Pool) -> None:
        for candidate in range(5):
            pool.submit(Job(candidate, 1, RECIPE, []))
        finished: list[Finished] = []
        told: list[PoolNews] = []
        while len(finished) < 5:
            assert set(pool.running()) <= {(candidate, 1) for candidate in range(5)}
            finished += pool.wait(0.1)
            told += pool.news()
        assert pool.wait(0.0) == []
        told += pool.news()
        assert list(pool.news()) == []
        assert sorted((each.candidate, each.attempt) for each in finished) == [(n, 1) for n in range(5)]
        assert dict(pool.running()) == {}
        assert (pool.state().busy, pool.state().queued) == (0, 0)
        assert {each.kind for each in told} <= set(get_args(NewsKind))
        if self.one_process:
            assert told == []
        else:
            started = {each.worker for each in told if each.kind == "worker started"}
            assert {each.worker for each in finished} <= started
            assert {each.node for each in told if each.kind == "node joined"} >= {w.split("@")[1] for w in started}

    def test_it_may_be_closed_twice(self, pool: Pool) -> None:
        pool.submit(Job(0, 1, RECIPE, []))
        pool.close()
        pool.close()


class _Runner:
    def run(self, job: Job) -> Finished:
        return Finished(job.candidate, job.attempt, "local", Measured([], {}))


class TestInProcess(PoolContract):
    @pytest.fixture
    def pool(self) -> Pool:
        return InProcessPool(_Runner)


class TestSimulated(PoolContract):
    @pytest.fixture
    def pool(self) -> Pool:
        return SimulatedPool(2, lambda job: (1.0 + job.candidate, Measured([], {})), SimulatedClock())


def test_of_a_node_one_worker_loads_first_and_a_few_at_once_after_it() -> None:
    starts = Starts()
    assert starts.limit("n", loaded=0, now=0.0) == 1
    starts.started("n")
    assert starts.limit("n", loaded=1, now=1.0) == TOGETHER
    assert starts.limit("other", loaded=0, now=1.0) == 1


def failed_until_hopeless(starts: Starts) -> list[float]:
    """When each start on a node was tried that always fails: whenever its pause is over."""
    now, tries = 0.0, []
    while not starts.is_hopeless("n"):
        if starts.limit("n", 0, now):
            tries.append(now)
            starts.failed("n", now, GONE)
        now += 0.5
    return tries


def test_a_node_on_which_starts_fail_is_tried_again_after_pauses_that_double() -> None:
    starts = Starts()
    starts.started("elsewhere")
    tries = failed_until_hopeless(starts)
    assert len(tries) == TRIES
    assert [b - a for a, b in pairwise(tries)] == [FIRST_PAUSE_S * 2**i for i in range(TRIES - 1)]
    assert starts.limit("n", 0, 1e9) == 0
    assert (starts.limit("elsewhere", 1, 1e9), starts.last_fault) == (TOGETHER, GONE)


def test_while_no_worker_has_started_anywhere_fewer_tries_tell_that_none_will() -> None:
    starts = Starts()
    assert len(failed_until_hopeless(starts)) == TRIES_AT_FIRST
    starts.started("elsewhere")
    assert not starts.is_hopeless("n"), "so it was the node after all, and its tries are not used up"


def test_starts_that_fail_together_are_one_try_and_the_next_is_made_alone() -> None:
    starts = Starts()
    starts.started("n")
    for moment in (10.0, 10.1, 10.2):
        starts.failed("n", moment, InputError("cluster", "out of memory"))
    assert starts.most("n", here=2, loaded=2, now=12.0) == 0
    assert starts.most("n", here=2, loaded=2, now=10.0 + FIRST_PAUSE_S) == 1
    assert starts.most("n", here=3, loaded=2, now=10.0 + FIRST_PAUSE_S) == 0, "one is at it"
    starts.failed("n", 10.0 + FIRST_PAUSE_S, InputError("cluster", "out of memory"))
    assert starts.limit("n", 2, 10.0 + 3 * FIRST_PAUSE_S - 0.1) == 0
    starts.started("n")
    assert starts.most("n", here=3, loaded=3, now=11.0) == float("inf")


@pytest.mark.parametrize(
    ("nodes", "rooms", "wanted"), [(32, 8, 256), (1, 256, 256), (4, 64, 256), (300, 1, 256), (2, 3, float("inf"))]
)
def test_hundreds_of_workers_are_started_a_few_at_once(nodes: int, rooms: int, wanted: float) -> None:
    """A process takes three seconds to start, on the first node ten; each second the pool looks what there is to do."""
    starting: list[tuple[float, str]] = []  # when each will have started, and where
    here: Counter[str] = Counter()
    for now in range(2000):
        starting = [(end, node) for end, node in starting if end > now]
        placing = Counter(node for _, node in starting)
        free = {f"n{i}": float(rooms - here[f"n{i}"]) for i in range(nodes)}
        for node in next_places(free, placing, wanted - here.total()):
            starting.append((now + (10 if node == "n0" else 3), node))
            here[node] += 1
            placing[node] += 1
        assert placing.total() <= PLACED_TOGETHER
        assert max(placing.values(), default=0) <= TOGETHER
        if not starting:
            break
    assert here.total() == min(wanted, nodes * rooms)
    assert max(here.values()) - min(here.values()) <= 1 or nodes > wanted
