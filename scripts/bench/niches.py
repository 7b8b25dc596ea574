"""How many elites are kept by luck: with and without cross-fitting, and in races that score leaders on all items.

There are two measurements.

*Lucky elites*, where the truth is known: 30 simulated searches of 200 candidates with six skills each, and items that
need one skill each. An elite is lucky if it would not be kept by its true scores, measured on 2,000 other items.
Archives keep the best of each bin of a skill (grid), 16 candidates by dominated novelty (dns), or 16 by shared credit
(m2n2). They judge and describe candidates by all items, by disjoint halves of them (cross-fitting), or by the same half
for both.

*Races*: searches that scored every candidate on every item (recorded by ``diversity.py run``) are raced again by the
driver itself, from their scores, in five orders of items, with MAP-Elites' rule for candidates that must not be
dropped. There is one objective, the mean of all four tasks, and two tasks are features. A candidate is wrongly dropped
if it left the race although, by all items, it is the elite of its niche among all candidates up to its generation.
Lucky elites are kept candidates that are not elites by all items: in the archive that takes only candidates that were
scored on every item, as leaders of niches are, and in one that also takes the race's estimates.

    python scripts/bench/niches.py [--recorded FOLDER] [--json docs/niches.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.genome import Baseline, Genome, Parameter
from evomerge.optimizers import Feature, Grid, Observation
from evomerge.optimizers.base import Keeps, Settings
from evomerge.optimizers.dns import dominated_novelty, skill_distances
from evomerge.optimizers.elites import Point
from evomerge.optimizers.m2n2 import survivors
from evomerge.recipes.base import Recipe, read_recipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.preparing.setup import EvaluatorInfo, FeatureInfo, ObjectiveInfo, Setup
from evomerge.search.settings.sections import Budget, Confirm, Racing
from evomerge.search.work.jobs import Job, Measured
from evomerge.store import Store, acquire

Table = NDArray[np.float64]

CANDIDATES, SKILLS, KEPT, BINS = 200, 6, 16, 6
WORLDS = 30
TRUTH = 2000  # items
ITEMS = (50, 100, 400)
RUNGS, CONFIDENCE, ORDERS = (12, 25, 50), 0.9, 5
POPULATION = 16


# ---- lucky elites ----------------------------------------------------------------------------------------------------


def world(seed: int) -> tuple[Table, Table]:
    """Scores on items and on many other items, [candidates, items] each; item i needs skill i % 6."""
    random = np.random.default_rng(seed)
    skill = random.normal(0.0, 1.0, (CANDIDATES, SKILLS))

    def solved(count: int) -> Table:
        load = random.normal(0.0, 0.5, (count, SKILLS))
        load[np.arange(count), np.arange(count) % SKILLS] += 1.5
        noise = random.logistic(0.0, 0.3, (CANDIDATES, count))
        return (skill @ load.T - random.normal(0.5, 1.0, count) + noise > 0).astype(np.float64)

    return solved(max(ITEMS)), solved(TRUTH)


def by_grid(judged: Table, described: Table, skills: NDArray[np.int64]) -> set[int]:
    """The best candidates by ``judged`` items, in bins of the share of the first skill's ``described`` items."""
    axis = Feature("skill", 0.0, 1.0, BINS)
    place = described[:, skills == 0].mean(axis=1)
    points = {i: Point([-score], [place[i]]) for i, score in enumerate(judged.mean(axis=1).tolist())}
    return set(Grid((axis,)).extend(points).niches)


def by_dns(judged: Table, described: Table, skills: NDArray[np.int64]) -> set[int]:
    novelty = dominated_novelty(-judged.mean(axis=1), skill_distances(described), 3)
    return set(np.argsort(-novelty, kind="stable")[:KEPT].tolist())


def by_m2n2(judged: Table, described: Table, skills: NDArray[np.int64]) -> set[int]:
    return set(survivors(judged, KEPT))


