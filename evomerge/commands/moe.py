"""The command moe: build mixtures of experts without a search, or prune experts of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from evomerge.calibration import Calibration, calibration_from
from evomerge.checkpoints.references import check_reference
from evomerge.checkpoints.target import check_target
from evomerge.commands.waiting import progress_bar
from evomerge.errors import InputError
from evomerge.files import read_text
from evomerge.mergekit.moe import mixture_of, read_moe
from evomerge.plugins import unknown_name
from evomerge.recipes.mixture import Architecture
from evomerge.yaml import load_yaml

if TYPE_CHECKING:
    from evomerge.checkpoints.source import Source


def assemble_or_prune(
    model: str,
    out: Path,
    architecture: str | None,
    keep: int | None,
    texts: tuple[Path, int, int] | None,
    *,
    merged: bool,
) -> None:
    """Build or prune a mixture, as the command line says.

    Args:
        texts: their file, how many to use, and how many tokens of each.
    """
    if architecture is not None and architecture not in get_args(Architecture):
        raise unknown_name(architecture, get_args(Architecture), "--architecture", "architecture of mixtures")
    if keep is None:
        if texts is not None:
            raise InputError("--calibration", "is for --prune; routers are made of the prompts in the file")
        assemble(Path(model), out, cast(Architecture | None, architecture))
        return
    if architecture is not None:
        raise InputError("--architecture", "is for a new mixture; pruning does not change the architecture")
    given = None if texts is None else calibration_from(texts[0], texts[1], texts[2], "--calibration")
    prune(model, out, keep, given, merged=merged)


def assemble(path: Path, out: Path, architecture: Architecture | None = None) -> None:
    """Build a mixture from a configuration of mergekit-moe.

    Args:
        architecture: overrides the one in the configuration, or the one that fits its models.
    """
    check_target(out)
    root = path.resolve().parent
    file = read_moe(load_yaml(read_text(path, str(path)), str(path)), str(path))
    opened: dict[str, Source] = {}

    def look(reference: str) -> tuple[str, int]:
        if reference not in opened:
            check_reference(reference, str(path), root)
            from evomerge.checkpoints.source import open_source

            opened[reference] = open_source(reference, reference, place=str(path), root=root)
        source = opened[reference]
        return str(source.config["model_type"]), source.layers

    made = mixture_of(file, look, str(path), architecture)
    for reference in made.recipe.sources.values():
        look(reference)
    import torch

    from evomerge.checkpoints.checks import check_compatible, check_finite
    from evomerge.merging.building.builders import BuildContext, check_recipe
    from evomerge.mixture.builder import MixtureBuilder
    from evomerge.report.card import papers
    from evomerge.report.consoles import make_console

    sources = {name: replace(opened[reference], name=name) for name, reference in made.recipe.sources.items()}
    check_recipe(made.recipe, sources)
    check_compatible(sources, same_special=False)
    for source in sources.values() if made.texts is not None else ():
        check_finite(source)
    console = make_console()
    if file.gate_mode in ("cheap_embed", "hidden_avg", "hidden_last"):
        console.print(f"{file.gate_mode} is read as hidden, of all tokens: docs/from-mergekit.md", style="yellow")
    dtype = None if made.recipe.dtype is None else getattr(torch, made.recipe.dtype)
    context = BuildContext(sources, made.recipe.tokenizer, calibration=made.texts, dtype=dtype)
    with progress_bar(console, "writing tensors") as update:
        beside = papers(out.name, made.recipe, sources, None)
        MixtureBuilder(context).export(made.recipe, out, texts=beside, progress=update)
    console.print(f"made {out}: {made.recipe.lines()[0]}", style="bold")


def prune(model: str, out: Path, keep: int, texts: Calibration | None, *, merged: bool) -> None:
    """Remove the experts of a mixture that some texts use least.

    Args:
        merged: merge removed experts into those that are kept, instead of dropping them.
    """
    check_target(out)
    if texts is None:
        hint = "Give some of the texts that the model is for: `--calibration FILE`."
        raise InputError("--calibration", "is missing, and texts are needed to see which experts are used", hint)
    check_reference(model, "MODEL")
    from evomerge.checkpoints.checks import check_finite
    from evomerge.checkpoints.source import open_source
    from evomerge.merging.building.builders import CPU
    from evomerge.mixture.pruning import check_prunable, kept_experts, use_of_experts, write_pruned
    from evomerge.report.consoles import make_console

    source = open_source("model", model, place=model)
    check_prunable(source, keep)
    texts.texts_of(source.name)
    check_finite(source)
    console = make_console()
    use = use_of_experts(source, texts, CPU)
    kept = {layer: kept_experts(of_layer, keep, merged=merged) for layer, of_layer in use.items()}
    lost = sum(float(u.gates.sum() - u.gates[list(kept[layer])].sum()) for layer, u in use.items())
    share = lost / sum(float(of_layer.gates.sum()) for of_layer in use.values())
    with progress_bar(console, "writing tensors") as update:
        write_pruned(source, kept, out, texts={}, progress=update)
    console.print(
        f"made {out}: {keep} experts a layer; the others had {share:.1%} of the gates on the texts", style="bold"
    )
