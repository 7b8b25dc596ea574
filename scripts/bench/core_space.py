"""The cost of making a candidate from LoRA adapters: merged in core space, and folded into whole weights.

Three ways take turns over the same candidates of a method, with different numbers in every layer: small matrices for
rows of a batch (`together`), the same added to the base's weights in a live model, and adapters that are folded and
merged like full models. Seconds are of one core (processor time of this process on one thread), as medians of turns;
the first candidate of each way, which also computes evidence, is reported separately. Nothing is scored.

    python scripts/bench/core_space.py --real real [--methods task_arithmetic,ties,dare_ties,karcher] [--repeats 5]
        [--dtype bfloat16] [--json FILE]

The model and its three adapters of rank 16 are those of scripts/real/prepare.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from real_model import SKILLS, open_family

from evomerge.checkpoints.live import live_model
from evomerge.checkpoints.low_rank_rows import CoreRows
from evomerge.checkpoints.source import Source
from evomerge.merging.adapters.low_rank import CoreMerges, family_of
from evomerge.merging.materialise import Materialiser
from evomerge.method import default_parameters, find_method
from evomerge.recipes.stack import Basis, Blend, StackRecipe

METHODS = "task_arithmetic,ties,dare_ties,karcher"


def recipe_of(sources: Mapping[str, Source], method: str, basis: Basis | None, seed: int) -> StackRecipe:
    """A candidate with its own weights and densities in every layer; for equal seeds only the basis differs."""
    numbers = np.random.default_rng(seed)
    found = find_method(method, "--methods")

    def blend() -> Blend:
        parameters = default_parameters(found, SKILLS)
        for name in ("weight", "density"):
            if name in parameters:
                parameters[name] = dict(zip(SKILLS, numbers.uniform(0.2, 0.9, len(SKILLS)).tolist(), strict=True))
        base = "base" if found.needs_base or basis else None
        return Blend(method=method, sources=SKILLS, base=base, parameters=parameters, basis=basis)

    layers = [blend() for _ in range(sources["base"].layers)]
    return StackRecipe.compose(
        sources={name: source.reference for name, source in sources.items()},
        tokenizer="base",
        embedding=layers[0],
        hops=((number, layer, layer, layer) for number, layer in enumerate(layers)),
        norm=layers[0],
        head=layers[0],
    )


def seconds(work: Callable[[StackRecipe], object], recipe: StackRecipe) -> float:
    """Processor seconds."""
    started = time.process_time()
    work(recipe)
    return time.process_time() - started


def measured(sources: Mapping[str, Source], method: str, repeats: int, dtype: torch.dtype) -> dict[str, object]:
    """Seconds per candidate in each way, after the first, and seconds of the first."""
    live = live_model(sources["base"], (torch.device("cpu"),), dtype)
    in_core, folded = Materialiser(sources), Materialiser(sources)
    merges: list[CoreMerges] = []
    rows: list[CoreRows] = []

    def mix(recipe: StackRecipe) -> None:
        if not merges:  # as a worker does for its first candidate
            merges.append(CoreMerges(in_core.core_space, sources, family_of(sources)))
            rows.append(CoreRows(live, merges[0].bases))
        rows[0].shares(merges[0].matrices(recipe))

    ways: dict[str, tuple[Basis | None, Callable[[StackRecipe], object]]] = {
        "rows": ("core", mix),
        "written": ("core", lambda recipe: in_core.write(recipe, live)),
        "folded": (None, lambda recipe: folded.write(recipe, live)),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (basis, work) in ways.items():
            taken[name].append(seconds(work, recipe_of(sources, method, basis, turn)))
    usual = {name: statistics.median(found[1:]) for name, found in taken.items()}
    return {
        "method": method,
        **{f"seconds_{name}": round(value, 4) for name, value in usual.items()},
        **{f"first_seconds_{name}": round(found[0], 2) for name, found in taken.items()},
        "candidates_a_minute_rows": round(60 / usual["rows"]),
        "rows_vs_folded": round(median_ratio(taken["folded"], taken["rows"]), 1),
        "written_vs_folded": round(median_ratio(taken["folded"], taken["written"]), 2),
    }


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median of the ratios of pairs, without the first."""
    return statistics.median(one / other for one, other in zip(slow[1:], fast[1:], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="the folder that scripts/real/prepare made")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sources = open_family(given.real / "smollm2", {name: given.real / name for name in SKILLS})
    found = []
    for method in given.methods.split(","):
        found.append(measured(sources, method, given.repeats, getattr(torch, given.dtype)))
        print(json.dumps(found[-1]), flush=True)
    if given.json:
        about = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        given.json.write_text(json.dumps({**about, "dtype": given.dtype, "methods": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
