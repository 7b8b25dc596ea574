"""The cost of a gradient of the proxy: in forward passes over the same items, and in additional memory.

A forward pass over items with their answers takes turns with the same plus the backward pass that gives the derivatives
with respect to all weights of a layer-wise search. Seconds are of one core (processor time of this process on one
thread), as medians of turns; work that is done once for all items of a step (decoding and planning nearby genomes) is
reported separately. Memory is the peak of each above the memory of the process before it.

    python scripts/bench/gradient.py --real real [--methods task_arithmetic,ties] [--items 24] [--repeats 3]
        [--dtype bfloat16] [--json FILE]
    python scripts/bench/gradient.py --zoo

The first uses the model and the adapters of scripts/real/prepare, the second the base and twelve adapters of
examples/zoo.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from real_model import SKILLS, open_family, real_evaluator

from evaluators.likelihood import LikelihoodSettings
from evomerge.inference import proxy
from evomerge.inference.reading import Prompt, Reader
from evomerge.inference.requests import Likelihood
from evomerge.merging.building.builders import BuildContext, Builders
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.fitting.gradient import GenomeGradients
from evomerge.method import find_method
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings

ROOT = Path(__file__).resolve().parents[2]
MB = 1e6


def peak(work: Callable[[], object]) -> float:
    """The peak of the process's memory during a call, in bytes above its memory before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(key: str) -> float:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[key].split()[0]) * 1024


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


class Problem:
    """A live model, the items of a step, and the gradient for these.

    Args:
        builder: builds the model.
        evaluator: gives the items and their right answers.
    """

    def __init__(self, builder: StackBuilder, space: ParameterSpace, prompts: list[Prompt]) -> None:
        self._builder, self._prompts = builder, prompts
        self._gradients = GenomeGradients(builder.materialiser, space)
        self._genome = np.array([p.default for p in space.parameters])
        self.tokens = sum(len(prompt.fed) for prompt in prompts)
        self.plan()
        builder.write(self._point.recipe)
        self._weights = [1.0] * len(prompts)

    def plan(self) -> None:
        """The part of a gradient's work that is not passes over the model."""
        self._point = self._gradients.at(self._genome)

    def forward(self) -> None:
        """Only the proxy, with the same batches."""
        items = [proxy._Item(p.fed, p.scored, 1.0, number) for number, p in enumerate(self._prompts)]
        with torch.inference_mode():
            for batch in proxy._batches(items, self._builder.live):
                proxy._part(self._builder.live, batch, proxy.saturating)

    def gradient(self) -> None:
        live = self._builder.live
        proxy.differentiate_proxy(live, self._prompts, self._weights, partial(self._point.listening, live))


def measured(problem: Problem, repeats: int) -> dict[str, float]:
    works = {"forward": problem.forward, "gradient": problem.gradient, "plan": problem.plan}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    memory: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            taken = partial(lambda work, name: seconds[name].append(timed(work)), work, name)
            memory[name].append(peak(taken))
            if not repeat:  # the first turn imports, compiles and reads statistics of the sources
                seconds[name].clear()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        **{f"{name}_s": round(value, 3) for name, value in medians.items()},
        "forward_passes": round(medians["gradient"] / medians["forward"], 2),
        "forward_passes_with_plan": round((medians["gradient"] + medians["plan"]) / medians["forward"], 2),
        **{f"{name}_mb": round(max(memory[name][1:]) / MB, 1) for name in ("forward", "gradient")},
        "tokens": problem.tokens,
    }


def opened(given: argparse.Namespace) -> tuple[StackBuilder, list[Prompt]]:
    """A builder over the sources, and the first items of a search with their answers."""
    if given.zoo:
        folder = ROOT / "examples" / "zoo"
        files = sorted(folder.glob("*/adapter_config.json"))
        adapters = {
            file.parent.name: file.parent for file in files if json.loads(file.read_text())["peft_type"] == "LORA"
        }
        sources = open_family(folder / "base", {name: at for name, at in adapters.items() if "full" not in name})
        evaluator = LikelihoodSettings(
            file=ROOT / "evaluators" / "tasks" / "data" / "zoo_math_en.search.jsonl",
            held_out_file=ROOT / "evaluators" / "tasks" / "data" / "zoo_math_en.held_out.jsonl",
        ).build()
    else:
        sources = open_family(given.real / "smollm2", {name: given.real / name for name in SKILLS})
        evaluator = real_evaluator(given.real / "items", likelihood=True)
    builder = Builders(BuildContext(sources, "base", dtype=getattr(torch, given.dtype))).of_kind("stack")
    assert isinstance(builder, StackBuilder)
    requests = evaluator.requests(Reader.of(builder.live), "search", range(given.items))
    return builder, [request.prompt for request in requests if isinstance(request, Likelihood)]


def space_of(builder: StackBuilder, method: str) -> ParameterSpace:
    """The space with a weight for every layer and source."""
    base = builder.sources["base"]
    context = SpaceContext(
        sources={name: source.reference for name, source in builder.sources.items()}, base="base", tokenizer="base",
        layers=base.layers, tied=base.tied, method=lambda name: find_method(name, "space.method"), recipe_seed=0,
        dtype=None,
    )  # fmt: skip
    return ParameterSpaceSettings(method=method, granularity="layer").build(context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=ROOT / "real", help="the folder that scripts/real/prepare made")
    parser.add_argument("--zoo", action="store_true")
    parser.add_argument("--methods", default="task_arithmetic,ties")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    builder, prompts = opened(given)
    said = {
        "model": "zoo" if given.zoo else "real", "items": given.items, "dtype": given.dtype,
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    for method in given.methods.split(","):
        space = space_of(builder, method)
        found = measured(Problem(builder, space, prompts), given.repeats)
        said[method] = {"genes": len(space.parameters), **found}
        print(f"{method}, {len(space.parameters)} genes: {found['forward_passes']:.2f} forward passes", end=" ")
        print(f"({found['forward_passes_with_plan']:.2f} with plans), of {found['tokens']} tokens;", end=" ")
        print(f"{found['gradient_mb'] - found['forward_mb']:.0f} MB above a forward pass's {found['forward_mb']:.0f}")
    if given.json is not None:
        given.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
