"""The Ray pool: a search on it, what does not fit, and workers that die, hang, join, leave and are about to leave."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray
from helpers_miniature import ROOT, evomerge, json_of, search_file, short_search_file
from helpers_search import table
from ray.cluster_utils import Cluster as LocalCluster
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group_table
from test_deadlines import Notes
from test_old_searches import goes_on_and_is_exported
from test_pools import RECIPE, PoolContract

from evomerge.errors import InputError
from evomerge.search.clusters import nodes, starts
from evomerge.search.clusters.joining import connect
from evomerge.search.clusters.nodes import fault_of, words_of, worker_limits, workers_that_fit
from evomerge.search.driving.control import Control
from evomerge.search.driving.dispatch import Dispatcher, Pending, feed_of
from evomerge.search.pools import ray as ray_pool
from evomerge.search.pools.ray import RayPool, RayWorker
from evomerge.search.settings.folder import open_store
from evomerge.search.settings.runtime_env import runtime_env_of
from evomerge.search.settings.search_file import load_search_file
from evomerge.search.settings.sections import Cluster, Workers
from evomerge.search.work.deadlines import Deadlines
from evomerge.search.work.jobs import Failed, Finished, Job, Measured, PoolNews


@pytest.mark.parametrize(
    ("cluster", "resources", "fitting"),
    [
        ({"workers": 2}, {"CPU": 2.0}, 2),
        ({}, {"CPU": 4.0}, 4),
        ({"cpus_per_worker": 3}, {"CPU": 8.0}, 2),
        ({}, {"CPU": 64.0, "GPU": 8.0}, 8),
        ({"gpus_per_worker": 0.25}, {"CPU": 64.0, "GPU": 2.0}, 8),
        ({"gpus_per_worker": 0}, {"CPU": 4.0, "GPU": 2.0}, 4),
        ({"gpus_per_worker": 2, "workers": 3}, {"CPU": 64.0, "GPU": 8.0}, 3),
    ],
)
def test_how_many_workers_fit(cluster: dict[str, float], resources: dict[str, float], fitting: int) -> None:
    assert workers_that_fit(Cluster.model_validate(cluster), resources) == fitting


@pytest.mark.parametrize(
    ("cluster", "resources", "words"),
    [
        ({"workers": 3}, {"CPU": 2.0}, "3 x 1 CPU = 3 of 2"),
        ({"workers": 4, "gpus_per_worker": 1}, {"CPU": 8.0, "GPU": 2.0}, "4 x 1 GPU = 4 of 2"),
        ({"gpus_per_worker": 1}, {"CPU": 8.0}, "1 x 1 GPU = 1 of 0"),
    ],
)
def test_more_than_the_cluster_has_is_refused_with_the_arithmetic(
    cluster: dict[str, float], resources: dict[str, float], words: str
) -> None:
    with pytest.raises(InputError, match="too little") as caught:
        workers_that_fit(Cluster.model_validate(cluster), resources)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("gpus", "nodes", "words"),
    [
        (4, [2.0, 2.0, 2.0], "is 4, all of one node, and the largest node has 2: 2 are missing"),
        (2, [1.0, 1.0], "is 2, all of one node, and the largest node has 1: 1 are missing"),
        (8, [4.0, 0.0], "the largest node has 4: 4 are missing"),
        (2, [0.0], "the largest node has 0: 2 are missing"),
    ],
)
def test_more_gpus_than_any_node_has_are_refused(gpus: int, nodes: list[float], words: str) -> None:
    with pytest.raises(InputError) as caught:
        workers_that_fit(Cluster(gpus_per_worker=gpus), *({"CPU": 64.0, "GPU": there} for there in nodes))
    assert caught.value.place == "cluster.gpus_per_worker"
    assert words in caught.value.problem


class WorkerKiller(threading.Thread):
    """Ends one busy Ray worker of this test's own cluster with SIGKILL, as soon as candidates are being scored."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self.killed: int | None = None

    def run(self) -> None:
        from evomerge.store import Store

        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.killed is None:
            time.sleep(0.05)
            if not (self._folder / "search.db").exists():
                continue
            with Store.open(self._folder / "search.db") as store:
                busy = store.counts()["running"] and store.counts()["done"] >= 3
            if busy:
                self.killed = self._kill_a_worker()

    def _kill_a_worker(self) -> int | None:
        for process in psutil.Process().children(recursive=True):
            if "RayWorker.run" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                return process.pid
        return None


