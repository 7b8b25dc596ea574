"""Writing one merged model as a plain Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from evomerge.checkpoints.folder import TOKENIZER_FILES
from evomerge.checkpoints.roles import tensor_roles
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.writer import SHARD_BYTES, FolderWriter
from evomerge.merging.materialise import check_recipe, merged_tensors
from evomerge.recipe import Recipe

_SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json")


def write_model(
    recipe: Recipe,
    sources: Mapping[str, Source],
    out: Path,
    *,
    texts: Mapping[str, str],
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Make the folder ``out``: weights, configuration, tokenizer, generation settings, and ``texts`` by file name.

    Peak memory is that of one tensor of every source. The folder appears when all is written and ``check``, given the
    complete folder under its temporary name, has not raised; otherwise nothing is left behind.

    Args:
        progress: called with the number of tensors written and of all.

    Raises:
        InputError: ``out`` cannot be written, the disk is too small, or the recipe does not fit the sources.
    """
    check_recipe(recipe, sources)
    model = sources[recipe.tokenizer]
    roles = tensor_roles(model)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    layout = [(name, model.tensors[name].shape, dtype or model.read(name).dtype) for name in roles]
    folders = [source.folder for source in sources.values()]
    with FolderWriter(out, layout, shard_bytes, sources=folders) as folder:
        for done, (name, tensor) in enumerate(merged_tensors(recipe, sources, roles), start=1):
            folder.write(name, tensor)
            progress(done, len(layout))
        folder.add_text("config.json", config_text(model, recipe))
        for file in existing(model.folder, _SIDE_FILES):
            folder.add_file(file)
        for name, text in texts.items():
            folder.add_text(name, text)
        if check is not None:
            check(folder.complete())


def config_text(model: Source, recipe: Recipe) -> str:
    """The configuration of the model's source, with the dtype of what is written."""
    config = {key: value for key, value in model.config.items() if key not in ("_name_or_path", "torch_dtype")}
    config["dtype"] = recipe.dtype or str(model.dtype).removeprefix("torch.")
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def existing(folder: Path, names: Iterable[str]) -> list[Path]:
    """Those of the files that the folder has."""
    return [folder / name for name in names if (folder / name).is_file()]
