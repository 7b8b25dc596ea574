"""A candidate of the real model of scripts/real/prepare: its time and memory, compared with plain transformers.

A worker merges a candidate into its live model and scores it on items of the search split, computing the common
beginning of all prompts once. Plain transformers runs ``generate`` on the same prompts with the same weights, with the
best of four batch sizes. Both take turns in one process, and the ratio is the median over pairs. The times of Evomerge
include the merge and the grading, which plain transformers does not have. Also measured are a merge against a copy of
as many bytes, the peak memory of a process that only scores candidates, and how long ``evomerge validate`` takes to
print its plan for the miniatures; and with --search, the confirmed gain of the search of scripts/real/search.

    python scripts/bench/real_model.py [--real real] [--items 60] [--repeats 5] [--threads 2] [--search real/search]
        [--json docs/real_model.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluators.base import Evaluator
from evaluators.function import FunctionSettings
from evaluators.likelihood import LikelihoodSettings
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.building.builders import BuildContext, Builders
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.status import read_status
from evomerge.search.work.jobs import Job, Measured, Task
from evomerge.search.workers.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
SKILLS = ("sums", "json", "verdict")
NEW_TOKENS = 40  # as in scripts/real/right.py
BATCH_SIZES = (8, 15, 30, 60)
MB = 1e6


def weights(count: int) -> np.ndarray:
    """The weights of each source in each candidate, [count, sources]: in the middle of a search's range."""
    return np.random.default_rng(1).uniform(0.3, 0.8, (count, len(SKILLS)))


def recipe_of(sources: Mapping[str, Source], numbers: np.ndarray) -> StackRecipe:
    """Task arithmetic with one weight for each source, as in scripts/real/search.yaml."""
    parameters = {"weight": dict(zip(SKILLS, numbers.tolist(), strict=True))}
    blend = Blend(method="task_arithmetic", sources=SKILLS, base="base", parameters=parameters)
    return StackRecipe.compose(
        sources={name: source.reference for name, source in sources.items()}, tokenizer="base",
        embedding=blend, norm=blend, head=blend,
        hops=((number, blend, blend, blend) for number in range(sources["base"].layers)),
    )  # fmt: skip


def open_family(base: Path, adapters: Mapping[str, Path]) -> dict[str, Source]:
    references = {"base": str(base), **{name: f"{base}+{adapter}" for name, adapter in adapters.items()}}
    return {name: open_source(name, reference, place=name) for name, reference in references.items()}


def real_evaluator(items: Path, likelihood: bool) -> Evaluator:
    files = {"held_out_file": items / "held_out.jsonl", "apply_chat_template": True}
    if likelihood:
        return LikelihoodSettings(file=items / "search.jsonl", prompt="{question}", **files).build()
    return FunctionSettings(
        file=ROOT / "scripts" / "real" / "right.py", function="right", items_file=items / "search.jsonl",
        metrics={"right": "maximize"}, batch_size=256, allow_task_code=True, **files,
    ).build()  # fmt: skip


class Candidates:
    """A worker on the real model, and candidates for it.

    Attributes:
        merge: seconds of the last candidate's merge.
    """

    def __init__(self, folder: Path, items: int, count: int) -> None:
        self.sources = open_family(folder / "smollm2", {name: folder / name for name in SKILLS})
        self._builders = Builders(BuildContext(self.sources, "base", dtype=torch.bfloat16))
        self._worker = Worker("bench", self._builders, [real_evaluator(folder / "items", likelihood=False)])
        self._task = Task(0, "search", range(items))
        self.recipes = [recipe_of(self.sources, numbers) for numbers in weights(count)]
        self.merge = 0.0

    @property
    def live(self) -> LiveModel:
        stack = self._builders.of(self.recipes[0])
        assert isinstance(stack, StackBuilder)
        return stack.live

    def score(self, recipe: StackRecipe) -> None:
        """Merge a candidate and score it."""
        result = self._worker.run(Job(0, 1, recipe, [self._task])).result
        assert isinstance(result, Measured), result
        self.merge = result.timings["merge"]


