"""Which merge methods earn their place: each tuned with equally many items, and confirmed on held-out ones.

Published tables of merge methods ran each at one fixed strength, where most fall below the base for the size of their
change and not for its direction. Here every method makes its change D for equal weights, and is tuned in two numbers at
most: the size of the change, kappa sqrt(N) times that of the mean task vector (arXiv 2608.17366), and one number of its
own. On each problem every method has the same number of candidates, scored on the same items. A seed is a draw of these
items from the search split, and of the masks of methods that draw some; the best candidate on them is scored on the
held-out split. Beside it stands the method at its paper's setting, which nothing is chosen by.

Differences are to task arithmetic tuned in the same way on the same seed, paired by item, averaged over seeds; their
95% intervals are a bootstrap over seeds and items.

    python scripts/bench/methods.py run FOLDER --problem zoo|six|real [--only NAME ...]     # can be interrupted
    python scripts/bench/methods.py report FOLDER     # docs/methods.json, docs/methods.svg, and the table

The problem "real" needs what scripts/real/prepare makes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from evaluators.change import ChangeSettings
from evomerge.checkpoints.fingerprints import content_digest, fingerprint
from evomerge.merging.builders import Builders
from evomerge.merging.evidence import Evidence
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
KAPPAS = {
    8: (0.35, 0.5, 0.65, 0.8, 1.0, 1.2, 1.5, 1.9), 4: (0.5, 0.8, 1.15, 1.6),
    6: (0.5, 0.65, 0.85, 1.0, 1.25, 1.6), 3: (0.6, 0.9, 1.3),
}  # fmt: skip
"""Sizes of the change, by how many a method tries."""

_CORRECTIONS, _PRECISION = 5, 0.02
"""How often the factor of a change is corrected at most, and how near its size is to come."""

_LEAST_CHANGE = 1e-9

Scores = NDArray[np.float64]
Values = Mapping[str, float | str]


@dataclass(frozen=True)
class Case:
    """A method in the table.

    Attributes:
        method: of the blends.
        paper: the setting of its paper, strength included; None where it has none that is fixed.
        own: two settings of the number that it has besides its strength; one where it has none.
        step: what is done to what it makes; ``own`` is of it then.
        basis: of the blends.
        profile: whether ``own`` is the first and the last layer's share of the change, and those between lie evenly.
        masks: whether it draws masks, and so depends on the seed.
    """

    method: str
    paper: Values | None
    own: tuple[Values, ...] = ({},)
    step: str | None = None
    basis: Literal["core"] | None = None
    profile: bool = False
    masks: bool = False


def two(name: str, first: float | str, second: float | str) -> tuple[Values, ...]:
    return ({name: first}, {name: second})


# Where a paper has several settings, that for language models.
CASES: dict[str, Case] = {
    BASELINE: Case("task_arithmetic", {"weight": 0.4}),
    "TIES": Case("ties", {"weight": 0.4, "density": 0.3}, two("density", 0.3, 0.7)),
    "DARE": Case("dare_linear", {"weight": 0.4, "density": 0.1}, two("density", 0.3, 0.7), masks=True),
    "DARE TIES": Case("dare_ties", {"weight": 0.4, "density": 0.1}, two("density", 0.3, 0.7), masks=True),
    "DELLA": Case("della", {"weight": 0.4, "density": 0.3}, two("density", 0.3, 0.7), masks=True),
    "breadcrumbs": Case("breadcrumbs", {"weight": 0.4, "density": 0.85}, two("density", 0.5, 0.85)),
    "breadcrumbs TIES": Case("breadcrumbs_ties", {"weight": 0.4, "density": 0.85}, two("density", 0.5, 0.85)),
    "SCE": Case("sce", {"select_topk": 0.1}, two("select_topk", 0.2, 1.0)),
    "model stock": Case("model_stock", {}),
    "Karcher mean": Case("karcher", {}),
    "multislerp": Case("multislerp", {}),
    "RAM": Case("ram", {}),
    "RAM+": Case("ramplus_tl", {}),
    "WUDI": Case("wudi", {}),
    "ACTMat": Case("actmat", {"weight": 1.0}),
    "ACE": Case("ace", {}),
    "SWUDI": Case("swudi", {}, two("log_t", 1.5, 2.5)),
    "gram, ridge": Case("gram", None, two("log_eps", -3.0, -1.0)),
    "RegMean": Case("regmean", {"weight": 1.0, "off_diagonal": 0.9}, two("off_diagonal", 0.5, 0.9)),
    "RegMean++": Case("regmean_plus_plus", {"weight": 1.0, "off_diagonal": 0.9}, two("off_diagonal", 0.5, 0.9)),
    "TSV-Merge": Case("tsv", {"weight": 1.0}, two("halvings", 0.0, 1.0)),
    "YOYO fusion": Case("yoyo", {}, two("cut", 2.5, 4.685)),
    "MagMax": Case("magmax", {"weight": 0.5}),
    "Consensus": Case("consensus", {"weight": 0.4, "ratio": 0.4, "votes": 2.0}, two("ratio", 0.2, 0.5)),
    "Localize-and-Stitch": Case("localize_and_stitch", {"weight": 1.0, "density": 0.1}, two("density", 0.1, 0.5)),
    "CABS": Case("cabs", {"weight": 1.0, "density": 0.25}, two("density", 0.25, 0.75)),
    "PCB": Case("pcb", {}, two("density", 0.1, 0.5)),
    "ResMerge": Case("resmerge", {}),
    "Iso-C": Case("task_arithmetic", {"weight": 1.0, "strength": 1.0}, two("strength", 0.5, 1.0), step="iso"),
    "Iso-CTS": Case("task_arithmetic", {"weight": 1.0, "common": 0.8}, two("common", 0.6, 0.9), step="iso_cts"),
    "Subspace Boosting": Case(
        "task_arithmetic", {"weight": 0.4, "beta": 0.2}, two("beta", 0.1, 0.3), step="subspace_boosting"
    ),
    "SVC": Case("task_arithmetic", {"weight": 0.4, "alpha": 0.1}, two("alpha", 0.1, 1.0), step="svc"),
    "AIM": Case("task_arithmetic", {"weight": 0.4, "omega": 0.4}, two("omega", 0.2, 0.6), step="activations"),
    "TIES in core space": Case("ties", {"weight": 0.4, "density": 0.3}, two("density", 0.3, 0.7), basis="core"),
    "LiNeS": Case("task_arithmetic", None, ({"first": 0.5, "last": 1.5}, {"first": 1.5, "last": 0.5}), profile=True),
}


@dataclass(frozen=True)
class Candidate:
    """One setting of a case.

    Attributes:
        own: values of the method's parameters, or of its first step's.
        kappa: the size of the change, in sizes of the mean task vector times sqrt(N); None at the paper's setting.
        seed: of masks.
    """

    own: Values
    kappa: float | None
    seed: int


@dataclass(frozen=True)
class Problem:
    """Sources, tasks and texts.

    Attributes:
        file: the search file that names sources and objectives.
        objectives: in place of the file's.
        sources: those of the file that are merged; all where empty.
        candidates: that every method tries on a seed.
        items: of the search split of each objective that a seed draws.
        split: items of the search split of each objective that are drawn from.
        texts: gives the calibration texts of each source, of its own task: no answers, and no held-out items.
    """

    file: Path
    objectives: Mapping[str, Any]
    sources: tuple[str, ...]
    candidates: int
    items: int
    split: int
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
"""The task nearest to what a source of the zoo was trained on; the base and the spelling have none."""


def zoo_texts(source: str) -> list[str]:
    tasks = [ZOO_TASKS[source]] if source in ZOO_TASKS else list(ZOO_METRICS)
    data = ROOT / "evaluators" / "tasks" / "data"
    lines = [
        json.loads(line) for task in tasks for line in (data / f"{task}.fit.jsonl").read_text("utf-8").splitlines()
    ]
    return [line["prompt"] + line["answer"] for line in lines]


def real_texts(source: str) -> list[str]:
    """Questions of the search split with their answers, of the source's skill."""
    lines = [json.loads(line) for line in (ROOT / "real/items/search.jsonl").read_text("utf-8").splitlines()]
    own = [line for line in lines if line["skill"] == source] or lines
    return [f"{line['question']}\n{line['answer']}" for line in own]