@pytest.mark.parametrize(
    ("kind", "address", "told"),
    [
        (
            RuntimeError,
            None,
            "pool: Ray cannot be started on this machine: RuntimeError: no port is free. Take `pool: in_process`",
        ),
        (Exception, None, "pool: Ray cannot be started on this machine: Exception: no port is free. Take"),  # its own
        (
            RuntimeError,
            "head:6379",
            "cluster.address: no Ray cluster answers at head:6379: RuntimeError: no port is free. See whether",
        ),
    ],
)
def test_a_cluster_that_cannot_be_joined_or_started_is_told(
    kind: type[Exception], address: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: raises(kind("no port\nis free")))
    with pytest.raises(InputError) as error:
        connect(Cluster(address=address))
    assert str(error.value).startswith(told)


class _OpenFileError(Exception):
    """What no pickle can hold."""

    def __init__(self) -> None:
        super().__init__("a lock is held")
        self.lock = threading.Lock()


def raised_in_a_worker(call: Callable[[], object]) -> RayTaskError:
    """What Ray gives a driver whose worker raised."""
    try:
        call()
    except Exception as error:
        told = RayTaskError("load", traceback.format_exc(), error, proctitle="worker", pid=1, ip="10.0.0.1")
        return cast(RayTaskError, pickle.loads(pickle.dumps(told)).as_instanceof_cause())
    raise AssertionError


def raises(error: Exception) -> None:
    raise error


HOPELESS = "cluster: no worker could be started: n1:"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: raises(InputError("sources.one", "has no config.json", "Copy it there.")),
            "sources.one: has no config.json (on n1; no worker could be started). Copy it there.",
        ),
        (
            lambda: RayWorker("w", {"nam": "small"}, Path("evidence"), {}).load(),
            "search.yaml: nam: is not a known key (on n1; no worker could be started). Did you mean 'name'?",
        ),
        (
            lambda: raises(OSError("the disk\nis away")),
            f"{HOPELESS} OSError: the disk is away. It was raised there in {__file__}, line ",
        ),
        (
            lambda: Cluster(cpus_per_worker=0),
            f"{HOPELESS} ValidationError: 1 validation error for Cluster cpus_per_worker",
        ),
        (
            lambda: raises(_OpenFileError()),
            f"{HOPELESS} test_ray_pool._OpenFileError: a lock",
        ),
    ],
    ids=["input", "search file", "other", "pydantic", "unpicklable"],
)
def test_what_a_worker_raises_arrives_with_its_place_its_message_and_its_hint(
    call: Callable[[], object], told: str
) -> None:
    error = raised_in_a_worker(call)
    assert str(fault_of(error, "n1")).startswith(told)
    if isinstance(error, InputError):
        assert words_of(error) == str(error.cause)


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[WorkerKiller]:
    thread = WorkerKiller(tmp_path / "search")
    thread.start()
    yield thread
    thread.join(1)


@pytest.mark.nightly  # two whole searches; below, killed workers with small candidates
@pytest.mark.timeout(300)
def test_a_worker_killed_mid_candidate_loses_nothing(
    tmp_path: Path, killer: WorkerKiller, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search_file(tmp_path, pool="ray", cluster={"workers": 2}, budget={"candidates": 17})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert killer.killed is not None
    rows = json_of(capsys, "top", tmp_path / "search", "--all", "--json")
    assert len(rows) == 17
    assert {row["status"] for row in rows} <= {"done", "cached"}
    with open_store(tmp_path / "search") as store:
        assert [row.attempts for row in store.candidates() if row.attempts != 1 and row.same_as is None] == [2]

    same = search_file(tmp_path, budget={"candidates": 17})
    assert evomerge("search", same, "--dir", tmp_path / "in-process") == 0
    alone = json_of(capsys, "top", tmp_path / "in-process", "--all", "--json")
    assert [(r["genome"], r["recipe_hash"], r["scores"]) for r in rows] == [
        (r["genome"], r["recipe_hash"], r["scores"]) for r in alone
    ]


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_proxy_leads_workers_of_ray_where_it_leads_this_process(tmp_path: Path) -> None:
    data = ROOT / "evaluators" / "tasks" / "data"
    proxy = {"file": f"{data}/mini_math_ja.search.jsonl", "items": 8, "steps": 2, "drawn": 4}
    tables = []
    for pool in ("in_process", "ray"):
        file = short_search_file(tmp_path, proxy=proxy, pool=pool, cluster={"workers": 2}, budget={"candidates": 11})
        assert evomerge("search", file, "--dir", tmp_path / pool) == 0
        tables.append(table(tmp_path / pool))
    assert tables[0] == tables[1]
    assert [row[2] for row in tables[0]].count("proxy") == 2


@pytest.mark.nightly
def test_a_search_that_an_older_program_began_goes_on_in_this_pool(tmp_path: Path) -> None:
    goes_on_and_is_exported(tmp_path, "--set", "pool=ray", "--set", "cluster.workers=2")


@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_when_no_worker_can_start_the_search_ends_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "TRIES_AT_FIRST", 1)  # a worker takes long to start; stubs below are tried again
    file = search_file(tmp_path, pool="ray", cluster={"workers": 1}, device="cuda:7")
    assert evomerge("search", file, "--dir", tmp_path / "search") == 2
    error = capsys.readouterr().err
    assert "no worker could be started" in error
    assert "'cuda:7' cannot be used here" in error
    assert "error: device: " in error
    status = json_of(capsys, "status", tmp_path / "search", "--json")
    assert status["state"] == "interrupted"
    assert f"error: {status['why']}\n" in error
    assert status["candidates"]["failed"] == 0
    with open_store(tmp_path / "search") as store:
        words = [event.payload["why"] for event in store.events(kinds=("worker failed to start",))]
    assert len(words) == 1
    assert "'cuda:7' cannot be used here" in words[0]


