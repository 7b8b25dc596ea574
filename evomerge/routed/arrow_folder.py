"""Exports Arrow-routed experts for peft: the base and each adapter in a folder of its own, and six lines of code."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.target import check_target
from evomerge.errors import InputError
from evomerge.merging.building.export import write_model
from evomerge.recipes.routed import RoutedRecipe
from evomerge.routed.trunk import base_alone

_ABOUT = "arrow.json"

_LOADER = '''"""Loads the model of this folder: `from load import model`."""
import json, pathlib
from peft.tuners.lora import ArrowConfig, create_arrow_model
from transformers import AutoModelForCausalLM
here = pathlib.Path(__file__).parent
about = json.loads((here / "arrow.json").read_text())
model = create_arrow_model(
    AutoModelForCausalLM.from_pretrained(here / "base", dtype="auto"),
    [str(here / name) for name in about["adapters"]], ArrowConfig(**about["arrow"]),
).eval()
'''


def arrow_settings(recipe: RoutedRecipe, sources: Mapping[str, Source]) -> dict[str, Any]:
    """The settings of peft's Arrow for a recipe.

    Raises:
        InputError: peft's Arrow does not support it.
    """
    router, first = recipe.router, recipe.groups[0]
    plain = first.model_copy(update={"layers": 1})
    problem = ""
    if router.kind != "arrow" or router.gate != "softmax" or router.base_expert or not router.renormalised:
        problem = "gates by Arrow's softmax over the kept experts alone"
    elif any(group.model_copy(update={"layers": 1}) != plain for group in recipe.groups):
        problem = "has the same experts, top-k and temperature in all layers"
    elif set(first.experts) != set(recipe.experts) or recipe.where != "all":
        problem = "has every expert in all blocks"
    elif (first.attention_gain, first.mlp_gain) != (1.0, 1.0) or any(first.bias.values()):
        problem = "knows no gains and no biases"
    elif len({_shape(sources[name]) for name in recipe.experts}) > 1:
        problem = "wants adapters of one rank, of the same modules"
    elif any(len(sources[name].adapters) != 1 for name in recipe.experts):
        problem = "takes each expert as one adapter"
    if problem:
        raise InputError("--as", f"peft's Arrow {problem}, and this recipe is otherwise", "Take `--as routed`.")
    top_k = len(recipe.experts) if first.top_k is None else first.top_k
    return {"top_k": top_k, "router_temperature": first.temperature, "rng_seed": 0}


def _shape(source: Source) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (name, change.down.shape)
        for name, changes in sorted(source.changes.items())
        for change in changes
        if isinstance(change, LowRank)
    )


def write_arrow(
    recipe: RoutedRecipe,
    sources: Mapping[str, Source],
    out: Path,
    *,
    texts: Mapping[str, str],
    check: Callable[[Path], None] | None,
) -> None:
    """Create the folder ``out``, or nothing.

    Raises:
        InputError: peft's Arrow does not support the recipe, or ``out`` cannot be written.
    """
    settings = arrow_settings(recipe, sources)
    check_target(out)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write_model(base_alone(recipe, sources[recipe.base].layers), sources, made / "base", texts={})
        for name in recipe.experts:
            (folder,) = sources[name].adapters
            (made / name).mkdir()
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(folder / file, made / name / file)
        about = {"adapters": list(recipe.experts), "arrow": settings}
        own = {_ABOUT: json.dumps(about, indent=2) + "\n", "load.py": _LOADER}
        for file, text in {**texts, **own}.items():
            (made / file).write_text(text, encoding="utf-8")
        if check is not None:
            check(made)
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def load(folder: Path) -> Any:
    """Load the model of such a folder with peft.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft.tuners.lora import ArrowConfig, create_arrow_model
    except ImportError:
        raise InputError(
            "--as", "peft is not installed, so that nothing can be verified", "`pip install peft`"
        ) from None
    from transformers import AutoModelForCausalLM

    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto", local_files_only=True)
    adapters = [str(folder / name) for name in about["adapters"]]
    return create_arrow_model(base, adapters, ArrowConfig(**about["arrow"]))
