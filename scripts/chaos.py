"""Runs a search and injects faults: workers, nodes and drivers die, its store is full or unavailable, the clock jumps.

It runs the search of ``chaos_search.py`` on a Ray cluster of several nodes on this machine. If the driver ends early,
it is started again and resumes.

    python scripts/chaos.py [--faults 25] [--candidates 200] [--seed 0] [--store sqlite|postgres] [--json]

Prints a row per fault, and totals: ``lost``, candidates without the status that they should have; ``double``,
candidates whose scores were recorded more than once or are not those of their recipe; ``hung``, how often there was no
progress for HUNG_S; ``zombies``, workers that outlived their node and gave wrong scores while their candidate was tried
elsewhere. The exit code is 0 if lost, double and hung are 0 and every fault can be seen in the search's events. The
faults of the store depend on its kind: a full disk (SQLite), or a server that is killed or closes connections
(PostgreSQL, from the ``test`` extra).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from chaos_search import FLAGS, NOTICE_S, ZOMBIE, scores_of

from evomerge.store import EventRow, Store

NODES, WORKERS_PER_NODE = 2, 2
LAST = 0.8  # of the candidates; a node takes seconds to start, in which nothing is injected and the search goes on
HUNG_S = 120.0  # longer than Ray takes to miss a node, to start one and to start workers on a crowded machine
STARTS = 4
HOUR = 3600.0
AWAY_S = 3.0  # how long a killed PostgreSQL is left so

ROOT = Path(__file__).resolve().parents[1]

BY_WORKER = ("crash", "straggler", "nan")  # candidates that are told so beforehand
BY_HAND = ("kill merge", "kill score", "kill report", "node removed", ZOMBIE, "driver killed", "clock jump")
BY_STORE = {"sqlite": ("disk full",), "postgres": ("postgres killed", "store cut")}


@dataclass
class Fault:
    """``at`` is the number of candidates after which it is injected, or the candidate that has it."""

    kind: str
    at: int
    candidate: int | None = None
    attempt: int | None = None
    injected: bool = False
    after: int = 0  # the newest event at that moment
    seen: str = ""


# The faults ---------------------------------------------------------------------------------------------------------


def plan_faults(count: int, candidates: int, seed: int, store: str) -> list[Fault]:
    """Equally many faults of each kind, in random order, spread over the search after its first candidates."""
    rng = random.Random(seed)
    all_kinds = (*BY_HAND, *BY_STORE[store], *BY_WORKER)
    kinds = [all_kinds[i % len(all_kinds)] for i in range(count)]
    rng.shuffle(kinds)
    first = 15
    step = (LAST * candidates - first) / count
    faults = [Fault(kind, first + int(i * step)) for i, kind in enumerate(kinds)]
    for fault in faults:
        if fault.kind in (*BY_WORKER, ZOMBIE):
            fault.candidate, fault.injected = fault.at, fault.kind != ZOMBIE
    return faults


def patiently(start: Callable[[], Any]) -> Any:
    """The result of ``start``, with retries: on a busy machine Ray may not start a process within its limit of 30 s."""
    for _ in range(STARTS - 1):
        try:
            return start()
        except Exception as error:  # Ray raises nothing more specific; whatever did start ends with this process
            print(error, file=sys.stderr)
    return start()


class Chaos:
    """Watches a search, breaks things, and starts its driver again.

    Args:
        server: the PostgreSQL server that has the search's store; None for SQLite.
    """

    def __init__(self, folder: Path, faults: list[Fault], candidates: int, server: Any = None) -> None:
        from ray.cluster_utils import Cluster as LocalCluster

        self.folder = folder
        self.server = server
        self.place = str(folder / "search.db")
        if server is not None:
            server.execute("CREATE DATABASE chaos")
            self.place = server.url("chaos")
        self.faults = faults
        self.candidates = candidates
        self.hung = self.drivers = 0
        Store.create(self.place, name="chaos", settings={}, fingerprints={}, environment={}).close()
        self.store = Store.open(self.place)
        for name in FLAGS:
            (folder / name).mkdir()
        self._planned = {fault.candidate: fault.kind for fault in faults if fault.candidate is not None}
        (folder / "plan.json").write_text(json.dumps(self._planned))
        # A node counts as lost after five failed checks in a row, at equal intervals.
        head = {"num_cpus": 0, "_system_config": {"health_check_period_ms": int(NOTICE_S / 5 * 1000)}}
        self.cluster = patiently(lambda: LocalCluster(initialize_head=True, head_node_args=head))
        self.nodes: list[Any] = []
        for _ in range(NODES):
            self._add_node()

    def _add_node(self) -> None:
        wanted = {"num_cpus": WORKERS_PER_NODE, "object_store_memory": 80 * 2**20}
        self.nodes.append(patiently(lambda: self.cluster.add_node(**wanted)))

    def run(self) -> None:
        """Run until the search has finished, or hangs for the third time."""
        try:
            while self.hung < 3:
                self.driver = self._start_driver()
                self.drivers += 1
                self._watch()
                if self._state() == "finished":
                    return
                for flag in ("full", "clock"):
                    (self.folder / flag).unlink(missing_ok=True)  # somebody has seen to it
        finally:
            if self.driver.poll() is None:
                self.driver.kill()
                self.driver.wait()
            self.store.close()
            self.cluster.shutdown()
            for pid, _ in self._alive("workers"):  # orphans of raylets that were killed
                os.kill(pid, signal.SIGKILL)

    def _start_driver(self) -> subprocess.Popen[bytes]:
        for note in (self.folder / "at").iterdir():
            note.unlink(missing_ok=True)
        script = Path(__file__).with_name("chaos_search.py")
        command = [sys.executable, script, self.folder, self.place, self.cluster.address, str(self.candidates)]
        with (self.folder / "driver.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def _watch(self) -> None:
        """Inject the faults that are due until the driver ends, by itself or by a fault."""
        events, since = -1, time.monotonic()
        while self.driver.poll() is None:
            time.sleep(0.05)
            now = self._events()
            if now != events:
                events, since = now, time.monotonic()
            elif time.monotonic() - since > HUNG_S:
                self.hung += 1
                self.driver.kill()
            known = self._known()
            for due in [fault for fault in self.faults if not fault.injected and fault.at <= known]:
                self._inject(due)
        self.driver.wait()

    def _inject(self, fault: Fault) -> None:
        """Inject a fault if that is possible now; otherwise it is tried again later."""
        fault.after = self._events()
        if fault.kind.startswith("kill "):
            for pid, at in self._busy():
                if at["phase"] == fault.kind.removeprefix("kill "):
                    os.kill(pid, signal.SIGKILL)
                    fault.candidate, fault.attempt, fault.injected = at["candidate"], at["attempt"], True
                    return
        elif fault.kind == "node removed":
            for _, at in self._busy():
                if self._replace_node(at["node"], with_workers=True):
                    fault.candidate, fault.attempt, fault.injected = at["candidate"], at["attempt"], True
                    return
        elif fault.kind == ZOMBIE:
            for _, at in self._alive("at"):
                if at["candidate"] == fault.candidate and at["phase"] == "zombie":
                    (self.folder / "dead" / str(fault.candidate)).touch()
                    fault.injected = self._replace_node(at["node"], with_workers=False)
                    fault.attempt = at["attempt"]
                    return
        elif fault.kind == "driver killed":
            self.driver.kill()
            self.driver.wait()
            fault.injected = True
        elif fault.kind == "disk full":
            (self.folder / "full").touch()
            self._wait_for_end()
            fault.injected = True
        elif fault.kind == "postgres killed":
            self.server.kill()
            time.sleep(AWAY_S)
            self.server.start()
            fault.injected = True
        elif fault.kind == "store cut":
            self.server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'chaos'")
            fault.injected = True
        elif fault.kind == "clock jump":
            fault.injected = self._jump(fault)

    def _jump(self, fault: Fault) -> bool:
        """Shift the driver's clock by an hour, or back; False if the driver ended before it recorded a time."""
        clock, began = self.folder / "clock", time.monotonic()
        offset = 0.0 if clock.exists() else random.Random(fault.at).choice((-HOUR, HOUR))
        if offset:
            clock.write_text(str(offset))
        else:
            clock.unlink()
        while self.driver.poll() is None and time.monotonic() - began < HUNG_S:
            (newest,) = self.store.events(newest=1)
            if newest.seq > fault.after and abs(newest.time - time.time() - offset) < HOUR / 2:
                return True
            time.sleep(0.05)
        return False

    def _replace_node(self, node_id: str, *, with_workers: bool) -> bool:
        """Kill a node's raylet, with or without its workers, and start another node in its place.

        Returns False if the node no longer exists.
        """
        for node in [node for node in self.nodes if node.node_id == node_id]:
            self.nodes.remove(node)
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            if with_workers:
                self.cluster.remove_node(node, allow_graceful=False)
            self._add_node()
            return True
        return False

    def _wait_for_end(self) -> None:
        """Keep the disk full until the driver has noticed."""
        deadline = time.monotonic() + HUNG_S
        while self.driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _busy(self) -> list[tuple[int, dict[str, Any]]]:
        """Workers that have a candidate without a planned fault: process id, and what they are doing."""
        return [(pid, at) for pid, at in self._alive("at") if at["candidate"] not in self._planned]

    def _alive(self, folder: str) -> list[tuple[int, dict[str, Any]]]:
        """Workers of this search, from the files in a folder: process id, and the content of the file."""
        workers = []
        for note in (self.folder / folder).glob("*[0-9]"):
            try:
                ours = "::Worker" in " ".join(psutil.Process(int(note.name)).cmdline())
                said = json.loads(note.read_text() or "{}")
            except (FileNotFoundError, psutil.NoSuchProcess):
                ours = False
            if ours:
                workers.append((int(note.name), said))
            else:  # it was ended, and its number may be another's by now
                note.unlink(missing_ok=True)
        return workers

    # What the store says ------------------------------------------------------------------------------------------

    def _state(self) -> str:
        return self.store.search().state

    def _events(self) -> int:
        """The newest event."""
        return max((event.seq for event in self.store.events(newest=1)), default=0)

    def _known(self) -> int:
        """The number of candidates that are scored or have failed."""
        return sum(n for status, n in self.store.counts().items() if status not in ("asked", "running"))


