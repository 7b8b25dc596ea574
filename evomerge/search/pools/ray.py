"""The Ray pool: each worker is an actor that keeps its sources and evaluators for life."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from evomerge.errors import InputError
from evomerge.search.jobs import Failed, FailureReason, Finished, Job, PoolState
from evomerge.search.launch import check_secured, listeners, who_listens
from evomerge.search.search_file import Cluster, SearchFile

# Threads are set before torch starts in the worker; a worker that takes every core slows all the others down.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM")


class RayWorker:
    """The actor: a ``Worker`` behind Ray's calls. Heavy imports happen in its own process."""

    def __init__(self, name: str, settings: dict[str, Any], statistics: Path) -> None:
        from evomerge.search.worker import Worker

        self._worker = Worker.start(name, SearchFile.model_validate(settings), statistics)

    def ready(self) -> int:
        """The process id, once the worker can take jobs."""
        return os.getpid()

    def run(self, job: Job) -> Finished:
        return self._worker.run(job)


class RayPool:
    """Jobs on Ray actors, of this machine or of a cluster.

    An actor that dies is replaced, and its job comes back as failed; the driver decides on another attempt. Ray itself
    repeats nothing (``max_task_retries=0``): a call that ran twice could not be told from one that ran once.
    """

    def __init__(self, file: SearchFile, statistics: Path) -> None:
        self._statistics = statistics
        self._settings = file.model_dump(mode="json")
        self._cluster = file.cluster
        self._owns = _connect(file.cluster)
        try:
            self._count = workers_that_fit(file.cluster, ray.cluster_resources())
        except InputError:
            self._disconnect()
            raise
        self._queue: deque[Job] = deque()
        self._calls: dict[Any, tuple[int, Job]] = {}
        self._starting: dict[Any, int] = {}
        self._actors: dict[int, Any] = {}
        self._idle: list[int] = []
        self._started = 0
        self._failed_start = ""
        for _ in range(self._count):
            self._start_worker()

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._feed()

    def wait(self, timeout_s: float) -> list[Finished]:
        self._check_alive()
        pending = [*self._calls, *self._starting]
        if not pending:
            return []
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout_s)
        if ready:  # take everything that has ended by now, not only the first
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        finished = [self._collect(call) for call in ready if call in self._calls]
        for call in ready:
            if call in self._starting:
                self._greet(call)
        self._feed()
        return finished

    def state(self) -> PoolState:
        return PoolState(
            workers=self._count, busy=len(self._calls), starting=len(self._starting), queued=len(self._queue)
        )

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._calls.clear()
        self._starting.clear()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._owns and ray.is_initialized():
            ray.shutdown()
            self._owns = False

    def _start_worker(self) -> None:
        number, self._started = self._started, self._started + 1
        threads = self._cluster.cpus_per_worker
        environment = {name: str(threads) for name in _THREADS}
        environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        actor = (
            ray.remote(RayWorker)
            .options(
                num_cpus=self._cluster.cpus_per_worker,
                num_gpus=gpus_per_worker(self._cluster, ray.cluster_resources()),
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
            )
            .remote(f"ray-{number}", self._settings, self._statistics)
        )
        self._actors[number] = actor
        self._starting[actor.ready.remote()] = number

    def _greet(self, call: Any) -> None:
        """A worker has started, or has failed to."""
        number = self._starting.pop(call)
        try:
            ray.get(call)
        except RayError as error:
            self._actors.pop(number)
            self._failed_start = str(error)
        else:
            self._idle.append(number)

    def _feed(self) -> None:
        while self._idle and self._queue:
            number, job = self._idle.pop(0), self._queue.popleft()
            self._calls[self._actors[number].run.remote(job)] = (number, job)

    def _collect(self, call: Any) -> Finished:
        number, job = self._calls.pop(call)
        try:
            finished = cast(Finished, ray.get(call))
        except RayError as error:  # its process, its node or its owner is gone; a task error is of our own making
            reason: FailureReason = "error" if isinstance(error, RayTaskError) else "worker_died"
            self._replace(number)
            first = str(error).strip().splitlines()[0]
            return Finished(job.candidate, job.attempt, f"ray-{number}", Failed(reason, first, str(error)))
        if isinstance(finished.result, Failed) and finished.result.reason == "worker_died":
            self._replace(number)  # it lives, but says of itself that it is beyond use
        else:
            self._idle.append(number)
        return finished

    def _replace(self, number: int) -> None:
        ray.kill(self._actors.pop(number))
        self._start_worker()

    def _check_alive(self) -> None:
        """When no worker lives and none is starting, nothing will ever finish: say why instead of waiting for ever.

        Raises:
            InputError: with the last words of the worker that failed to start.
        """
        if self._calls or self._starting or self._idle:
            return
        lines = [line.strip() for line in self._failed_start.splitlines() if line.strip()]
        raise InputError("cluster", f"no worker could be started: {lines[-1] if lines else 'none is left'}")


def gpus_per_worker(cluster: Cluster, resources: dict[str, float]) -> float:
    """As the search file says, else one where the cluster has any."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if resources.get("GPU", 0) else 0.0


def workers_that_fit(cluster: Cluster, resources: dict[str, float]) -> int:
    """How many workers to start: as many as asked, else as many as there is room for.

    Raises:
        InputError: the cluster has less than is asked for; with the arithmetic.
    """
    gpus = gpus_per_worker(cluster, resources)
    needs = {"CPU": float(cluster.cpus_per_worker), "GPU": gpus}
    room = min(int(resources.get(kind, 0) / each + 1e-9) for kind, each in needs.items() if each)
    wanted = cluster.workers or room
    if wanted > room or not wanted:
        wanted = max(wanted, 1)
        sums = [
            f"{wanted} x {each:g} {kind} = {wanted * each:g} of {resources.get(kind, 0):g}"
            for kind, each in needs.items()
            if wanted * each > resources.get(kind, 0)
        ]
        raise InputError(
            "cluster.workers", f"the cluster has too little: {'; '.join(sums)}", f"At most {room} such workers fit."
        )
    return wanted


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