USEFUL = ("steps_en", "steps_ja", "into_japanese", "extraction", "kanji", "rewarded")
"""Sources of the zoo of which each is the best at a task, or near it, and none is at odds with a task."""

ZOO = ROOT / "examples" / "zoo.yaml"
ZOO_OBJECTIVES = {name: {"task": name, "metric": metric, "batch_size": 200} for name, metric in ZOO_METRICS.items()}
PROBLEMS = {
    "zoo": Problem(ZOO, ZOO_OBJECTIVES, (), 8, 50, 150, zoo_texts),
    "six": Problem(ZOO, ZOO_OBJECTIVES, USEFUL, 8, 50, 150, zoo_texts),
    "real": Problem(ROOT / "scripts" / "real" / "search.yaml", {}, (), 6, 60, 150, real_texts),
}
"""All twelve experts of the zoo, its six that are useful, and the three of the real model."""

PROMPTS, TOKENS = 60, 64
"""Of the calibration texts of each source."""


class Bench:
    """A problem with one worker in this process."""

    def __init__(self, name: str, threads: int, work: Path) -> None:
        self.problem = PROBLEMS[name]
        content = yaml.safe_load(self.problem.file.read_text("utf-8"))
        for section in ("racing", "features", "constraints", "calibration"):
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

    def blend(self, case: Case, own: Values, factor: float = 1.0) -> Blend:
        """Equal weights, the other numbers as ``own`` has them, the change ``factor`` times as large."""
        method = find_method(case.method, "case")
        values = default_parameters(method, self.mixed)
        weight = 1.0 / len(self.mixed)
        for p in method.parameters:
            value = own.get(p.name, weight if p.name == "weight" else p.default)
            values[p.name] = dict.fromkeys(self.mixed, value) if p.scope == "source" else value
        steps = []
        if case.step is not None:
            known = {p.name for p in find_step(case.step, "case").parameters}
            steps.append(BlendStep(name=case.step, parameters={k: v for k, v in own.items() if k in known}))
        if factor != 1.0:
            steps.append(BlendStep(name="scale", parameters={"factor": factor}))
        return Blend(
            method=case.method, sources=self.mixed, base=self.base, parameters=values, basis=case.basis,
            steps=tuple(steps),
        )  # fmt: skip

    def recipe(self, case: Case, own: Values, factor: float = 1.0, seed: int = 0) -> StackRecipe:
        """A case at these numbers."""
        last = self._layers - 1
        shares = [1.0] * self._layers
        if case.profile:
            first, rise = float(own["first"]), float(own["last"]) - float(own["first"])
            shares = [first + rise * layer / last for layer in range(self._layers)]
        blends = [self.blend(case, own, factor * share) for share in shares]
        return self._composed(blends, self.blend(case, own, factor * shares[0]), seed)

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
            return self.recipe(case, candidate.own, seed=candidate.seed)
        wanted, factor = candidate.kappa * math.sqrt(len(self.mixed)) * self.mean_change, 1.0
        for _ in range(_CORRECTIONS):  # not proportional where small changes are rounded away in 16 bits
            recipe = self.recipe(case, candidate.own, factor, candidate.seed)
            ratio = wanted / max(self.change(recipe), _LEAST_CHANGE)
            if abs(ratio - 1) < _PRECISION:
                break
            factor *= ratio
        return recipe

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @cached_property
    def mean_change(self) -> float:
        """The size of the mean task vector beside the base."""
        return self.change(self.recipe(CASES[BASELINE], {}))

    def change(self, recipe: StackRecipe) -> float:
        number = len(self._prepared.evaluators)
        return float(self._run(recipe, [Task(number, "search", range(1))]).scores[0]["change"][0])

    def score(
        self, recipe: StackRecipe, split: Literal["search", "held_out"], items: Sequence[Sequence[int]]
    ) -> Scores:
        """Scores of some items of each objective, one objective after the other."""
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
        evaluators = self._prepared.setup.evaluators
        return self.score(
            recipe, "held_out", [range(evaluators[o.evaluator].held_out_items) for o in self._prepared.setup.objectives]
        )

    def drawn(self, seed: int) -> list[NDArray[np.int64]]:
        """The items of each objective that a seed tunes by."""
        random = np.random.default_rng(seed)
        count = len(self._prepared.setup.objectives)
        return [np.sort(random.permutation(self.problem.split)[: self.problem.items]) for _ in range(count)]


