"""The loss of quality without the barrier: asynchronous against generational search, with equally many candidates.

Workers run on a simulated clock and take log-normal times, with a tenth of stragglers, so that results come back late
and out of order. Both modes search with the same seeds: standard functions in 10 dimensions, and one that is only
visible through 250 items that are right or wrong, like a merge's score; with ``--miniatures`` also real merges of the
miniatures, of which the best candidate's held-out score counts. A figure is asynchronous minus generational, paired by
seed, with its 95% confidence interval (BCa bootstrap of the mean): for functions of the logarithm of the best loss,
otherwise of scores. The simulated time of both is given as a ratio.

    python scripts/bench/asynchronous.py [--seeds 12] [--candidates 600] [--miniatures N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from evomerge.genome import Genome
from evomerge.merging.measured.evidence import Evidence
from evomerge.optimizers import CmaSettings
from evomerge.recipes.stack import StackRecipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.opening.session import recipe_of
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool, Simulation
from evomerge.search.preparing.prepare import prepare
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.settings.sections import Mode
from evomerge.search.work.jobs import Failed, Job, Measured, Task
from evomerge.search.workers.worker import Worker
from evomerge.store import Store, acquire
from evomerge.testing.searches import made_up_setup, made_up_space

ROOT = Path(__file__).parents[2]
MODES: tuple[Mode, Mode] = ("generational", "asynchronous")
POPULATION, WORKERS = 16, (8, 16, 64)
SPREAD, STRAGGLERS, SLOWER = 0.5, 0.1, 10.0  # of a candidate's seconds, as in scaling.py
SETTINGS: dict[str, Any] = {
    "sources": {name: str(ROOT / "examples" / "miniatures" / name) for name in ("base", "maths", "japanese")},
    "base": "base",
    "space": {"kind": "parameter_space", "method": "dare_ties", "granularity": "model", "bounds": {"weight": [0, 1.5]}},
    "objectives": {"maths": {"task": "mini_math_ja", "metric": "acc_ja", "items": 250, "batch_size": 250}},
}
LAYERS = 7  # and embedding, norm and head: 10 weights of one source
ITEMS = 250
OPTIMUM = np.linspace(0.3, 1.1, LAYERS + 3)  # weights are searched from 0 to 1.5

Function = Callable[[NDArray[np.float64]], float]
FUNCTIONS: Mapping[str, Function] = {
    "sphere": lambda x: float(x @ x),
    "ellipsoid": lambda x: float(10 ** np.linspace(0, 4, len(x)) @ x**2),
    "Rosenbrock": lambda x: float(np.sum(100 * ((x[1:] + 1) - (x[:-1] + 1) ** 2) ** 2 + x[:-1] ** 2)),
    "Rastrigin": lambda x: float(np.sum((5 * x) ** 2 + 10 - 10 * np.cos(2 * np.pi * 5 * x))),
}
SEEN_THROUGH_ITEMS = f"sphere seen through {ITEMS} items"


def seconds_of(random: np.random.Generator) -> float:
    return float(random.lognormal(0, SPREAD)) * (SLOWER if random.random() < STRAGGLERS else 1.0)


def drive(setup: Setup, workers: int, simulate: Simulation, end: Callable[[Store], float]) -> tuple[float, float]:
    """The result of ``end`` after the search, and the search's seconds on the simulated clock."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "search.db", name="bench", settings={}, fingerprints={}, environment={})
        with store, acquire(store):
            clock = SimulatedClock()
            pool = SimulatedPool(workers, simulate, clock)
            Driver(Drive(setup, store, pool, Control(store.take_commands), logs=Path(folder), clock=clock)).run()
            return end(store), clock.now


