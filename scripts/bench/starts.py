"""Where a search over many sources should start, and other variants, simulated on a model of the zoo's scores.

The model is a Gaussian process for each of four tasks, fitted to merges that searches of ``selection.py`` scored on 25
items of each (docs/zoo_merges.json: weights of the four useful sources, of two that add little, and of an average of
the rest; the last differs between searches). The report says how well it predicts merges that it was not fitted to. On
this model hundreds of searches take seconds. The scores of a candidate are predictions with noise as for 25 items, most
of which have the same answers for all candidates; results are predictions without noise.

*Starts*: plain CMA-ES over the first four to seven sources, with 40 candidates including baselines, from the centre of
the box, from the defaults, and from the best baseline. *Niches*: whether the first generation of ``map_elites`` and
``cycle_qd`` should be children of the sources instead of random, and whether ``cycle_qd`` should vary candidates like
``map_elites``. *Fronts*: which part of the unit cube of two, three or four tasks is dominated by the candidates that
appear nondominated.

    python scripts/bench/starts.py gather FOLDER        # of selection.py run: docs/zoo_merges.json
    python scripts/bench/starts.py report               # docs/starts.json, and the tables
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from search_cost import ROOT
from selection import TASKS

from evomerge.front import hypervolume, nondominated
from evomerge.genome import Genome, Parameter
from evomerge.optimizers import CmaSettings, Feature, Observation
from evomerge.optimizers.base import Optimizer, Settings
from evomerge.optimizers.cycle_qd import CycleQd, CycleQdSettings
from evomerge.optimizers.map_elites import MapElites, MapElitesSettings
from evomerge.optimizers.optuna_samplers import OptunaSettings
from evomerge.optimizers.pareto_map import MapSettings
from evomerge.optimizers.variation import iso_line
from evomerge.search.settings.folder import is_search, open_store

Table = NDArray[np.float64]

MERGES, RESULTS = ROOT / "docs" / "zoo_merges.json", ROOT / "docs" / "starts.json"
SOURCES = ("steps_ja", "into_english", "into_japanese", "extraction", "japanese", "steps_en", "rest")
HIGH, DEFAULT = 1.5, 0.4
"""The upper bound of weights, and their default."""

NOISE = 0.07
"""The standard deviation of a task's noise at a score of 0.5: for 25 items, half of which never differ."""

SEARCHES = 30
CANDIDATES, MORE_CANDIDATES = 40, 96
BINS = 5


def gather(folder: Path) -> None:
    """Write the merges that the searches of a folder scored, each once."""
    found: dict[tuple[float, ...], list[float]] = {}
    for place in sorted(folder.iterdir()):
        if not place.name.startswith(("after", "told")) or not is_search(place):
            continue
        with open_store(place) as store:
            names = [str(parameter.share_of) for parameter in store.search().record.parameters]
            for row in store.candidates():
                if row.losses is not None and row.genome is not None:
                    weights = dict(zip(names, row.genome.tolist(), strict=True))
                    found[tuple(round(weights.get(name, 0.0), 4) for name in SOURCES)] = [-loss for loss in row.losses]
    merges = [[list(weights), scores] for weights, scores in found.items()]
    lines = ",\n".join(json.dumps(merge) for merge in merges)
    MERGES.write_text(
        f'{{"sources": {json.dumps(SOURCES)}, "tasks": {json.dumps([*TASKS])}, "merges": [\n{lines}\n]}}\n'
    )


class World:
    """The true scores of merges: a Gaussian process for each task.

    Attributes:
        explained: for each task the share of the variance that is predicted in tenfold cross-validation.
    """

    def __init__(self) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
        from sklearn.model_selection import cross_val_predict

        known = json.loads(MERGES.read_text())["merges"]
        weights, scores = (np.array([merge[part] for merge in known]) for part in (0, 1))
        self._processes, self.explained = [], []
        for of_task in scores.T:
            scales = Matern(np.ones(len(SOURCES)), length_scale_bounds=(0.2, 20.0), nu=2.5)
            kernel = ConstantKernel(0.1) * scales + WhiteKernel(0.003, (1e-4, 0.05))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a length scale at its bound: a source that does not affect a task
                fitted = GaussianProcessRegressor(kernel, normalize_y=True).fit(weights, of_task)
            again = GaussianProcessRegressor(fitted.kernel_, normalize_y=True, optimizer=None)
            missed = cross_val_predict(again, weights, of_task, cv=10) - of_task
            self._processes.append(fitted)
            self.explained.append(1.0 - float((missed**2).mean() / of_task.var()))

    def scores(self, weights: Table) -> Table:
        """The scores of merges (weights [merges, sources]): float64 [merges, tasks]."""
        return np.stack([np.clip(process.predict(weights), 0.0, 1.0) for process in self._processes], axis=1)


