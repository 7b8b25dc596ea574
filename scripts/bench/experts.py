"""When routing pays: adapters routed token by token, against the best plain merges of them, at equal budgets.

Eight adapters of the zoo and four tasks, of which one is a composition that no adapter solves. Models that need no
search are scored as they are: every adapter alone, their mean and sum, Arrow as in peft. Equal weights with tuned
strength and LoraHub's rule choose a few numbers; static coefficients (one per weight and adapter) and routers are
fitted by gradient to the third split, with equally many answers; and three searches have 150 candidates each, raced on
the same 100 items: over weights of adapters, around the fitted coefficients, and over routed experts. A seed determines
the fits, LoraHub's sample, and the searches. Everything is scored on the same held-out items, item by item.

Differences are relative to the best plain merge (the one with the highest mean over seeds), paired by item; their 95%
intervals come from a bootstrap over seeds and items. Tokens per second are measured for answers to the same items on
one thread, with all forms in turn, as the median of several turns.

Learning rates were chosen beforehand with ``tune``, on a seed that is not reported: fits to four fifths of the third
split are compared by the likelihood of the answers of the last fifth.

    python scripts/bench/experts.py tune FOLDER                         # how good each learning rate is
    python scripts/bench/experts.py run FOLDER [--seeds 0 1 2 ...]      # can be interrupted
    python scripts/bench/experts.py speed FOLDER       # tokens per second of what the first seed found
    python scripts/bench/experts.py report FOLDER      # docs/experts.json, and the table

Reported runs are kept in docs/experts_runs.json, item by item, and are not repeated: further seeds add to them. If what
a run measured has changed, remove it there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from methods import interval, write
from numpy.typing import NDArray
from search_cost import ROOT, TASKS, ZOO, CountingPool, in_turn

from evomerge.checkpoints.fingerprints import content_digest, fingerprint
from evomerge.genome import Parameter
from evomerge.merging.building.builders import Builders
from evomerge.merging.measured.evidence import Evidence
from evomerge.optimizers import CmaSettings, Observation
from evomerge.recipes.base import Recipe, read_recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.driving.driver import Driver
from evomerge.search.opening.session import create_search, fingerprints_of, recipe_of
from evomerge.search.preparing.prepare import Prepared, prepare
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.work.jobs import Job, Measured, Task
from evomerge.search.workers.building import build_context
from evomerge.search.workers.worker import Worker
from evomerge.store import acquire

RUNS = ROOT / "docs" / "experts_runs.json"
SEEDS = range(5)
EXPERTS = (
    "steps_ja", "kanji", "into_english", "into_japanese", "extraction", "steps_en", "english", "spelling",
)  # fmt: skip
ITEMS, HELD_OUT = 100, 800
CANDIDATES = 150
STRENGTHS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0)
ROUTED = ("Arrow", "fitted soft", "fitted top 1", "MoLA 8-6-4-2", "MoLA 2-4-6-8", "MoLA 8-2-2-8", "MoLA 5-5-5-5")
PLAIN = ("uniform average", "sum", "tuned strength", "LoraHub", "fitted", "searched weights", "searched around the fit")
SPACES: Mapping[str, Mapping[str, Any]] = {
    "searched weights": {"kind": "parameter_space", "method": "task_arithmetic", "bounds": {"weight": [0, 1.5]}},
    "searched around the fit": {"kind": "parameter_space", "method": "fitted", "bounds": {"weight": [0, 2]}},
    "searched routed": {"kind": "routed", "granularity": "model"},
}
TURNS = 5
SPEED_ITEMS = 100
TIMED = ("uniform average", *ROUTED)
TUNING_SEED = 100  # not among the reported ones
RATES = (0.025, 0.05, 0.1, 0.2, 0.4)
TUNED_ITEMS = 480  # items of the third split to fit to with each rate; the others judge it
TUNED = ("fitted", "fitted soft")

Scores = NDArray[np.float64]


def content(space: Mapping[str, Any], seed: int, fit: Mapping[str, Any]) -> dict[str, Any]:
    """A search file. Routed spaces have choices, so their optimizer is CatCMA; spaces over weights have no fit."""
    is_routed, is_fitted = space["kind"] == "routed", space.get("method") != "task_arithmetic"
    return {
        "name": "experts", "seed": seed, "base": "base", "dtype": "float32",
        "sources": {"base": str(ZOO / "base"), **{name: f"{ZOO / 'base'}+{ZOO / name}" for name in EXPERTS}},
        "space": dict(space),
        "objectives": {"zoo": {"task": "zoo_mixed", "metric": "acc", "items": ITEMS, "batch_size": 250}},
        "optimizer": {"name": "catcma" if is_routed else "cma", "x0": "best"},
        "racing": {"rungs": [25, 50]},
        "baselines": {"kappa": False},
        "budget": {"candidates": CANDIDATES},
    } | ({"fit": {"file": "fit.jsonl", **fit}} if is_fitted else {})  # fmt: skip


class Bench:
    """One seed: a worker, and the recipes of all forms that need no search.

    Args:
        folder: of all seeds, with the items of the fit.
        fit: settings of the fit that differ from the usual ones.
    """

    def __init__(self, folder: Path, seed: int, fit: Mapping[str, Any] | None = None) -> None:
        self.folder, self.seed, self.fit = folder, seed, fit or {}
        self.prepared, self.worker = self._opened(SPACES["searched routed"])
        self.recipes: dict[str, Recipe] = {mark.label: mark.recipe for mark in self.prepared.setup.space.baselines()}
        around, _ = self._opened(SPACES["searched around the fit"])
        marks = around.setup.space.baselines()
        self.recipes["fitted"] = next(mark.recipe for mark in marks if mark.label == "fitted defaults")

    def _opened(self, space: Mapping[str, Any]) -> tuple[Prepared, Worker]:
        prepared = prepare(
            parse_search_file(content(space, self.seed, self.fit), place="experts", root=self.folder.resolve())
        )
        contents = {name: content_digest(fingerprint(source)) for name, source in prepared.sources.items()}
        space, sources, file = prepared.setup.space, prepared.sources, prepared.file
        evidence = Evidence(self.folder / "evidence", contents)
        builders = Builders(build_context(file, sources, evidence, space.layer_buffers, hops=space.hops))
        builders.start({baseline.recipe.kind for baseline in space.baselines()})
        fit = [] if file.fit_split is None else [file.fit_split.evaluator]
        return prepared, Worker("bench", builders, [*prepared.evaluators, *fit])

    def result(self) -> dict[str, Any]:
        """The held-out scores of every form, one character per item, and the best recipe of the routed search."""
        best = max(EXPERTS, key=lambda name: self.scores(self.recipes[name], "search", ITEMS).mean())
        chosen: dict[str, Recipe] = {"best adapter": self.recipes[best]}
        chosen |= {name: self.recipes[name] for name in ("base", "uniform average", "sum", "fitted", *ROUTED)}
        chosen["tuned strength"] = self._tuned_strength()
        chosen["LoraHub"] = self._lora_hub()
        for name, space in SPACES.items():
            chosen[name] = self._searched(name, space)
        held = {name: _written(self.scores(recipe, "held_out", HELD_OUT)) for name, recipe in chosen.items()}
        return {"seed": self.seed, "held_out": held, "searched": chosen["searched routed"].canonical()}

    def scores(self, recipe: Recipe, split: Any, items: int) -> Scores:
        """float64 [items]"""
        return self._measured(recipe, split, items).scores[0]["acc"].astype(np.float64)

    def _measured(self, recipe: Recipe, split: Any, items: int) -> Measured:
        result = self.worker.run(Job(0, 1, recipe, [Task(0, split, range(items))])).result
        if not isinstance(result, Measured):
            raise RuntimeError(result)
        return result

    # ---- what chooses a few numbers ----------------------------------------------------------------------------------

    def weighted(self, weights: Sequence[float]) -> StackRecipe:
        """The base plus a weighted sum of the adapters' changes."""
        like = self.recipes["sum"]
        parameters = {"weight": dict(zip(EXPERTS, weights, strict=True)), "normalize": False, "lambda": 1.0}
        blend = Blend(method="task_arithmetic", sources=EXPERTS, base="base", parameters=parameters)
        layers = self.prepared.sources["base"].layers
        return StackRecipe.uniform(
            blend, sources=like.sources, tokenizer=like.tokenizer, layers=layers, seed=like.seed, dtype=like.dtype
        )

    def _tuned_strength(self) -> StackRecipe:
        """Equal weights with the strength that is best on the search items."""
        recipes = [self.weighted([strength] * len(EXPERTS)) for strength in STRENGTHS]
        return max(recipes, key=lambda recipe: self.scores(recipe, "search", ITEMS).mean())

    def _lora_hub(self) -> StackRecipe:
        """LoraHub (Huang et al., arXiv 2307.13269, section 3.3): 40 steps without gradients, from zero and within 1.5,
        on the loss of five examples per task plus 0.05 times the mean absolute weight. The paper uses nevergrad's
        optimizer, and here it is CMA-ES; its weights multiply both factors of an adapter, and here its change.
        """
        space = [Parameter(name, -1.5, 1.5, 0.0) for name in EXPERTS]
        optimizer = CmaSettings(name="cma", x0="default", population=8).build(space, 1, self.seed)
        few = range(self.seed * 5 * len(TASKS), (self.seed + 1) * 5 * len(TASKS))
        best: tuple[float, Sequence[float]] = (float("inf"), [0.0] * len(EXPERTS))
        for _ in range(5):
            observations = []
            for genome in optimizer.ask(8):
                recipe = self.weighted(genome.tolist())
                loss = -self.likelihood(recipe, few) + 0.05 * float(np.abs(genome).mean())
                observations.append(Observation(genome, [loss]))
                best = min(best, (loss, genome.tolist()))
            optimizer.tell(observations)
        return self.weighted(best[1])

    def likelihood(self, recipe: Recipe, items: Sequence[int]) -> float:
        """The mean log-likelihood of right answers to the fit's items."""
        result = self.worker.run(Job(0, 1, recipe, [Task(1, "search", items)])).result
        if not isinstance(result, Measured):
            raise RuntimeError(result)
        return float(result.scores[0]["log_likelihood"].mean())

    # ---- searches ----------------------------------------------------------------------------------------------------

    def _searched(self, name: str, space: Mapping[str, Any]) -> Recipe:
        """The recipe of the best candidate of a search."""
        prepared, worker = self._opened(space)
        pool = CountingPool(worker, {})
        place = self.folder / f"{name.replace(' ', '_')}-{self.seed}.{int(time.time())}"
        store = create_search(place, prepared, fingerprints_of(prepared))
        with store, acquire(store):
            Driver(Drive(prepared.setup, store, pool, Control(store.take_commands), logs=place / "logs")).run()
            (best,) = list(store.events(kinds=("front",)))[-1].payload["candidates"]
            return recipe_of(store.candidate(best), prepared.file.sources)

    # ---- speed -------------------------------------------------------------------------------------------------------

    def speeds(self, searched: str) -> dict[str, float]:
        """Tokens of answers per second by form, the median of several turns over all forms.

        Args:
            searched: the canonical text of the best recipe of the routed search.
        """
        recipes = {name: self.recipes[name] for name in TIMED}
        recipes["searched routed"] = read_recipe(searched, self.prepared.file.sources)
        tokenizer = self.prepared.reader().tokenizer
        found: dict[str, list[float]] = {name: [] for name in recipes}
        for _ in range(TURNS):
            for name, recipe in recipes.items():
                measured = self._measured(recipe, "held_out", SPEED_ITEMS)
                tokens = sum(len(tokenizer(answer)["input_ids"]) for answer in measured.answers[0].values())
                found[name].append(tokens / measured.timings["generate"])
        return {name: float(np.median(values)) for name, values in found.items()}


