"""Copies models from object storage, or from a disk shared by all nodes, to this machine, once for all processes.

The copy is in the user's cache (XDG_CACHE_HOME on Linux) under a hash of the URL and of the storage's metadata of each
file, so a model that is overwritten there gets a new copy. One process per machine copies, and the others wait for it;
if it dies, its lock is released, and the next process continues with the files that are complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from evomerge.errors import InputError
from evomerge.objects import PARTIAL, FileVersion, Storage, StorageError

log = logging.getLogger(__name__)

TRIES = 6
FIRST_PAUSE_S = 1.0
"""The pause after a failed copy; each further pause is twice as long. Up to the same time is added at random, so that
the nodes of a cluster do not retry simultaneously. All five pauses together take half a minute to a minute."""


def local_copy(url: str, place: str, patterns: Sequence[str]) -> Path:
    """The folder with the files of a model that match one of ``patterns``, copied if it does not exist yet.

    Args:
        place: where the URL was given, for error messages.

    Raises:
        InputError: the storage cannot be reached or has no such file; the disk is full.
    """
    storage = Storage(url, place)
    try:
        listed = storage.versions()
        files = {name: version for name, version in listed.items() if any(fnmatch(name, each) for each in patterns)}
        if not files:
            raise InputError(place, f"there is no model at {url}", "Name the folder that holds its config.json.")
        folder = _folder_of(storage, files)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not folder.exists():  # no other process copied it while this one waited
                    _copy(storage, files, folder, place)
    except StorageError as error:
        raise InputError(place, f"{error.place} {error.problem}", error.hint) from None
    except OSError as error:
        hint = "Copies are kept in ~/.cache, or where XDG_CACHE_HOME says: free some space there, or name another disk."
        raise InputError(place, f"{url} cannot be copied to this machine ({error})", hint) from None
    return folder


def _folder_of(storage: Storage, files: Mapping[str, FileVersion]) -> Path:
    text = json.dumps([storage.url, sorted((name, *version) for name, version in files.items())])
    name = re.sub(r"[^\w.-]", "_", storage.name)[:80]
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    return user_cache_path("evomerge") / "sources" / f"{name}-{digest}"


def _copy(storage: Storage, files: Mapping[str, FileVersion], folder: Path, place: str) -> None:
    """Copy files next to their folder, each under a temporary name; the folder appears once all are complete."""
    partial = folder.with_name(folder.name + PARTIAL)
    partial.mkdir(exist_ok=True)
    lacking = {name: each.size for name, each in files.items() if not (partial / name).exists()}
    room, wanted = shutil.disk_usage(partial).free, sum(lacking.values())
    if room < wanted:
        problem = f"needs {wanted / 1e9:.1f} GB for a copy in {partial.parent}, and {room / 1e9:.1f} GB are free"
        raise InputError(place, problem, "Make room, or let XDG_CACHE_HOME name another disk.")
    for name, size in lacking.items():
        _get(storage, name, size, partial / name)
    partial.rename(folder)


def _get(storage: Storage, name: str, size: int, file: Path) -> None:
    """Copy one file, completely or not at all; if the storage fails, wait and retry."""
    partial = file.with_name(file.name + PARTIAL)
    pause = FIRST_PAUSE_S
    for tries in range(1, TRIES + 1):
        try:
            storage.get(name, partial)
            if partial.stat().st_size != size:
                raise StorageError(f"{storage.url}/{name}", f"gave {partial.stat().st_size} of {size} bytes")
            partial.rename(file)
            return
        except StorageError as error:
            if tries == TRIES:
                raise
            pause_s = pause * (1 + random.random())
            log.warning("%s: %s; tried again in %.0f s", error.place, error.problem, pause_s)
            time.sleep(pause_s)
            pause *= 2
