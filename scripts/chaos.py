"""A search while things break: workers and nodes die, the driver dies, the disk is full, the clock jumps.

A Ray cluster of several nodes on this machine, a made-up space, and workers that sleep in place of merging and scoring.
Faults are injected as the search goes on; whenever its driver ends early, it is started again and resumes.

    python scripts/chaos.py [--faults 25] [--candidates 200] [--seed 0] [--json]

Prints a row per fault and the sums: ``lost``, candidates without an end that they should have; ``double``, candidates
whose scores were recorded more than once or are not those of their recipe; ``hung``, times that nothing went on for
HUNG_S. The exit code is 0 when these three are 0 and every fault can be seen in the search's events.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from sqlalchemy import Engine, event

from evomerge.merging.registry import find_method
from evomerge.optimizers import CmaSettings
from evomerge.search import deadlines
from evomerge.search.control import Control
from evomerge.search.driver import Driver
from evomerge.search.jobs import Failed, Finished, Job, Measured
from evomerge.search.pools.ray import RayPool, RayWorker
from evomerge.search.search_file import Budget, Cluster, Confirm, SearchFile
from evomerge.search.setup import EvaluatorInfo, ObjectiveInfo, Setup
from evomerge.store import EventRow, Store, acquire
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings

ITEMS = 20
MERGE_S, SCORE_S = 0.1, 0.2
SLOWER = 20.0
LEAST_S = 3.0  # the shortest deadline, in place of a minute: candidates take a fraction of a second here
ATTEMPTS = 5  # several faults may hit one candidate, and none of them is its own
NODES, WORKERS_PER_NODE = 2, 2
HUNG_S = 120.0  # longer than Ray takes to miss a node, to start one and to start workers on a crowded machine
HOUR = 3600.0

STORE = "search.db"

BY_WORKER = ("crash", "straggler", "nan")  # candidates that are told so beforehand
BY_HAND = ("kill merge", "kill score", "kill report", "node removed", "driver killed", "disk full", "clock jump")
KINDS = (*BY_HAND, *BY_WORKER)


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


# The search ---------------------------------------------------------------------------------------------------------


def make_setup(candidates: int) -> Setup:
    context = SpaceContext(
        sources={"base": "", "one": "", "two": "", "three": ""},
        base="base",
        tokenizer="base",
        layers=8,
        tied=False,
        method=lambda name: find_method(name, "method").spec,
        recipe_seed=0,
        dtype=None,
    )
    return Setup(
        name="chaos",
        seed=0,
        space=ParameterSpace(ParameterSpaceSettings(method="task_arithmetic", granularity="model"), context),
        optimizer=CmaSettings(name="cma", population=8, restarts=50),
        objectives=(ObjectiveInfo("score", 0, "acc", True, ITEMS),),
        evaluators=(EvaluatorInfo("task", "v", ITEMS, ITEMS),),
        budget=Budget(candidates=candidates),
        confirm=Confirm(),
        attempts=ATTEMPTS,
        mode="asynchronous",
    )


def scores_of(recipe_hash: str) -> NDArray[np.float32]:
    """The one right answer: float32 [ITEMS]."""
    return np.random.default_rng(int(recipe_hash[:12], 16)).random(ITEMS).astype(np.float32)


class Worker(RayWorker):
    """Sleeps; says in ``at/PID`` what it is at, and does to some candidates what ``plan.json`` says."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path) -> None:
        self._name = name
        self._note = folder / "at" / str(os.getpid())
        self._plan: dict[str, str] = json.loads((folder / "plan.json").read_text())

    def run(self, job: Job) -> Finished:
        kind = self._plan.get(str(job.candidate), "")
        slower = SLOWER if kind == "straggler" and job.attempt == 1 else 1.0
        scores = scores_of(job.recipe.hash)
        for phase, seconds in (("merge", MERGE_S), ("score", SCORE_S), ("report", 0.05)):
            self._say({"candidate": job.candidate, "attempt": job.attempt, "phase": phase, "node": self.ready()})
            time.sleep(seconds * slower)
            if kind == "crash" and phase == "score":
                os._exit(1)
            if kind == "nan":
                scores = scores * np.float32(math.nan)
        self._note.unlink()
        result: Measured | Failed = Measured([{"acc": scores}], {})
        if not np.isfinite(scores).all():
            result = Failed("not_finite", f"acc of {ITEMS} items")
        return Finished(job.candidate, job.attempt, self._name, result)

    def _say(self, what: dict[str, Any]) -> None:
        partial = self._note.with_suffix(".partial")
        partial.write_text(json.dumps(what))
        partial.rename(self._note)


