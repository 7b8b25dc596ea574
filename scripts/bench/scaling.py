"""How a search scales to many workers: how long they wait, and the time of the driver, with simulated workers.

Candidates take log-normal times; a tenth are stragglers, ten times as slow, and one in fifty fails. The pool has a
simulated clock, so hundreds of workers take no time, and the real time is that of the driver.

    python scripts/bench/scaling.py [--workers 16 64 256] [--candidates 10000] [--longest 100000]
                                    [--last 20000 --of 1000000 --many 1000] [--json docs/scaling.json]

Writes the curve of the driver's cost along ``--longest`` candidates, and a plot next to the JSON file. The driver's
milliseconds are processor time.

``--last`` drives the last candidates of a search of ``--of`` candidates: the first ``SEED`` are driven, and those in
between are copies of their rows in the database, with other numbers and other hashes of recipes. The driver is then in
the same state as after driving all of them: its map of known recipes is read from the database, and nothing else in it
grows. Workers' waiting is that of the whole search, on the pool alone: they never wait while candidates are left.
"""

from __future__ import annotations

import argparse
import heapq
import json
import resource
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.optimizers import CmaSettings
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Mode
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import Store, acquire
from evomerge.testing.searches import made_up_setup, made_up_space

ITEMS = 250
SPREAD = 0.5  # standard deviation of the logarithm of a candidate's seconds
STRAGGLERS, SLOWER = 0.1, 10.0
FAILURES = 0.02
SEED = 5_000  # candidates whose rows are copied to make a longer search


