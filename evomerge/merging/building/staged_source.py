"""A merge as a source of another one: opened like a model folder, and computed as its tensors are read."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from evomerge import __version__
from evomerge.checkpoints.folder import WEIGHTS
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.vocabulary import align
from evomerge.errors import InputError
from evomerge.merging.building.export import companions, write_model
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import Merged, merged_config, merged_tensors
from evomerge.recipes.base import text_hash
from evomerge.recipes.stack import StackRecipe
from evomerge.recipes.staged import Stage


@dataclass
class StagedSource(Source):
    """A source whose weights are those of a recipe, float32.

    Attributes:
        key: a hash of everything that it depends on: its recipe, the recipes before it, and the names, sizes and times
            of its sources' files.
        made: computes its tensors.
    """

    key: str = ""
    made: StageTensors | None = field(default=None, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        assert self.made is not None
        return self.made.tensor(name)

    def read_stored(self, name: str) -> torch.Tensor:
        return self.read(name)

    def is_mapped(self, name: str) -> bool:
        return False

    def release(self, name: str) -> None:
        pass

    def release_files(self) -> None:
        assert self.made is not None
        for source in self.made.sources.values():
            source.release_files()


class StageTensors:
    """Computes the tensors of a recipe one at a time, for whichever thread asks.

    Args:
        recipe: float32.
        sources: by the names of the recipe.
    """

    def __init__(self, recipe: StackRecipe, sources: Mapping[str, Source]) -> None:
        self.sources = sources
        self._recipe = recipe
        self._materialiser = Materialiser(sources)
        self._merged: dict[str, Merged] = {merged.name: merged for merged in merged_tensors(recipe, sources)}
        self._layout = {name: (shape, dtype) for name, shape, dtype in self._materialiser.layout(recipe)}
        self._lock = threading.Lock()

    def tensor(self, name: str) -> torch.Tensor:
        """One of them, in its own memory. Raises InputError: it has NaN or Inf."""
        shape, dtype = self._layout[name]
        with self._lock:
            return self._materialiser.scaled(self._merged[name], self._recipe, shape, dtype)


def opened_stage(stage: Stage, sources: Mapping[str, Source], above: Path, keep: Path | None = None) -> Source:
    """A stage as a source: either a folder that is written in float32 and opened, or a source that is computed.

    Its configuration and tensor names are read from a folder without weights, so that a stage equals its own export.

    Args:
        sources: its sources, by the names of its recipe.
        above: where folders without weights are made.
        keep: where stages are kept as folders, each under its name and key; None computes them.

    Raises:
        InputError: the stage cannot be made from these sources, such as one that reads images.
    """
    if seeing := [name for name, source in sources.items() if source.takes_images]:
        problem = f"{seeing[0]} reads images, and stages are made of text-only models"
        raise InputError(f"stage {stage.name}", problem, "Merge it in one go, or each stage to a folder.")
    recipe = stage.recipe.model_copy(update={"dtype": "float32"})
    aligned = align(sources, recipe.tokenizer, recipe.vocabulary)
    Materialiser(aligned).check(recipe)
    key = _key(stage, sources)
    if keep is not None:
        kept = keep / f"{stage.name}-{key}"
        if not kept.exists():
            keep.mkdir(parents=True, exist_ok=True)
            write_model(recipe, aligned, kept, texts={})
        return open_source(stage.name, str(kept), place=f"stage {stage.name}")
    made = StageTensors(recipe, aligned)
    folder = above / f"{stage.name}-{key}"
    if not folder.exists():
        _write_hollow(folder, recipe, aligned)
    opened = open_source(stage.name, str(folder), place=f"stage {stage.name}")
    files = tuple(dict.fromkeys(file for source in sources.values() for file in source.files))
    found: dict[str, Any] = {f.name: getattr(opened, f.name) for f in fields(Source) if f.init}
    staged = StagedSource(**found, key=key, made=made)
    return replace(staged, files=files, warnings=())


def _key(stage: Stage, sources: Mapping[str, Source]) -> str:
    """A hash of everything that a stage depends on."""
    follows: list[Any] = [__version__, stage.recipe.canonical()]
    for name, source in sorted(sources.items()):
        if isinstance(source, StagedSource):
            follows.append((name, source.key))
        else:
            files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
            follows.append((name, source.reference, files))
    return text_hash(json.dumps(follows, sort_keys=True))


def key_of(source: Source) -> str:
    """The identity of a stage: its key, or the folder that is named by it."""
    return source.key if isinstance(source, StagedSource) else str(source.folder)


def stages_key(sources: Mapping[str, Source]) -> str:
    """What the stages among some sources depend on; empty without stages."""
    keys = [source.key for source in sources.values() if isinstance(source, StagedSource)]
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16] if keys else ""


def _write_hollow(folder: Path, recipe: StackRecipe, sources: Mapping[str, Source]) -> None:
    """A model folder whose weight file is a header followed by a hole, which takes no disk space."""
    folder.mkdir(parents=True)
    model = sources[recipe.tokenizer]
    for file in companions(model):
        (folder / file.relative_to(model.folder)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.relative_to(model.folder))
    texts = {**model.tokenizer_texts, "config.json": json.dumps(merged_config(recipe, sources))}
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    header, end = {}, 0
    for name, shape, _ in Materialiser(sources).layout(recipe):
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        stream.truncate(8 + len(head) + end)
