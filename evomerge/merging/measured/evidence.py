"""Costly facts about sources, computed once for all processes that need them: each worker of a search, and its export.

Each result is kept in a file named by a hash of everything that it depends on, so a file is never out of date. Files
appear complete: they are written under a temporary name and renamed. They are mapped, not read, so that a worker's
memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]

_SMALL = 1 << 20
"""The largest result, in bytes, that is kept in memory if there is no folder: larger ones are worth keeping only if
they can be mapped."""


class Evidence:
    """Facts by kind and by what they depend on.

    Args:
        folder: where they are kept, for all processes that are given it; made when first needed. None keeps small ones
            for this process alone.
        contents: for each source a digest of what its files hold. Files are only as good as these: a folder is to be
            used with true ones.
    """

    def __init__(self, folder: Path | None = None, contents: Mapping[str, str] | None = None) -> None:
        if folder is not None and contents is None:
            raise ValueError("evidence that is kept must say of which sources it is")
        self._folder = folder
        self._contents = dict(contents or {})
        self._known: dict[tuple[str, Any], Tensors] = {}
        self._latest: dict[tuple[str, Any], Any] = {}

    def content_of(self, source: str) -> str:
        """A digest of a source's content; its name if nothing is kept beyond this process."""
        return self._contents[source] if self._contents else source

    def get(self, kind: str, follows_from: tuple[Any, ...], compute: Callable[[], Tensors]) -> Tensors:
        """Tensors by name: as computed before, or as ``compute`` returns them now.

        While one process computes, others that need the same wait for it. A truncated or damaged file is computed
        again. If the folder cannot be written to, the next process computes the result again.

        Args:
            kind: what it is, and the version of how it is computed. follows_from: everything that it depends on, as
            nested tuples of text and numbers; sources by ``content_of``. compute: returns contiguous tensors on the CPU
            with unique names; equal for equal ``follows_from``.
        """
        key = kind, follows_from
        if key not in self._known:
            tensors = compute() if self._folder is None else self._shared(self._folder, key, compute)
            if self._folder is None and sum(tensor.nbytes for tensor in tensors.values()) > _SMALL:
                return tensors
            self._known[key] = tensors
        return self._known[key]

    def recurs(self, kind: str, place: Any, follows_from: tuple[Any, ...]) -> bool:
        """Whether the last result asked for, of this kind and place, depended on the same, or it is kept already.

        Results that may depend on new numbers with every candidate would fill a disk; ``get`` them only if they recur.
        """
        latest = self._latest.get((kind, place))
        self._latest[kind, place] = follows_from
        return latest == follows_from or (kind, follows_from) in self._known

    def has(self, kind: str, follows_from: tuple[Any, ...]) -> bool:
        """Whether ``get`` would find it kept, judging by its file's header."""
        if (kind, follows_from) in self._known:
            return True
        if self._folder is None:
            return False
        file, text = _place(self._folder, (kind, follows_from))
        try:
            with safe_open(file, framework="pt") as opened:
                return bool((opened.metadata() or {}).get("follows_from") == text)
        except (OSError, SafetensorError):
            return False

    def _shared(self, folder: Path, key: tuple[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        file, text = _place(folder, key)
        if (kept := _read(file, text)) is not None:
            return kept
        with _alone(file) as writable:
            if (kept := _read(file, text)) is not None:  # another process has computed it while we waited
                return kept
            made = compute()
            if not (writable and _write(file, text, made)):
                self._folder = None
                return made
        return _read(file, text, is_own=True) or made


def _place(folder: Path, key: tuple[str, Any]) -> tuple[Path, str]:
    """The file in which something is kept, and the text in it that describes everything it depends on."""
    text = json.dumps(key)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.safetensors", text


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[bool]:
    """Hold the lock of a file, if its folder is writable. The lock of a process that dies is released."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        log.warning("what is computed of the sources is not kept: %s cannot be written (%s)", file, error.strerror)
        yield False
        return
    try:
        yield True
    finally:
        # A process that waits for the lock file removed here finds the result once it gets its turn.
        file.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


def _read(file: Path, text: str, *, is_own: bool = False) -> Tensors | None:
    """The content of a file, mapped; None if there is no complete file that matches ``text``.

    Args:
        is_own: this process has just written it, so its bytes need no check.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.offset_keys()}
    except (OSError, SafetensorError):
        return None
    if about.get("follows_from") != text or not (is_own or about.get("sha256") == _digest(tensors)):
        return None
    return tensors


def _write(file: Path, text: str, tensors: Tensors) -> bool:
    """Write a file, completely or not at all. False if that fails."""
    partial = file.with_suffix(f".partial-{os.getpid()}")
    try:
        save_file(dict(tensors), partial, {"follows_from": text, "sha256": _digest(tensors)})
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        log.warning("what is computed of the sources is not kept: %s cannot be written (%s)", file, error)
        partial.unlink(missing_ok=True)
        return False
    return True


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