def on_function(name: str, mode: Mode, workers: int, candidates: int, seed: int) -> tuple[float, float]:
    """The logarithm of the best loss, or the true score of the best candidate by items; and simulated seconds."""
    space = made_up_space(LAYERS, "layer", sources=1)
    genomes: dict[str, Genome] = {}
    decode = space.decode

    def remember(genome: Genome) -> StackRecipe:
        recipe = decode(genome)
        genomes[recipe.hash] = genome
        return recipe

    space.decode = remember  # type: ignore[method-assign]
    random, noisy = np.random.default_rng(seed), name == SEEN_THROUGH_ITEMS
    function = FUNCTIONS["sphere" if noisy else name]

    def true_score(recipe_hash: str) -> float:
        loss = function(genomes.get(recipe_hash, np.zeros_like(OPTIMUM)) - OPTIMUM)  # baselines are not decoded
        return float(np.exp(-loss)) if noisy else -loss

    def simulate(job: Job) -> tuple[float, Measured | Failed]:
        score = true_score(job.recipe.hash)
        items = random.random(ITEMS) < score if noisy else np.full(ITEMS, score)
        return seconds_of(random), Measured([{"acc": items.astype(np.float32)}], {})

    def end(store: Store) -> float:
        score = true_score(store.front()[0].recipe_hash)
        return score if noisy else float(np.log10(-score))

    optimizer = CmaSettings(name="cma", population=POPULATION)
    setup = made_up_setup(space, candidates, ITEMS, mode=mode, seed=seed, optimizer=optimizer)
    return drive(setup, workers, simulate, end)


def on_miniatures(mode: Mode, workers: int, candidates: int, seed: int) -> tuple[float, float]:
    """The held-out score of the best candidate, and simulated seconds."""
    optimizer, budget = {"name": "cma", "population": POPULATION}, {"candidates": candidates}
    content = SETTINGS | {"name": "bench", "seed": seed, "mode": mode, "optimizer": optimizer, "budget": budget}
    prepared = prepare(parse_search_file(content, place="bench", root=ROOT))
    random = np.random.default_rng(seed)
    worker = Worker.of("bench", prepared, Evidence())

    def simulate(job: Job) -> tuple[float, Measured | Failed]:
        return seconds_of(random), worker.run(job).result

    def end(store: Store) -> float:
        best = store.front()[0]
        tasks = [Task(0, "held_out", range(prepared.setup.evaluators[0].held_out_items))]
        result = worker.run(Job(best.number, 0, recipe_of(best, prepared.file.sources), tasks)).result
        assert isinstance(result, Measured), result
        return float(result.scores[0]["acc_ja"].mean(dtype=np.float64))

    return drive(prepared.setup, workers, simulate, end)


Search = Callable[[Mode, int, int], tuple[float, float]]
"""(mode, workers, seed) -> the number to compare, and simulated seconds."""


def compare(name: str, better: str, search: Search, workers: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    rows = []
    for count in workers:
        by_mode = {mode: np.array([search(mode, count, seed) for seed in range(seeds)]) for mode in MODES}
        generational, asynchronous = (by_mode[mode] for mode in MODES)
        gap = asynchronous[:, 0] - generational[:, 0]
        interval = bootstrap((gap,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        row = {
            "what": name,
            "better": better,
            "workers": count,
            "population": POPULATION,
            "seeds": seeds,
            "generational": float(generational[:, 0].mean()),
            "asynchronous": float(asynchronous[:, 0].mean()),
            "difference": float(gap.mean()),
            "low": float(interval.low),
            "high": float(interval.high),
            "times as fast": float(generational[:, 1].mean() / asynchronous[:, 1].mean()),
        }
        print(
            f"{name:32}{count:4d} workers  {row['generational']:8.3f} {row['asynchronous']:8.3f}  difference "
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], {better} is better; "
            f"{row['times as fast']:.1f} times as fast",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=600)
    parser.add_argument("--miniatures", type=int, metavar="N", help="candidates of each search of the miniatures")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for name in (*FUNCTIONS, SEEN_THROUGH_ITEMS):
        search: Search = lambda mode, workers, seed, name=name: on_function(  # type: ignore[misc]  # noqa: E731
            name, mode, workers, given.candidates, seed
        )
        better = "higher" if name == SEEN_THROUGH_ITEMS else "lower"
        rows += compare(name, better, search, WORKERS, given.seeds)
    if given.miniatures:
        merges: Search = lambda mode, workers, seed: on_miniatures(mode, workers, given.miniatures, seed)  # noqa: E731
        rows += compare("miniatures, held out", "higher", merges, [POPULATION], given.seeds)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
