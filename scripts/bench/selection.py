"""How well `select` finds the useful sources among twelve, and what a search after it loses.

The zoo with its distractors, and four tasks of one skill each. The useful sources are the four that are best at one of
the tasks on the held-out items (examples/zoo/README.md; each of the two translators on its half of the items). Every
source is scored once on all items; the races of all seeds, which differ in the order of items, are replayed from these
scores. A choice is right if all four are kept. Some seeds are run completely: the choice with its averages and its
control, then a search over the chosen sources, and one with equally many candidates over the four useful ones. The
winners are scored on the same held-out items; the difference is paired by item, with a bootstrap over seeds and items.

    python scripts/bench/selection.py run FOLDER [--searches 0 1 2]      # can be interrupted
    python scripts/bench/selection.py report FOLDER      # the key `select` of docs/diversity.json, and the tables
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from search_cost import ROOT, ZOO

from evomerge.commands.driving import drive_new, drive_selection, open_all
from evomerge.commands.selecting import Selection
from evomerge.recipes.stack import StackRecipe
from evomerge.report.confirmed import held_out
from evomerge.search.opening.session import create_search, fingerprints_of
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.settings.folder import FILE_NAME, is_search, open_store
from evomerge.search.settings.search_file import SearchFile, parse_search_file
from evomerge.search.work.jobs import Finished, Job, Measured
from evomerge.store import Scores, acquire
from evomerge.store.events import Selected, Winner

SOURCES = (
    "english", "japanese", "steps_en", "steps_ja", "into_japanese", "into_english", "extraction", "kanji", "terse",
    "rewarded", "careless", "spelling",
)  # fmt: skip
USEFUL = ("steps_ja", "into_english", "into_japanese", "extraction")
DISTRACTORS = ("careless", "spelling")
TASKS = {"zoo_math_en": "acc", "zoo_math_ja": "acc_ja", "zoo_translate": "acc", "zoo_extract": "acc"}
SEEDS = range(100)
RUN = range(10)
SEARCHES = range(3)
CANDIDATES, ITEMS, HELD_OUT = 40, 25, 60
MERGES = 3
"""The number of averages and controls that are scored on the items of the last rung."""
RESULTS = ROOT / "docs" / "diversity.json"

Known = Mapping[str, Mapping[str, Scores]]
"""For each source its scores on the search split, by task."""


def search_file(seed: int, sources: dict[str, str], items: int | None, **more: Any) -> SearchFile:
    """A search file over sources, with ``items`` of each task, by default all 300."""
    measure = {"batch_size": 100, "held_out": f"test[:{HELD_OUT}]"} | ({} if items is None else {"items": items})
    content = {
        "name": "select", "seed": seed, "base": "base", "dtype": "float32", "sources": sources,
        "space": {"kind": "parameter_space", "method": "task_arithmetic"},
        "objectives": {task: {"task": task, "metric": metric, **measure} for task, metric in TASKS.items()},
        "optimizer": {"name": "cma", "scalarisation": {"name": "weighted_sum", "weights": [1.0] * len(TASKS)}},
        "budget": {"candidates": CANDIDATES}, "confirm": {"top": 1}, "answers": "none", **more,
    }  # fmt: skip
    return parse_search_file(content, place="selection.py", root=ROOT)


def of_zoo(names: Sequence[str]) -> dict[str, str]:
    return {"base": str(ZOO / "base")} | {name: f"{ZOO / 'base'}+{ZOO / name}" for name in names}


# ---- running ----


def run(folder: Path, searches: Sequence[int]) -> None:
    """Score every source on all items; choose and search with some seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    if not is_search(folder / "singles"):  # only baselines
        alone = search_file(0, of_zoo(SOURCES), None, budget={"candidates": 16})
        drive_new(folder / "singles", open_all(alone), console)
    for seed in searches:
        chosen = folder / f"chosen-{seed}"
        if selected(chosen) is None:
            drive_selection(chosen, open_all(search_file(seed, of_zoo(SOURCES), None, select={})), console)
        chosen_file = yaml.safe_load((chosen / FILE_NAME).read_text())
        # Its optimizer starts at weights proportional to what the sources add.
        after = search_file(seed, chosen_file["sources"], ITEMS, optimizer=chosen_file["optimizer"])
        told = search_file(seed, of_zoo(USEFUL), ITEMS)
        for name, file in (("after", after), ("told", told)):
            if not is_search(folder / f"{name}-{seed}"):
                drive_new(folder / f"{name}-{seed}", open_all(file), console)


# ---- replaying ----


class Recorded:
    """A worker that answers jobs of single sources from known scores."""

    def __init__(self, known: Known, prepared: Prepared) -> None:
        self._known, self._tasks = known, [evaluator.name for evaluator in prepared.setup.evaluators]

    def run(self, job: Job) -> Finished:
        assert isinstance(job.recipe, StackRecipe)
        (source,) = job.recipe.blends[0].sources
        scores = []
        for task in job.tasks:
            known = self._known[source][self._tasks[task.evaluator]]
            scores.append({name: values[list(task.indices)] for name, values in known.metrics.items()})
        return Finished(job.candidate, job.attempt, "recorded", Measured(scores, {}))

    def run_together(self, jobs: Sequence[Job]) -> list[Finished]:
        return [self.run(job) for job in jobs]


