"""How a search scales to many workers: how long they wait, and what the driver costs, in simulated time.

Candidates take log-normal times; a tenth are stragglers, ten times as slow, and one in fifty fails. The pool has a
clock of its own, so that hundreds of workers cost nothing, and all that the real clock shows is the driver's.

    python scripts/bench/scaling.py [--workers 256] [--candidates 10000] [--longest 100000] [--json docs/scaling.json]

Writes the curve of the driver's cost along ``--longest`` candidates, and a plot beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.optimizers import CmaSettings
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.settings.sections import Mode
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import Store, acquire
from evomerge.testing.searches import made_up_setup, made_up_space

ITEMS = 250
SPREAD = 0.5  # standard deviation of the logarithm of a candidate's seconds
STRAGGLERS, SLOWER = 0.1, 10.0
FAILURES = 0.02


def run(mode: Mode, workers: int, candidates: int) -> dict[str, Any]:
    """One search: the share of the workers' time that they waited, and milliseconds of the driver a candidate."""
    # Generations as large as there are workers: the best case of that mode.
    optimizer = CmaSettings(name="cma", population=workers, restarts=50)
    setup = made_up_setup(made_up_space(), candidates, ITEMS, mode=mode, optimizer=optimizer)
    random, busy = np.random.default_rng(0), [0.0]
    clock, jobs = SimulatedClock(), list[tuple[float, float]]()
    curve: list[tuple[int, float]] = []

    def simulate(job: Job) -> tuple[float, Measured | Failed]:
        seconds = float(random.lognormal(0, SPREAD)) * (SLOWER if random.random() < STRAGGLERS else 1.0)
        busy[0] += seconds
        jobs.append((clock.now, clock.now + seconds))
        if random.random() < FAILURES:
            return seconds, Failed("error", "broken")
        return seconds, Measured([{"acc": random.random(ITEMS).astype(np.float32)}], {})

    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "search.db", name="bench", settings={}, fingerprints={}, environment={})
        with store, acquire(store):
            pool = SimulatedPool(workers, simulate, clock)
            started = time.perf_counter()
            calls = [0]

            def note() -> None:
                calls[0] += 1
                if calls[0] % 500 == 0:
                    curve.append((sum(store.counts().values()), time.perf_counter() - started))

            driver = Driver(
                Drive(setup, store, pool, Control(store.take_commands), logs=Path(folder), clock=clock, idle=note)
            )
            driver.run()
            seconds = time.perf_counter() - started
            asked = sum(store.counts().values())
    curve.append((asked, seconds))
    last = max(start for start, _ in jobs)
    return {
        "mode": mode,
        "workers": workers,
        "candidates": asked,
        "idle": 1 - busy[0] / (workers * clock.now),
        "idle_while_asking": 1 - sum(min(e, last) - s for s, e in jobs) / (workers * last),
        "driver_ms_per_candidate": 1000 * seconds / asked,
        "curve": [{"candidates": count, "driver_s": at} for count, at in curve],
    }


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mode, colour in (("generational", "#d97706"), ("asynchronous", "#2563eb")):
        mine = [row for row in rows if row["mode"] == mode and not row.get("long")]
        left.plot([r["workers"] for r in mine], [100 * r["idle"] for r in mine], "o-", color=colour, label=mode)
    left.set(xscale="log", xlabel="workers", ylabel="time that workers wait, %", ylim=(0, 100))
    left.legend()
    for row in rows:
        if row.get("long"):
            counts = np.array([0, *(p["candidates"] for p in row["curve"])])
            seconds = np.array([0.0, *(p["driver_s"] for p in row["curve"])])
            per_candidate = 1000 * np.diff(seconds) / np.maximum(np.diff(counts), 1)
            right.plot(counts[1:], per_candidate, color="#2563eb", label=f"{row['mode']}, {row['workers']} workers")
    right.set(xlabel="candidates so far", ylabel="driver, ms a candidate", ylim=(0, None))
    right.legend()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--longest", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    modes: tuple[Mode, Mode] = ("generational", "asynchronous")
    rows = [run(mode, workers, given.candidates) for workers in given.workers for mode in modes]
    if given.longest > given.candidates:
        rows.append(run("asynchronous", given.workers[-1], given.longest) | {"long": True})
    for row in rows:
        print(
            f"{row['mode']:13} {row['workers']:4d} workers  {row['candidates']:7,d} candidates  "
            f"idle {row['idle']:6.1%}, {row['idle_while_asking']:6.1%} while there is something to ask for  "
            f"driver {row['driver_ms_per_candidate']:.2f} ms a candidate"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
        plot(rows, given.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