ARCHIVES: dict[str, Callable[[Table, Table, NDArray[np.int64]], set[int]]] = {
    "grid": by_grid, "dns": by_dns, "m2n2": by_m2n2,
}  # fmt: skip


def lucky() -> list[dict[str, Any]]:
    """The share of lucky elites by archive, number of items, and items that judge and describe."""
    shares: dict[tuple[str, int, str], list[float]] = {}
    for seed in range(WORLDS):
        table, truth = world(seed)
        for archive, keep in ARCHIVES.items():
            true = keep(truth, truth, np.arange(TRUTH) % SKILLS)
            for items in ITEMS:
                for way, (judge, describe) in halves_of(items).items():
                    kept = keep(table[:, judge], table[:, describe], describe % SKILLS)
                    shares.setdefault((archive, items, way), []).append(len(kept - true) / len(kept))
    return [
        {"archive": archive, "items": items, "by": way, "lucky": float(np.mean(found)),
         "error": float(np.std(found, ddof=1) / np.sqrt(len(found)))}
        for (archive, items, way), found in shares.items()
    ]  # fmt: skip


def halves_of(items: int) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each variant the items that judge candidates and those that describe them; both have every skill."""
    every = np.arange(items)
    half = (every // SKILLS) % 2 == 0
    return {
        "all items": (every, every),
        "disjoint halves": (every[half], every[~half]),
        "the same half": (every[half], every[half]),
    }


# ---- races -----------------------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """A recorded search: the recipes of its candidates, baselines first, and their scores [candidates, items]. Items
    of the tasks are interleaved.
    """

    recipes: list[Recipe]
    baselines: int
    scores: Table
    tasks: int
    place_of: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.place_of = {recipe.hash: place for place, recipe in reversed(list(enumerate(self.recipes)))}

    @classmethod
    def read(cls, path: Path) -> Recorded:
        with Store.open(path) as store:
            search = store.search()
            sources = dict(search.settings["sources"])
            rows = [row for row in store.candidates(statuses=("done", "cached")) if row.losses is not None]
            found = []
            for row in rows:
                known = {
                    s.evaluator: s for s in store.scores(row.number if row.same_as is None else row.same_as, "search")
                }
                found.append([known[o.version].metrics[o.metric] for o in search.record.objectives])
            scores = np.array(found, dtype=np.float64)  # [candidates, tasks, items of a task]
            recipes = [read_recipe(row.recipe, sources) for row in rows]
            baselines = sum(row.step == 0 for row in rows)
        return cls(recipes, baselines, scores.transpose(0, 2, 1).reshape(len(rows), -1), scores.shape[1])

    def values(self, recipe_hash: str, evaluator: int) -> Table:
        """The scores on all items, or on those of one of the last two tasks."""
        row = self.scores[self.place_of[recipe_hash]]
        return row if evaluator == 0 else row[self.tasks - evaluator :: self.tasks]

    def point(self, recipe_hash: str) -> Point:
        """The candidate's losses and features by all items."""
        return Point([-self.values(recipe_hash, 0).mean()], [self.values(recipe_hash, e).mean() for e in (1, 2)])


class RecordedSpace:
    """A space with one number: the index of a candidate."""

    layer_buffers = hops = 1

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded
        self.parameters = [Parameter("place", 0.0, float(len(recorded.recipes)), 0.0)]

    def decode(self, genome: Genome) -> Recipe:
        return self._recorded.recipes[int(genome[0])]

    def genome_of(self, recipe: Recipe) -> Genome:
        return np.array([float(self._recorded.place_of[recipe.hash])])

    def baselines(self) -> Iterator[Baseline]:
        for place, recipe in enumerate(self._recorded.recipes[: self._recorded.baselines]):
            yield Baseline(str(place), "source", recipe, None)


class AgainSettings(Settings):
    """Settings of an optimizer that asks for the recorded candidates again, in their order."""

    name: Literal["again"] = "again"
    first: int

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> Any:
        return Again(self.first)


