"""Compares merge methods: each is tuned with equally many items, and confirmed on held-out ones.

Published tables compare merge methods at one fixed strength each. There, most are worse than the base because of the
size of their change, not because of its direction. Here every method computes its change for equal weights, with its
other numbers as in its paper, and its strength is tuned: the size of the change, as kappa sqrt(N) times the size of the
mean task vector (arXiv 2608.17366). Every method tries the same kappas on the same items. A seed determines these items
of the search split, and the masks of methods with random ones; the best candidate on them is scored on the held-out
split. In addition, the method is scored with its paper's setting, without any choice.

Differences are relative to task arithmetic that is tuned in the same way on the same seed, paired by item and averaged
over seeds; their 95% intervals come from a bootstrap over seeds and items.

    python scripts/bench/methods.py run FOLDER --problem zoo|real [--only NAME ...]     # can be interrupted
    python scripts/bench/methods.py report FOLDER     # docs/methods.json, docs/methods.svg, and the table

The problem "real" needs what scripts/real/prepare makes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from evaluators.change import ChangeSettings
from evomerge.checkpoints.fingerprints import content_digest, fingerprint
from evomerge.merging.building.builders import Builders
from evomerge.merging.measured.evidence import Evidence
from evomerge.method import default_parameters, find_method
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.search.preparing.prepare import Prepared, prepare
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.work.jobs import Job, Measured, Task
from evomerge.search.workers.building import build_context
from evomerge.search.workers.worker import Worker
from evomerge.step import find_step, needs_of_steps

ROOT = Path(__file__).parents[2]
SEEDS = range(5)
BASELINE = "task arithmetic"
_CORRECTIONS, _PRECISION = 4, 0.03
"""The largest number of corrections of a change's factor, and the required accuracy of its size."""

_MIN_CHANGE = 1e-9

Scores = NDArray[np.float64]
Values = Mapping[str, float | str]


@dataclass(frozen=True, eq=False)
class Case:
    """A method in the table.

    Attributes:
        method: of the blends.
        paper: the numbers in its paper, including strength; None if the paper fixes no strength.
        own: its numbers besides strength if ``paper`` is None.
        step: the step after it, whose numbers are among these as well.
        basis: of the blends.
        profile: whether it has the numbers ``first`` and ``last``: the shares of the change that the first and the last
            layer keep, with linear interpolation between them.
        masks: whether it draws masks, so that it depends on the seed.
    """

    method: str
    paper: Values | None
    own: Values = field(default_factory=dict)
    step: str | None = None
    basis: Literal["core"] | None = None
    profile: bool = False
    masks: bool = False

    @property
    def numbers(self) -> Values:
        """Its numbers besides strength."""
        return self.own if self.paper is None else {k: v for k, v in self.paper.items() if k not in STRENGTH}


STRENGTH = ("weight", "lambda")

