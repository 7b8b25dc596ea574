"""Sources: model folders opened for merging, checked down to the last byte of their headers before a weight is read."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from evomerge.checkpoints.folder import INDEX, TOKENIZER_FILES, check_links, find_tensors, load_json
from evomerge.checkpoints.headers import TORCH_DTYPES, TensorEntry, map_file, view_entry
from evomerge.checkpoints.structure import (
    check_config,
    empty_model,
    names_in_model,
    parse_config,
    stored_tensors,
    tied_names,
)
from evomerge.errors import InputError

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_COPIES = ["*/*", "consolidated*"]  # the same weights again in another layout


@dataclass
class Source:
    """An opened model folder: headers, configuration, and its tensors on demand.

    Attributes:
        name: short name in the search file.
        reference: the folder or hub id as given.
        place: where the reference stands, for errors ("sources.maths").
        folder: where the files are.
        config: config.json as parsed JSON.
        tensors: every tensor that the model has, by its name in the files, in the order of the model's modules.
            What the files hold beside them is left out and named in ``warnings``.
        names: the name in the transformers model of each of them. Most are the same.
        layers: number of layers in the stack.
        tied: the head is the embedding, and has no tensor of its own.
        files: all files that make this model what it is: weights, index, configurations, tokenizer.
        warnings: sentences for a person.
    """

    name: str
    reference: str
    place: str
    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    names: Mapping[str, str]
    layers: int
    tied: bool
    files: tuple[Path, ...]
    warnings: tuple[str, ...]
    _maps: dict[Path, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}  # a pickled map would be all of the weights

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its weights."""
        return _dominant_dtype(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, in its stored dtype: a view of the mapped file, never to be written to."""
        entry = self.tensors[name]
        if entry.file not in self._maps:
            self._maps[entry.file] = map_file(entry.file)
        return view_entry(entry, self._maps[entry.file])


def open_source(name: str, reference: str, *, place: str, root: Path | None = None) -> Source:
    """Open a model folder and check all of it but the values of its weights.

    Args:
        name: short name of the source.
        reference: a folder, or ``org/name`` with an optional ``@revision`` on the Hugging Face hub.
        place: where the reference was given, for errors.
        root: what a relative folder is relative to; the current folder when None.

    Raises:
        InputError: the model cannot be had, or anything about it is broken, unsafe or unsupported.
    """
    folder = _locate(reference, place, root)
    try:
        return _open(name, reference, place, folder)
    except OSError as error:
        raise InputError(place, f"{error.filename or folder} cannot be read ({error.strerror})") from error


def _open(name: str, reference: str, place: str, folder: Path) -> Source:
    check_links(folder, place)
    if (folder / "adapter_config.json").exists():
        raise InputError(
            place,
            f"{folder} is an adapter (LoRA); adapters are not supported yet",
            "Merge it into its base with peft's `merge_and_unload` and name the folder that you save.",
        )
    config = load_json(folder / "config.json", place)
    check_config(config, place)
    _check_side_files(folder, place)
    found = find_tensors(folder, place)
    parsed = parse_config(config, place)
    layers: int = parsed.num_hidden_layers
    if layers > len(found):  # before building that many modules
        raise InputError(place, f"config.json: num_hidden_layers is {layers}, but there are {len(found)} tensors")
    model = empty_model(parsed, place)
    stored = _stored_names(names_in_model(model, found, place), place)
    _check_tensors(found, stored, model, place)
    copies = _check_copies(found, stored, model, place)
    tensors = {stored[name]: found[stored[name]] for name in stored_tensors(model)}
    return Source(
        name=name,
        reference=reference,
        place=place,
        folder=folder,
        config=config,
        tensors=tensors,
        names={stored[name]: name for name in stored_tensors(model)},
        layers=layers,
        tied=bool(tied_names(model)),
        files=_files(folder, found),
        warnings=_warnings(tensors, sorted(found.keys() - tensors.keys() - copies)),
    )


def _locate(reference: str, place: str, root: Path | None) -> Path:
    local = Path(os.path.join(root or Path(), os.path.expanduser(reference)))
    if os.path.isdir(local):  # unlike Path.is_dir, False for a name that is too long
        return local
    if os.path.exists(local):
        raise InputError(place, f"{local} is a file", "Name the folder that holds the model.")
    hub = _HUB_ID.fullmatch(reference)
    if hub is None or reference.startswith("."):
        raise InputError(place, f"there is no folder {local}", "Give a model's folder, or org/name of one on the hub.")
    return _download(hub["id"], hub["revision"], local, place)


def _download(repository: str, revision: str | None, local: Path, place: str) -> Path:
    # Messages of the hub's own errors carry addresses and request ids, so ours are written anew.
    which = repository + (f" at revision {revision}" if revision else "")
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES)
        )
    except GatedRepoError:
        problem = f"{which} is gated on the hub, and this machine's token may not read it"
        mend = "Ask for access on its page, then run `hf auth login`."
    except RevisionNotFoundError:
        problem, mend = f"{repository} has no revision {revision!r} on the hub", "Name a branch, a tag or a commit."
    except (RepositoryNotFoundError, HFValidationError):
        problem = f"there is neither a folder {local} nor a model {repository} on the hub"
        mend = "Check the spelling; for a private model run `hf auth login`."
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        problem = f"there is no folder {local}, and {which} is not in the hub's cache and the hub cannot be reached"
        mend = "Check the spelling and the network, or download the model on another machine."
    except Exception as error:  # a connection that breaks half way raises errors of many libraries
        problem, mend = f"{which} could not be downloaded ({type(error).__name__})", "Try again later."
    raise InputError(place, problem, mend)


def _check_side_files(folder: Path, place: str) -> None:
    if (folder / "generation_config.json").exists():
        load_json(folder / "generation_config.json", place)
    tokenizer = folder / "tokenizer_config.json"
    if not tokenizer.exists():
        return
    content = load_json(tokenizer, place)
    if content.get("auto_map") is not None:
        raise InputError(
            place,
            "tokenizer_config.json: auto_map asks for code from the model's folder",
            "Read what it names; if transformers knows the tokenizer without it, delete the key from a copy.",
        )


def _stored_names(names: Mapping[str, str], place: str) -> dict[str, str]:
    """Name in the files of each name in the model."""
    stored: dict[str, str] = {}
    for name, in_model in names.items():
        if in_model in stored:
            raise InputError(place, f"the files hold {in_model} twice: as {stored[in_model]} and as {name}")
        stored[in_model] = name
    return stored


def _check_tensors(found: Mapping[str, TensorEntry], stored: Mapping[str, str], model: Any, place: str) -> None:
    expected, head = stored_tensors(model), model.get_output_embeddings()
    if missing := [name for name in expected if name not in stored]:
        mend = "Complete the download, or see that config.json is the one that belongs to these weights."
        if head is not None and all(expected[name] is getattr(head, "weight", None) for name in missing):
            mend = "If its head is its embedding, set tie_word_embeddings to true in a copy of config.json."
        raise InputError(place, f"tensors that config.json asks for are missing from the files: {_few(missing)}", mend)
    for in_model, tensor in expected.items():
        name, shape = stored[in_model], list(tensor.shape)
        entry = found[name]
        if list(entry.shape) != shape:
            raise InputError(
                place, f"{name} has shape {list(entry.shape)} in {entry.file.name}; config.json asks for {shape}"
            )
        if entry.dtype not in TORCH_DTYPES:
            raise InputError(
                place,
                f"{name} is stored as {entry.dtype}; only {', '.join(TORCH_DTYPES)} can be merged",
                "Use the model in full precision; F8 and integers are what quantised models are stored as.",
            )


def _check_copies(found: Mapping[str, TensorEntry], stored: Mapping[str, str], model: Any, place: str) -> set[str]:
    """Names of second copies of tied tensors in the files. They are fine as long as they are equal."""
    copies = {stored[copy]: stored[original] for copy, original in tied_names(model).items() if copy in stored}
    for copy, original in copies.items():
        one, other = found[copy], found[original]
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not same or not torch.equal(view_entry(one, map_file(one.file)), view_entry(other, map_file(other.file))):
            raise InputError(
                place,
                f"config.json ties {copy} to {original} (tie_word_embeddings), but they differ in the files",
                "Set tie_word_embeddings to false in a copy of config.json, if the model was trained so.",
            )
    return set(copies)


def _files(folder: Path, found: Mapping[str, TensorEntry]) -> tuple[Path, ...]:
    weights = sorted({entry.file for entry in found.values()})
    side = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
    return (*weights, *(folder / name for name in side if (folder / name).exists()))


def _warnings(tensors: Mapping[str, TensorEntry], extra: list[str]) -> tuple[str, ...]:
    told = []
    if extra:
        told.append(f"left out, being no part of the model: {_few(extra)}")
    if len({entry.dtype for entry in tensors.values()}) > 1:
        most = str(_dominant_dtype(tensors)).removeprefix("torch.")
        told.append(f"the tensors are of several dtypes; most are {most}")
    return tuple(told)


def _dominant_dtype(tensors: Mapping[str, TensorEntry]) -> torch.dtype:
    elements: Counter[str] = Counter()
    for entry in tensors.values():
        elements[entry.dtype] += math.prod(entry.shape)
    return TORCH_DTYPES[elements.most_common(1)[0][0]]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