class Again:
    population = POPULATION
    keeps: Keeps = "niches"
    wants_items = False
    favourite = stopped = None
    refined = ()

    def __init__(self, first: int) -> None:
        self._next = first

    def ask(self, n: int) -> list[Genome]:
        self._next += n
        return [np.array([float(place)]) for place in range(self._next - n, self._next)]

    def tell(self, observations: Sequence[Observation]) -> None:
        """Do nothing."""


def raced(recorded: Recorded, seed: int) -> dict[str, float]:
    """The counts of one search that is raced again."""
    count, items = recorded.scores.shape
    each = items // recorded.tasks
    setup = Setup(
        name="again", seed=seed, space=RecordedSpace(recorded), optimizer=AgainSettings(first=recorded.baselines),
        objectives=(ObjectiveInfo("mean", 0, "acc", True, items),),
        evaluators=tuple(EvaluatorInfo(n, n, c, c) for n, c in (("all", items), ("last", each), ("before", each))),
        features=tuple(FeatureInfo(n, e, "acc", True, each, 0.0, 1.0, 5) for n, e in (("one", 1), ("other", 2))),
        budget=Budget(candidates=count), confirm=Confirm(top=1), attempts=1,
        racing=Racing(rungs=RUNGS, confidence=CONFIDENCE),
    )  # fmt: skip

    def simulate(job: Job) -> tuple[float, Measured]:
        known = [recorded.values(job.recipe.hash, task.evaluator)[list(task.indices)] for task in job.tasks]
        return 1.0, Measured([{"acc": values.astype(np.float32)} for values in known], {})

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.db"
        with Store.create(path, name="again", settings={}, fingerprints={}, environment={}) as store, acquire(store):
            clock = SimulatedClock()
            control = Control(store.take_commands)
            Driver(
                Drive(setup, store, SimulatedPool(1, simulate, clock), control, logs=Path(folder), clock=clock)
            ).run()
            rows = store.candidates()
    grid, wrongly = Grid(setup.axes), 0
    for step in sorted({row.step for row in rows}):
        there = [row for row in rows if row.step == step]
        grid = grid.extend({row.number: recorded.point(row.recipe_hash) for row in there})
        wrongly += sum(row.status == "eliminated" and row.number in grid.niches for row in there)
    estimated = Grid(setup.axes).extend(
        {row.number: Point([-row.objectives["mean"].mean], [row.objectives[n].mean for n in ("one", "other")])
         for row in rows if row.status != "eliminated"}
    )  # fmt: skip
    kept = {row.number for row in rows if row.elite}
    own = [row for row in rows if row.step]
    return {
        "candidates": len(own),
        "eliminated": sum(row.status == "eliminated" for row in own),
        "wrongly": wrongly,
        "elites": len(kept),
        "lucky": len(kept - grid.niches.keys()),
        "elites_with_estimates": len(estimated.niches),
        "lucky_with_estimates": len(estimated.niches.keys() - grid.niches.keys()),
        "items": sum(row.objectives["mean"].n for row in own),
        "of_items": len(own) * items,
    }


def is_finished(path: Path) -> bool:
    with Store.open(path) as store:
        return store.search().state == "finished"


def races(folder: Path) -> dict[str, float]:
    """All recorded searches in all orders, as shares."""
    searches = [Recorded.read(path) for path in sorted(folder.glob("*/search.db")) if is_finished(path)]
    counts = [raced(search, seed) for search in searches for seed in range(ORDERS)]
    total = {key: float(sum(row[key] for row in counts)) for key in counts[0]}
    return {
        "searches": len(searches),
        "candidates": total["candidates"],
        "eliminated": total["eliminated"] / total["candidates"],
        "wrongly_dropped": total["wrongly"] / total["candidates"],
        "items": total["items"] / total["of_items"],
        "lucky": total["lucky"] / total["elites"],
        "lucky_with_estimates": total["lucky_with_estimates"] / total["elites_with_estimates"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"lucky": lucky()}
    if given.recorded is not None:
        found["races"] = races(given.recorded)
    for row in [*found["lucky"], found.get("races", {})]:
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