# If a paper has several settings, the one for language models.
CASES: dict[str, Case] = {
    BASELINE: Case("task_arithmetic", {"weight": 0.4}),
    "TIES": Case("ties", {"weight": 0.4, "density": 0.3}),
    "SCE": Case("sce", {"select_topk": 0.1}),
    "TSV-Merge": Case("tsv", {"weight": 1.0}),
    "WUDI": Case("wudi", {}),
    "SWUDI": Case("swudi", {}),
    "ACE": Case("ace", {}),
    "gram, ridge": Case("gram", None, {"log_eps": -2.0}),
    "RegMean": Case("regmean", {"weight": 1.0, "off_diagonal": 0.9}),
    "Iso-C": Case("task_arithmetic", {"weight": 1.0, "strength": 1.0}, step="iso"),
    "AIM": Case("task_arithmetic", {"weight": 0.4, "omega": 0.4}, step="activations"),
    "Localize-and-Stitch": Case("localize_and_stitch", {"weight": 1.0, "density": 0.1}),
    "Consensus": Case("consensus", {"weight": 0.4, "ratio": 0.4, "votes": 2.0}),
    "DARE": Case("dare_linear", {"weight": 0.4, "density": 0.1}, masks=True),
    "DELLA": Case("della", {"weight": 0.4, "density": 0.3}, masks=True),
    "breadcrumbs": Case("breadcrumbs", {"weight": 0.4, "density": 0.85}),
    "model stock": Case("model_stock", {}),
    "RAM": Case("ram", {}),
    "YOYO fusion": Case("yoyo", {}),
    "MagMax": Case("magmax", {"weight": 0.5}),
    "CABS": Case("cabs", {"weight": 1.0, "density": 0.25}),
    "PCB": Case("pcb", {"weight": 1.2}),
    "ResMerge": Case("resmerge", {}),
    "Subspace Boosting": Case("task_arithmetic", {"weight": 0.4, "beta": 0.2}, step="subspace_boosting"),
    "SVC": Case("task_arithmetic", {"weight": 0.4, "alpha": 0.1}, step="svc"),
    "LiNeS": Case("task_arithmetic", None, {"first": 0.5, "last": 1.5}, profile=True),
    "TIES in core space": Case("ties", {"weight": 0.4, "density": 0.3}, basis="core"),
    "Iso-CTS": Case("task_arithmetic", {"weight": 1.0, "common": 0.8}, step="iso_cts"),
    "Karcher mean": Case("karcher", {}),
    "multislerp": Case("multislerp", {}),
    "DARE TIES": Case("dare_ties", {"weight": 0.4, "density": 0.1}, masks=True),
    "RAM+": Case("ramplus_tl", {}),
    "RegMean++": Case("regmean_plus_plus", {"weight": 1.0, "off_diagonal": 0.9}),
}


@dataclass(frozen=True)
class Candidate:
    """One setting of a case.

    Attributes:
        numbers: of the method and its step.
        kappa: the size of the change, divided by sqrt(N) times that of the mean task vector; None for the paper's
            setting.
        seed: of masks.
    """

    numbers: Values
    kappa: float | None
    seed: int


@dataclass(frozen=True)
class Problem:
    """Sources, tasks and texts.

    Attributes:
        file: the search file with sources and objectives.
        objectives: used instead of the file's.
        sources: the sources of the file that are merged; empty for all.
        kappas: the sizes of the change that every method tries, around the optimum of most methods.
        items: how many items of the search split a seed draws for each objective.
        split: how many items of the search split they are drawn from.
        held_out: how many items of the held-out split are scored for each objective.
        texts: gives the calibration texts of each source, from its own task, without held-out items.
    """

    file: Path
    objectives: Mapping[str, Any]
    sources: tuple[str, ...]
    kappas: tuple[float, ...]
    items: int
    split: int
    held_out: int
    texts: Callable[[str], list[str]]


ZOO_METRICS = {
    "zoo_math_en": "acc", "zoo_math_ja": "acc_ja", "zoo_translate": "acc", "zoo_extract": "acc",
    "zoo_steps_kanji": "acc",
}  # fmt: skip
ZOO_TASKS = {
    "english": "zoo_math_en", "steps_en": "zoo_math_en", "terse": "zoo_math_en", "rewarded": "zoo_math_en",
    "careless": "zoo_math_en", "japanese": "zoo_math_ja", "steps_ja": "zoo_math_ja", "kanji": "zoo_steps_kanji",
    "into_japanese": "zoo_translate", "into_english": "zoo_translate", "extraction": "zoo_extract",
}  # fmt: skip
"""The task that is most similar to the training data of each source of the zoo; base and spelling have none."""


def zoo_texts(source: str) -> list[str]:
    tasks = [ZOO_TASKS[source]] if source in ZOO_TASKS else list(ZOO_METRICS)
    data = ROOT / "evaluators" / "tasks" / "data"
    lines = [
        json.loads(line) for task in tasks for line in (data / f"{task}.fit.jsonl").read_text("utf-8").splitlines()
    ]
    return [line["prompt"] + line["answer"] for line in lines]


