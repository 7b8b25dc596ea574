"""The coverage of teams of three: searches that keep many different candidates against plain CMA-ES, at equal budgets.

Four adapters of the zoo (examples/zoo), their base, and four tasks, of which one is a composition that no source
solves; no single merge solves all of them. Every search has 96 candidates including baselines, each scored on 25 items
of every task; a seed determines these items and all random numbers of the search. From each search a team of three is
chosen greedily by the items that it was scored on (``evomerge team``), and scored on 300 held-out items. These teams
are compared with the three best candidates of plain CMA-ES by the mean of the tasks, which is what a search without
niches offers, with the team that can also be chosen from that search, and with that of the sources.

Coverage is the share of held-out items that at least one member solves; a majority is more than half of the members.
Differences are paired by seed and item; their 95% intervals come from a bootstrap over both.

    python scripts/bench/diversity.py run FOLDER [--seeds 0 1 2 ...] [--only NAME ...]      # can be interrupted
    python scripts/bench/diversity.py report FOLDER      # docs/diversity.json, docs/diversity.svg, and the table

Reported runs are kept in docs/diversity_runs.json and are not repeated: further seeds add to them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from methods import interval, write
from numpy.typing import NDArray
from search_cost import EXPERTS, ROOT, TASKS, ZOO

from evomerge.merging.measured.evidence import Evidence
from evomerge.report.team import maximised, search_scores
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.estimation.team import coverage, greedy_team, majority
from evomerge.search.opening.session import create_search, fingerprints_of, recipe_of
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.preparing.prepare import Prepared, prepare
from evomerge.search.settings.folder import open_store
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.work.jobs import Job, Measured
from evomerge.search.workers.worker import Worker
from evomerge.store import CandidateRow, Store, acquire

RUNS = ROOT / "docs" / "diversity_runs.json"
SEEDS = range(5)
MEMBERS = 3
CANDIDATES = 96
ITEMS, HELD_OUT = 25, 75  # of each task
AT = (16, 32, 64, 96)  # candidates of the coverage curve

METRICS = {"zoo_math_ja": "acc_ja"}  # the other tasks have acc
ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "plain CMA-ES": {"name": "cma", "scalarisation": {"name": "weighted_sum", "weights": [1.0] * len(TASKS)}},
    "dns": {"name": "dns"},
    "m2n2": {"name": "m2n2"},
    "map_elites": {"name": "map_elites"},
    "cycle_qd": {"name": "cycle_qd", "bins": 5},
}
SEARCHED = "plain CMA-ES"
BASELINE = "the three best of plain CMA-ES"
SOURCES = "sources"

Scores = NDArray[np.float64]


def content(name: str, seed: int) -> dict[str, Any]:
    """A search file."""
    first = ITEMS * seed

    def measured(task: str) -> dict[str, Any]:
        split = {"search": f"validation[{first}:{first + ITEMS}]", "held_out": f"test[:{HELD_OUT}]"}
        return {"task": task, "metric": METRICS.get(task, "acc"), "batch_size": 100} | split

    niches = {"range": [0, 1], "bins": 5}
    is_grid = name == "map_elites"
    return {
        "name": "diversity", "seed": seed, "base": "base", "dtype": "float32",
        "sources": {"base": str(ZOO / "base"), **{name: f"{ZOO / 'base'}+{ZOO / name}" for name in EXPERTS}},
        "space": {"kind": "parameter_space", "method": "task_arithmetic", "bounds": {"weight": [0, 1.5]}},
        "objectives": {task: measured(task) for task in TASKS},
        "optimizer": dict(ENTRIES[name]),
        "baselines": {"kappa": False},
        "budget": {"candidates": CANDIDATES},
    } | ({"features": {f"in_{task}": measured(task) | niches for task in TASKS[2:]}} if is_grid else {})  # fmt: skip


def run(folder: Path, name: str, seed: int) -> None:
    """Run one search and choose its teams, for FOLDER/NAME-SEED.json; skipped if that exists."""
    key = f"{''.join(letter if letter.isalnum() else '_' for letter in name)}-{seed}"
    out = folder / f"{key}.json"
    if out.exists() or any((known["name"], known["seed"]) == (name, seed) for known in reported()):
        return
    started = time.process_time()
    prepared = prepare(parse_search_file(content(name, seed), place=name, root=folder.resolve()))
    place = folder / key
    store = open_store(place) if place.exists() else create_search(place, prepared, fingerprints_of(prepared))
    with store, acquire(store):
        worker = Worker.of("bench", prepared, Evidence())
        pool = InProcessPool(lambda: worker)
        if store.search().state != "finished":
            Driver(Drive(prepared.setup, store, pool, Control(store.take_commands), logs=place / "logs")).run()
        teams = Searched(store, prepared, worker, folder / "held_out")
        result = {"name": name, "seed": seed, "teams": {}, "curve": {}}
        result["curve"] = {str(at): teams.shown(teams.greedy(at)) for at in AT}
        result["teams"][name] = result["curve"][str(CANDIDATES)]
        if name == SEARCHED:
            result["teams"][BASELINE] = teams.shown(teams.best())
            result["teams"][SOURCES] = teams.shown(teams.of_sources())
    result["seconds"] = time.process_time() - started
    write(out, result)
    print(f"{name}, seed {seed}: {result['seconds']:.0f} s", flush=True)


class Searched:
    """A finished search: the teams that can be chosen from it, and the held-out items that they solve.

    Args:
        known: a folder with the results of recipes, in files named by their hashes, because searches share sources.
    """

    def __init__(self, store: Store, prepared: Prepared, worker: Worker, known: Path) -> None:
        self._store, self._prepared, self._worker, self._known = store, prepared, worker, known
        rows = [row for row in store.candidates() if row.status in ("done", "cached")]
        self._numbers, self._scores = search_scores(store, rows, maximised(store))

    def greedy(self, at: int) -> list[int]:
        """The team of the first ``count`` candidates."""
        return self._team([number for number in self._numbers if number < at])

    def of_sources(self) -> list[int]:
        """The team of the sources."""
        return self._team([row.number for row in self._store.candidates(step=0) if row.origin == "source"])

    def best(self) -> list[int]:
        """The candidates with the highest mean over tasks, without repeated genomes."""
        order = np.argsort(-self._scores.mean(axis=1), kind="stable").tolist()
        distinct: dict[str, int] = {}
        for place in order:
            number = self._numbers[place]
            distinct.setdefault(self._store.candidate(number).recipe_hash, number)
        return list(distinct.values())[:MEMBERS]

    def _team(self, among: Sequence[int]) -> list[int]:
        places = [self._numbers.index(number) for number in among if number in self._numbers]
        return [self._numbers[places[member]] for member in greedy_team(self._scores[places], MEMBERS)]

    def shown(self, team: Sequence[int]) -> list[str]:
        """For each member a string of 0 and 1: whether it solves each held-out item."""
        return [self._held_out(number) for number in team]

    def _held_out(self, number: int) -> str:
        row = self._store.candidate(number)
        file = self._known / f"{row.recipe_hash}.txt"
        if not file.exists():
            self._known.mkdir(exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text("".join("1" if value >= 0.5 else "0" for value in self._scored(row)))
            partial.rename(file)
        return file.read_text()

    def _scored(self, row: CandidateRow) -> Scores:
        """float64 [items]"""
        setup = self._prepared.setup
        job = Job(row.number, 0, recipe_of(row, self._prepared.file.sources), setup.tasks("held_out"))
        result = self._worker.run(job).result
        if not isinstance(result, Measured):
            raise RuntimeError(result)
        found = {task.evaluator: of_task for task, of_task in zip(job.tasks, result.scores, strict=True)}
        return np.concatenate([found[o.evaluator][o.metric].astype(np.float64) for o in setup.objectives])


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teams:
    """The teams of one row. ``solved`` has float64 [members, items] for each seed."""

    solved: Sequence[Scores]

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> Teams:
        return cls([np.array([[float(letter) for letter in text] for text in team]) for team in texts])

    @property
    def covered(self) -> Scores:
        """float64 [seeds, items]"""
        return np.array([coverage(team) for team in self.solved])

    @property
    def majority(self) -> float:
        return float(np.mean([majority(team).mean() for team in self.solved]))

    @property
    def best_member(self) -> float:
        return float(np.mean([team.mean(axis=1).max() for team in self.solved]))


def reported() -> list[dict[str, Any]]:
    """The runs of earlier reports."""
    runs: list[dict[str, Any]] = json.loads(RUNS.read_text()) if RUNS.exists() else []
    return runs


def report(folder: Path) -> None:
    """Write docs/diversity.json and its plot, and print the table, with the seeds that plain CMA-ES also has."""
    found = [*reported(), *(json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))]
    runs = list({(run["name"], run["seed"]): run for run in found}.values())
    RUNS.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
    by_name = {name: {run["seed"]: run for run in runs if run["name"] == name} for name in ENTRIES}
    plain = by_name[SEARCHED]
    beside = {
        team: {seed: Teams.of([run["teams"][team]]) for seed, run in plain.items()} for team in (BASELINE, SOURCES)
    }
    rows = []
    for name, of_name in by_name.items():
        for team in plain[min(plain)]["teams"] if name == SEARCHED else [name]:
            seeds = sorted(of_name.keys() & plain.keys())
            teams = Teams.of([of_name[seed]["teams"][team] for seed in seeds])
            others = {
                other: np.concatenate([of_seed[seed].covered for seed in seeds]) for other, of_seed in beside.items()
            }
            rows.append(_row(team, teams, others))
    rows.sort(key=lambda row: -row["coverage"])
    out = ROOT / "docs" / "diversity.json"
    kept = json.loads(out.read_text()) if out.exists() else {}
    seeds_of_all = min(row["seeds"] for row in rows)
    out.write_text(
        json.dumps(kept | {"seeds": seeds_of_all, "items": len(TASKS) * HELD_OUT, "rows": rows}, indent=2) + "\n"
    )
    for row in rows:
        values = (f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print("  ".join(values))
    means = {
        other: float(np.mean([team.covered.mean() for team in of_seed.values()])) for other, of_seed in beside.items()
    }
    _plot({name: [run["curve"] for run in of_name.values()] for name, of_name in by_name.items()}, means)


def _row(name: str, teams: Teams, others: Mapping[str, Scores]) -> dict[str, Any]:
    """The coverage of a team, and by how much it exceeds others on the same seeds (float64 [seeds, items] each)."""
    gaps = {other: teams.covered - covered for other, covered in others.items()}
    ends = {other: interval(gap) for other, gap in gaps.items()}
    return {
        "name": name,
        "seeds": len(teams.solved),
        "coverage": float(teams.covered.mean()),
        "difference": float(gaps[BASELINE].mean()),
        "low": ends[BASELINE][0],
        "high": ends[BASELINE][1],
        "over_sources": float(gaps[SOURCES].mean()),
        "over_sources_low": ends[SOURCES][0],
        "over_sources_high": ends[SOURCES][1],
        "majority": teams.majority,
        "best_member": teams.best_member,
    }


def _plot(curves: Mapping[str, Sequence[Mapping[str, list[str]]]], beside: Mapping[str, float]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "diversity"
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, of_seeds in curves.items():
        covered = np.array([Teams.of([curve[str(at)] for at in AT]).covered.mean(axis=1) for curve in of_seeds])
        (line,) = axes.plot(AT, covered.mean(axis=0), label=f"team of {name}", lw=2 if name == SEARCHED else 1.4)
        error = covered.std(axis=0, ddof=1) / np.sqrt(len(covered)) if len(covered) > 1 else 0 * covered[0]
        axes.fill_between(
            AT, covered.mean(axis=0) - error, covered.mean(axis=0) + error, alpha=0.12, color=line.get_color()
        )
    for name, style in ((BASELINE, "--"), (SOURCES, ":")):
        label = f"team of {name}" if name == SOURCES else name
        axes.axhline(beside[name], label=label, ls=style, color="grey")
    axes.set(xlabel="candidates", ylabel=f"held-out coverage of a team of {MEMBERS}")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(ROOT / "docs" / "diversity.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    given = parser.parse_args()
    if given.what == "report":
        report(given.folder)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for name in given.only:
            run(given.folder, name, seed)


if __name__ == "__main__":
    main()
