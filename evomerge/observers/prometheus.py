"""Metrics over HTTP in the text format of Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from pydantic import Field

from evomerge.errors import InputError
from evomerge.observers.base import News, Observer, ObserverSettings, PoolCounts, named, package
from evomerge.store.events import Eliminated, Failure, Rung, ScoresAdded
from evomerge.store.rows import CandidateRow, EventRow, SearchRow

_BUCKETS_S = tuple(m * 10.0**e for e in range(-2, 5) for m in (1, 2, 5))
"""From 10 ms, a merge of small models, to 14 hours, the longest plausible evaluation."""


class PrometheusSettings(ObserverSettings):
    """Serves metrics at ``http://host:port/metrics``.

    By default ``host`` is loopback, because anybody who can reach the port can read the metrics. Port 0 takes any free
    port.
    """

    kind: Literal["prometheus"]
    host: str = "127.0.0.1"
    port: int = Field(default=9090, ge=0, lt=2**16)

    def build(self, folder: Path, search: SearchRow) -> Prometheus:
        return Prometheus(self.host, self.port)


class Prometheus(Observer):
    """Counts from the first event of the search, so that counters continue from their old values after a resume."""

    def __init__(self, host: str, port: int) -> None:
        self.registry = CollectorRegistry()
        self._make_metrics()
        self._gpus = Gpus()
        self._server, self._thread = start_http_server(port, addr=host, registry=self.registry)
        self.port: int = self._server.server_port

    def _make_metrics(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"evomerge_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"evomerge_{name}", text, labels, registry=self.registry)

        self._search = Info("evomerge_search", "The search.", registry=self.registry)
        self._state = gauge("search_state", "1 for the state that the search is in.", "state")
        self._spent = gauge("spent_seconds", "Seconds in which a driver was running, as last recorded.")
        self._candidates = gauge("candidates", "Candidates by status.", "status")
        self._best = gauge("best", "The best mean on the search split so far.", "objective")
        self._held_out = gauge("held_out", "Means on the held-out split.", "objective", "candidate")
        self._winner = gauge("winner", "1 for the winner of the confirmation.", "candidate")
        self._front = gauge("front_size", "Candidates on the Pareto front.")
        self._workers = gauge("workers", "Workers by what they do.", "state")
        self._queue = gauge("queue_depth", "Jobs that wait for a worker.")
        self._idle = gauge("idle_share", "The share of the workers that have nothing to do now.")
        self._gpu_use = gauge("gpu_use_share", "How busy a GPU of this machine is.", "gpu")
        self._gpu_used = gauge("gpu_memory_used_bytes", "Memory in use on a GPU of this machine.", "gpu")
        self._gpu_size = gauge("gpu_memory_bytes", "Memory of a GPU of this machine.", "gpu")
        self._items = counter("items_scored", "Items that candidates were scored on.", "split")
        self._failures = counter("failures", "Failed attempts by reason.", "reason", "final")
        self._eliminated = counter("eliminations", "Candidates that left their race, by items scored.", "items")
        self._rungs = counter("rungs", "Rungs that candidates were scored up to, by items.", "items")
        self._events = counter("events", "Events of the search by kind.", "kind")
        self._seconds = Histogram(
            "evomerge_phase_seconds", "Seconds that a candidate took in a phase.", ("phase",),
            registry=self.registry, buckets=_BUCKETS_S,
        )  # fmt: skip

    def tell(self, news: News) -> None:
        for event in news.events:
            self._count(event, news.ended_by(event), news)
        self._search.info({"name": news.search.name})
        self._state.clear()
        self._state.labels(news.search.state).set(1)
        self._spent.set(news.search.spent_s)
        for status, count in news.counts.items():
            self._candidates.labels(status).set(count)
        for objective, row in news.best.items():
            self._best.labels(objective).set(row.objectives[objective].mean)
        for number, means in news.held_out.items():
            for objective, mean in means.items():
                self._held_out.labels(objective, named(number)).set(mean)
        self._winner.clear()
        if news.winner is not None:
            self._winner.labels(named(news.winner)).set(1)
        self._front.set(len(news.front))
        self._tell_workers(news.workers)
        self._tell_gpus()

    def _count(self, event: EventRow, ended: CandidateRow | None, news: News) -> None:
        self._events.labels(event.kind).inc()
        if event.kind in ("failure", "confirm failed"):
            failure = event.read(Failure)
            self._failures.labels(failure.reason, str(failure.final).lower()).inc()
        elif event.kind == "eliminated":
            self._eliminated.labels(str(event.read(Eliminated).items)).inc()
        elif event.kind == "rung":
            self._rungs.labels(str(max(event.read(Rung).items.values()))).inc()
        elif event.kind == "scores":
            for _, split, count in event.read(ScoresAdded).scores:
                self._items.labels(split).inc(count)
        if ended is not None and ended.same_as is None:
            self._items.labels("search").inc(_items(ended, news))
            for phase, seconds in ended.timings.items():
                self._seconds.labels(phase).observe(seconds)

    def _tell_workers(self, pool: PoolCounts | None) -> None:
        if pool is None:
            return
        idle = max(0, pool.workers - pool.busy - pool.starting)
        for state, count in (("busy", pool.busy), ("idle", idle), ("starting", pool.starting)):
            self._workers.labels(state).set(count)
        self._queue.set(pool.queued)
        self._idle.set(idle / pool.workers if pool.workers else 0.0)

    def _tell_gpus(self) -> None:
        for gpu, use, used, size in self._gpus.read():
            self._gpu_used.labels(gpu).set(used)
            self._gpu_size.labels(gpu).set(size)
            if not math.isnan(use):
                self._gpu_use.labels(gpu).set(use)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _items(row: CandidateRow, news: News) -> int:
    """The number of items a candidate was scored on; among objectives of one evaluator, the largest number counts."""
    most: dict[int, int] = {}
    for objective in news.objectives:
        if (estimate := row.objectives.get(objective.name)) is not None:
            most[objective.evaluator] = max(estimate.n, most.get(objective.evaluator, 0))
    return sum(most.values())


class Gpus:
    """The GPUs of this machine, read through NVML; none if it is not available. Unknown utilisation is NaN."""

    def __init__(self) -> None:
        self._nvml: ModuleType | None = None
        try:
            nvml = package("pynvml", "gpu")
            nvml.nvmlInit()
        except InputError:
            return
        except Exception:  # NVML without a GPU driver: there is no GPU
            return
        self._nvml = nvml

    def read(self) -> Iterator[tuple[str, float, int, int]]:
        """For each GPU: its number, its utilisation from 0 to 1, its memory in use and its total memory in bytes."""
        if self._nvml is None:
            return
        for number in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(number)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            try:
                use = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            except self._nvml.NVMLError:  # not available for a partitioned GPU (MIG)
                use = math.nan
            yield str(number), use, memory.used, memory.total
