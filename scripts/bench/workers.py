"""How busy Ray's workers are: a search with workers that sleep instead of scoring, against the ideal.

Sleeping takes no core, so sixteen workers fit on two. The loss is the time that Ray, the pool, the driver and the store
take between two candidates of a worker. Time is measured from the moment when all workers have started to the last
result; the ideal is the same sleep with nothing in between.

    python scripts/bench/workers.py [--workers 16] [--seconds 2] [--candidates 320] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from evomerge.optimizers import CmaSettings
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.ray import RayPool, RayWorker
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.settings.sections import Cluster
from evomerge.search.work.jobs import Finished, Job, Measured
from evomerge.store import Store, acquire
from evomerge.testing.searches import made_up_setup, made_up_space

ITEMS = 250


class Sleeper(RayWorker):
    """A worker that sleeps and returns made-up scores. The folder for evidence has a file with the seconds."""

    def load(self) -> None:
        name, _, evidence, _ = self._arguments
        self._name, self._seconds = name, float((evidence / "seconds").read_text())

    def run(self, job: Job) -> Finished:
        time.sleep(self._seconds)
        scores = np.random.default_rng(job.candidate).random(ITEMS).astype(np.float32)
        return Finished(job.candidate, job.attempt, self._name, Measured([{"acc": scores}], {"score": self._seconds}))


def run(workers: int, seconds: float, candidates: int) -> dict[str, Any]:
    setup = made_up_setup(
        made_up_space(), candidates, ITEMS, mode="asynchronous",
        optimizer=CmaSettings(name="cma", population=workers, restarts=50),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "seconds").write_text(str(seconds))
        store = Store.create(folder / "search.db", name="bench", settings={}, fingerprints={}, environment={})
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        file = SearchFile.model_construct(name="bench", cluster=Cluster(address="auto", insecure=True, workers=workers))
        with store, acquire(store):
            pool = RayPool(file, folder, {}, Sleeper)
            try:
                while pool.state().workers - pool.state().starting < workers:
                    pool.wait(1.0)
                Driver(Drive(setup, store, pool, Control(store.take_commands), logs=folder)).run()
            finally:
                pool.close()
                ray.shutdown()
            began = [event.time for event in store.events(kinds=("dispatch",))]
            ended = [event.time for event in store.events(kinds=("result",))]
    # Until the last candidate is asked for, every worker has a candidate; after that they wait for each other.
    span = began[-1] - began[0]
    done = sum(end <= began[-1] for end in ended)
    return {
        "workers": workers,
        "seconds_of_a_candidate": seconds,
        "candidates": len(ended),
        "candidates_per_second": done / span,
        "ideal_per_second": workers / seconds,
        "share_of_ideal": done / span / (workers / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--candidates", type=int, default=320)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = run(given.workers, given.seconds, given.candidates)
    print(
        json.dumps(result)
        if given.json
        else f"{result['workers']} workers: {result['candidates_per_second']:.2f} candidates a second, "
        f"{result['share_of_ideal']:.1%} of the ideal {result['ideal_per_second']:.2f}"
    )


if __name__ == "__main__":
    main()