def plain(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer in plain transformers. It is imported here because a process that scores, whose peak
    memory is measured too, does not need much of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(folder / "smollm2", padding_side="left")


def plain_prompts(tokenizer: Any, folder: Path, items: int) -> list[str]:
    """The questions as chats, as the evaluator asks them."""
    lines = (folder / "items" / "search.jsonl").read_text("utf-8").splitlines()[:items]
    talks = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    return [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]


def plain_answers(model: Any, tokenizer: Any, prompts: Sequence[str], rows: int) -> None:
    """Greedy answers from transformers' ``generate``, with prompts sorted by length to avoid padding."""
    ordered = sorted(prompts, key=len, reverse=True)
    for first in range(0, len(ordered), rows):
        batch = tokenizer(ordered[first : first + rows], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(folder: Path, items: int, repeats: int) -> dict[str, float]:
    """Seconds per candidate, ours and plain; of its merge; and of copying what a merge reads and writes."""
    ours = Candidates(folder, items, repeats + 1)
    model, tokenizer = plain(folder)
    prompts = plain_prompts(tokenizer, folder, items)
    base = ours.sources["base"]
    read = [base.read(name) for name in base.tensors]
    written = [torch.empty_like(tensor) for tensor in read]

    def copy() -> None:
        for target, tensor in zip(written, read, strict=True):
            target.copy_(tensor)

    def answers(size: int) -> float:
        return seconds(lambda: plain_answers(model, tokenizer, prompts, size))

    rows: list[dict[str, float]] = []
    best = 0
    for repeat, recipe in enumerate(ours.recipes):
        evomerge = seconds(partial(ours.score, recipe))
        model.load_state_dict(ours.live.model.state_dict(), strict=False)
        best = best or min(BATCH_SIZES, key=answers)
        taken = {"evomerge": evomerge, "plain": answers(best), "merge": ours.merge, "copy": seconds(copy)}
        if repeat:  # the first turn imports and compiles
            rows.append(taken)
            print(", ".join(f"{name} {value:.3f} s" for name, value in taken.items()), flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratio = statistics.median(row["plain"] / row["evomerge"] for row in rows)
    return {**medians, "times as fast": ratio, "best batch size": best}


def peak(arguments: Sequence[str]) -> int:
    """The peak memory, in bytes, of a process that runs this file with these arguments."""
    command = [sys.executable, str(Path(__file__)), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_plan(repeats: int) -> float:
    """Seconds that ``evomerge validate`` takes on the miniatures, up to and including its plan."""
    command = [sys.executable, "-m", "evomerge", "validate", str(ROOT / "examples" / "miniature.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return statistics.median(
        seconds(lambda: subprocess.run(command, check=True, capture_output=True, env=environment))
        for _ in range(repeats)
    )


def model_and_sources(sources: Mapping[str, Source]) -> int:
    """Bytes of a live model in bfloat16, and of the files of all sources."""
    folders = {Path(part) for source in sources.values() for part in source.reference.split("+")}
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    base = sources["base"]
    return sum(2 * base.read(name).numel() for name in base.tensors) + sum(file.stat().st_size for file in files)


def confirmed_gain(search: Path) -> dict[str, float | None]:
    """The winner's held-out gain over the best source, with its corrected interval; None if a source wins."""
    status = read_status(search)
    (objective,) = status.directions
    sources = [entry for entry in status.confirmed_baselines if entry.origin == "source"]
    best = max(sources, key=lambda entry: entry.objectives[objective].mean)
    winner = next((entry for entry in status.confirmed if entry.id == status.winner), None)
    if winner is None:
        return dict.fromkeys(("mean", "low", "high"))
    (gain,) = (gain for gain in winner.objectives[objective].difference if gain.to == best.label)
    return {"mean": gain.mean, "low": gain.low, "high": gain.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=ROOT / "real")
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--search", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=["evomerge", "plain"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak == "evomerge":
        ours = Candidates(given.real, given.items, 2)
        for recipe in ours.recipes:
            ours.score(recipe)
    elif given.peak == "plain":
        model, tokenizer = plain(given.real)
        plain_answers(model, tokenizer, plain_prompts(tokenizer, given.real, given.items), BATCH_SIZES[-1])
    if given.peak:
        print(own_peak())
        return
    common = ["--real", str(given.real), "--items", str(given.items), "--threads", str(given.threads)]
    peaks = {who: peak([*common, "--peak", who]) / MB for who in ("evomerge", "plain")}
    compared = compare(given.real, given.items, given.repeats)
    sources = open_family(given.real / "smollm2", {name: given.real / name for name in SKILLS})
    said = {
        "confirmed_gain": None if given.search is None else confirmed_gain(given.search),
        "seconds_per_candidate": round(compared["evomerge"], 3),
        "answer_seconds": round(compared["evomerge"] - compared["merge"], 3),
        "plain_seconds_per_candidate": round(compared["plain"], 3),
        "times_as_fast": round(compared["times as fast"], 2),
        "plain_batch_size": compared["best batch size"],
        "merge_seconds": round(compared["merge"], 3),
        "copy_seconds": round(compared["copy"], 3),
        "peak_mb": round(peaks["evomerge"]),
        "plain_peak_mb": round(peaks["plain"]),
        "model_and_sources_mb": round(model_and_sources(sources) / MB),
        "first_plan_seconds": round(first_plan(given.repeats), 2),
        "items": given.items,
        "threads": given.threads,
    }
    for key, value in said.items():
        print(f"{key:28} {value}")
    if given.json:
        given.json.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