# The sums -----------------------------------------------------------------------------------------------------------


def add_up(folder: Path, faults: list[Fault], chaos: Chaos) -> dict[str, Any]:
    """The totals, and how each fault shows, from the store."""
    ill = {fault.candidate for fault in faults if fault.kind in ("crash", "nan")}
    late = {int(note.name) for note in (folder / "late").iterdir()}
    with Store.open(chaos.place) as store:
        rows, events = store.candidates(), store.events()
        ended = {row.number for row in rows if row.status in (("failed",) if row.number in ill else ("done", "cached"))}
        times = Counter(e.candidate for e in events if e.kind == "result")
        double = {number for number, count in times.items() if count > 1}
        for row in rows:
            for score in store.scores(row.number, "search"):
                if not np.array_equal(score.metrics["acc"], scores_of(row.recipe_hash)):
                    double.add(row.number)
    for fault in faults:
        fault.seen = _seen(fault, [e for e in events if e.seq >= fault.after], late)
    return {
        "faults": sum(fault.injected for fault in faults),
        "candidates": len(rows),
        "lost": chaos.candidates - len(ended),
        "double": len(double),
        "hung": chaos.hung,
        "zombies": len(late),
        "drivers": chaos.drivers,
        "rows": [asdict(fault) for fault in faults],
    }