def real_texts(source: str) -> list[str]:
    """Questions of the search split with their answers, for the source's skill."""
    lines = [json.loads(line) for line in (ROOT / "real/items/search.jsonl").read_text("utf-8").splitlines()]
    own = [line for line in lines if line["skill"] == source] or lines
    return [f"{line['question']}\n{line['answer']}" for line in own]


THREE = ("steps_ja", "extraction", "kanji")
"""Sources of the zoo that are compatible; two of them give the composition. With equal weights of all twelve, which
include conflicting experts, every method ends below the best source: all twelve need searches over weights."""

ZOO = ROOT / "examples" / "zoo.yaml"
ZOO_OBJECTIVES = {name: {"task": name, "metric": metric, "batch_size": 200} for name, metric in ZOO_METRICS.items()}
PROBLEMS = {
    "zoo": Problem(ZOO, ZOO_OBJECTIVES, THREE, (0.8, 1.0, 1.2, 1.35, 1.5, 1.7, 2.0, 2.4), 50, 100, 400, zoo_texts),
    "real": Problem(
        ROOT / "scripts" / "real" / "search.yaml", {}, (), (0.15, 0.25, 0.35, 0.5, 0.7, 1.0), 45, 90, 180, real_texts
    ),
}

PROMPTS, TOKENS = 60, 64
"""The number of calibration texts of each source."""