# A cluster of several nodes, and workers that only do what they are told ---------------------------------------------

CRASHES, HANGS, HOLDS, DEVICES = 3, 5, 100, 50


class Stub(RayWorker):
    """Knows no models: 3 ends its process, 5 hangs at the first attempt, 50 counts the GPUs that it may see.

    100 and more wait for the file ``go``.
    Its seconds are what the environment variable STUB says. It cannot start while there is a file ``broken``.
    """

    def __init__(self, name: str, settings: dict[str, Any], folder: Path, contents: dict[str, str]) -> None:
        self._go = folder / "go"

    def load(self) -> None:
        if self._go.with_name("broken").exists():
            raise OSError("the sources cannot be read here")

    def run(self, job: Job) -> Finished:
        if job.candidate == CRASHES:
            os._exit(1)
        while (job.candidate, job.attempt) == (HANGS, 1) or (job.candidate >= HOLDS and not self._go.exists()):
            time.sleep(0.05)
        if job.candidate == DEVICES:
            visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
            return Finished(job.candidate, job.attempt, "", Measured([], {"gpus": float(len(visible))}))
        return Finished(job.candidate, job.attempt, "", Measured([], {"score": float(os.environ.get("STUB", "0"))}))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head without room for workers, and one node with room for one."""
    ray.shutdown()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found = LocalCluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    add_node(found)
    yield found
    ray.shutdown()
    found.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def add_node(cluster: LocalCluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)


@pytest.fixture
def start(cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RayPool]]:
    """Starts a pool of stubs; its arguments are keys of ``cluster`` in the search file."""
    monkeypatch.setattr(ray_pool, "_LOOK_S", 0.2)
    pools: list[RayPool] = []

    def start(**cluster: Any) -> RayPool:
        file = load_search_file(search_file(tmp_path, pool="ray"))
        file = file.model_copy(update={"cluster": Cluster(**cluster)})
        pools.append(RayPool(file, tmp_path, {}, Stub))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def until(pool: RayPool, reached: Callable[[], bool]) -> list[Finished]:
    """Wait on the pool until something is so; what finished meanwhile. The test's own limit ends a wait in vain."""
    finished: list[Finished] = []
    while not reached():
        finished += pool.wait(0.1)
    return finished


def hold(pool: RayPool, candidate: int) -> None:
    pool.submit(Job(candidate, 1, RECIPE, []))


@pytest.mark.timeout(120)
def test_a_candidate_that_kills_two_workers_fails_and_one_that_hangs_is_tried_again(
    start: Callable[..., RayPool],
) -> None:
    notes = Notes()
    dispatcher = Dispatcher(start(), Control(list), 2, lambda: None, Deadlines(most_s=2.0))
    assert dispatcher.run(feed_of([Pending(n, 1, RECIPE, str(n), []) for n in range(8)]), notes)
    assert sorted(notes.done) == [(n, 2 if n == HANGS else 1) for n in range(8) if n != CRASHES]
    assert notes.final == [CRASHES]
    assert sorted(notes.reasons) == ["timeout", "worker_died", "worker_died"]


