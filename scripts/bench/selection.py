"""How well `select` finds the useful ones of twelve sources, and what a search after it loses.

The zoo with its distractors and four tasks of one skill each. Useful are the four sources that are best at one of them
on the held-out items (examples/zoo/README.md; the two translators each at its half of the items). A seed decides on
which items sources are scored. The choice is right where all four are kept. Then two searches have equally many
candidates, one over what was chosen and one that was told the four; their winners are scored on the same held-out
items, and their difference is paired by item, with a bootstrap over seeds and items.

    python scripts/bench/selection.py run FOLDER [--seeds 0 1 ...] [--searches 0 1 2]      # can be interrupted
    python scripts/bench/selection.py report FOLDER      # the key `select` of docs/diversity.json, and the tables
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from search_cost import ROOT, ZOO

from evomerge.commands.driving import drive_new, drive_selection, open_all
from evomerge.report.confirmed import held_out
from evomerge.search.settings.folder import FILE_NAME, is_search, open_store
from evomerge.search.settings.search_file import SearchFile, parse_search_file
from evomerge.store.events import Selected, Winner

SOURCES = (
    "english", "japanese", "steps_en", "steps_ja", "into_japanese", "into_english", "extraction", "kanji", "terse",
    "rewarded", "careless", "spelling",
)  # fmt: skip
USEFUL = ("steps_ja", "into_english", "into_japanese", "extraction")
DISTRACTORS = ("careless", "spelling")
TASKS = {"zoo_math_en": "acc", "zoo_math_ja": "acc_ja", "zoo_translate": "acc", "zoo_extract": "acc"}
SEEDS, SEARCHES = range(10), range(3)
CANDIDATES, ITEMS, HELD_OUT = 40, 40, 100
RESULTS = ROOT / "docs" / "diversity.json"

Scores = NDArray[np.float64]


def search_file(seed: int, sources: dict[str, str], items: int | None, **more: Any) -> SearchFile:
    """A search over sources; ``items`` of each task, or all 300."""
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


def run(folder: Path, seeds: Sequence[int], searches: Sequence[int]) -> None:
    """Choose with every seed, and search with some."""
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for seed in seeds:
        chosen = folder / f"chosen-{seed}"
        if selected(chosen) is None:
            drive_selection(chosen, open_all(search_file(seed, of_zoo(SOURCES), None, select={})), console)
        if seed not in searches:
            continue
        sources = yaml.safe_load((chosen / FILE_NAME).read_text())["sources"]
        for name, over in (("after", sources), ("told", of_zoo(USEFUL))):
            if not is_search(folder / f"{name}-{seed}"):
                drive_new(folder / f"{name}-{seed}", open_all(search_file(seed, over, ITEMS)), console)


def selected(folder: Path) -> Selected | None:
    """What was chosen in a folder; None where nothing is yet."""
    if not is_search(folder):
        return None
    with open_store(folder) as store:
        events = store.events(kinds=(Selected.kind,))
        return events[-1].read(Selected) if events else None


def winner(folder: Path) -> Scores | None:
    """The held-out scores of a search's winner: float64 [tasks, items]; None where it has not ended."""
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
    chosen = {int(path.name.rpartition("-")[2]): selected(path) for path in sorted(folder.glob("chosen-*"))}
    known = {seed: said for seed, said in sorted(chosen.items()) if said is not None}
    right, fractions, idle = 0, [], 0
    for seed, said in known.items():
        kept = [source.name for source in said.sources if source.fate == "kept"]
        right += set(USEFUL) <= set(kept)
        idle += len(set(DISTRACTORS) & set(kept))
        fractions.append(said.scored / said.full)
        others = (
            "" if said.others is None else f"{said.others.mean:+.3f} [{said.others.low:+.3f}, {said.others.high:+.3f}]"
        )
        print(f"| {seed} | {', '.join(kept)} | {said.scored:,} | {fractions[-1]:.3f} | {others} |")
    print(f"{right} of {len(known)} right, {idle} distractors kept")
    print(f"items: {np.mean(fractions):.3f} of all, at most {max(fractions):.3f}")
    pairs = [
        (seed, after, told)
        for seed in known
        if (after := winner(folder / f"after-{seed}")) is not None
        and (told := winner(folder / f"told-{seed}")) is not None
    ]
    figures: dict[str, Any] = {
        "seeds": len(known), "seeds_right": right, "items_fraction": round(float(np.mean(fractions)), 4),
        "items_fraction_most": round(max(fractions), 4), "distractors_kept": idle,
    }  # fmt: skip
    for seed, after, told in pairs:
        print(f"| {seed} | {after.mean():.3f} | {told.mean():.3f} |")
    if pairs:
        gaps = np.array([after - told for _, after, told in pairs])
        mean, low, high = bootstrap(gaps)
        print(f"after less told: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(pairs)} seeds")
        figures["searches"] = len(pairs)
        figures["after"] = {name: round(value, 4) for name, value in (("mean", mean), ("low", low), ("high", high))}
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(content | {"select": figures}, indent=1) + "\n")


def bootstrap(gaps: NDArray[np.float64], draws: int = 10_000) -> tuple[float, float, float]:
    """The mean of differences [seeds, tasks, items] with its 95% interval: seeds and each task's items are drawn."""
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
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--searches", type=int, nargs="*", default=list(SEARCHES))
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.folder, arguments.seeds, arguments.searches)
    else:
        report(arguments.folder)


if __name__ == "__main__":
    main()
