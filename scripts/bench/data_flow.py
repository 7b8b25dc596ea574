"""Compares the encodings of data-flow space on the miniatures: equal budgets, several seeds, one table and a plot.

A candidate is scored by the log-likelihood of the right Japanese answers on items of the search split; the best of each
run is then scored on the held-out split, by that and by the share of right answers. There are two settings:

- "maths": model A is the maths expert, which answers in English, and layers of the Japanese expert may be used;
- "hurt": model A is the Japanese expert with three additional, harmful layers: copies of its own with shuffled weights,
  which add eight times as much to the residual stream. Only another path can fix it.

    python scripts/bench/data_flow.py [--seeds 5] [--candidates 120] [--settings maths;hurt] [--only NAME;...]

Writes data-flow.json and data-flow.svg; results of other settings in the file are kept, so settings can be run
separately. A setting takes about 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from scipy import stats

from evaluators.likelihood import LikelihoodSettings
from evaluators.lm_eval import LmEvalSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.source import open_source
from evomerge.merging.materialise import Materialiser
from evomerge.method import find_method
from evomerge.optimizers import Observation, OptimizerSettings
from evomerge.recipes.stack import StackRecipe
from search_spaces.base import SpaceContext
from search_spaces.data_flow_space import DataFlowSpaceSettings

ROOT = Path(__file__).parents[2]
MINIATURES = ROOT / "examples" / "miniatures"
DATA = ROOT / "evaluators" / "tasks" / "data"
ITEMS = 64
HURT = (2, 4, 5)  # layers of A that are followed by a harmful one
HARM = 8.0  # factor on what it adds to the residual stream

CMA = {"name": "cma", "x0": "default"}
CATCMA = {"name": "catcma"}
# Label: (settings of the space, optimizer). The first is the paper's: a slot for each layer of each repetition, with a
# mean of zero except for A's, a scale for each pair of layers, and CMA-ES. The paper's population of 128 would take
# most of this budget.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "indicators, as in the paper": ({"start": "paper", "scale": "transition"}, CMA),
    "indicators, a scale a hop": ({"start": "paper"}, CMA),
    "indicators, sparse start": ({}, CMA),
    "indicators, bits": ({"bits": True}, CATCMA),
    "integers": ({"encoding": "integers"}, CMA),
    "integers, catcma": ({"encoding": "integers"}, CATCMA),
    "blocks": ({"encoding": "blocks"}, CATCMA),
    "blocks, unscaled": ({"encoding": "blocks", "scale": "none"}, CATCMA),
    "blocks, at random": ({"encoding": "blocks"}, {"name": "random"}),
    "pruning": ({"encoding": "pruning", "bits": True}, CATCMA),
}


class Scorer:
    """Scores recipes over sources, the first of which is model A."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.sources = {name: open_source(name, str(folder), place=name) for name, folder in folders.items()}
        first, *_ = self.sources.values()
        layer_buffers = sum(source.layers for source in self.sources.values())
        self.live = live_model(first, torch.device("cpu"), torch.float32, layer_buffers)
        self.materialiser = Materialiser(self.sources)
        files = {
            key: DATA / f"mini_math_ja.{split}.jsonl"
            for key, split in (("file", "search"), ("held_out_file", "held_out"))
        }
        self.likelihood = LikelihoodSettings(**files).build()
        self.sums = LmEvalSettings(task="mini_math_ja", batch_size=100).build()

    def loss(self, recipe: StackRecipe) -> float:
        """The negative mean log-likelihood on the search split."""
        self.materialiser.write(recipe, self.live)
        log_likelihoods = score(self.likelihood, self.live, "search", range(ITEMS)).scores["log_likelihood"]
        return -float(log_likelihoods.mean()) if np.isfinite(log_likelihoods).all() else np.inf

    def held_out(self, recipe: StackRecipe) -> dict[str, float]:
        """The mean log-likelihood and the share of right answers on the whole held-out split."""
        self.materialiser.write(recipe, self.live)
        every = range(len(self.likelihood.items("held_out")))
        likely = score(self.likelihood, self.live, "held_out", every).scores["log_likelihood"]
        right = score(self.sums, self.live, "held_out", range(len(self.sums.items("held_out")))).scores["acc_ja"]
        return {"log_likelihood": float(likely.mean()), "acc_ja": float(right.mean()), "hops": float(len(recipe.hops))}