class Search:
    """A simulated search over some sources.

    Attributes:
        genomes: those of all candidates; ``true`` and ``seen`` are their scores without and with noise.
        first: the indices of the candidates of the first generation.
    """

    def __init__(
        self, world: World, places: Sequence[int], seed: int, observe: Callable[[Genome, Table], Observation]
    ) -> None:
        self._world, self._places, self._observe = world, list(places), observe
        self._random = np.random.default_rng([seed, 1])
        self.genomes: list[Genome] = []
        self.true, self.seen = np.empty((0, len(TASKS))), np.empty((0, len(TASKS)))
        self.first = slice(0, 0)

    def run(self, optimizer: Optimizer, candidates: int) -> Search:
        """Tell the baselines, and ask for the other candidates."""
        n = len(self._places)
        alike = [np.full(n, share) for share in (1 / n, DEFAULT, 0.5 / n**0.5)]
        self._tell(optimizer, [np.zeros(n), *np.eye(n), *alike])
        begin = len(self.genomes)
        while (left := candidates - len(self.genomes)) > 0:
            self._tell(optimizer, optimizer.ask(min(optimizer.population, left)))
            if self.first.stop == 0:
                self.first = slice(begin, len(self.genomes))
        return self

    def _tell(self, optimizer: Optimizer, genomes: Sequence[Genome]) -> None:
        weights = np.zeros((len(genomes), len(SOURCES)))
        weights[:, self._places] = genomes
        true = self._world.scores(weights)
        noise = NOISE * np.sqrt(4 * true * (1 - true)) * self._random.standard_normal(true.shape)
        seen = np.clip(true + noise, 0.0, 1.0)
        self.genomes += genomes
        self.true, self.seen = np.vstack([self.true, true]), np.vstack([self.seen, seen])
        optimizer.tell([self._observe(genome, scores) for genome, scores in zip(genomes, seen, strict=True)])

    @property
    def winner(self) -> float:
        """The true score of the candidate that appears best."""
        return float(self.true[self.seen.mean(axis=1).argmax()].mean())


def parameters(sources: int) -> list[Parameter]:
    return [
        Parameter(f"model.weight.{name}", 0.0, HIGH, DEFAULT, group="model", share_of=name)
        for name in SOURCES[:sources]
    ]


def by_mean(genome: Genome, scores: Table) -> Observation:
    return Observation(genome, [-float(scores.mean())])


def by_tasks(genome: Genome, scores: Table) -> Observation:
    return Observation(genome, (-scores).tolist())


def in_niches(genome: Genome, scores: Table) -> Observation:
    """The mean as the loss, with niches of the last two tasks."""
    return Observation(genome, [-float(scores.mean())], features=(float(scores[2]), float(scores[3])))


def over_seeds(measure: Callable[[int], Sequence[float]]) -> list[str]:
    """The means of measures over searches with their standard errors, as text."""
    found = np.array([measure(seed) for seed in range(SEARCHES)])
    errors = found.std(axis=0, ddof=1) / SEARCHES**0.5
    return [f"{mean:.3f} ± {error:.3f}" for mean, error in zip(found.mean(axis=0), errors, strict=True)]


# ---- starts ----------------------------------------------------------------------------------------------------------


STARTS: Mapping[str, Mapping[str, Any]] = {
    "centre": {},
    "default": {"x0": "default"},
    "best": {"x0": "best"},
    "best, short steps": {"x0": "best", "sigma": 0.1},
}


