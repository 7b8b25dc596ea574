"""Uploading a model folder to object storage, so that a reader finds it complete or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from evomerge.errors import InputError
from evomerge.objects import PARTIAL, Storage, StorageError

SUMS = "SHA256SUMS"
"""Uploaded first: the checksums of all files of the upload, in the format of `sha256sum --check`."""

LAST = "config.json"
"""Uploaded last: without it no loader sees a model."""

_LAST = (LAST, "model_index.json", "adapter_config.json", "arrow.json", "model.safetensors")
"""The same for other folders (diffusers, adapters, routed experts for peft, single tensor files): the first of these
that a folder has."""


def _last(names: Collection[str]) -> str | None:
    return next((name for name in _LAST if name in names), None)


def check_model(folder: Path) -> None:
    """Check that this is the folder of a model or an adapter.

    Raises:
        InputError: it is not.
    """
    if not folder.is_dir():
        raise InputError(str(folder), "is not a folder", "Name the folder of a model or an adapter.")
    if _last([file.name for file in folder.iterdir() if file.is_file()]) is None:
        raise InputError(str(folder), "holds no model", f"A model's folder has one of: {', '.join(_LAST)}.")


def check_free(storage: Storage) -> None:
    """Check that a model can be uploaded here: the place is writable, and empty or with an interrupted upload.

    Raises:
        InputError: it contains something else, or is not writable.
    """
    storage.probe()
    there = set(storage.files()) - {SUMS + PARTIAL}
    told = _parsed((storage.read(SUMS) or b"").decode()) if SUMS in there else there
    if _last(told) in there:
        raise InputError(storage.url, "holds a model already", "Choose another place, or remove it.")
    if there and SUMS not in there:
        raise InputError(storage.url, "is not empty", "Choose another place, or remove what is there.")


def upload(folder: Path, storage: Storage, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
    """Copy a model folder to a place that passed ``check_free``.

    At any time all files there belong to one model, the one of the checksums there. So an interrupted upload is
    continued, after removing files of any other model.

    Args:
        progress: called with the number of uploaded bytes and of all bytes.

    Raises:
        StorageError: the storage failed. The last file is then missing, and the same call continues.
    """
    named = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    last = _last(named)
    files = {name: named[name] for name in sorted(named, key=lambda name: (name == last, name))}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    sums = {name: _sum(file) for name, file in files.items()}
    there = storage.files()
    before = _parsed((storage.read(SUMS) or b"").decode())
    kept = {name for name in files if before.get(name) == sums[name] and there.get(name) == sizes[name]}
    stale = {name for name, digest in before.items() if sums.get(name) != digest}
    storage.remove([name for name in there if name.removesuffix(PARTIAL) in stale])
    storage.write(SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())
    done, total = sum(sizes[name] for name in kept), sum(sizes.values())

    def report(sent: int) -> None:
        progress(done + sent, total)

    for name in [name for name in files if name not in kept]:
        _put(storage, files[name], name, report)
        done += sizes[name]


def _put(storage: Storage, file: Path, name: str, progress: Callable[[int], None]) -> None:
    storage.put(file, name, progress)
    if (size := storage.size(name)) != file.stat().st_size:
        problem = f"has {size:,} bytes of {name}, which is {file.stat().st_size:,} bytes long"
        raise StorageError(storage.url, problem, "Run the command again.")


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parsed(sums: str) -> Mapping[str, str]:
    """Checksums by file name."""
    rows = (line.partition("  ") for line in sums.splitlines())
    return {name: digest for digest, _, name in rows}