def test_ray_sets_up_what_the_search_file_says(start: Callable[..., RayPool]) -> None:
    pool = start(runtime_env={"env_vars": {"STUB": "4.5"}})
    pool.submit(Job(0, 1, RECIPE, []))
    finished: list[Finished] = []
    while not finished:
        finished = pool.wait(0.1)
    assert isinstance(finished[0].result, Measured)
    assert finished[0].result.timings == {"score": 4.5}


@pytest.mark.parametrize(
    ("runtime_env", "place", "problem"),
    [
        ({"env_var": {"A": "1"}}, "cluster.runtime_env.env_var", "not a known key"),
        ({"working_dir": "."}, "cluster.runtime_env.working_dir", "not a known key"),
        ({"env_vars": {"A": 1}}, "cluster.runtime_env", "must be of type Dict[str, str]"),
        ({"pip": ["a"], "conda": "b"}, "cluster.runtime_env", "cannot be specified at the same time"),
        ({"pip": "no-such-file.txt"}, "cluster.runtime_env", "no-such-file.txt"),
    ],
)
def test_a_wrong_runtime_env_is_refused_before_anything_starts(
    runtime_env: dict[str, Any], place: str, problem: str
) -> None:
    with pytest.raises(InputError) as refused:
        runtime_env_of(Cluster(runtime_env=runtime_env))
    assert refused.value.place == place
    assert problem in refused.value.problem


def test_requirements_are_read_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("one==1\ntwo\n")
    found = runtime_env_of(Cluster(runtime_env={"pip": str(tmp_path / "requirements.txt")}))
    assert found["pip"]["packages"] == ["one==1", "two"]
    assert runtime_env_of(Cluster(runtime_env=found)) == found  # as it travels with a job


@pytest.mark.nightly  # nodes that come and go: ten seconds each, most of them of processes of Ray
@pytest.mark.timeout(120)
def test_the_gpus_of_a_worker_are_held_together_on_one_node(
    start: Callable[..., RayPool], cluster: LocalCluster
) -> None:
    others = [cluster.add_node(num_cpus=4, num_gpus=gpus, object_store_memory=80 * 2**20) for gpus in (1, 2)]
    pool = start(gpus_per_worker=2)
    pool.submit(Job(DEVICES, 1, RECIPE, []))
    finished: list[Finished] = []
    while not finished:
        finished = pool.wait(0.1)
    assert isinstance(finished[0].result, Measured)
    assert finished[0].result.timings == {"gpus": 2.0}
    assert finished[0].worker.endswith(others[1].node_id[:6])
    assert pool.state().workers == 1
    (group,) = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert (group["strategy"], group["bundles"]) == ("STRICT_PACK", {0: {"CPU": 1.0, "GPU": 2.0}})
    pool.close()
    assert placement_group_table()[group["placement_group_id"]]["state"] == "REMOVED"
    for other in others:
        cluster.remove_node(other)


class TestRay(PoolContract):
    one_process = False

    @pytest.fixture
    def pool(self, start: Callable[..., RayPool]) -> RayPool:
        return start()


def all_news(pool: RayPool, told: list[PoolNews]) -> list[PoolNews]:
    """All news so far."""
    told += pool.news()
    return told


def kinds_of(told: list[PoolNews], node: Any) -> list[str]:
    """What was told of a node and its workers, in order."""
    return [each.kind for each in told if each.node.endswith(node.node_id[:6])]


@pytest.mark.nightly  # nodes that come and go: ten seconds each, most of them of processes of Ray
@pytest.mark.timeout(180)
def test_workers_follow_the_nodes(start: Callable[..., RayPool], cluster: LocalCluster, tmp_path: Path) -> None:
    pool, told = start(), list[PoolNews]()
    hold(pool, HOLDS)
    until(pool, lambda: pool.state().busy == 1)
    second = add_node(cluster)
    hold(pool, HOLDS + 1)
    until(pool, lambda: pool.state().busy == 2)
    assert pool.state().workers == 2

    cluster.remove_node(second)
    lost: list[Finished] = []
    while not lost:
        lost = pool.wait(0.1)
    assert [(f.candidate, f.result.reason) for f in lost if isinstance(f.result, Failed)] == [(HOLDS + 1, "node_lost")]
    until(pool, lambda: (pool.state().workers, pool.state().starting) == (1, 0))

    third = add_node(cluster)
    until(pool, lambda: (pool.state().workers, pool.state().starting) == (2, 0))
    drain(third)
    until(pool, lambda: third.node_id not in nodes.usable_nodes() and pool.state().workers == 1)
    (tmp_path / "go").touch()
    for candidate in range(HOLDS + 2, HOLDS + 5):
        hold(pool, candidate)
    done: list[Finished] = []
    while len(done) < 4:
        done += pool.wait(0.1)
    assert {f.worker for f in done} == {done[0].worker}
    assert not done[0].worker.endswith(third.node_id[:6])
    assert kinds_of(all_news(pool, told), second) == ["node joined", "worker started", "worker died", "node left"]
    assert kinds_of(told, third)[:4] == ["node joined", "worker started", "node drains", "worker dropped"]
    cluster.remove_node(third)
    until(pool, lambda: kinds_of(all_news(pool, told), third)[4:] == ["node left"])


