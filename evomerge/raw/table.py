"""Tables of tensors without an architecture, as sources: a safetensors file, or a diffusers folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoints.folder import check_files
from evomerge.checkpoints.headers import TORCH_DTYPES, TensorEntry, read_header
from evomerge.checkpoints.parts import Part
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.files import read_json
from evomerge.printable import printable
from evomerge.raw.references import INDEX, PICKLED
from evomerge.recipes.stack import Role

ROLE = Role("embedding")
"""The role of a tensor in a recipe: none belongs to a known layer."""

_MATRIX = Role("matrix")
_LOOKED_UP = re.compile(
    r"(token|position|positional|word|class)_embed|embed_(tokens|positions)|relative_attention_bias"
    r"|(^|[./])(shared|wte|wpe)\."
)
"""Names of lookup tables: their matrices are not multiplied by an input."""

_QUANTISED = ("F8_", "F4", "F6_")


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """The role of a tensor: a matrix of some layer, for methods that treat these separately, or anything else.

    Convolution kernels are not matrices, because the meaning of their rows and columns is undefined.
    """
    is_matrix = len(shape) == 2 and min(shape) > 1 and _LOOKED_UP.search(name) is None
    return _MATRIX if is_matrix else ROLE


@dataclass(frozen=True)
class Table:
    """A source and its other content.

    Attributes:
        source: floating-point tensors, by name; in a folder prefixed with the component: ``unet/conv_in.weight``.
        others: other tensors, such as positions, which are never merged.
        files: for each file's path in the folder, the names of its tensors; for a single file, under its own name.
        root: the folder, or that of the file.
        is_folder: whether it is a diffusers folder, whose other files are copied too.
    """

    source: Source
    others: Mapping[str, TensorEntry]
    files: Mapping[str, tuple[str, ...]]
    root: Path
    is_folder: bool


def open_table(name: str, reference: str, root: Path, place: str) -> Table:
    """Open a table, reading only headers.

    Raises:
        InputError: it does not exist, is pickled, broken, quantised, or contains nothing to merge.
    """
    path = Path(os.path.join(root, os.path.expanduser(reference)))
    if path.suffix in PICKLED:
        hint = "Save it as safetensors where you trust it: `safetensors.torch.save_file(torch.load(FILE), ...)`."
        raise InputError(place, f"{path} is pickled, which can run code", hint)
    is_folder = path.is_dir()
    if not is_folder and not path.is_file():
        raise InputError(place, f"there is no file {path}")
    if is_folder:
        check_files(path, place)
        _check_components(path, place)
    held = sorted(path.glob("*/*.safetensors")) if is_folder else [path]
    if not held:
        raise InputError(place, f"{path} has no component with weights in safetensors")
    entries: dict[str, TensorEntry] = {}
    files: dict[str, tuple[str, ...]] = {}
    for file in held:
        prefix = f"{file.parent.name}/" if is_folder else ""
        found = {prefix + key: entry for key, entry in read_header(file, place).items()}
        if twice := sorted(found.keys() & entries.keys()):
            raise InputError(place, f"{twice[0]} is in two files of {path}", "Keep one variant of its weights.")
        entries |= found
        files[file.relative_to(path).as_posix() if is_folder else file.name] = tuple(found)
    quantised = next((key for key, entry in entries.items() if entry.dtype.startswith(_QUANTISED)), None)
    if quantised is not None:
        problem = f"{quantised} is stored as {entries[quantised].dtype}, which has lost what merging needs"
        raise InputError(place, problem, "Use the checkpoint in 16 or 32 bits.")
    mergeable = {key: entry for key, entry in entries.items() if entry.dtype in TORCH_DTYPES}
    if not mergeable:
        raise InputError(place, f"{path} holds no tensors in floating point")
    others = {key: entry for key, entry in entries.items() if key not in mergeable}
    files_of_all = (*held, *(rest_of(path) if is_folder else ()))
    source = _source(name, reference, place, path, mergeable, files_of_all)
    return Table(source, others, files, path if is_folder else path.parent, is_folder)


def _check_components(folder: Path, place: str) -> None:
    """Reject a diffusers folder that could not be loaded again after its weights are merged.

    Raises:
        InputError: a component that it names is missing or elsewhere, or has only pickled weights.
    """
    for component in (inner for inner in folder.iterdir() if inner.is_dir()):
        check_files(component, place)
        if any(component.glob("*.bin")) and not any(component.glob("*.safetensors")):
            hint = "Save it as safetensors where you trust it: `Pipeline.from_pretrained(old).save_pretrained(new)`."
            raise InputError(place, f"{component} is pickled, which can run code", hint)
    index = read_json(folder / INDEX, place)
    for name, of_class in index.items() if isinstance(index, dict) else ():
        if name.startswith("_") or not isinstance(of_class, list) or of_class[:1] == [None]:
            continue
        if Path(name).name != name or not (folder / name).is_dir():
            raise InputError(
                place, f"{INDEX} names {printable(name, 100)!r}, which is no folder beside it", "Copy it whole."
            )


def rest_of(folder: Path) -> list[Path]:
    """The files of a diffusers folder that accompany its weights: configurations, tokenizers."""
    paths = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    taken = (path for path in paths if len(path.parts) <= 2 and path.suffix not in (".bin", ".py"))
    return [folder / path for path in taken if len(path.parts) < 2 or path.suffix != ".safetensors"]


def _source(
    name: str, reference: str, place: str, path: Path, tensors: dict[str, TensorEntry], files: tuple[Path, ...]
) -> Source:
    return Source(
        name=name, reference=reference, place=place, folder=path if path.is_dir() else path.parent, config={},
        settings={}, layered={}, computing={}, image_settings={}, reordering_problem="has no layers",
        text_type="", float32={}, tensors=tensors, parts={key: Part(key) for key in tensors},
        roles=dict.fromkeys(tensors, ROLE), layers=0, tied=False, transposed=frozenset(),
        folds={}, normed=False, files=files, warnings=(),
    )  # fmt: skip


def usual_dtype(tables: Mapping[str, Table]) -> str:
    """The name of the dtype of most tensors of the first table."""
    first = next(iter(tables.values()))
    return Counter(entry.dtype for entry in first.source.tensors.values()).most_common(1)[0][0]