def _seen(fault: Fault, events: list[EventRow], late: set[int]) -> str:
    """How a fault shows in the events after it; empty if it does not."""
    if fault.kind in BY_STORE["postgres"]:
        away = [e.payload["seconds"] for e in events if e.kind == "reconnected"]
        return f"the store was away for {away[0]:.1f} s" if away else ""
    if fault.kind in ("driver killed", "disk full"):
        return "a driver took over" if any(e.kind == "lease" for e in events) else ""
    if fault.kind == "clock jump":
        jumps = [b.time - a.time for a, b in pairwise(events) if abs(b.time - a.time) > HOUR / 2]
        return f"times jump by {jumps[0]:+.0f} s" if jumps else ""
    for event in events:
        if event.candidate == fault.candidate and fault.attempt in (None, event.attempt):
            if event.kind == "failure" and fault.kind == ZOMBIE:
                known = event.payload["reason"] == "node_lost" and fault.candidate in late
                return f"attempt {event.attempt} failed: node_lost; scored on, and did not count" if known else ""
            if event.kind == "failure":
                return f"attempt {event.attempt} failed: {event.payload['reason']}"
            if event.kind == "result":
                return f"attempt {event.attempt} gave scores all the same"
    later = any(e.candidate == fault.candidate and e.kind == "dispatch" for e in events)
    return "tried again by another driver" if later else ""


def table(results: dict[str, Any]) -> str:
    lines = [f"{'fault':<15} {'at':>4} {'candidate':>9}  seen in the events"]
    for row in results["rows"]:
        candidate = "" if row["candidate"] is None else row["candidate"]
        seen = row["seen"] if row["injected"] else "NOT INJECTED"
        lines.append(f"{row['kind']:<15} {row['at']:>4} {candidate:>9}  {seen or 'NOT SEEN'}")
    sums = ("faults", "candidates", "lost", "double", "hung", "zombies", "drivers")
    return "\n".join([*lines, "", ", ".join(f"{name} {results[name]}" for name in sums)])


def running_store(store: str) -> AbstractContextManager[Any]:
    """The PostgreSQL server of the store, started as in the tests; None for SQLite."""
    if store == "sqlite":
        return nullcontext()
    sys.path.append(str(ROOT / "tests"))
    from helpers_postgres import running_server

    return running_server()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--store", choices=tuple(BY_STORE), default="sqlite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running_store(options.store) as server:
        faults = plan_faults(options.faults, options.candidates, options.seed, options.store)
        chaos = Chaos(Path(name), faults, options.candidates, server)
        chaos.run()
        results = add_up(Path(name), faults, chaos)
    print(json.dumps(results, indent=2) if options.json else table(results))
    whole = all(row["injected"] and row["seen"] for row in results["rows"])
    return 0 if whole and not (results["lost"] or results["double"] or results["hung"]) else 1


if __name__ == "__main__":
    sys.exit(main())