def hurt(folder: Path, out: Path) -> None:
    """A copy of a model with additional layers, whose weights are those of the layer before, shuffled."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    inside = {n: t for n, t in tensors.items() if n.startswith("model.layers.")}
    made = {name: tensor for name, tensor in tensors.items() if name not in inside}
    number = 0
    for layer in range(config["num_hidden_layers"]):
        mine = {n.removeprefix(f"model.layers.{layer}."): t for n, t in inside.items() if n.split(".")[2] == str(layer)}
        made |= {f"model.layers.{number}.{name}": tensor for name, tensor in mine.items()}
        number += 1
        if layer in HURT:
            generator = torch.Generator().manual_seed(layer)
            for name, tensor in mine.items():
                order = torch.randperm(tensor.shape[0], generator=generator)
                size = HARM if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                made[f"model.layers.{number}.{name}"] = tensor[order].contiguous() * size
            number += 1
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": number}, indent=2))


def search(
    scorer: Scorer, space: dict[str, Any], optimizer: dict[str, Any], seed: int, candidates: int
) -> dict[str, Any]:
    """Run one search: its best loss after each candidate, and the held-out scores of the best one."""
    names = list(scorer.sources)
    first = scorer.sources[names[0]]
    context = SpaceContext(
        sources={name: name for name in names},
        base=None,
        tokenizer=names[0],
        layers=first.layers,
        tied=first.tied,
        method=lambda name: find_method(name, "method"),
        recipe_seed=seed,
        dtype="float32",
        depths={name: source.layers for name, source in scorer.sources.items()},
    )
    built = DataFlowSpaceSettings(**space).build(context)
    settings: Any = TypeAdapter(OptimizerSettings).validate_python(optimizer)
    chooser = settings.build(built.parameters, 1, seed)
    known: dict[str, float] = {}
    best: list[float] = []
    winner: StackRecipe | None = None

    def loss_of(recipe: StackRecipe) -> float:
        nonlocal winner
        if recipe.hash not in known:
            known[recipe.hash] = scorer.loss(recipe)
        if not best or known[recipe.hash] < best[-1]:
            winner = recipe
        best.append(min([known[recipe.hash], *best[-1:]]))
        return known[recipe.hash]

    alone = next(iter(built.baselines()))  # only baseline A, because encodings are compared by what they find
    if alone.genome is not None:
        chooser.tell([Observation(alone.genome, [loss_of(alone.recipe)])])
    while len(best) < candidates and chooser.stopped is None:
        genomes = chooser.ask(min(chooser.population, candidates - len(best)))
        chooser.tell([Observation(genome, [loss_of(built.decode(genome))]) for genome in genomes])
    best += best[-1:] * (candidates - len(best))
    assert winner is not None
    return {"seed": seed, "best": best, "distinct": len(known), "path": path_of(winner), **scorer.held_out(winner)}


def path_of(recipe: StackRecipe) -> list[str]:
    return [f"{recipe.blends[hop.attention].sources[0]}.{hop.layer}" for hop in recipe.hops]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the half-width of its 95% confidence interval by Student's t."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(reach)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=120)
    parser.add_argument("--settings", default="maths;hurt")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    labels = [label for label in CASES if not given.only or label in given.only.split(";")]
    results: dict[str, Any] = {"candidates": given.candidates, "seeds": given.seeds, "items": ITEMS, "settings": {}}
    with tempfile.TemporaryDirectory() as temporary:
        hurt(MINIATURES / "japanese", Path(temporary) / "hurt")
        settings = {
            "maths": {"maths": MINIATURES / "maths", "japanese": MINIATURES / "japanese"},
            "hurt": {"hurt": Path(temporary) / "hurt", "maths": MINIATURES / "maths"},
        }
        for setting in given.settings.split(";"):
            folders = settings[setting]
            scorer = Scorer(folders)
            name, source = next(iter(scorer.sources.items()))
            alone = DataFlowSpaceSettings(scale="none").build(
                SpaceContext(
                    {n: n for n in folders}, None, name, source.layers, source.tied,
                    lambda n: find_method(n, "method"), 0, "float32",
                    depths={n: s.layers for n, s in scorer.sources.items()},
                )
            )  # fmt: skip
            marks = {mark.label: scorer.held_out(mark.recipe) for mark in alone.baselines()}
            runs: dict[str, Any] = {}
            for label in labels:
                start = time.perf_counter()
                runs[label] = [search(scorer, *CASES[label], seed, given.candidates) for seed in range(given.seeds)]
                print(row(setting, label, runs[label]), f"{time.perf_counter() - start:6.0f} s", flush=True)
            results["settings"][setting] = {"baselines": marks, "runs": runs}
            print({label: round(mark["acc_ja"], 3) for label, mark in marks.items()}, flush=True)
    given.out.mkdir(exist_ok=True)
    kept = given.out / "data-flow.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    if all(before.get(key) == results[key] for key in ("candidates", "seeds", "items")):
        results["settings"] = dict(sorted((before["settings"] | results["settings"]).items(), reverse=True))
    kept.write_text(json.dumps(results) + "\n")
    draw(results, given.out / "data-flow.svg")


def row(setting: str, label: str, runs: Sequence[dict[str, Any]]) -> str:
    cells = [
        f"{mean:7.3f} ± {reach:.3f}"
        for mean, reach in (interval([r[k] for r in runs]) for k in ("log_likelihood", "acc_ja", "hops"))
    ]
    return f"{setting:8} {label:28} {'  '.join(cells)}"


def draw(results: dict[str, Any], out: Path) -> None:
    """Plot the best log-likelihood so far over candidates: the mean over seeds, with its standard error as a band."""
    matplotlib.rcParams.update({"svg.hashsalt": "evomerge", "font.size": 9})
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (setting, content) in zip(
        figure.subplots(1, len(results["settings"]), squeeze=False)[0], results["settings"].items(), strict=True
    ):
        for label, runs in content["runs"].items():
            curves = -np.array([run["best"] for run in runs])
            mean, error = curves.mean(axis=0), curves.std(axis=0, ddof=1) / np.sqrt(len(curves))
            (line,) = axes.plot(mean, label=label, linestyle="--" if "random" in label else "-")
            axes.fill_between(
                range(len(mean)), mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0
            )
        axes.set(title=setting, xlabel="candidates", ylabel="best log-likelihood so far, search split")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