class Bench:
    """A problem with one worker in this process."""

    def __init__(self, name: str, threads: int, work: Path) -> None:
        self.problem = PROBLEMS[name]
        content = yaml.safe_load(self.problem.file.read_text("utf-8"))
        for section in ("racing", "features", "constraints", "compositions", "calibration"):
            content.pop(section, None)
        content |= {"name": name, "space": {"kind": "parameter_space", "method": "task_arithmetic"}}
        content |= {"pool": "in_process", "cluster": {"cpus_per_worker": threads}, "optimizer": {"name": "random"}}
        if self.problem.objectives:
            content["objectives"] = dict(self.problem.objectives)
        if self.problem.sources:
            kept = (content["base"], *self.problem.sources)
            content["sources"] = {source: content["sources"][source] for source in kept}
        content["calibration"] = self._texts([*content["sources"]], work)
        self._prepared: Prepared = prepare(parse_search_file(content, place=name, root=self.problem.file.parent))
        file = self._prepared.file
        self.base = file.base or ""
        sources = self._prepared.sources
        self.mixed = tuple(source for source in sources if source != self.base)
        contents = {source: content_digest(fingerprint(opened)) for source, opened in sources.items()}
        self._evidence = Evidence(work / "evidence", contents)
        layers = self._prepared.setup.space.layer_buffers
        self._builders = Builders(build_context(file, sources, self._evidence, layers))
        self._builders.start({"stack"})
        change = ChangeSettings(model=sources[self.base].reference).build()
        self._worker = Worker("bench", self._builders, [*self._prepared.evaluators, change])
        self._layers = sources[self.base].layers
        self._factors: dict[Case, float] = {}  # the factor of the last candidate of a case, with its kappa

    def _texts(self, sources: Sequence[str], work: Path) -> dict[str, Any]:
        """The calibration texts, written for each source."""
        files = {}
        for source in sources:
            file = work / f"texts-{source}.jsonl"
            lines = (json.dumps({"text": text}) for text in self.problem.texts(source)[:PROMPTS])
            file.write_text("\n".join(lines) + "\n", "utf-8")
            files[source] = str(file.resolve())
        return {"prompts": PROMPTS, "tokens": TOKENS, "sources": files}

    # ---- recipes -----------------------------------------------------------------------------------------------------

    def blend(self, case: Case, numbers: Values, factor: float = 1.0) -> Blend:
        """A blend with equal weights and these other numbers, whose change is multiplied by ``factor``."""
        method = find_method(case.method, "case")
        values = default_parameters(method, self.mixed)
        weight = 1.0 / len(self.mixed)
        for p in method.parameters:
            value = numbers.get(p.name, weight if p.name == "weight" else p.default)
            values[p.name] = dict.fromkeys(self.mixed, value) if p.scope == "source" else value
        steps = []
        if case.step is not None:
            known = {p.name for p in find_step(case.step, "case").parameters}
            steps.append(BlendStep(name=case.step, parameters={k: v for k, v in numbers.items() if k in known}))
        if "lambda" in values and not steps:
            values["lambda"] = factor
        elif factor != 1.0:
            steps.append(BlendStep(name="scale", parameters={"factor": factor}))
        return Blend(
            method=case.method, sources=self.mixed, base=self.base, parameters=values, basis=case.basis,
            steps=tuple(steps),
        )  # fmt: skip

    def recipe(self, case: Case, numbers: Values, factor: float = 1.0, seed: int = 0) -> StackRecipe:
        """The recipe of a case with these numbers."""
        last = self._layers - 1
        shares = [1.0] * self._layers
        if case.profile:
            first, rise = float(numbers["first"]), float(numbers["last"]) - float(numbers["first"])
            shares = [first + rise * layer / last for layer in range(self._layers)]
        blends = [self.blend(case, numbers, factor * share) for share in shares]
        return self._composed(blends, self.blend(case, numbers, factor * shares[0]), seed)

    def alone(self, source: str) -> StackRecipe:
        blend = Blend(method="linear", sources=(source,), parameters={"weight": {source: 1.0}, "normalize": False})
        return self._composed([blend] * self._layers, blend, 0)

    def _composed(self, layers: Sequence[Blend], outside: Blend, seed: int) -> StackRecipe:
        sources = {name: source.reference for name, source in self._prepared.sources.items()}
        calibration = self._prepared.calibration
        needs = find_method(outside.method, "case").needs or needs_of_steps(outside)
        return StackRecipe.compose(
            sources=sources, tokenizer=self._prepared.file.tokenizer_source, embedding=outside, norm=outside,
            head=outside, hops=((number, blend, blend, blend) for number, blend in enumerate(layers)), seed=seed,
            calibration=calibration.digest if calibration is not None and needs else None,
        )  # fmt: skip

    def of(self, case: Case, candidate: Candidate) -> StackRecipe:
        """The recipe of a candidate."""
        if candidate.kappa is None:
            return self.recipe(case, candidate.numbers, seed=candidate.seed)
        wanted = candidate.kappa * math.sqrt(len(self.mixed)) * self.mean_change
        factor = self._factors.get(case, 1.0 / candidate.kappa) * candidate.kappa
        for _ in range(_CORRECTIONS):  # not exactly proportional, because small changes are rounded away in 16 bits
            recipe = self.recipe(case, candidate.numbers, factor, candidate.seed)
            ratio = wanted / max(self.change(recipe), _MIN_CHANGE)
            if abs(ratio - 1) < _PRECISION:
                break
            factor *= ratio
        self._factors[case] = factor / candidate.kappa
        return recipe

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @cached_property
    def mean_change(self) -> float:
        """The size of the mean task vector, relative to the base."""
        return self.change(self.recipe(CASES[BASELINE], {}))

    def change(self, recipe: StackRecipe) -> float:
        number = len(self._prepared.evaluators)
        return float(self._run(recipe, [Task(number, "search", range(1))]).scores[0]["change"][0])

    def score(
        self, recipe: StackRecipe, split: Literal["search", "held_out"], items: Sequence[Sequence[int]]
    ) -> Scores:
        """Scores of items of each objective, one objective after the other."""
        objectives = self._prepared.setup.objectives
        tasks = [Task(o.evaluator, split, list(some)) for o, some in zip(objectives, items, strict=True)]
        measured = self._run(recipe, tasks)
        scores = [scores[o.metric] for o, scores in zip(objectives, measured.scores, strict=True)]
        return np.concatenate(scores).astype(np.float64)

    def _run(self, recipe: StackRecipe, tasks: Sequence[Task]) -> Measured:
        result = self._worker.run(Job(0, 1, recipe, tasks)).result
        if not isinstance(result, Measured):
            raise RuntimeError(result.message)
        return result

    def held_out(self, recipe: StackRecipe) -> Scores:
        return self.score(recipe, "held_out", [range(self.problem.held_out)] * len(self._prepared.setup.objectives))

    def drawn(self, seed: int) -> list[NDArray[np.int64]]:
        """The items of each objective that a seed tunes on."""
        random = np.random.default_rng(seed)
        count = len(self._prepared.setup.objectives)
        return [np.sort(random.permutation(self.problem.split)[: self.problem.items]) for _ in range(count)]


