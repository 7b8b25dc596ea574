"""Merges tables of tensors with any method that works tensor by tensor, on all tensors or by blocks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.headers import TORCH_DTYPES, map_file
from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.checkpoints.whole import whole_folder
from evomerge.errors import InputError
from evomerge.files import open_file, read_json
from evomerge.mergekit.reading import from_mergekit
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import Merged
from evomerge.printable import printable
from evomerge.raw.blocks import blocks_of
from evomerge.raw.layouts import KEPT, layout_of
from evomerge.raw.table import ROLE, Table, open_table, rest_of, role_of, usual_dtype
from evomerge.recipes.stack import Role, StackRecipe
from evomerge.recipes.state_dict import Keys

WEIGHTS = "model.safetensors"
"""The file of a merged table other than a diffusers folder."""

_LAYER = {f"layer {kind}": Role(kind, 0) for kind in ("attention", "mlp", "norm")}
"""A layer without tensors, because a recipe must have one."""


@dataclass(frozen=True)
class TableMerge:
    """A merge of tables.

    Attributes:
        recipe: its blends are for labelled names; see ``labelled``.
        tables: by the recipe's names for sources; everything else comes from the first.
        labels: the labelled name of each tensor.
        kept: names of tensors that are copied from the first table.
        dtype: the dtype of the result; None for each tensor's own in the first table.
    """

    recipe: StackRecipe
    tables: Mapping[str, Table]
    labels: Mapping[str, str]
    kept: frozenset[str]
    dtype: torch.dtype | None


def labelled(name: str, block: str) -> str:
    """The name that a recipe's filters are matched against, with the block as a prefix: ``IN04 model.diffusion...``."""
    return f"{block} {name}" if block else name


def read_table_merge(config: Mapping[str, Any], root: Path, keys: Keys, place: str) -> TableMerge:
    """The merge described by a configuration for mergekit-pytorch. Its filters may name blocks, as ``filter: IN04``.

    Raises:
        InputError: an unknown key or value; a table that cannot be opened, or lacks tensors that others have; tensors
            with different shapes.
    """
    for key in ("slices", "tokenizer", "tokenizer_source", "chat_template"):
        if key in config:
            raise InputError(f"{place}: {key}", "is of language models, and these are tables of tensors", "Remove it.")
    opened: dict[str, Table] = {}
    labels: dict[str, str] = {}

    def look(reference: str) -> Mapping[str, Role]:
        if reference not in opened:
            opened[reference] = open_table(reference, reference, root, place)
            blocks = blocks_of(opened[reference].source.tensors)
            labels.update({name: labelled(name, block) for name, block in blocks.items()})
        return {**{labels[name]: ROLE for name in opened[reference].source.tensors}, **_LAYER}

    first = _first(config, place)
    recipe = from_mergekit({**config, "tokenizer_source": first}, look, place)
    tables = {name: opened[reference] for name, reference in recipe.sources.items()}
    tables = {recipe.tokenizer: tables[recipe.tokenizer], **tables}
    said = " ".join(_filters(config))
    blocks = {name: label.partition(" ")[0] if " " in label else "" for name, label in labels.items()}
    kept = frozenset(name for name, block in blocks.items() if block in KEPT and block not in said)
    check_alike(tables, keys, kept, place)
    dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
    return TableMerge(recipe, tables, labels, kept, dtype)


def _first(config: Mapping[str, Any], place: str) -> Any:
    """The table from which everything that is not merged is copied: the first model, or without models the base."""
    models = config.get("models")
    if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "model" not in models[0]:
        raise InputError(f"{place}: models", "must be a list of models")
    return models[0]["model"]