@pytest.mark.nightly  # a worker that is killed or hangs is replaced in a test above
@pytest.mark.timeout(120)
def test_a_worker_that_cannot_start_is_tried_again(
    start: Callable[..., RayPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "FIRST_PAUSE_S", 0.1)
    (tmp_path / "broken").touch()
    pool, told = start(), list[PoolNews]()
    until(pool, lambda: [each.kind for each in all_news(pool, told)][-1:] == ["worker failed to start"])
    assert told[-1].why == "OSError: the sources cannot be read here"
    assert told[-1].worker == f"ray-0@{told[-1].node}"
    (tmp_path / "broken").unlink()
    hold(pool, 1)
    done: list[Finished] = []
    while not done:
        done = pool.wait(0.1)
    assert done[0].worker == f"ray-1@{told[-1].node}"

    pool.close()
    (tmp_path / "broken").touch()
    hopeless = start()
    with pytest.raises(InputError, match=r"no worker could be started: .*: OSError: the sources cannot be read here"):
        until(hopeless, lambda: False)
    failed = [each.kind for each in hopeless.news() if each.kind != "node joined"]
    assert failed == ["worker failed to start"] * starts.TRIES_AT_FIRST


def drain(node: Any) -> None:
    """Announce that a node goes away in an hour, as a provider of spot machines does."""
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node.node_id, reason, "", (time.time_ns() // 10**6) + 3_600_000)
    assert accepted, why


@pytest.mark.nightly  # nodes that come and go: ten seconds each, most of them of processes of Ray
@pytest.mark.timeout(120)
def test_when_every_node_is_gone_jobs_wait_for_one(
    start: Callable[..., RayPool], cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = start()
    until(pool, lambda: pool.state().starting == 0)
    monkeypatch.setattr(ray_pool, "usable_nodes", dict)
    until(pool, lambda: pool.state().workers == 0)
    hold(pool, 1)
    assert pool.wait(0.0) == []
    monkeypatch.setattr(ray_pool, "usable_nodes", nodes.usable_nodes)
    done: list[Finished] = []
    while not done:
        done = pool.wait(0.1)
    assert isinstance(done[0].result, Measured)


@pytest.mark.timeout(120)
def test_the_autoscaler_is_told_how_many_are_wanted_until_the_end(
    start: Callable[..., RayPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    pool = start(workers=Workers(min=1, max=3))
    assert pool.state().workers == 1
    pool.close()
    assert asked == [[{"CPU": 1.0}] * 3, []]
    with pytest.raises(InputError, match="2 x 1 CPU = 2 of 1"):
        start(workers=Workers(min=2, max=3))


def test_no_worker_is_spread_over_two_nodes() -> None:
    asked = Cluster(cpus_per_worker=2)
    assert workers_that_fit(asked, {"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 1.0}) == 2
    with pytest.raises(InputError, match="each on one node"):
        workers_that_fit(Cluster(cpus_per_worker=2, workers=3), {"CPU": 3.0}, {"CPU": 3.0})
    assert worker_limits(Cluster()) == (1, None)


# The last one, for Ray goes on to send workers to that node until it misses it, which the others should not wait for.
@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_a_node_that_vanishes_is_not_waited_for_until_ray_misses_it(
    start: Callable[..., RayPool], cluster: LocalCluster
) -> None:
    pool = start()
    second = add_node(cluster)
    hold(pool, HOLDS)
    hold(pool, HOLDS + 1)
    until(pool, lambda: pool.state().busy == 2)
    cluster.remove_node(second, allow_graceful=False)
    lost: list[Finished] = []
    while not lost:
        lost = pool.wait(0.1)
    missed = second.node_id not in nodes.usable_nodes()
    assert [f.result.reason for f in lost if isinstance(f.result, Failed)] == ["node_lost"]
    until(pool, lambda: pool.state().workers == 1)
    assert kinds_of(list(pool.news()), second)[-2:] == ["worker died", "node left"]
    assert not missed, "or Ray is quicker now, and answers() is not needed any more"