def key(candidate: Candidate) -> str:
    return json.dumps([dict(candidate.numbers), candidate.kappa, candidate.seed])


def run(bench: Bench, name: str, out: Path) -> None:
    """Tune a case on every seed and score the chosen candidates; the file has all scores, item by item."""
    started, case = time.time(), CASES[name]
    split, count = bench.problem.split, len(bench.drawn(0))
    known: dict[str, Scores] = {}  # on all items that seeds draw from, or (with masks) on those of one seed
    held: dict[str, list[float]] = {}
    rows = []
    for seed in SEEDS:
        drawn = bench.drawn(seed)
        places = np.concatenate([o * split + items for o, items in enumerate(drawn)])
        best, best_score = None, -math.inf
        for kappa in bench.problem.kappas:
            candidate = Candidate(case.numbers, kappa, seed if case.masks else 0)
            recipe = bench.of(case, candidate)
            if case.masks:
                scores = bench.score(recipe, "search", drawn)
            else:
                if key(candidate) not in known:
                    known[key(candidate)] = bench.score(recipe, "search", [range(split)] * count)
                scores = known[key(candidate)][places]
            if scores.mean() > best_score:
                best, best_score = candidate, float(scores.mean())
        assert best is not None
        chosen = {"tuned": best}
        if case.paper is not None:
            chosen["paper"] = Candidate(case.paper, None, seed if case.masks else 0)
        for setting, candidate in chosen.items():
            if key(candidate) not in held:
                held[key(candidate)] = bench.held_out(bench.of(case, candidate)).tolist()
            rows.append(
                {"seed": seed, "setting": setting, "candidate": json.loads(key(candidate)), "held": key(candidate)}
            )
    result = {"method": name, "rows": rows, "held_out": held, "seconds": time.time() - started}
    write(out, result)
    tuned = np.mean([np.mean(held[row["held"]]) for row in rows if row["setting"] == "tuned"])
    print(f"{name:24} tuned {tuned:.3f}  {result['seconds']:.0f} s", flush=True)


def run_sources(bench: Bench, out: Path) -> None:
    """Score what needs no tuning: each source alone, and the plain average."""
    held = {}
    for source in (bench.base, *bench.mixed):
        held[source] = bench.held_out(bench.alone(source)).tolist()
    held["plain average"] = bench.held_out(bench.recipe(CASES[BASELINE], {})).tolist()
    write(out, {"held_out": held})


def write(out: Path, content: Mapping[str, Any]) -> None:
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(out)


# ---- the report ------------------------------------------------------------------------------------------------------


def tuned_scores(result: Mapping[str, Any], setting: str) -> Scores:
    """The held-out scores of the candidates that each seed chose: [seeds, items]."""
    return np.array([result["held_out"][row["held"]] for row in result["rows"] if row["setting"] == setting])


