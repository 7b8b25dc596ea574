"""The cost of a good merge: items generated until a search's held-out score is as good as that of plain CMA-ES.

Four problems:

* miniatures: DARE-TIES with a weight and a density for each of two experts (examples/miniatures), on 250 items.
* model, over the zoo (examples/zoo): a weight for each of four experts, and the mean score on four tasks, of which one
  is a composition that no expert solves; 100 items.
* blocks: a weight for each expert in each attention, in each mlp and outside of the layers: 56.
* density: TIES with a weight and a density for each of these: 112.

The reference of each is a search with the settings of the original work: CMA-ES with its defaults from the centre of
the box, 1,000 candidates, each scored on every item. Every technique searches the same space on the same items, and
whenever its best candidate changes, that candidate is scored on the held-out split, which no search reads. The curves
are these held-out scores over the items generated so far, including those of the baselines. Forward and backward passes
through right answers are counted separately. The goal is 95% of the reference's gain over the best baseline at the end
of its budget.

    python scripts/bench/search_cost.py run FOLDER [--problem blocks] [--seeds 0 1 2 ...] [--only NAME ...]
    python scripts/bench/search_cost.py report FOLDER    # docs/search_cost.json, docs/search_cost_PROBLEM.svg

This takes hours, and can be interrupted. Several processes with different seeds or problems may share a folder.
Reported runs are kept in docs/search_cost_runs.json, curve by curve, and are not repeated: further seeds add to them.
If what a run measured has changed, remove it there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.opening.session import create_search, fingerprints_of, recipe_of
from evomerge.search.opening.start import with_start
from evomerge.search.pools.base import PoolState
from evomerge.search.preparing.prepare import Prepared, prepare
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.work.jobs import Finished, Job, Measured, PoolNews, Result, Task
from evomerge.search.workers.worker import Worker
from evomerge.store import Store, acquire
from evomerge.store.events import Descent

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "docs" / "search_cost_runs.json"
ZOO = ROOT / "examples" / "zoo"
DATA = ROOT / "evaluators" / "tasks" / "data"
SHARE = 0.95  # of the reference's gain
PARTS = (0.01, 0.02, 0.05)  # shares of the reference's items at which a technique's share of the gain is reported
REFERENCE = "full evaluation, plain CMA-ES"
SEEDS = 8
SPACING = 1.1  # the ratio of items between neighbouring points of a curve
HELD_OUT = 500  # items of the held-out split, as many of each task

EXPERTS = ("steps_ja", "kanji", "into_english", "extraction")
TASKS = ("zoo_math_ja", "zoo_translate", "zoo_extract", "zoo_steps_kanji")  # those of zoo_mixed
BOUNDS = {"weight": [0, 1.5]}
MINIATURES: dict[str, Any] = {
    "sources": {name: str(ROOT / "examples" / "miniatures" / name) for name in ("base", "maths", "japanese")},
    "base": "base",
    "space": {"kind": "parameter_space", "method": "dare_ties", "granularity": "model", "bounds": BOUNDS},
    "objectives": {"maths": {"task": "mini_math_ja", "metric": "acc_ja", "items": 250, "batch_size": 250}},
    "baselines": {"kappa": False},
    "proxy": {"file": "miniatures.search.jsonl", "held_out_file": "miniatures.held_out.jsonl"},
}


def zoo(method: str, granularity: str) -> dict[str, Any]:
    """A search over the zoo."""
    return {
        "sources": {"base": str(ZOO / "base"), **{name: f"{ZOO / 'base'}+{ZOO / name}" for name in EXPERTS}},
        "base": "base",
        "dtype": "float32",
        "space": {"kind": "parameter_space", "method": method, "granularity": granularity, "bounds": BOUNDS},
        "objectives": {"zoo": {"task": "zoo_mixed", "metric": "acc", "items": 100, "batch_size": 250}},
        "baselines": {"kappa": False},
        "proxy": {"file": "search.jsonl", "held_out_file": "held_out.jsonl", "items": 1000},
    }


PROBLEMS = {
    "miniatures": MINIATURES,
    "model": zoo("task_arithmetic", "model"),
    "blocks": zoo("task_arithmetic", "block"),
    "density": zoo("ties", "block"),
}
TITLES = {
    "model": "4 weights",
    "blocks": "56 weights, one for each expert in every block",
    "density": "112 numbers: TIES with a weight and a density in every block",
}
RACING: dict[str, Any] = {"rungs": [25, 50]}
LITTLE = {"candidates": 150}
CMA: dict[str, Any] = {"name": "cma"}
CASES: dict[str, dict[str, Any]] = {
    REFERENCE: {"budget": {"candidates": 1000}, "optimizer": CMA},
    "racing": {"budget": LITTLE, "optimizer": CMA, "racing": RACING},
    "racing, population by the budget": {
        "budget": LITTLE, "optimizer": CMA | {"population": "auto"}, "racing": RACING,
    },
    "racing, cosines": {
        "budget": LITTLE, "optimizer": CMA, "racing": RACING,
        "space": {"granularity": "model", "profile": {"cosines": 3}},
    },
    "racing, begun where one over the model ends": {
        "budget": {"candidates": 75}, "optimizer": CMA, "racing": RACING, "earlier": "model",
    },
    "racing, coarse to fine": {
        "budget": LITTLE, "optimizer": CMA, "racing": RACING, "space": {"granularity": "adaptive", "finest": "block"},
    },
    "racing, proxy": {
        "budget": {"candidates": 60}, "optimizer": CMA | {"population": 4}, "racing": RACING, "proxy": True,
    },
    "racing, proxy, coarse to fine": {
        "budget": {"candidates": 60}, "optimizer": CMA | {"population": 4}, "racing": RACING, "proxy": True,
        "space": {"granularity": "adaptive", "finest": "block"},
    },
    "racing, proxy alone": {
        "budget": LITTLE, "optimizer": {"name": "proxy_descent"}, "racing": RACING, "proxy": True,
    },
    "proxy alone": {"budget": {"candidates": 30}, "optimizer": {"name": "proxy_descent"}, "proxy": True},
    "racing, proxy alone, each layer": {
        "budget": {"candidates": 60}, "optimizer": {"name": "proxy_descent"}, "racing": RACING, "proxy": True,
        "space": {"method": "task_arithmetic", "granularity": "layer"},
    },
}  # fmt: skip


def write_items(folder: Path) -> None:
    """Write the items that the proxy reads: those of a problem, with several tasks interleaved."""
    for split in ("search", "held_out"):
        (folder / f"miniatures.{split}.jsonl").write_bytes((DATA / f"mini_math_ja.{split}.jsonl").read_bytes())
        (folder / f"{split}.jsonl").write_text("\n".join(line for _, line in in_turn(split)) + "\n", "utf-8")


def in_turn(split: str) -> list[tuple[str, str]]:
    """The interleaved items of a split of ``TASKS``: the task, and the line of JSON."""
    by_task = [(DATA / f"{task}.{split}.jsonl").read_text("utf-8").splitlines() for task in TASKS]
    return [pair for row in zip(*by_task, strict=True) for pair in zip(TASKS, row, strict=True)]


class CountingPool:
    """A pool with one worker in this process, which counts the items that each attempt answers and screens.

    Args:
        known: the results that this process has for the problem, by recipe and tasks. They save scoring the same model
            again, for example baselines in every run; the counts do not depend on them.
    """

    def __init__(self, worker: Worker, known: dict[Hashable, Result]) -> None:
        self.worker = worker
        self._known = known
        self.asked: dict[tuple[int, int], Mapping[int, int]] = {}
        self._waiting: list[Job] = []

    def submit(self, job: Job) -> None:
        self.asked[job.candidate, job.attempt] = {task.evaluator: len(task.indices) for task in job.tasks}
        self._waiting.append(job)

    def wait(self, timeout_s: float) -> list[Finished]:
        return [self.run(self._waiting.pop(0))] if self._waiting else []

    def run(self, job: Job) -> Finished:
        """Run a job unless its result is known."""
        if job.instead is not None:
            return self.worker.run(job)
        key = (
            _seedless(job.recipe).canonical(),
            tuple((task.evaluator, task.split, tuple(task.indices)) for task in job.tasks),
        )
        if key not in self._known:
            self._known[key] = self.worker.run(job).result
        return Finished(job.candidate, job.attempt, "bench", self._known[key])

    def state(self) -> PoolState:
        return PoolState(workers=1, busy=len(self._waiting))

    def close(self) -> None:
        self._waiting.clear()

    def running(self) -> Mapping[tuple[int, int], float]:
        return {}

    def now(self) -> float:
        return time.monotonic()

    def news(self) -> Sequence[PoolNews]:
        return ()

    def cancel(self, candidate: int, attempt: int) -> None:
        """A job that runs in this process cannot be ended."""


def _seedless(recipe: Recipe) -> Recipe:
    """The recipe without its seed, if nothing in it is random."""
    drawn = not isinstance(recipe, StackRecipe) or any("dare" in blend.method for blend in recipe.blends)
    return recipe if drawn else recipe.model_copy(update={"seed": 0})


@dataclass(frozen=True)
class Point:
    """A change of the best candidate: when, and its scores on the search split and on the held-out split."""

    items: int
    passes: int
    candidates: int
    search: float
    held_out: float


_MEASURED: defaultdict[str, dict[Hashable, Result]] = defaultdict(dict)  # by problem


def run(folder: Path, problem: str, name: str, seed: int) -> None:
    """Run one search and write its curve to FOLDER/PROBLEM-NAME-SEED.json; skipped if that exists."""
    key = "".join(letter if letter.isalnum() else "_" for letter in f"{problem} {name}")
    out = folder / f"{key}-{seed}.json"
    if out.exists() or any(_key(known) == (problem, name, seed) for known in _reported()):
        return
    started = time.time()
    case = dict(CASES[name])
    earlier = case.pop("earlier", None)
    if earlier is None:
        search = _search(folder, key, problem, case, seed)
    else:
        first = _search(folder, f"{key}-first", earlier, case, seed)
        search = first.then(_search(folder, key, problem, case | {"start_from": [str(first.place)]}, seed))
    result = {"problem": problem, "name": name, "seed": seed, "why": search.why, "seconds": time.time() - started}
    result |= {"baselines": search.baselines, "points": [vars(point) for point in search.points]}
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(out)
    print(f"{problem}, {name}, seed {seed}: {search.points[-1]}, {search.why}, {result['seconds']:.0f} s", flush=True)


@dataclass(frozen=True)
class Search:
    """A finished search. ``baselines`` has held-out scores by label."""

    place: Path
    why: str
    baselines: Mapping[str, float]
    points: Sequence[Point]

    def then(self, search: Search) -> Search:
        """This search and one that started from it: the cost of both, and the best so far of the one that runs."""
        spent = self.points[-1]
        points = [
            Point(
                spent.items + point.items,
                spent.passes + point.passes,
                spent.candidates + point.candidates,
                point.search,
                point.held_out,
            )
            for point in search.points
        ]
        return Search(search.place, search.why, search.baselines, [*self.points, *points])


def _search(folder: Path, name: str, problem: str, case: Mapping[str, Any], seed: int) -> Search:
    of_problem = dict(PROBLEMS[problem])
    proxy = of_problem.pop("proxy")
    content = of_problem | case | {"name": name, "seed": seed} | ({"proxy": proxy} if "proxy" in case else {})
    content["space"] = of_problem["space"] | case.get("space", {})
    prepared = with_start(prepare(parse_search_file(content, place=name, root=folder.resolve())))
    place = folder / f"{name}-{seed}.{int(time.time())}"
    store = create_search(place, prepared, fingerprints_of(prepared))
    with store, acquire(store):
        pool = CountingPool(Worker.of("bench", prepared, Evidence()), _MEASURED[problem])
        driver = Driver(Drive(prepared.setup, store, pool, Control(store.take_commands), logs=place / "logs"))
        why = driver.run().why
        curve = _curve(store, prepared, pool)
        baselines = {row.label: _held_out(row.number, store, prepared, pool) for row in store.candidates(step=0)}
    return Search(place, why, baselines, curve)


def _curve(store: Store, prepared: Prepared, pool: CountingPool) -> list[Point]:
    """The best candidate after every tell that changed it, and another point at the end of the search.

    Changes within a tenth of the items generated so far count as one, because each costs ``HELD_OUT`` answers.
    """
    points, items, passes, candidates, best = [], 0, 0, 0, -1
    for event in store.events(kinds=("ask", "descent", "dispatch", "front", "tell")):
        if event.kind == "ask":
            candidates += len(event.payload["candidates"])
        elif event.kind == "dispatch" and event.candidate is not None and event.attempt is not None:
            asked = pool.asked[event.candidate, event.attempt]
            items += asked.get(0, 0)
        elif event.kind == "descent":
            passes += event.read(Descent).passes
        elif event.kind == "front":
            (best,) = event.payload["candidates"]
            if not points or items >= SPACING * points[-1].items:
                points.append(_point(store, prepared, pool, best, items, passes, candidates))
    points.append(_point(store, prepared, pool, best, items, passes, candidates))
    return points


def _point(
    store: Store, prepared: Prepared, pool: CountingPool, best: int, items: int, passes: int, candidates: int
) -> Point:
    search = store.candidate(best).objectives[prepared.setup.objectives[0].name].mean
    return Point(items, passes, candidates, search, _held_out(best, store, prepared, pool))


def _held_out(number: int, store: Store, prepared: Prepared, pool: CountingPool) -> float:
    row = store.candidate(number)
    tasks = [Task(0, "held_out", range(HELD_OUT))]
    finished = pool.run(Job(number, 0, recipe_of(row, prepared.file.sources), tasks))
    assert isinstance(finished.result, Measured), finished.result
    return float(finished.result.scores[0][prepared.setup.objectives[0].metric].mean(dtype=np.float64))


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """The runs of one technique. ``grid`` has numbers of items, ``held_out`` the runs' scores there [seeds, grid]."""

    runs: Sequence[Mapping[str, Any]]

    def at(self, grid: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 [seeds, grid]: the held-out score of the best candidate at these items, or at the end of the run."""
        rows = []
        for search in self.runs:
            items = np.array([point["items"] for point in search["points"]])
            scores = np.array([point["held_out"] for point in search["points"]])
            at = np.searchsorted(items, grid, side="right") - 1
            rows.append(np.where(at >= 0, scores[np.maximum(at, 0)], np.nan))
        return np.array(rows)

    @property
    def seeds(self) -> list[int]:
        return [search["seed"] for search in self.runs]

    def of(self, seeds: Sequence[int]) -> Curves:
        """The runs of these seeds, in their order."""
        by_seed = {search["seed"]: search for search in self.runs}
        return Curves([by_seed[seed] for seed in seeds])

    @property
    def last(self) -> NDArray[np.float64]:
        return np.array([search["points"][-1]["held_out"] for search in self.runs])

    @property
    def spent(self) -> float:
        return float(np.mean([search["points"][-1]["items"] for search in self.runs]))


def report(folder: Path) -> None:
    """Combine the curves of all runs: docs/search_cost.json, and a plot for each problem."""
    found = [*_reported(), *(json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))]
    runs = [run for _, run in sorted({_key(run): run for run in found}.items())]
    lines = ",\n".join(json.dumps(run) for run in runs)
    RUNS.write_text(f"[\n{lines}\n]\n")
    curves = {
        problem: {
            name: Curves(found)
            for name in CASES
            if (found := [r for r in runs if (r["problem"], r["name"]) == (problem, name)])
        }
        for problem in PROBLEMS
    }
    curves = {problem: of_problem for problem, of_problem in curves.items() if REFERENCE in of_problem}
    rows = {problem: _problem(of_problem) for problem, of_problem in curves.items()}
    docs = ROOT / "docs"
    earlier = json.loads((docs / "search_cost.json").read_text())["problems"]  # of problems that were not repeated
    content: dict[str, Any] = {**rows.get("model", {}), "problems": earlier | rows}
    if {"model", "blocks"} <= curves.keys():
        content["layerwise"] = _finer(curves["model"], curves["blocks"]) | {
            key: rows["blocks"][key] for key in ("items_fraction_of_full", "by")
        }
    (docs / "search_cost.json").write_text(json.dumps(content, indent=2) + "\n")
    for problem, of_problem in rows.items():
        print(f"{problem}: best baseline {of_problem['best_baseline']:.3f}, goal {of_problem['goal']:.3f}")
        for name, row in of_problem["techniques"].items():
            shown = (f"{key} {'-' if value is None else f'{value:.4g}'}" for key, value in row.items())
            print(f"  {name:34} {'  '.join(shown)}")
    print(content.get("layerwise"))
    for problem, of_problem in curves.items():
        _plot(problem, of_problem, docs / f"search_cost_{problem}.svg")


def _reported() -> list[dict[str, Any]]:
    """The runs of earlier reports."""
    runs: list[dict[str, Any]] = json.loads(RUNS.read_text()) if RUNS.exists() else []
    return runs


def _key(run: Mapping[str, Any]) -> tuple[str, str, int]:
    return run["problem"], run["name"], run["seed"]


def _problem(curves: Mapping[str, Curves]) -> dict[str, Any]:
    """The rows of a problem, and which technique reaches the reference's gain with the fewest items."""
    reference = curves[REFERENCE]
    start = float(np.mean([max(search["baselines"].values()) for search in reference.runs]))
    goal = start + SHARE * max(0.0, float(reference.last.mean()) - start)
    rows = {name: _row(of_case, reference, _grid(curves), start, goal) for name, of_case in curves.items()}
    reaching = [name for name in rows if name != REFERENCE and rows[name]["items"] is not None]
    best = min(reaching, key=lambda name: rows[name]["items"] or 0.0, default=None)
    return {
        "seeds": len(reference.runs),
        "best_baseline": start,
        "goal": goal,
        "reference_items": reference.spent,
        "items_fraction_of_full": None if best is None else rows[best]["fraction_of_full"],
        "by": best,
        "techniques": rows,
    }


def _grid(curves: Mapping[str, Curves]) -> NDArray[np.float64]:
    points = [[point["items"] for point in search["points"]] for of_case in curves.values() for search in of_case.runs]
    return np.unique(np.concatenate(points)).astype(np.float64)


def _finer(model: Mapping[str, Curves], blocks: Mapping[str, Curves]) -> dict[str, float]:
    """By how much the best technique with a weight per block exceeds the best over the whole model, with equal items.

    The interval is 95%, by Student's t over the seeds that both have.
    """
    ends = {name: float(of_case.last.mean()) for name, of_case in blocks.items()}
    fine = blocks[max(ends, key=lambda name: ends[name])]
    items = np.array([fine.spent])
    coarse = max(model.values(), key=lambda of_case: float(of_case.at(items).mean()))
    shared = sorted({*fine.seeds} & {*coarse.seeds})
    gaps = fine.of(shared).at(items)[:, 0] - coarse.of(shared).at(items)[:, 0]
    seeds, mean = len(shared), float(gaps.mean())
    reach = float(special.stdtrit(seeds - 1, 0.975) * gaps.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else float("nan")
    return {"difference": mean, "low": mean - reach, "high": mean + reach, "items": fine.spent, "seeds": seeds}


def _row(
    curves: Curves, reference: Curves, grid: NDArray[np.float64], start: float, goal: float
) -> dict[str, float | None]:
    """The cost of a technique. ``items`` is the number from which the mean over seeds stays at the goal, else None.

    If the reference does not exceed the best baseline, ``start``, the goal is to exceed it, and shares are None.
    """
    mean = curves.at(grid).mean(axis=0)
    short = np.flatnonzero((mean < goal) | (mean <= start))
    since = short[-1] + 1 if len(short) else 0
    items = float(grid[since]) if since < len(grid) else None
    gain = float(reference.last.mean()) - start
    shared = sorted({*curves.seeds} & {*reference.seeds})
    gap = curves.of(shared).last - reference.of(shared).last
    error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else float("nan")
    return {
        "items": items,
        "fraction_of_full": None if items is None else items / reference.spent,
        **{
            f"share_of_gain_at_{part:g}": (
                float(mean[grid <= part * reference.spent][-1] - start) / gain if gain > 0 else None
            )
            for part in PARTS
        },
        "held_out_at_the_end": float(curves.last.mean()),
        "difference_from_full": float(gap.mean()),
        "difference_stderr": error,
        "items_at_the_end": curves.spent,
        "passes_at_the_end": float(np.mean([search["points"][-1]["passes"] for search in curves.runs])),
        "seeds": len(curves.runs),
    }


def _plot(problem: str, curves: Mapping[str, Curves], out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "search cost"
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes, grid = figure.subplots(), _grid(curves)
    for name, of_case in curves.items():
        inside = grid[grid <= of_case.spent]
        values = of_case.at(inside)
        (line,) = axes.plot(inside, values.mean(axis=0), label=name, lw=2 if name == REFERENCE else 1.4)
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0 * values[0]
        axes.fill_between(
            inside, values.mean(axis=0) - error, values.mean(axis=0) + error, alpha=0.12, color=line.get_color()
        )
    axes.set(xscale="log", title=TITLES.get(problem, problem), xlabel="items generated")
    axes.set_ylabel("held-out score of the best candidate so far")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--problem", choices=list(PROBLEMS), nargs="+", default=list(PROBLEMS))
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    given = parser.parse_args()
    if given.what == "report":
        report(given.folder)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    write_items(given.folder)
    for seed in given.seeds:
        for problem in given.problem:
            for name in given.only:
                run(given.folder, problem, name, seed)


if __name__ == "__main__":
    main()
