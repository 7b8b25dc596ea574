"""The Ray pool: each worker is an actor that keeps its sources and evaluators for its lifetime."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from evomerge.errors import InputError
from evomerge.search.clusters.joining import connect
from evomerge.search.clusters.nodes import (
    Resources,
    answers,
    ask_for,
    draining_nodes,
    fault_of,
    is_lost_node_error,
    needs_of_worker,
    node_names,
    room,
    together_on_a_node,
    usable_nodes,
    words_of,
    worker_limits,
    workers_that_fit,
)
from evomerge.search.clusters.starts import Starts, next_places
from evomerge.search.pools.in_process import JobRunner
from evomerge.search.settings.folder import FILE_NAME
from evomerge.search.settings.runtime_env import runtime_env_of
from evomerge.search.settings.search_file import SearchFile, read_settings
from evomerge.search.work.jobs import Failed, FailureReason, Finished, Job, NewsKind, PoolNews, PoolState, batch
from evomerge.startup import collect_garbage_rarely

# Threads are set before torch starts in the worker; a worker that takes every core slows all the others down.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_SILENT_S = 30.0  # how long an unresponsive node is left alone: twice the time that Ray takes to notice
_LOOK_S = 5.0  # how often the nodes are checked; they take longer than that to join or to be declared dead
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM")


class RayWorker:
    """The actor: a ``Worker`` that is called through Ray. Heavy imports happen in its own process."""

    def __init__(self, name: str, settings: dict[str, Any], evidence: Path, contents: Mapping[str, str]) -> None:
        self._arguments = (name, settings, evidence, contents)

    def node(self) -> str:
        """The id of the node that Ray has put it on."""
        return str(ray.get_runtime_context().get_node_id())

    def load(self) -> None:
        """Open the sources; after this the worker can take jobs."""
        collect_garbage_rarely()
        from evomerge.merging.measured.evidence import Evidence
        from evomerge.search.workers.worker import Worker

        name, settings, folder, contents = self._arguments
        evidence = Evidence(folder, contents)
        self._worker: JobRunner = Worker.start(name, read_settings(settings, FILE_NAME), evidence)

    def run(self, job: Job) -> Finished:
        return self._worker.run(job)

    def run_together(self, jobs: Sequence[Job]) -> list[Finished]:
        return self._worker.run_together(jobs)


@dataclass(eq=False)
class _Hired:
    """A worker as the pool sees it.

    Attributes:
        node: where it should be, and once it is placed, where it is.
        group: the placement group that holds its GPUs together; None if it has at most one GPU.
    """

    number: int
    actor: Any
    node: str
    group: PlacementGroup | None = None
    phase: Literal["placing", "placed", "loading", "idle", "busy"] = "placing"

    @property
    def has_loaded(self) -> bool:
        return self.phase in ("idle", "busy")

    def end(self) -> None:
        """End its process, and release its resources."""
        ray.kill(self.actor)
        if self.group is not None:
            remove_placement_group(self.group)


class RayPool:
    """Jobs on Ray actors, of this machine or of a cluster.

    An actor that dies is replaced if there is room, and its job comes back as failed; the driver decides about another
    attempt. Ray itself repeats nothing (``max_task_retries=0``): a call that ran twice would look the same as one that
    ran once. Workers follow the cluster: they are started as nodes join, up to ``cluster.workers``, and those on a node
    that is about to leave get no more work. If no node is left, jobs wait for one. On each node one worker loads first,
    then a few at once; if a start fails, another is tried after a pause (``starts``).

    Args:
        evidence: folder of evidence about the sources, for every worker; see ``Evidence``.
        contents: digests of the sources.
        worker: the actor's class.
    """

    def __init__(
        self, file: SearchFile, evidence: Path, contents: Mapping[str, str], worker: type[RayWorker] = RayWorker
    ) -> None:
        self._arguments = (file.model_dump(mode="json"), evidence, contents)
        self._worker = worker
        self._runtime_env = runtime_env_of(file.cluster)
        self._owns = connect(file.cluster)
        nodes = usable_nodes()
        try:
            fitting = workers_that_fit(file.cluster, *nodes.values())
        except InputError:
            self._disconnect()
            raise
        self._threads = file.cluster.cpus_per_worker
        self._together = file.together
        self._needs = needs_of_worker(file.cluster, *nodes.values())
        _, self._most = worker_limits(file.cluster)
        self._asked_for = self._most if self._most is not None and self._most > fitting else 0
        if self._asked_for:
            ask_for(self._needs, self._asked_for)
        self._queue: deque[Job] = deque()
        self._calls: dict[Any, tuple[_Hired, list[Job]]] = {}
        self._began: dict[tuple[int, int], float] = {}
        self._ended: list[Finished] = []  # by this pool, and not returned yet
        self._news: list[PoolNews] = []
        self._workers: dict[int, _Hired] = {}
        self._starting: dict[Any, _Hired] = {}  # by the pending call
        self._idle: list[_Hired] = []
        self._hired = 0
        self._starts = Starts()
        self._nodes: Mapping[str, Resources] = {}
        self._draining: set[str] = set()
        self._silent: dict[str, float] = {}  # when a node was found unresponsive before Ray noticed
        self._names: Mapping[str, str] = {}
        self._look_at = 0.0
        self._look()

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        if self._together == 1:  # otherwise the next ``wait`` distributes all submitted jobs
            self._feed()

    def wait(self, timeout_s: float) -> list[Finished]:
        self._check_alive()
        self._feed()
        finished, self._ended = self._ended, []
        pending = [*self._calls, *self._starting]
        if pending:
            ready, _ = ray.wait(pending, num_returns=1, timeout=0 if finished else timeout_s)
            if ready:  # take all calls that have ended, not only the first
                ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
            finished += [done for call in ready if call in self._calls for done in self._collect(call)]
            for call in ready:
                if call in self._starting:
                    self._greet(call)
        elif not finished:
            time.sleep(timeout_s)
        if time.monotonic() >= self._look_at:
            self._look()
        self._load()
        self._feed()
        return finished

    def running(self) -> Mapping[tuple[int, int], float]:
        return dict(self._began)

    def now(self) -> float:
        return time.monotonic()

    def cancel(self, candidate: int, attempt: int) -> None:
        for call, (worker, jobs) in self._calls.items():
            if (candidate, attempt) in [(job.candidate, job.attempt) for job in jobs]:
                del self._calls[call]  # do not wait for the worker: it may be unreachable
                seconds = max([time.monotonic() - self._began.pop((job.candidate, job.attempt)) for job in jobs])
                failure = Failed("timeout", f"ended after {seconds:.0f} s")
                self._ended += self._failed(worker, jobs, failure)
                self._drop(worker, "worker dropped", f"candidate {candidate} took longer than {seconds:.0f} s")
                return

    def state(self) -> PoolState:
        starting = sum(not worker.has_loaded for worker in self._workers.values())
        workers = len(self._workers)
        gpus = workers * self._needs.get("GPU", 0.0)
        return PoolState(workers, len(self._calls), starting, len(self._queue), self._together, gpus)

    def news(self) -> Sequence[PoolNews]:
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        for worker in self._workers.values():
            worker.end()
        if self._asked_for and self._workers:
            ask_for(self._needs, 0)
        self._workers.clear()
        self._calls.clear()
        self._starting.clear()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._owns and ray.is_initialized():
            ray.shutdown()
            self._owns = False

    # Workers that come and go -------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Follow nodes that join, leave, or are about to leave."""
        self._look_at = time.monotonic() + _LOOK_S
        self._look_at_nodes()
        for worker in [worker for worker in self._workers.values() if worker.phase != "busy"]:
            if worker.node not in self._nodes:
                self._drop(worker, "worker dropped", "its node is gone or about to go")
            elif self._starts.is_hopeless(worker.node) and worker.phase in ("placing", "placed"):
                self._drop(worker, "worker dropped", "no worker starts on its node")
        here = Counter(worker.node for worker in self._workers.values())
        free = {node: self._free(node, here[node]) for node in self._nodes}
        left = math.inf if self._most is None else self._most - sum(here[node] for node in self._nodes)
        placing = Counter(worker.node for worker in self._workers.values() if worker.phase == "placing")
        for node in next_places(free, placing, left):
            self._hire(node)

    def _look_at_nodes(self) -> None:
        """Update the list of nodes, and report changes."""
        now = time.monotonic()
        self._silent = {node: since for node, since in self._silent.items() if now - since < _SILENT_S}
        before, draining_before = self._nodes, self._draining
        self._nodes = {node: resources for node, resources in usable_nodes().items() if node not in self._silent}
        if self._nodes.keys() != before.keys():
            self._names = node_names()
        self._draining = draining_nodes()
        for node in self._nodes.keys() - before.keys():
            self._tell("node joined", node)
        for node in before.keys() - self._nodes.keys():
            self._tell("node drains" if node in self._draining else "node left", node)
        for node in draining_before - self._draining:
            self._tell("node left", node)

    def _free(self, node: str, here: int) -> float:
        """How many more workers a node can take, given the number that it has or will have."""
        loaded = self._loaded(node)
        return min(room(self._needs, self._nodes[node]) - here, self._starts.most(node, here, loaded, self.now()))

    def _loaded(self, node: str) -> int:
        return sum(worker.has_loaded and worker.node == node for worker in self._workers.values())

    def _hire(self, node: str) -> None:
        """Have Ray start a worker's process: on this node, unless others have taken its resources."""
        number, self._hired = self._hired, self._hired + 1
        environment = {name: str(self._threads) for name in _THREADS}
        environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= self._runtime_env.get("env_vars", {})
        group = together_on_a_node(self._needs, node) if self._needs.get("GPU", 0) > 1 else None
        place = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        actor = (
            ray.remote(self._worker)
            .options(
                num_cpus=self._needs.get("CPU", 0),
                num_gpus=self._needs.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=place if group is None else PlacementGroupSchedulingStrategy(group, 0),
                runtime_env=self._runtime_env | {"env_vars": environment},
            )
            .remote(f"ray-{number}", *self._arguments)
        )
        worker = self._workers[number] = _Hired(number, actor, node, group)
        self._starting[actor.node.remote()] = worker

    def _load(self) -> None:
        """Let placed workers open the sources, with no more per node at once than ``starts`` allows."""
        for worker in self._workers.values():
            if worker.phase == "placed":
                there = [other for other in self._workers.values() if other.node == worker.node]
                loading = sum(other.phase == "loading" for other in there)
                if loading < self._starts.limit(worker.node, self._loaded(worker.node), self.now()):
                    worker.phase = "loading"
                    self._starting[worker.actor.load.remote()] = worker

    def _greet(self, call: Any) -> None:
        """Handle a worker that was placed, has loaded its sources, or has failed to."""
        worker = self._starting.pop(call)
        try:
            result = ray.get(call)
        except RayError as error:
            self._fail_to_start(worker, error)
            return
        if worker.phase == "placing":
            worker.node, worker.phase = result, "placed"
            self._look_at = 0.0  # another may be started instead
        else:
            worker.phase = "idle"
            self._idle.append(worker)
            self._starts.started(worker.node)
            self._tell("worker started", worker.node, self._name(worker))

    def _fail_to_start(self, worker: _Hired, error: RayError) -> None:
        words = words_of(error)
        if self._is_lost(worker.node, error):
            self._drop(worker, "worker died", words)
            return
        died = not isinstance(error, RayTaskError)
        self._starts.failed(worker.node, self.now(), fault_of(error, self._node_name(worker.node)), died=died)
        self._drop(worker, "worker failed to start", words)

    def _drop(self, worker: _Hired, kind: NewsKind, why: str) -> None:
        """End a worker; another is started at the next check of the cluster, which is soon."""
        self._workers.pop(worker.number).end()
        self._starting = {call: other for call, other in self._starting.items() if other is not worker}
        self._idle = [other for other in self._idle if other is not worker]
        self._tell(kind, worker.node, self._name(worker), why)
        self._look_at = 0.0

    def _is_lost(self, node: str, error: RayError) -> bool:
        """Whether a worker's node is gone or about to leave, so that the node ended the worker."""
        if isinstance(error, RayTaskError):
            return False
        if is_lost_node_error(error) or node in self._silent or node not in usable_nodes():
            return True
        if isinstance(error, ActorDiedError) or answers(node):
            return False  # its raylet saw the process die, or would have
        self._silent[node] = self.now()
        return True

    def _tell(self, kind: NewsKind, node: str, worker: str = "", why: str = "") -> None:
        self._news.append(PoolNews(kind, self._node_name(node), worker, why))

    def _node_name(self, node: str) -> str:
        return self._names.get(node, node[:6])

    def _name(self, worker: _Hired) -> str:
        return f"ray-{worker.number}@{self._node_name(worker.node)}"

    # Jobs ---------------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        while self._idle and self._queue:
            worker, jobs = self._idle.pop(0), batch(self._queue)
            worker.phase = "busy"
            actor = worker.actor
            call = actor.run_together.remote(jobs) if self._together > 1 else actor.run.remote(jobs[0])
            self._calls[call] = (worker, jobs)
            self._began |= {(job.candidate, job.attempt): time.monotonic() for job in jobs}

    def _collect(self, call: Any) -> list[Finished]:
        worker, jobs = self._calls.pop(call)
        for job in jobs:
            self._began.pop((job.candidate, job.attempt))
        try:
            returned = ray.get(call)
            finished = cast(list[Finished], returned if self._together > 1 else [returned])
        except RayError as error:  # its process, node or owner is gone; a task error comes from our own code
            reason, words = self._blame(worker, error), words_of(error)
            message = f"its node is gone or about to go: {words}" if reason == "node_lost" else words
            failure = Failed(reason, message, str(error))
            self._drop(worker, "worker dropped" if reason == "error" else "worker died", message)
            return self._failed(worker, jobs, failure)
        worker.phase = "idle"
        results = [done.result for done in finished]
        if died := [result for result in results if isinstance(result, Failed) and result.reason == "worker_died"]:
            self._drop(worker, "worker dropped", died[0].message)  # it reported this itself
        elif worker.node not in self._nodes:
            self._drop(worker, "worker dropped", "its node is gone or about to go")
        else:
            self._idle.append(worker)
        return [replace(done, worker=self._name(worker)) for done in finished]

    def _failed(self, worker: _Hired, jobs: Sequence[Job], failure: Failed) -> list[Finished]:
        return [Finished(job.candidate, job.attempt, self._name(worker), failure) for job in jobs]

    def _blame(self, worker: _Hired, error: RayError) -> FailureReason:
        if isinstance(error, RayTaskError):
            return "error"
        return "node_lost" if self._is_lost(worker.node, error) else "worker_died"

    def _check_alive(self) -> None:
        """If no worker can start anywhere, nothing will ever finish: say why instead of waiting forever.

        Raises:
            InputError: the error of the worker that last failed to start.
        """
        if self._workers or self._ended:
            return
        self._look()  # another node may have joined, or a pause may be over
        able = [node for node, resources in self._nodes.items() if room(self._needs, resources)]
        if not self._workers and able and all(self._starts.is_hopeless(node) for node in able):
            assert self._starts.last_fault is not None  # a node becomes hopeless by failed starts
            raise self._starts.last_fault