def replay(seeds: Sequence[int], known: Known) -> dict[int, tuple[list[str], float]]:
    """The sources kept with each seed, and the share of items that this takes, including averages and control."""
    chosen = {}
    prepared = open_all(search_file(0, of_zoo(SOURCES), None, select={}))
    full = (1 + len(SOURCES)) * sum(info.search_items for info in prepared.setup.evaluators)
    for seed in seeds:
        file = prepared.file.model_copy(update={"seed": seed})
        section, again = file.select, Prepared(**{**vars(prepared), "file": file})
        assert section is not None
        with tempfile.TemporaryDirectory() as above:
            folder = Path(above) / "search"
            with create_search(folder, again, fingerprints_of(again)) as store, acquire(store):
                selection = Selection(folder, again, store, section)
                selection.run_race(InProcessPool(lambda: Recorded(known, prepared)))
                taken = selection.scored + MERGES * len(TASKS) * section.rungs[-1]
                chosen[seed] = ([one.name for one in selection.kept], taken / full)
    return chosen


def singles(folder: Path) -> Known:
    """The recorded scores of every source alone."""
    with open_store(folder / "singles") as store:
        tasks = {evaluator.version: evaluator.name for evaluator in store.search().record.evaluators}
        rows = [row for row in store.candidates(step=0) if row.origin == "source"]
        return {row.label: {tasks[s.evaluator]: s for s in store.scores(row.number, "search")} for row in rows}


# ---- reporting ----


def selected(folder: Path) -> Selected | None:
    """The sources that were chosen in a folder; None if the choice has not ended."""
    if not is_search(folder):
        return None
    with open_store(folder) as store:
        events = store.events(kinds=(Selected.kind,))
        return events[-1].read(Selected) if events else None


def winner(folder: Path) -> NDArray[np.float64] | None:
    """The held-out scores of a search's winner, float64 [tasks, items]; None if it has not ended."""
    if not is_search(folder):
        return None
    with open_store(folder) as store:
        events = store.events(kinds=(Winner.kind,))
        if not events:
            return None
        objectives = store.search().record.objectives
        scores = held_out(store, events[-1].read(Winner).candidate, list(objectives))
        return np.array([scores[objective.name] for objective in objectives], dtype=np.float64)


def report(folder: Path) -> None:
    """Print the tables, and write the figures."""
    chosen = replay(SEEDS, singles(folder))
    right = {seed: set(USEFUL) <= set(kept) for seed, (kept, _) in chosen.items()}
    shares = np.array([share for _, share in chosen.values()])
    distractors = np.mean([len(set(DISTRACTORS) & set(kept)) for kept, _ in chosen.values()])
    for seed in RUN:
        print(f"| {seed} | {', '.join(chosen[seed][0])} | {chosen[seed][1]:.3f} |")
    figures: dict[str, Any] = {
        "seeds": len(RUN), "seeds_right": sum(right[seed] for seed in RUN),
        "items_fraction": round(float(shares[list(RUN)].mean()), 4),
        "more": {
            "seeds": len(SEEDS), "seeds_right": sum(right.values()), "items_fraction": round(float(shares.mean()), 4),
            "items_fraction_most": round(float(shares.max()), 4), "distractors_kept": round(float(distractors), 4),
        },
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    pairs = []
    for seed in RUN:
        said, after, told = (
            selected(folder / f"chosen-{seed}"), winner(folder / f"after-{seed}"), winner(folder / f"told-{seed}")
        )  # fmt: skip
        if said is not None:
            kept = [source.name for source in said.sources if source.fate == "kept"]
            print(f"seed {seed} run: {', '.join(kept)}; as replayed: {kept == chosen[seed][0]}; control {said.others}")
        if after is not None and told is not None:
            pairs.append(after - told)
            print(f"| {seed} | {after.mean():.3f} | {told.mean():.3f} |")
    if pairs:
        mean, low, high = bootstrap(np.array(pairs))
        print(f"after less told: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(pairs)} seeds")
        figures["after"] = {"seeds": len(pairs), "mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(content | {"select": figures}, indent=2) + "\n")


def bootstrap(gaps: NDArray[np.float64], draws: int = 10_000) -> tuple[float, float, float]:
    """The mean of differences [seeds, tasks, items] with its 95% bootstrap interval over seeds and items."""
    rng = np.random.default_rng(0)
    seeds, tasks, items = gaps.shape
    means = np.empty(draws)
    for draw in range(draws):
        of_seeds = gaps[rng.integers(seeds, size=seeds)].mean(axis=0)
        means[draw] = np.mean([of_seeds[task, rng.integers(items, size=items)].mean() for task in range(tasks)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gaps.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--searches", type=int, nargs="*", default=list(SEARCHES))
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.folder, arguments.searches)
    else:
        report(arguments.folder)


if __name__ == "__main__":
    main()