def candidates(case: Case, count: int, seed: int) -> Iterator[Candidate]:
    """What a seed tries: so many."""
    for own in case.own:
        for kappa in KAPPAS[count // len(case.own)]:
            yield Candidate(own, kappa, seed if case.masks else 0)


def key(candidate: Candidate) -> str:
    return json.dumps([dict(candidate.own), candidate.kappa, candidate.seed])


def run(bench: Bench, name: str, out: Path) -> None:
    """Tune a case on every seed and score what was chosen; OUT has it all, item by item."""
    started, case = time.time(), CASES[name]
    split, count = bench.problem.split, len(bench.drawn(0))
    known: dict[str, Scores] = {}  # on all items that are drawn from, or (masks) on those of the one seed
    held: dict[str, list[float]] = {}
    rows = []
    for seed in SEEDS:
        drawn = bench.drawn(seed)
        places = np.concatenate([o * split + items for o, items in enumerate(drawn)])
        best, best_score = None, -math.inf
        for candidate in candidates(case, bench.problem.candidates, seed):
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
    """Each source alone, and the plain average: what needs no tuning."""
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
    """[seeds, items] held-out scores of what each seed chose."""
    return np.array([result["held_out"][row["held"]] for row in result["rows"] if row["setting"] == setting])


def interval(differences: Scores) -> tuple[float, float]:
    """95% of the means of differences [seeds, items] over draws of seeds and of items."""
    random = np.random.default_rng(0)
    seeds, items = differences.shape
    means = []
    for _ in range(2000):
        drawn = differences[random.integers(seeds, size=seeds)].mean(axis=0)
        means.append(drawn[random.integers(items, size=items)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def rows_of(folder: Path, problem: str) -> list[dict[str, Any]]:
    """The table of one problem, best tuned methods first."""
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
