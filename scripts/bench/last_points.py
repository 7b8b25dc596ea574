"""How much worse than the best candidate of a race is the one that it selects.

CMA-ES searches for one weight for each of two or four sources, in simulation. A candidate solves an item if its
quality, a quadratic function around the best weights, exceeds the item's difficulty. Every item also prefers some
direction and has some roughness, so that the best candidate on the 250 items of a search is not the best on 4,000 other
items, by which candidates are judged here. Printed for each way of searching are the true quality of the search's best
candidate, of the best one that was scored on every item, and of the best one of all.

    python scripts/bench/last_points.py [--seeds 32] [--json docs/last_points.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Genome
from evomerge.recipes.stack import StackRecipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.settings.sections import Racing
from evomerge.search.work.jobs import Job, Measured
from evomerge.store import Store, acquire
from evomerge.testing.searches import made_up_setup, made_up_space

ITEMS, OTHERS = 250, 4000
RUNGS = (25, 75)
SEARCHES: Mapping[str, tuple[int, Racing | None]] = {  # candidates, and how they race
    "full evaluation": (150, None),
    "race": (150, Racing(rungs=RUNGS)),
}


class Landscape:
    """A simulated task: which items a candidate with given weights solves."""

    def __init__(self, seed: int, weights: int) -> None:
        random = np.random.default_rng(seed)
        items = ITEMS + OTHERS
        self.best = random.uniform(0.4, 1.1, weights)
        self._scale = random.uniform(1, 2, weights)
        self._difficulty = random.normal(0, 1, items)
        self._leaning = random.normal(0, 0.6, (items, weights))
        self._waves, self._phase = random.normal(0, 9, (items, weights)), random.uniform(0, 2 * np.pi, items)

    def solved(self, genome: Genome) -> NDArray[np.float32]:
        """float32 [items], those of a search first."""
        away = genome - self.best
        quality = 1.2 - 3 * float((self._scale * away**2).sum())
        own = self._leaning @ away + 0.5 * np.sin(self._waves @ genome + self._phase)
        return (quality - self._difficulty + own > 0).astype(np.float32)

    def worth(self, genome: Genome) -> float:
        return float(self.solved(genome)[ITEMS:].mean())


def search(seed: int, sources: int, candidates: int, racing: Racing | None) -> dict[str, float]:
    """One search."""
    space = made_up_space(sources=sources)
    landscape, genomes = Landscape(seed, len(space.parameters)), dict[str, Genome]()
    decode, generated = space.decode, [0]

    def remember(genome: Genome) -> StackRecipe:
        recipe = decode(genome)
        genomes[recipe.hash] = genome
        return recipe

    def genome_of(recipe_hash: str) -> Genome:
        return genomes.get(recipe_hash, np.zeros_like(landscape.best))  # baselines are not decoded

    def simulate(job: Job) -> tuple[float, Measured]:
        solved = landscape.solved(genome_of(job.recipe.hash))
        generated[0] += sum(len(task.indices) for task in job.tasks)
        return 1.0, Measured([{"acc": solved[list(task.indices)]} for task in job.tasks], {})

    space.decode = remember  # type: ignore[method-assign]
    setup = made_up_setup(space, candidates, ITEMS, seed=seed, racing=racing)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "search.db", name="bench", settings={}, fingerprints={}, environment={})
        with store, acquire(store):
            clock = SimulatedClock()
            pool = SimulatedPool(1, simulate, clock)
            Driver(Drive(setup, store, pool, Control(store.take_commands), logs=Path(folder), clock=clock)).run()
            chosen, rows = store.front()[0].recipe_hash, store.candidates()
    worth = {row.recipe_hash: landscape.worth(genome_of(row.recipe_hash)) for row in rows}
    return {
        "best": worth[chosen],
        "best_scored_on_every_item": max(worth[row.recipe_hash] for row in rows if row.eligible),
        "best_of_all": max(worth.values()),
        "best_there_is": landscape.worth(landscape.best),
        "items": float(generated[0]),
    }


def measure(sources: int, seeds: int) -> dict[str, object]:
    found = {name: [search(seed, sources, *how) for seed in range(seeds)] for name, how in SEARCHES.items()}
    means = {name: {key: float(np.mean([run[key] for run in runs])) for key in runs[0]} for name, runs in found.items()}
    return {"sources": sources, "seeds": seeds, "searches": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = []
    for sources in (2, 4):
        results.append(row := measure(sources, given.seeds))
        print(json.dumps(row, indent=1), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