def _written(scores: Scores) -> str:
    """Scores as a string of 1 and 0."""
    if not set(scores) <= {0.0, 1.0}:
        raise ValueError("an answer is neither right nor wrong")
    return "".join(f"{score:.0f}" for score in scores)


def tune(folder: Path) -> None:
    """The likelihood of right answers that were not fitted to, by learning rate."""
    for rate in RATES:
        bench = Bench(folder, TUNING_SEED, {"items": TUNED_ITEMS, "rate": rate})
        assert bench.prepared.file.fit_split is not None
        rest = range(TUNED_ITEMS, len(bench.prepared.file.fit_split.evaluator.items("search")))
        shown = (f"{name} {bench.likelihood(bench.recipes[name], rest):.3f}" for name in TUNED)
        print(f"rate {rate:g}: log-likelihood of {len(rest)} answers, {', '.join(shown)}", flush=True)


# ---- the report ------------------------------------------------------------------------------------------------------


def report(folder: Path) -> None:
    """Write docs/experts.json and print the table, the best first."""
    known = _known()
    found = [json.loads(file.read_text()) for seed in SEEDS if (file := folder / f"{seed}.json").exists()]
    runs = {run["seed"]: run for run in [*known["runs"], *found]}
    if (timed := folder / "speeds.json").exists():
        known["tokens_per_second"] = json.loads(timed.read_text())
    known["runs"] = [{key: runs[seed][key] for key in ("seed", "held_out")} for seed in sorted(runs)]
    RUNS.write_text(json.dumps(known, indent=1) + "\n")
    scores = {
        name: np.array([[float(right) for right in run["held_out"][name]] for run in known["runs"]])
        for name in known["runs"][0]["held_out"]
    }  # [seeds, items] each
    rows = _rows(scores, known["tokens_per_second"])
    plain = next(row["name"] for row in rows if row["name"] in PLAIN)
    about = {"seeds": len(runs), "best_plain": plain, "items": HELD_OUT, "rows": rows}
    (ROOT / "docs" / "experts.json").write_text(json.dumps(about, indent=2) + "\n")