def run(mode: Mode, workers: int, candidates: int) -> dict[str, Any]:
    """Run one search: the share of time that workers waited, and the driver's milliseconds per candidate."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "search.db"
        Store.create(place, name="bench", settings={}, fingerprints={}, environment={}).close()
        simulation = _Simulation(workers)
        curve, seconds = _drive(place, _setup(mode, workers, candidates), simulation, _TimedDriver)
    last = max(start for start, _ in simulation.jobs)
    held_s = workers * simulation.clock.now
    return {
        "mode": mode,
        "workers": workers,
        "candidates": curve[-1][0],
        "idle": 1 - simulation.busy / held_s,
        "idle_while_asking": 1 - sum(min(e, last) - s for s, e in simulation.jobs) / (workers * last),
        "driver_ms": 1000 * seconds / curve[-1][0],
        "driver_mb": _peak_mb(),
        "curve": [{"candidates": count, "driver_s": at} for count, at in curve],
    }


def run_last(workers: int, last: int, candidates: int) -> dict[str, Any]:
    """Run the last candidates of a search without a barrier."""
    before = candidates - last
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "search.db"
        Store.create(place, name="bench", settings={}, fingerprints={}, environment={}).close()
        _drive(place, _setup("asynchronous", workers, SEED), _Simulation(workers), _TimedDriver)
        copy_rows(place, before)
        bytes_each = place.stat().st_size / before
        setup = _setup("asynchronous", workers, candidates)
        _, seconds = _drive(place, setup, _Simulation(workers), _LateDriver)
    return {
        "mode": "asynchronous",
        "workers": workers,
        "candidates": candidates,
        "driven": last,
        "idle": idle_of(workers, candidates),
        "driver_ms": 1000 * seconds / last,
        "driver_mb": _peak_mb(),
        "store_bytes": bytes_each,
    }


class _TimedDriver(Driver):
    """A driver that notes its processor seconds after replaying what is recorded."""

    began = 0.0

    def _replay(self) -> None:
        super()._replay()
        self.began = time.process_time()


class _LateDriver(_TimedDriver):
    """A driver that starts in the state after all recorded candidates."""

    def _replay(self) -> None:
        with self._store.transaction() as connection:
            newest = connection.exec_driver_sql("SELECT max(seq) FROM event").scalar_one()
            rows = connection.exec_driver_sql("SELECT number, recipe_hash, status, step FROM candidate")
            for number, recipe_hash, status, step in rows:
                self._asked = max(self._asked, number + 1)
                self._step = max(self._step, step)
                if status == "done":
                    self._scoring._by_recipe[recipe_hash] = number
        self.asked_after = newest
        self.began = time.process_time()


class _Simulation:
    """Simulated times and scores of candidates, and how long workers were busy.

    Attributes:
        busy: seconds, summed over workers.
        jobs: the start and the end of each job.
    """

    def __init__(self, workers: int) -> None:
        self._random = np.random.default_rng(0)
        self.clock = SimulatedClock()
        self.pool = SimulatedPool(workers, self, self.clock)
        self.busy = 0.0
        self.jobs: list[tuple[float, float]] = []

    def __call__(self, job: Job) -> tuple[float, Measured | Failed]:
        seconds = _seconds(self._random)
        self.busy += seconds
        self.jobs.append((self.clock.now, self.clock.now + seconds))
        if self._random.random() < FAILURES:
            return seconds, Failed("error", "broken")
        return seconds, Measured([{"acc": self._random.random(ITEMS).astype(np.float32)}], {})


def _seconds(random: np.random.Generator) -> float:
    return float(random.lognormal(0, SPREAD)) * (SLOWER if random.random() < STRAGGLERS else 1.0)


def _setup(mode: Mode, workers: int, candidates: int) -> Setup:
    # As many candidates in a generation as there are workers, which is the best case of that mode.
    optimizer = CmaSettings(name="cma", population=workers, restarts=50)
    return made_up_setup(made_up_space(), candidates, ITEMS, mode=mode, optimizer=optimizer)


def _drive(
    place: Path, setup: Setup, simulation: _Simulation, kind: type[_TimedDriver]
) -> tuple[list[tuple[int, float]], float]:
    """(candidates, processor seconds) along the search, and the seconds of all of it without the replay."""
    curve: list[tuple[int, float]] = []
    turns = [0]
    with Store.open(place) as store, acquire(store):

        def note() -> None:
            turns[0] += 1
            if turns[0] % 2000 == 0:
                curve.append((sum(store.counts().values()), time.process_time() - driver.began))

        control = Control(store.take_commands)
        drive = Drive(setup, store, simulation.pool, control, logs=place.parent, clock=simulation.clock, idle=note)
        driver = kind(drive)
        driver.run()
        seconds = time.process_time() - driver.began
        curve.append((sum(store.counts().values()), seconds))
    return curve, seconds


def copy_rows(place: Path, candidates: int) -> None:
    """Lengthen a search to ``candidates`` by copying its rows again and again."""
    with closing(sqlite3.connect(place)) as connection:
        columns = {
            table: [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            for table in ("candidate", "recipe", "objective", "score", "event")
        }
        (first,) = connection.execute("SELECT min(number) FROM candidate WHERE step > 0").fetchone()
        (size,) = connection.execute("SELECT max(number) + 1 FROM candidate").fetchone()
        (newest,) = connection.execute("SELECT max(seq) FROM event").fetchone()
        copied = size - first
        for shift in range(copied, candidates - size + 1 + copied, copied):
            new = {
                "number": f"number + {shift}",
                "candidate": f"candidate + {shift}",
                "step": f"step + {shift}",
                "recipe_hash": "lower(hex(randomblob(32)))",
                "on_front": "0",
                "seq": "NULL",
            }
            for table, names in columns.items():
                key = "number" if table == "candidate" else "candidate"
                values = ", ".join(new.get(name, f'"{name}"') for name in names)
                listed = ", ".join(f'"{name}"' for name in names)
                limits = f"{key} >= {first} AND {key} < {min(size, candidates - shift)}"
                if table == "event":
                    limits = f"({limits} OR kind IN ('ask', 'tell')) AND seq <= {newest}"
                connection.execute(f"INSERT INTO {table} ({listed}) SELECT {values} FROM {table} WHERE {limits}")
            connection.commit()


def idle_of(workers: int, candidates: int) -> float:
    """The share of time that workers wait, including the end, if a free worker always gets a candidate."""
    random = np.random.default_rng(0)
    free = [0.0] * workers
    busy = 0.0
    for _ in range(candidates):
        seconds = _seconds(random)
        busy += seconds
        heapq.heapreplace(free, free[0] + seconds)
    return 1 - busy / (workers * max(free))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mode, colour in (("generational", "#d97706"), ("asynchronous", "#2563eb")):
        mine = [row for row in rows if row["mode"] == mode and "driven" not in row and not row.get("long")]
        left.plot([r["workers"] for r in mine], [100 * r["idle"] for r in mine], "o-", color=colour, label=mode)
    left.set(xscale="log", xlabel="workers", ylabel="time that workers wait, %", ylim=(0, 100))
    left.legend()
    for row in rows:
        if row.get("long"):
            counts = np.array([0, *(p["candidates"] for p in row["curve"])])
            seconds = np.array([0.0, *(p["driver_s"] for p in row["curve"])])
            each = 1000 * np.diff(seconds) / np.maximum(np.diff(counts), 1)
            right.plot(counts[1:-1], each[:-1], color="#2563eb", label=f"{row['mode']}, {row['workers']} workers")
    right.set(xlabel="candidates so far", ylabel="driver, ms a candidate", ylim=(0, None))
    right.legend()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--longest", type=int, default=100_000)
    parser.add_argument("--last", type=int, default=20_000)
    parser.add_argument("--of", type=int, default=1_000_000)
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    modes: tuple[Mode, Mode] = ("generational", "asynchronous")
    rows = [run(mode, workers, given.candidates) for workers in given.workers for mode in modes]
    if given.longest > given.candidates:
        rows.append(run("asynchronous", given.many, given.longest) | {"long": True})
    if given.last:
        rows.append(run_last(given.many, given.last, given.of))
    for row in rows:
        part = f" (driven: the last {row['driven']:,d})" if "driven" in row else ""
        print(
            f"{row['mode']:13} {row['workers']:4d} workers  {row['candidates']:9,d} candidates{part}  "
            f"idle {row['idle']:6.2%}  driver {row['driver_ms']:.2f} ms a candidate, {row['driver_mb']:.0f} MB"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
        plot(rows, given.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