def interval(differences: Scores) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of differences [seeds, items], over seeds and items."""
    random = np.random.default_rng(0)
    seeds, items = differences.shape
    means = []
    for _ in range(2000):
        drawn = differences[random.integers(seeds, size=seeds)].mean(axis=0)
        means.append(drawn[random.integers(items, size=items)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def rows_of(folder: Path, problem: str) -> list[dict[str, Any]]:
    """The table of one problem, the best tuned methods first."""
    results = {name: json.loads(file.read_text()) for name in CASES if (file := place(folder, problem, name)).exists()}
    baseline = tuned_scores(results[BASELINE], "tuned")
    rows = []
    for name, result in results.items():
        for setting in sorted({row["setting"] for row in result["rows"]}):
            rows.append(row_of(problem, name, setting, tuned_scores(result, setting), baseline))
    rows.sort(key=lambda row: (row["setting"] != "tuned", -row["held_out"]))
    for name, held in json.loads(place(folder, problem, "sources").read_text())["held_out"].items():
        rows.append(
            row_of(
                problem,
                name,
                "source" if name != "plain average" else "paper",
                np.array([held] * len(baseline)),
                baseline,
            )
        )
    return rows


def row_of(problem: str, name: str, setting: str, scores: Scores, baseline: Scores) -> dict[str, Any]:
    low, high = interval(scores - baseline)
    return {
        "problem": problem, "method": name, "setting": setting, "held_out": float(scores.mean()),
        "difference": float((scores - baseline).mean()), "low": low, "high": high,
    }  # fmt: skip


def report(folder: Path) -> None:
    rows = [
        row for problem in PROBLEMS if place(folder, problem, BASELINE).exists() for row in rows_of(folder, problem)
    ]
    docs = ROOT / "docs"
    (docs / "methods.json").write_text(json.dumps({"seeds": len(SEEDS), "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['problem']:5} {row['method']:28} {row['setting']:6} {row['held_out']:.3f}  "
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    plot(rows, docs / "methods.svg")


def plot(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "methods"
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    longest = max(len({row["method"] for row in rows if row["problem"] == problem}) for problem in problems)
    figure = Figure(figsize=(6 * len(problems), 1 + 0.26 * longest), layout="constrained")
    for axes, problem in zip(np.ravel(figure.subplots(1, len(problems))), problems, strict=True):
        names = list(dict.fromkeys(row["method"] for row in rows if row["problem"] == problem))
        for setting, colour in (("paper", "tab:orange"), ("source", "0.5"), ("tuned", "tab:blue")):
            some = [row for row in rows if row["problem"] == problem and row["setting"] == setting]
            heights = [-names.index(row["method"]) for row in some]
            middles = [row["difference"] for row in some]
            reach = [
                [row["difference"] - row["low"] for row in some],
                [row["high"] - row["difference"] for row in some],
            ]
            axes.errorbar(middles, heights, xerr=reach, fmt="o", ms=4, lw=1, color=colour, label=setting)
        axes.axvline(0, color="0.4", lw=1)
        axes.set_yticks([-place for place in range(len(names))], names, fontsize=8)
        axes.set(title=problem, xlabel=f"held-out score less that of tuned {BASELINE}")
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(out, metadata={"Date": None})


def place(folder: Path, problem: str, name: str) -> Path:
    return folder / problem / f"{''.join(letter if letter.isalnum() else '_' for letter in name)}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problem", choices=list(PROBLEMS))
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.what == "report":
        report(given.folder)
        return
    if given.problem is None:
        parser.error("run needs --problem")
    (given.folder / given.problem).mkdir(parents=True, exist_ok=True)
    bench = Bench(given.problem, given.threads, given.folder / given.problem)
    if not (out := place(given.folder, given.problem, "sources")).exists():
        run_sources(bench, out)
    for name in given.only:
        if not (out := place(given.folder, given.problem, name)).exists():
            run(bench, name, out)


if __name__ == "__main__":
    main()