def _known() -> dict[str, Any]:
    """The measurements of earlier reports: ``runs``, and ``tokens_per_second`` by form."""
    if not RUNS.exists():
        return {"runs": [], "tokens_per_second": {}}
    known: dict[str, Any] = json.loads(RUNS.read_text())
    return known


def _rows(scores: Mapping[str, Scores], speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each form, the best first, with its difference from the best plain merge."""
    plain = max(PLAIN, key=lambda name: float(scores[name].mean()))
    rows = []
    for name, held in sorted(scores.items(), key=lambda pair: -float(pair[1].mean())):
        low, high = interval(held - scores[plain])
        by_task = {task: float(held[:, number :: len(TASKS)].mean()) for number, task in enumerate(TASKS)}
        row = {
            "name": name, "mean": float(held.mean()), "held_out": by_task,
            "difference": float((held - scores[plain]).mean()), "low": low, "high": high,
            "tokens_per_second": speeds.get(name),
        }  # fmt: skip
        rows.append(row)
        tasks = "  ".join(f"{value:.3f}" for value in by_task.values())
        speed = "" if name not in speeds else f"  {speeds[name]:.0f} tokens/s"
        print(f"{name:26} {row['mean']:.3f}  {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]  {tasks}{speed}")
    return rows


def write_items(folder: Path) -> None:
    """Write the items of the fit: those of the tasks' third splits, interleaved."""
    (folder / "fit.jsonl").write_text("\n".join(line for _, line in in_turn("fit")) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "speed", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    write_items(given.folder)
    if given.what == "tune":
        tune(given.folder)
    elif given.what == "report":
        report(given.folder)
    elif given.what == "speed":
        seed = given.seeds[0]
        searched = json.loads((given.folder / f"{seed}.json").read_text())["searched"]
        write(given.folder / "speeds.json", Bench(given.folder, seed).speeds(searched))
    else:
        run(given.folder, given.seeds)


def run(folder: Path, seeds: Sequence[int]) -> None:
    """Run the seeds that are neither in an earlier report nor in the folder."""
    reported = {run["seed"] for run in _known()["runs"]}
    for seed in seeds:
        if seed not in reported and not (out := folder / f"{seed}.json").exists():
            started = time.time()
            write(out, Bench(folder, seed).result())
            print(f"seed {seed}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
