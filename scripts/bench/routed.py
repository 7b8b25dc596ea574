"""The cost of routed experts: tokens per second, relative to the base alone, with random weights in a model's shape.

All forms read the same prompts and generate equally many tokens, in turn, in one process on one thread. A ratio is the
median over turns of those to the base in the same turn, in processor seconds of the thread, so that other load matters
less. Routers are linear, one for each adapted layer or one for each block, and keep all experts or the best two. If
modules have the same input, it is multiplied once by all of their routers and once by all of their adapters; "apart" is
without that.

    python scripts/bench/routed.py [--hidden 576] [--layers 30] [--experts 4] [--rank 16] [--rows 60] [--turns 7]
        [--json docs/routed.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from real_model import open_family
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.checkpoints.live import LiveModel, live_model
from evomerge.checkpoints.source import Source
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.routed import LayerGroup, RoutedRecipe, Router
from evomerge.routed import computing
from evomerge.routed.live import LiveExperts
from evomerge.routed.routers import routings
from evomerge.routed.sites import places_of, sites_of
from evomerge.routed.trunk import base_alone

TOKENIZER = Path(__file__).parents[2] / "examples" / "zoo" / "base"
PROMPT, ANSWER = 50, 40  # tokens of each row
FORMS: dict[str, dict[str, Any]] = {
    "a router each layer, apart": {"per": "module", "apart": True},
    "a router each layer": {"per": "module"},
    "a router each layer, top 2": {"per": "module", "top_k": 2},
    "a router each block": {"per": "block"},
}


def write_family(folder: Path, given: argparse.Namespace) -> dict[str, Source]:
    """A base with random weights, and adapters on all of its linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocabulary, hidden_size=given.hidden, intermediate_size=given.hidden * 8 // 3,
        num_hidden_layers=given.layers, num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 192, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    linear = {name: m.weight.shape for name, m in model.named_modules() if name.endswith("_proj")}
    adapters = {}
    for number in range(given.experts):
        place = adapters[f"expert{number}"] = folder / f"expert{number}"
        place.mkdir()
        tensors = {}
        for name, (rows, columns) in linear.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(given.rank, columns) / columns
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, given.rank) / given.rank
        save_file(tensors, place / "adapter_model.safetensors")
        about = {"peft_type": "LORA", "r": given.rank, "lora_alpha": given.rank, "init_lora_weights": True}
        (place / "adapter_config.json").write_text(json.dumps(about))
    return open_family(folder / "base", adapters)


@torch.inference_mode()
def seconds(live: LiveModel, prompts: torch.Tensor) -> float:
    """Processor seconds of this thread for all answers."""
    started = time.thread_time()
    found = live.model(prompts, use_cache=True)
    for _ in range(ANSWER - 1):
        last = found.logits[:, -1:].argmax(-1)
        found = live.model(last, past_key_values=found.past_key_values, use_cache=True)
    return time.thread_time() - started


def forms_of(sources: dict[str, Source], live: LiveModel) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """For each form, a context in which the live model computes in that form."""
    base, names = sources["base"], tuple(name for name in sources if name != "base")
    experts: LiveExperts | None = None
    found: dict[str, Callable[[], AbstractContextManager[object]]] = {"base": nullcontext}
    for form, how in FORMS.items():
        recipe = RoutedRecipe(
            sources={name: source.reference for name, source in sources.items()}, tokenizer="base", base="base",
            experts=names, groups=(LayerGroup(layers=base.layers, experts=names, top_k=how.get("top_k")),),
            router=Router(kind="prototypes", per=how["per"]), calibration="none",
        )  # fmt: skip
        sites = sites_of(recipe, sources)
        places = places_of(recipe, sites, base)
        if experts is None:
            Materialiser(sources).write(base_alone(recipe, base.layers), live)
            experts = LiveExperts(live, sites, names)
        weights = {name: torch.randn(len(names), place.width) for name, place in places.items()}
        routers = {name: computing.Router("linear", weight, weight[:, 0].clone()) for name, weight in weights.items()}
        gating, apart = routings(recipe, places, routers), how.get("apart", False)
        found[form] = partial(experts.install, recipe, places, gating, apart=apart)
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the base, and the ratio of every form to it."""
    with tempfile.TemporaryDirectory() as folder:
        sources = write_family(Path(folder), given)
        live = live_model(sources["base"], torch.device("cpu"), torch.float32)
        prompts = torch.randint(3, given.vocabulary, (given.rows, PROMPT), generator=torch.Generator().manual_seed(1))
        forms = forms_of(sources, live)
        turns: dict[str, list[float]] = {form: [] for form in forms}
        for turn in range(given.turns + 1):  # the first one warms up
            for form, install in forms.items():
                with install():
                    taken = seconds(live, prompts)
                if turn:
                    turns[form].append(taken)
    ratios = {form: [one / own for one, own in zip(turns["base"], taken, strict=True)] for form, taken in turns.items()}
    return {
        "shape": {key: getattr(given, key) for key in ("hidden", "layers", "experts", "rank", "rows", "vocabulary")},
        "processor": platform.processor() or platform.machine(),
        "turns": given.turns,
        "base_tokens_per_second": given.rows * ANSWER / statistics.median(turns["base"]),
        "of_the_base": {form: statistics.median(of_form) for form, of_form in ratios.items()},
        "least_and_most": {form: [min(of_form), max(of_form)] for form, of_form in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"hidden": 576, "layers": 30, "experts": 4, "rank": 16, "rows": 60, "vocabulary": 49152, "turns": 7}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given)
    print(f"base: {found['base_tokens_per_second']:.0f} tokens a second")
    for form, ratio in found["of_the_base"].items():
        low, high = found["least_and_most"][form]
        print(f"{form:28} {ratio:.2f} [{low:.2f}, {high:.2f}]")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