def starts(world: World) -> list[dict[str, Any]]:
    """The winner and the mean of the first generation of plain CMA-ES, by start and number of sources."""
    rows = []
    for sources in range(4, len(SOURCES) + 1):
        for name, settings in STARTS.items():

            def measure(seed: int, sources: int = sources, settings: Mapping[str, Any] = settings) -> list[float]:
                optimizer = CmaSettings(name="cma", **settings).build(parameters(sources), 1, seed)
                done = Search(world, range(sources), seed, by_mean).run(optimizer, CANDIDATES)
                return [done.winner, float(done.true[done.first].mean())]

            winner, first = over_seeds(measure)
            rows.append({"sources": sources, "start": name, "winner": winner, "first_generation": first})
    return rows


CHOICES = ROOT / "docs" / "zoo_choices.json"
"""The sources that replayed choices of selection.py kept, in order, with their gains: 20 seeds, all from SOURCES."""

MIDDLE = HIGH / 2


def choices(world: World) -> list[dict[str, Any]]:
    """The same over the chosen sources, from several starts, minus the result over the four useful sources."""
    kept: list[dict[str, float]] = json.loads(CHOICES.read_text())

    def found(names: Sequence[str], start: Sequence[float], seed: int, x0: str = "default") -> tuple[float, float]:
        weights = [
            Parameter(f"model.weight.{name}", 0.0, HIGH, value, group="model", share_of=name)
            for name, value in zip(names, start, strict=True)
        ]
        optimizer = CmaSettings(name="cma", x0=x0).build(weights, 1, seed)
        done = Search(world, [SOURCES.index(name) for name in names], seed, by_mean).run(optimizer, CANDIDATES)
        return done.winner, float(done.true[done.first].mean())

    told = np.array([found(SOURCES[:4], [MIDDLE] * 4, seed) for seed in range(len(kept))])
    rows = [{"start": "told", "winner": float(told[:, 0].mean()), "first_generation": float(told[:, 1].mean())}]
    for name in ("centre", "defaults", "best", "as each adds"):
        pairs = []
        for seed, gains in enumerate(kept):
            by_gain = [MIDDLE * gain / max(gains.values()) for gain in gains.values()]
            alike = [MIDDLE if name == "centre" else DEFAULT] * len(gains)
            start = by_gain if name == "as each adds" else alike
            pairs.append(found([*gains], start, seed, "best" if name == "best" else "default"))
        of_start = np.array(pairs)
        less = of_start[:, 0] - told[:, 0]
        rows.append(
            {
                "start": name,
                "winner": float(of_start[:, 0].mean()),
                "first_generation": float(of_start[:, 1].mean()),
                "less_than_told": float(less.mean()),
                "error": float(less.std(ddof=1) / len(less) ** 0.5),
            }
        )
    return rows


# ---- niches ----------------------------------------------------------------------------------------------------------


class FromTold(MapElites):
    """MAP-Elites whose first generation are children of the baselines."""

    def ask(self, n: int) -> list[Genome]:
        self._asked += self.population
        return super().ask(n)


class CycleFromTold(CycleQd):
    """CycleQD whose first generation are children of the baselines."""

    def ask(self, n: int) -> list[Genome]:
        self._asked += self.population
        return super().ask(n)


class OnLines(CycleQd):
    """CycleQD with the variation of MAP-Elites."""

    def _children(self, random: RandomState, n: int) -> Table | None:
        archive = self._archives[(self._asks - 1) % self._objectives]
        if not archive:
            return None
        elites = np.array([self._box.unit(archive[niche].genome) for niche in sorted(archive)])
        one, other = elites[random.randint(len(elites), size=(2, n))]
        return iso_line(random, one, other, 0.05, 0.2)


AXES = tuple(Feature(name, 0.0, 1.0, BINS) for name in [*TASKS][2:])
GRID, CYCLE = MapElitesSettings(name="map_elites"), CycleQdSettings(name="cycle_qd", bins=BINS)
NICHES: Mapping[str, Callable[[list[Parameter], int], Optimizer]] = {
    "map_elites": lambda p, seed: MapElites(GRID, p, seed, AXES),
    "map_elites, first children of the sources": lambda p, seed: FromTold(GRID, p, seed, AXES),
    "cycle_qd": lambda p, seed: CycleQd(CYCLE, p, len(TASKS), seed),
    "cycle_qd, first children of the sources": lambda p, seed: CycleFromTold(CYCLE, p, len(TASKS), seed),
    "cycle_qd, iso + line": lambda p, seed: OnLines(CYCLE, p, len(TASKS), seed),
}