def drive(folder: Path, address: str, candidates: int) -> None:
    """The driver's process: one search, from wherever the store has it."""
    deadlines.LEAST_S = LEAST_S
    real = time.time

    def offset() -> float:
        return float((folder / "clock").read_text()) if (folder / "clock").exists() else 0.0

    time.time = lambda: real() + offset()

    @event.listens_for(Engine, "begin")
    def full_or_not(connection: Any) -> None:
        """A full disk as SQLite itself finds it: no page more than there are."""
        connection.exec_driver_sql(f"PRAGMA max_page_count = {1 if (folder / 'full').exists() else 2**30}")

    setup = make_setup(candidates)
    with Store.open(folder / STORE) as store, acquire(store):
        cluster = Cluster(address=address, insecure=True)
        pool = RayPool(SearchFile.model_construct(name="chaos", cluster=cluster), folder, Worker)
        try:
            Driver(setup, store, pool, Control(store.take_commands), logs=folder / "logs").run()
        finally:
            pool.close()


# The faults ---------------------------------------------------------------------------------------------------------


def plan_faults(count: int, candidates: int, seed: int) -> list[Fault]:
    """As many of each kind, in an order drawn by ``seed``, spread over the search after its landmarks and first ten."""
    rng = random.Random(seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    rng.shuffle(kinds)
    first = 15
    step = (0.9 * candidates - first) / count
    faults = [Fault(kind, first + int(i * step)) for i, kind in enumerate(kinds)]
    for fault in faults:
        if fault.kind in BY_WORKER:
            fault.candidate, fault.injected = fault.at, True
    return faults


class Chaos:
    """Watches a search, breaks things, and starts its driver again."""

    def __init__(self, folder: Path, faults: list[Fault], candidates: int) -> None:
        from ray.cluster_utils import Cluster as LocalCluster

        self.folder = folder
        self.faults = faults
        self.candidates = candidates
        self.hung = self.drivers = 0
        Store.create(folder / STORE, name="chaos", settings={}, fingerprints={}, environment={}).close()
        (folder / "at").mkdir()
        self._planned = {fault.candidate: fault.kind for fault in faults if fault.kind in BY_WORKER}
        (folder / "plan.json").write_text(json.dumps(self._planned))
        self.cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self._add_node() for _ in range(NODES)]

    def _add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=WORKERS_PER_NODE, object_store_memory=80 * 2**20)

    def run(self) -> None:
        """Until the search has finished, or hangs for the third time."""
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
            self.cluster.shutdown()

    def _start_driver(self) -> subprocess.Popen[bytes]:
        for note in (self.folder / "at").iterdir():
            note.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--drive", str(self.folder), "--address", self.cluster.address]
        with (self.folder / "driver.log").open("ab") as log:
            return subprocess.Popen([*command, "--candidates", str(self.candidates)], stdout=log, stderr=log)

    def _watch(self) -> None:
        """Inject what is due until the driver ends, by itself or by us."""
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
            due = next((f for f in self.faults if not f.injected and f.at <= known), None)
            if due is not None:
                self._inject(due)
        self.driver.wait()

    def _inject(self, fault: Fault) -> None:
        """Do it, if it can be done at this moment; else it is tried again at the next."""
        fault.after = self._events()
        if fault.kind.startswith("kill "):
            for pid, at in self._busy():
                if at["phase"] == fault.kind.removeprefix("kill "):
                    os.kill(pid, signal.SIGKILL)
                    fault.candidate, fault.attempt, fault.injected = at["candidate"], at["attempt"], True
                    return
        elif fault.kind == "node removed":
            for _, at in self._busy():
                for node in [node for node in self.nodes if node.node_id == at["node"]]:
                    self.nodes.remove(node)
                    self.cluster.remove_node(node, allow_graceful=False)
                    self.nodes.append(self._add_node())
                    fault.candidate, fault.attempt, fault.injected = at["candidate"], at["attempt"], True
                    return
        elif fault.kind == "driver killed":
            self.driver.kill()
            self.driver.wait()
            fault.injected = True
        elif fault.kind == "disk full":
            (self.folder / "full").touch()
            self._wait_for_end()
            fault.injected = True
        elif fault.kind == "clock jump":
            (self.folder / "clock").write_text(str(random.Random(fault.at).choice((-HOUR, HOUR))))
            fault.injected = True

    def _wait_for_end(self) -> None:
        """The disk stays full until the driver has noticed."""
        deadline = time.monotonic() + HUNG_S
        while self.driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _busy(self) -> list[tuple[int, dict[str, Any]]]:
        """Workers of this search at a candidate that has no fault of its own: process id, and what they are at."""
        found = []
        for note in (self.folder / "at").glob("*[0-9]"):
            try:
                ours = "Worker.run" in " ".join(psutil.Process(int(note.name)).cmdline())
                at = json.loads(note.read_text())
            except (FileNotFoundError, psutil.NoSuchProcess):
                ours = False
            if ours and at["candidate"] not in self._planned:
                found.append((int(note.name), at))
            elif not ours:  # it was ended, and its number may be another's by now
                note.unlink(missing_ok=True)
        return found

    # What the store says ------------------------------------------------------------------------------------------

    def _state(self) -> str:
        with Store.open(self.folder / STORE) as store:
            return store.search().state

    def _events(self) -> int:
        """The newest event."""
        with Store.open(self.folder / STORE) as store:
            return max((found.seq for found in store.events(newest=1)), default=0)

    def _known(self) -> int:
        """Candidates that have come to an end."""
        with Store.open(self.folder / STORE) as store:
            return sum(n for status, n in store.counts().items() if status not in ("asked", "running"))


