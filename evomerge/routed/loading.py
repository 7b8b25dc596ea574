"""Loads exported folders of routed models that are not plain, with the library that they are meant for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.live import LiveModel, NotFiniteError, check_live, for_scoring
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext
from evomerge.routed import arrow_folder, remote_code


def loaded(folder: Path, context: BuildContext) -> LiveModel:
    """Load a folder that was exported in the context's form.

    Raises:
        InputError: it cannot be loaded, or computes NaN or Inf.
    """
    if len(context.devices) > 1:
        problem = f"a model as {context.form} is loaded on one device, and a worker has {len(context.devices)}"
        raise InputError("cluster.devices", problem, "Export with `--no-verify`, or as a plain model.")
    try:
        made = remote_code.load(folder, None) if context.form == "routed" else arrow_folder.load(folder)
    except InputError:
        raise
    except Exception as error:  # transformers and peft may raise anything
        raise InputError(str(folder), f"cannot be loaded: {first_line(error)}") from error
    model = for_scoring(made.to(context.devices[0]))
    whole = folder / "base" if context.form == "peft" else folder
    tokenizer = load_tokenizer(replace(context.sources[context.tokenizer], folder=whole))
    live = LiveModel(model, tokenizer, devices=context.devices)
    try:
        check_live(live)
    except NotFiniteError as error:
        raise InputError(str(folder), f"cannot be scored: {error}") from error
    return live
