"""Candidates of LoRA adapters scored together, with their rows in one batch, against one at a time, in one run.

The adapters have the largest singular values of the changes of the miniatures maths and japanese to the base's linear
layers. Candidates are task arithmetic over both with random weights in every layer; each is scored on the same few
items of mini_math_ja, as in a race's first rung. Figures are seconds of one core (processor time of this process on one
thread) for all candidates, as medians of runs that take turns, and the number of items with different scores: sums are
added in another order, so a different one of two tokens that are equally likely up to rounding may be chosen.

    python scripts/bench/together.py [--candidates 16] [--items 25] [--rank 16] [--dtype float32] [--repeats 3]
        [--json docs/together.json]
    python scripts/bench/together.py --real real --dtype bfloat16 --candidates 4 --items 15 [--likelihood]

The second uses the model and the adapters of scripts/real/prepare, with answers or with the likelihood of right ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from real_model import open_family, real_evaluator
from safetensors.torch import save_file

from evaluators.lm_eval import LmEvalSettings
from evaluators.lm_eval_quiet import quiet
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.building.builders import BuildContext, Builders
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.work.jobs import Finished, Job, Measured, Task
from evomerge.search.workers.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "evaluators" / "tasks"
MINIATURES = ROOT / "examples" / "miniatures"
ADAPTED = ("maths", "japanese")


def write_adapter(name: str, rank: int, folder: Path) -> Path:
    """Write the best LoRA of a rank for a miniature's changes to the base's linear layers, in peft's format."""
    base, model = (open_source(miniature, str(MINIATURES / miniature), place=miniature) for miniature in ("base", name))
    tensors: dict[str, torch.Tensor] = {}
    for weight in base.tensors:
        if weight.endswith("_proj.weight"):
            up, sizes, down = torch.linalg.svd(model.read(weight).float() - base.read(weight).float())
            module = f"base_model.model.{weight.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = (sizes[:rank, None] * down[:rank]).contiguous()
            tensors[f"{module}.lora_B.weight"] = up[:, :rank].contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def open_miniatures(rank: int, folder: Path) -> dict[str, Source]:
    return open_family(MINIATURES / "base", {name: write_adapter(name, rank, folder / name) for name in ADAPTED})


def recipes_of(sources: Mapping[str, Source], count: int) -> list[StackRecipe]:
    """Task arithmetic with random weights in every layer."""
    numbers = np.random.default_rng(1)
    adapted = tuple(sources)[1:]

    def blend() -> Blend:
        weights = dict(zip(adapted, numbers.uniform(0.0, 1.2, len(adapted)).tolist(), strict=True))
        return Blend(method="task_arithmetic", sources=adapted, base="base", parameters={"weight": weights})

    recipes = []
    for _ in range(count):
        layers = [blend() for _ in range(sources["base"].layers)]
        recipes.append(
            StackRecipe.compose(
                sources={name: source.reference for name, source in sources.items()}, tokenizer="base",
                embedding=layers[0], norm=layers[0], head=layers[0],
                hops=((number, layer, layer, layer) for number, layer in enumerate(layers)),
            )
        )  # fmt: skip
    return recipes


def scores(finished: list[Finished]) -> np.ndarray:
    """[candidates, items]"""
    rows = []
    for done in finished:
        assert isinstance(done.result, Measured), done.result
        rows.append(next(iter(done.result.scores[0].values())))
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--items", type=int, default=25)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real", type=Path, help="the folder that scripts/real/prepare made")
    parser.add_argument("--likelihood", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet():
        if given.real is None:
            sources = open_miniatures(given.rank, Path(folder))
            evaluator = LmEvalSettings(task="mini_math_ja", task_folders=(TASKS,), allow_task_code=True).build()
        else:
            sources = open_family(
                given.real / "smollm2", {name: given.real / name for name in ("sums", "json", "verdict")}
            )
            evaluator = real_evaluator(given.real / "items", given.likelihood)
        builders = Builders(BuildContext(sources, "base", dtype=getattr(torch, given.dtype)))
        worker = Worker("bench", builders, [evaluator])
        task = Task(0, "search", range(given.items))
        jobs = [Job(n, 1, recipe, [task]) for n, recipe in enumerate(recipes_of(sources, given.candidates))]
        works: dict[str, Callable[[], list[Finished]]] = {
            "one at a time": lambda: [worker.run(job) for job in jobs],
            "together": lambda: worker.run_together(jobs),
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        results: dict[str, np.ndarray] = {}
        for repeat in range(given.repeats + 1):
            for name, work in works.items():
                started = time.process_time()
                finished = work()
                if repeat:  # the first turn imports and compiles
                    taken[name].append(time.process_time() - started)
                results[name] = scores(finished)
    alone, together = (statistics.median(taken[name]) for name in works)
    differing = int((results["one at a time"] != results["together"]).sum())
    said = {
        "candidates": given.candidates, "items": given.items, "rank": given.rank, "dtype": given.dtype,
        "scored": "answers" if not given.likelihood else "likelihood",
        "seconds_one_at_a_time": round(alone, 3), "seconds_together": round(together, 3),
        "ratio": round(alone / together, 2), "scores_that_differ": differing, "scores": results["together"].size,
        "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    for key, value in said.items():
        print(f"{key:24} {value}")
    if given.json:
        given.json.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
