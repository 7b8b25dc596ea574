"""The driver's own time per candidate, as a search grows.

A search over many parameters runs in a simulated pool whose workers take no time, so all the time that passes is the
driver's: asking, decoding, hashing, all transactions of the store, the front. Prints a curve over the number of
candidates, which should be flat. The store is an SQLite file, or a database given by a URL, in which the search
remains.

    python scripts/bench/driver.py [--parameters 200] [--candidates 2000] [--store postgresql://user@host/database]
                                   [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.work.jobs import Job, Measured
from evomerge.store import Store, acquire
from evomerge.testing.searches import made_up_setup, made_up_space

ITEMS = 1000


def run(parameters: int, candidates: int, place: str | None = None) -> tuple[int, list[tuple[int, float]]]:
    """The number of parameters, and (candidates finished, seconds since the start) along the search.

    ``place`` is the URL of a database for the store; by default, the store is a file.
    """
    # Three sources with weights by layer: 3 x (layers + 3) parameters, as close to the requested number as possible.
    space = made_up_space(max(1, round(parameters / 3) - 3), "layer")
    setup = made_up_setup(space, candidates, ITEMS)
    rng = np.random.default_rng(0)

    simulated = [0]

    def simulate(job: Job) -> tuple[float, Measured]:
        simulated[0] += 1
        return 1.0, Measured([{"acc": rng.random(ITEMS).astype(np.float32)}], {"merge": 0.0, "score": 1.0})

    curve: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        name = f"bench-{time.time_ns()}"  # a database may have the searches of earlier runs
        path = place or Path(folder) / "search.db"
        store = Store.create(path, name=name, settings={}, fingerprints={}, environment={})
        with store, acquire(store):
            clock = SimulatedClock()
            control = Control(store.take_commands)
            pool = SimulatedPool(8, simulate, clock)
            started = time.perf_counter()

            def note() -> None:
                curve.append((simulated[0], time.perf_counter() - started))

            driver = Driver(Drive(setup, store, pool, control, logs=Path(folder), clock=clock, idle=note))
            driver.run()
            curve.append((candidates, time.perf_counter() - started))
    return len(space.parameters), curve


def slopes(curve: list[tuple[int, float]], pieces: int) -> list[tuple[int, float]]:
    """Milliseconds per candidate in each of ``pieces`` equal parts of the search."""
    stretches = []
    counts, seconds = np.array([c for c, _ in curve]), np.array([s for _, s in curve])
    marks = np.linspace(0, counts[-1], pieces + 1)
    times = np.interp(marks, np.r_[0, counts], np.r_[0.0, seconds])
    for start, end, t0, t1 in zip(marks[:-1], marks[1:], times[:-1], times[1:], strict=True):
        stretches.append((int(end), 1000 * float(t1 - t0) / float(end - start)))
    return stretches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--store", metavar="URL")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    parameters, curve = run(arguments.parameters, arguments.candidates, arguments.store)
    stretches = slopes(curve, 8)
    count, seconds = curve[-1]
    mean_ms = 1000 * seconds / count
    if arguments.json:
        shape = [{"candidates": end, "milliseconds_per_candidate": ms} for end, ms in stretches]
        result = {
            "parameters": parameters,
            "candidates": count,
            "milliseconds_per_candidate": mean_ms,
            "curve": shape,
        }
        print(json.dumps(result))
        return
    print(
        f"{parameters} parameters, {count} candidates, {ITEMS} items each: {mean_ms:.2f} ms of the driver a candidate"
    )
    print("up to candidate    ms a candidate")
    for end, ms in stretches:
        print(f"{end:15d}    {ms:14.2f}")


if __name__ == "__main__":
    main()