# The sums -----------------------------------------------------------------------------------------------------------


def add_up(folder: Path, faults: list[Fault], chaos: Chaos) -> dict[str, Any]:
    """What became of every candidate and every fault, by what the store has."""
    ill = {fault.candidate for fault in faults if fault.kind in ("crash", "nan")}
    with Store.open(folder / STORE) as store:
        rows, events = store.candidates(), store.events()
        ended = {row.number for row in rows if row.status in (("failed",) if row.number in ill else ("done", "cached"))}
        times = Counter(e.candidate for e in events if e.kind == "result")
        double = {number for number, count in times.items() if count > 1}
        for row in rows:
            for found in store.scores(row.number, "search"):
                if not np.array_equal(found.metrics["acc"], scores_of(row.recipe_hash)):
                    double.add(row.number)
    for fault in faults:
        fault.seen = _seen(fault, [e for e in events if e.seq >= fault.after])
    return {
        "faults": sum(fault.injected for fault in faults),
        "candidates": len(rows),
        "lost": chaos.candidates - len(ended),
        "double": len(double),
        "hung": chaos.hung,
        "drivers": chaos.drivers,
        "rows": [asdict(fault) for fault in faults],
    }


def _seen(fault: Fault, events: list[EventRow]) -> str:
    """How a fault shows in the events since; empty if it does not."""
    if fault.kind in ("driver killed", "disk full"):
        return "a driver took over" if any(e.kind == "lease" for e in events) else ""
    if fault.kind == "clock jump":
        jumps = [b.time - a.time for a, b in pairwise(events) if abs(b.time - a.time) > HOUR / 2]
        return f"times jump by {jumps[0]:+.0f} s" if jumps else ""
    for found in events:
        if found.candidate == fault.candidate and fault.attempt in (None, found.attempt):
            if found.kind == "failure":
                return f"attempt {found.attempt} failed: {found.payload['reason']}"
            if found.kind == "result":
                return f"attempt {found.attempt} gave scores all the same"
    later = any(e.candidate == fault.candidate and e.kind == "dispatch" for e in events)
    return "tried again by another driver" if later else ""


def table(found: dict[str, Any]) -> str:
    lines = [f"{'fault':<14} {'at':>4} {'candidate':>9}  seen in the events"]
    for row in found["rows"]:
        candidate = "" if row["candidate"] is None else row["candidate"]
        seen = row["seen"] if row["injected"] else "NOT INJECTED"
        lines.append(f"{row['kind']:<14} {row['at']:>4} {candidate:>9}  {seen or 'NOT SEEN'}")
    sums = ("faults", "candidates", "lost", "double", "hung", "drivers")
    return "\n".join([*lines, "", ", ".join(f"{name} {found[name]}" for name in sums)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.drive, options.address, options.candidates)
        return 0
    with tempfile.TemporaryDirectory() as name:
        faults = plan_faults(options.faults, options.candidates, options.seed)
        chaos = Chaos(Path(name), faults, options.candidates)
        chaos.run()
        found = add_up(Path(name), faults, chaos)
    print(json.dumps(found, indent=2) if options.json else table(found))
    whole = all(row["injected"] and row["seen"] for row in found["rows"])
    return 0 if whole and not (found["lost"] or found["double"] or found["hung"]) else 1


if __name__ == "__main__":
    sys.exit(main())