def niches(world: World) -> list[dict[str, Any]]:
    """The number of filled niches of all four tasks, the sum of their best, the winner, and the best team of three."""
    rows = []
    for sources in (4, 6):
        for name, build in NICHES.items():

            def measure(seed: int, sources: int = sources, name: str = name, build: Any = build) -> list[float]:
                observe = in_niches if name.startswith("map_elites") else by_tasks
                done = Search(world, range(sources), seed, observe).run(
                    build(parameters(sources), seed), MORE_CANDIDATES
                )
                best: dict[tuple[int, ...], float] = {}
                for scores in done.true:
                    niche = tuple(np.minimum((scores * BINS).astype(int), BINS - 1).tolist())
                    best[niche] = max(best.get(niche, 0.0), float(scores.mean()))
                return [len(best), sum(best.values()), done.winner, team(done)]

            filled, quality, winner, of_three = over_seeds(measure)
            rows.append(
                {"sources": sources, "name": name, "niches": filled, "qd": quality, "winner": winner, "team": of_three}
            )
    return rows


def team(done: Search) -> float:
    """The true score of a greedily chosen team of three, where each task is solved by the best member."""
    members: list[int] = []
    covered = np.zeros(len(TASKS))
    for _ in range(3):
        members.append(int(np.maximum(done.seen, covered).mean(axis=1).argmax()))
        covered = np.maximum(covered, done.seen[members[-1]])
    return float(done.true[members].max(axis=0).mean())


# ---- fronts ----------------------------------------------------------------------------------------------------------


CHOSEN = {"two": (1, 3), "three": (1, 2, 3), "four": (0, 1, 2, 3)}
"""The tasks of each front, as indices in TASKS."""

FRONTS: Mapping[str, Callable[[int], Settings]] = {
    "map": lambda objectives: MapSettings(name="map"),
    "nsga2": lambda objectives: OptunaSettings(name="nsga2", population=16),
    "cma": lambda objectives: CmaSettings(
        name="cma",
        scalarisation={"name": "weighted_sum", "weights": [1.0] * objectives},  # type: ignore[arg-type]
    ),
    "map_elites": lambda objectives: GRID,
    "random": lambda objectives: OptunaSettings(name="random", population=16),
}


def fronts(world: World) -> list[dict[str, Any]]:
    """The volume dominated by candidates that appear nondominated, over four sources at equal budgets."""
    rows = []
    for chosen, tasks in CHOSEN.items():
        for name, settings in FRONTS.items():

            def measure(
                seed: int, name: str = name, tasks: tuple[int, ...] = tasks, settings: Any = settings
            ) -> list[float]:
                def observe(genome: Genome, scores: Table) -> Observation:
                    if name == "map_elites":
                        return in_niches(genome, scores)
                    return Observation(genome, [-float(scores[task]) for task in tasks])

                axes = AXES if name == "map_elites" else ()
                objectives = 1 if name == "map_elites" else len(tasks)
                optimizer = settings(len(tasks)).build(parameters(4), objectives, seed, axes)
                done = Search(world, range(4), seed, observe).run(optimizer, MORE_CANDIDATES)
                front = done.true[nondominated(-done.seen[:, tasks])][:, tasks]
                return [hypervolume(-front, np.zeros(len(tasks)))]

            (volume,) = over_seeds(measure)
            rows.append({"objectives": chosen, "name": name, "volume": volume})
    return rows


def report() -> None:
    """Print the tables, and write the figures."""
    world = World()
    content: dict[str, Any] = {
        "explained": dict(zip(TASKS, [round(share, 3) for share in world.explained], strict=True)),
        "merges": len(json.loads(MERGES.read_text())["merges"]),
        "searches": SEARCHES,
    }
    print(json.dumps(content))
    for name, measured in (("starts", starts), ("choices", choices), ("niches", niches), ("fronts", fronts)):
        content[name] = measured(world)
        for row in content[name]:
            print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gather", "report"))
    parser.add_argument("folder", type=Path, nargs="?")
    given = parser.parse_args()
    if given.what == "gather":
        gather(given.folder)
    else:
        report()


if __name__ == "__main__":
    main()
