"""The Ray pool: each worker is an actor that keeps its sources and evaluators for life."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from evomerge.errors import InputError
from evomerge.search.jobs import Failed, FailureReason, Finished, Job, PoolState
from evomerge.search.launch import check_secured, listeners, who_listens
from evomerge.search.pools.in_process import JobRunner
from evomerge.search.pools.nodes import (
    ask_for,
    needs_of_worker,
    room,
    usable_nodes,
    worker_limits,
    workers_that_fit,
)
from evomerge.search.search_file import Cluster, SearchFile

# Threads are set before torch starts in the worker; a worker that takes every core slows all the others down.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LOOK_S = 5.0  # how often the nodes are looked at; a node takes longer than that to come or to be missed
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM")


class RayWorker:
    """The actor: a ``Worker`` behind Ray's calls. Heavy imports happen in its own process."""

    def __init__(self, name: str, settings: dict[str, Any], statistics: Path) -> None:
        from evomerge.search.worker import Worker

        self._worker: JobRunner = Worker.start(name, SearchFile.model_validate(settings), statistics)

    def ready(self) -> str:
        """The id of its node, once the worker can take jobs."""
        return str(ray.get_runtime_context().get_node_id())

    def run(self, job: Job) -> Finished:
        return self._worker.run(job)


class RayPool:
    """Jobs on Ray actors, of this machine or of a cluster.

    An actor that dies is replaced where there is room, and its job comes back as failed; the driver decides on another
    attempt. Ray itself repeats nothing (``max_task_retries=0``): a call that ran twice could not be told from one that
    ran once. Workers follow the cluster: they are started as nodes join, up to ``cluster.workers``, and those on a node
    that is about to go get no more work. When no node is left, jobs wait for one.

    Args:
        worker: the actor's class.
    """

    def __init__(self, file: SearchFile, statistics: Path, worker: type[RayWorker] = RayWorker) -> None:
        self._arguments = (file.model_dump(mode="json"), statistics)
        self._worker = worker
        self._owns = _connect(file.cluster)
        self._nodes = usable_nodes()
        try:
            fitting = workers_that_fit(file.cluster, *self._nodes.values())
        except InputError:
            self._disconnect()
            raise
        self._threads = file.cluster.cpus_per_worker
        self._needs = needs_of_worker(file.cluster, *self._nodes.values())
        _, self._most = worker_limits(file.cluster)
        self._asked_for = self._most if self._most is not None and self._most > fitting else 0
        if self._asked_for:
            ask_for(self._needs, self._asked_for)
        self._queue: deque[Job] = deque()
        self._calls: dict[Any, tuple[int, Job]] = {}
        self._began: dict[tuple[int, int], float] = {}
        self._ended: list[Finished] = []  # by ourselves, and not given back yet
        self._starting: dict[Any, int] = {}
        self._actors: dict[int, Any] = {}
        self._homes: dict[int, str] = {}  # the node of each worker that has started
        self._idle: list[int] = []
        self._started = 0
        self._failed_starts = 0  # since the nodes last changed; where a worker cannot start, the next one cannot
        self._failed_start = ""
        self._look_at = 0.0
        self._look()

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._feed()

    def wait(self, timeout_s: float) -> list[Finished]:
        self._check_alive()
        finished, self._ended = self._ended, []
        pending = [*self._calls, *self._starting]
        if pending:
            ready, _ = ray.wait(pending, num_returns=1, timeout=0 if finished else timeout_s)
            if ready:  # take everything that has ended by now, not only the first
                ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
            finished += [self._collect(call) for call in ready if call in self._calls]
            for call in ready:
                if call in self._starting:
                    self._greet(call)
        elif not finished:
            time.sleep(timeout_s)
        if time.monotonic() >= self._look_at:
            self._look()
        self._feed()
        return finished

    def running(self) -> Mapping[tuple[int, int], float]:
        return dict(self._began)

    def now(self) -> float:
        return time.monotonic()

    def cancel(self, candidate: int, attempt: int) -> None:
        for call, (number, job) in self._calls.items():
            if (job.candidate, job.attempt) == (candidate, attempt):
                del self._calls[call]  # nothing is awaited of the worker: it may be out of reach
                seconds = time.monotonic() - self._began.pop((candidate, attempt))
                failure = Failed("timeout", f"ended after {seconds:.0f} s")
                self._ended.append(Finished(candidate, attempt, f"ray-{number}", failure))
                self._drop(number)
                return

    def state(self) -> PoolState:
        return PoolState(
            workers=len(self._actors), busy=len(self._calls), starting=len(self._starting), queued=len(self._queue)
        )

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        if self._asked_for and self._actors:
            ask_for(self._needs, 0)
        self._actors.clear()
        self._calls.clear()
        self._starting.clear()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._owns and ray.is_initialized():
            ray.shutdown()
            self._owns = False

    # Workers that come and go -------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Follow the nodes that join, leave, and are about to leave."""
        self._look_at = time.monotonic() + _LOOK_S
        nodes = usable_nodes()
        if nodes.keys() != self._nodes.keys():
            self._failed_starts = 0
        self._nodes = nodes
        for number in [number for number in self._idle if self._homes[number] not in nodes]:
            self._idle.remove(number)
            self._drop(number)
        fitting = room(self._needs, *nodes.values())
        wanted = (fitting if self._most is None else min(fitting, self._most)) - self._failed_starts
        here = [number for number in self._actors if self._homes.get(number) in (None, *nodes)]
        for _ in range(wanted - len(here)):
            self._start_worker()
        # Those for which there is no room any more would wait for ever.
        waiting = sorted(self._starting, key=lambda call: self._starting[call])
        for call in waiting[max(0, len(waiting) - max(0, len(here) - wanted)) :]:
            self._drop(self._starting.pop(call))

    def _start_worker(self) -> None:
        number, self._started = self._started, self._started + 1
        environment = {name: str(self._threads) for name in _THREADS}
        environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        actor = (
            ray.remote(self._worker)
            .options(
                num_cpus=self._needs.get("CPU", 0),
                num_gpus=self._needs.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
            )
            .remote(f"ray-{number}", *self._arguments)
        )
        self._actors[number] = actor
        self._starting[actor.ready.remote()] = number

    def _greet(self, call: Any) -> None:
        """A worker has started, or has failed to."""
        number = self._starting.pop(call)
        try:
            self._homes[number] = ray.get(call)
        except RayError as error:
            self._actors.pop(number)
            self._failed_starts += 1
            self._failed_start = str(error)
        else:
            self._idle.append(number)

    def _drop(self, number: int) -> None:
        """End a worker; another is started when the cluster is next looked at, which is soon."""
        ray.kill(self._actors.pop(number))
        self._homes.pop(number, None)
        self._look_at = 0.0

    # Jobs ---------------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        while self._idle and self._queue:
            number, job = self._idle.pop(0), self._queue.popleft()
            self._calls[self._actors[number].run.remote(job)] = (number, job)
            self._began[job.candidate, job.attempt] = time.monotonic()

    def _collect(self, call: Any) -> Finished:
        number, job = self._calls.pop(call)
        self._began.pop((job.candidate, job.attempt))
        try:
            finished = cast(Finished, ray.get(call))
        except RayError as error:  # its process, its node or its owner is gone; a task error is of our own making
            reason: FailureReason = "error" if isinstance(error, RayTaskError) else "worker_died"
            self._drop(number)
            first = str(error).strip().splitlines()[0]
            return Finished(job.candidate, job.attempt, f"ray-{number}", Failed(reason, first, str(error)))
        beyond_use = isinstance(finished.result, Failed) and finished.result.reason == "worker_died"
        if beyond_use or self._homes[number] not in self._nodes:
            self._drop(number)  # it says so of itself, or its node is about to go
        else:
            self._idle.append(number)
        return finished

    def _check_alive(self) -> None:
        """When every worker failed to start, nothing will ever finish: say why instead of waiting for ever.

        Raises:
            InputError: with the last words of the worker that failed to start.
        """
        if self._actors or self._ended:
            return
        self._look()  # there may be another node by now; and those of a lost node did not fail by themselves
        if self._actors or not self._failed_starts:
            return
        lines = [line.strip() for line in self._failed_start.splitlines() if line.strip()]
        raise InputError("cluster", f"no worker could be started: {lines[-1] if lines else 'none is left'}")


def _connect(cluster: Cluster) -> bool:
    """Join the cluster, or start one on this machine; True when it was started here and is ours to end."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _private_files():
        try:
            context = ray.init(
                address=cluster.address or "local",
                include_dashboard=False if cluster.address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError("cluster.address", f"no Ray cluster answers at {cluster.address}: {error}") from None
    try:
        check_secured(context.dashboard_url if cluster.address else None, insecure=cluster.insecure)
    except InputError:
        ray.shutdown()
        raise
    if cluster.address is None:
        print(who_listens(listeners()), file=sys.stderr)
    return True


@contextmanager
def _private_files() -> Iterator[None]:
    """Ray writes its authentication token readable by everyone on the machine unless the umask forbids it."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