def _filters(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        if isinstance(content.get("filter"), str):
            yield content["filter"]
        for value in content.values():
            yield from _filters(value)
    elif isinstance(content, list):
        for value in content:
            yield from _filters(value)


def check_alike(tables: Mapping[str, Table], keys: Keys, kept: Collection[str], place: str) -> None:
    """Reject tables with different tensors, unless ``keys`` says how to treat these, with different shapes, or with
    different layouts.

    Args:
        kept: names of tensors that are not merged.

    Raises:
        InputError: naming the tensor and both tables.
    """
    _check_layouts(tables, place)
    _check_predictions(tables, place)
    _check_keys(tables, keys, kept, place)
    _check_shapes(tables, kept, place)


def _check_layouts(tables: Mapping[str, Table], place: str) -> None:
    """Reject models in two layouts, whose tensors have different names whatever ``keys`` says."""
    known = {name: layout.name for name, table in tables.items() if (layout := layout_of(table.source.tensors))}
    first = next(iter(known), None)
    other = next((name for name, layout in known.items() if first is not None and layout != known[first]), None)
    if first is None or other is None:
        return
    problem = f"{first} is {known[first]}, and {other} is {known[other]}"
    hint = "Merge models of one architecture; one in the other layout is converted by diffusers: "
    raise InputError(place, problem, f"{hint}`Pipeline.from_single_file(FILE).save_pretrained(FOLDER)`.")


def _check_predictions(tables: Mapping[str, Table], place: str) -> None:
    """Reject diffusers folders whose models have different prediction targets, which cannot be averaged."""
    said = {}
    for name, table in tables.items():
        file = table.root / "scheduler" / "scheduler_config.json"
        if table.is_folder and file.is_file():
            content = read_json(file, place)
            said[name] = str(content.get("prediction_type", "epsilon")) if isinstance(content, dict) else "epsilon"
    if len({*said.values()}) > 1:
        told = ", ".join(f"{name} {printable(kind, 40)}" for name, kind in said.items())
        raise InputError(place, f"models predict different things ({told})", "Merge models that predict the same.")


def _check_keys(tables: Mapping[str, Table], keys: Keys, kept: Collection[str], place: str) -> None:
    if keys != "same":
        return
    for name, table in tables.items():
        for other, theirs in tables.items():
            lacking = [key for key in theirs.source.tensors if key not in table.source.tensors and key not in kept]
            if lacking:
                problem = f"{name} has no {lacking[0]}, which {other} has ({len(lacking):,} in all)"
                hint = "`--keys union`, in a search `keys: union`, copies these from the first that has them, "
                hint += "`intersection` leaves them out."
                raise InputError(place, problem, hint)


def _check_shapes(tables: Mapping[str, Table], kept: Collection[str], place: str) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, table in tables.items():
        for key, entry in table.source.tensors.items():
            if key in kept:
                continue
            other, shape = shapes.setdefault(key, (name, entry.shape))
            if shape != entry.shape:
                problem = f"{key} is {list(shape)} in {other} and {list(entry.shape)} in {name}"
                raise InputError(place, problem, "Merge checkpoints of one architecture.")


def write_table_merge(
    merge: TableMerge,
    out: Path,
    keys: Keys,
    *,
    texts: Mapping[str, str],
    materialiser: Materialiser | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Create the folder ``out``: ``model.safetensors``, or the components of a diffusers folder.

    Memory holds one tensor of every table.

    Args:
        texts: additional files, by name.
        materialiser: a materialiser for the tables' sources; a new one if None.
        check: called with the complete folder under its temporary name, which is removed if it raises.

    Raises:
        InputError: ``out`` cannot be written, or a tensor contains NaN or Inf.
    """
    with whole_folder(out, [table.root for table in merge.tables.values() if table.is_folder]) as folder:
        known = materialiser or Materialiser({name: table.source for name, table in merge.tables.items()})
        fill_folder(merge, folder, keys, known, progress)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if check is not None:
            check(folder)


def fill_folder(
    merge: TableMerge,
    folder: Path,
    keys: Keys,
    materialiser: Materialiser,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Write the files of a merge into an empty folder, which is left incomplete if this raises.

    Args:
        materialiser: a materialiser for the tables' sources.

    Raises:
        InputError: a tensor contains NaN or Inf.
    """
    first = next(iter(merge.tables.values()))
    files = dict(first.files) if first.is_folder else {WEIGHTS: next(iter(first.files.values()))}
    files = _with_others(files, merge, keys)
    total, done = sum(len(names) for names in files.values()), 0
    if first.is_folder:
        _copy_rest(first, folder)
    for path, names in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        prefix = f"{path.partition('/')[0]}/" if first.is_folder else ""
        with TensorFile(folder / path) as file:
            for name in sorted(names, key=lambda name: _width(merge, name), reverse=True):
                _add(file, name.removeprefix(prefix), name, merge, materialiser)
                done += 1
                progress(done, total)
    if first.is_folder and keys != "same":
        _write_indices(folder, files)


def _write_indices(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Update the indices of components with several weights files to the tensors that exist."""
    for index in folder.glob("*/*.safetensors.index.json"):
        component = index.parent.name
        of_component = {Path(path).name: names for path, names in files.items() if Path(path).parent.name == component}
        places = ((name.removeprefix(f"{component}/"), file) for file, names in of_component.items() for name in names)
        size = sum((index.parent / file).stat().st_size for file in of_component)
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places))}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _with_others(files: dict[str, tuple[str, ...]], merge: TableMerge, keys: Keys) -> dict[str, tuple[str, ...]]:
    """The files, with additional tensors of other tables, or without tensors that some tables lack."""
    tables = list(merge.tables.values())
    if keys == "intersection":
        common = set.intersection(*({*table.source.tensors, *table.others} for table in tables)) | merge.kept
        return {path: tuple(name for name in names if name in common) for path, names in files.items()}
    known = {name for names in files.values() for name in names}
    for table in tables[1:]:
        for path, names in table.files.items():
            own = path if tables[0].is_folder else next(iter(files))
            files[own] = (*files.get(own, ()), *(name for name in names if name not in known))
            known.update(names)
    return files


def _width(merge: TableMerge, name: str) -> int:
    """Bytes per element of the result, so that files can have wide dtypes first."""
    for table in merge.tables.values():
        if name in table.others:
            entry = table.others[name]
            return (entry.end - entry.begin) // max(1, _count(entry.shape))
        if name in table.source.tensors:
            return _dtype(merge, table, name).itemsize
    raise KeyError(name)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _dtype(merge: TableMerge, table: Table, name: str) -> torch.dtype:
    return merge.dtype or TORCH_DTYPES[table.source.tensors[name].dtype]


def _add(file: TensorFile, written: str, name: str, merge: TableMerge, materialiser: Materialiser) -> None:
    holders = [table for table in merge.tables.values() if name in table.source.tensors or name in table.others]
    if name in holders[0].others:
        entry = holders[0].others[name]
        file.add_bytes(written, map_file(entry.file)[entry.begin : entry.end], entry.dtype, entry.shape)
    elif len(holders) < len(merge.tables) or name in merge.kept:
        tensor = holders[0].source.read(name)
        file.add(written, tensor if name in merge.kept else tensor.to(_dtype(merge, holders[0], name)))
    else:
        shape = holders[0].source.tensors[name].shape
        role = role_of(name, shape)
        merged = Merged(merge.labels[name], role, name, role)
        tensor = materialiser.tensor(merged, merge.recipe, shape, _dtype(merge, holders[0], name))
        file.add(written, tensor)


def _copy_rest(table: Table, folder: Path) -> None:
    """Copy the other files of a diffusers folder: configurations, tokenizers, the scheduler's."""
    for file in rest_of(table.root):
        path = file.relative_to(table.root)
        (folder / path).parent.mkdir(exist_ok=True)
        with open_file(file, str(table.root)) as stream, (folder / path).open("xb") as copy:
            shutil.copyfileobj(stream, copy)


def summary(merge: TableMerge) -> list[str]:
    """A short description of the merge: the blocks with their number of tensors, and what is kept."""
    counts: dict[str, int] = {}
    for name, label in merge.labels.items():
        if " " in label and name not in merge.kept:
            block = label.partition(" ")[0]
            counts[block] = counts.get(block, 0) + 1
    layout = layout_of(merge.labels)
    kind = "tables" if layout is None else f"tables ({layout.name})"
    lines = [f"{len(merge.labels):,} tensors of {len(merge.tables)} {kind} in {usual_dtype(merge.tables)}"]
    if counts:
        lines.append("blocks: " + ", ".join(f"{block} ({count})" for block, count in sorted(counts.items())))
    if merge.kept:
        lines.append(
            f"kept of {next(iter(merge.tables))}: {len(merge.kept):,} tensors ({', '.join(_kept_blocks(merge))})"
        )
    return lines


def _kept_blocks(merge: TableMerge) -> list[str]:
    found = {merge.labels[name].partition(" ")[0] for name in merge.kept}
    return sorted(found & {*KEPT}) or ["in no group"]
