"""Writes a Hugging Face folder tensor by tensor, atomically."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from evomerge.checkpoints.folder import INDEX, WEIGHTS
from evomerge.checkpoints.headers import STORED_DTYPES
from evomerge.checkpoints.target import check_target, existing_parent
from evomerge.errors import InputError
from evomerge.files import open_file, sync

SHARD_BYTES = 5_000_000_000
_UNFINISHED = ".unfinished"
_LOCK = ".lock"
_SLACK_BYTES = 32_000_000  # for the tokenizer and other files beside the weights
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_ORDER = {
    "I64": 0,
    "F32": 1,
    "I32": 2,
    "BF16": 3,
    "F16": 4,
    "U8": 5,
    "BOOL": 6,
}  # wide ones first, so that all are aligned; the order of safetensors' own writer

Layout = Sequence[tuple[str, Sequence[int], torch.dtype]]
"""Name, shape and dtype of every tensor to be written."""


@dataclass(frozen=True)
class _Shard:
    file: str
    header: bytes  # preceded by its length
    ranges: dict[str, tuple[int, int]]  # for each tensor, in bytes from the start of the file

    @property
    def size(self) -> int:
        return max([len(self.header), *(end for _, end in self.ranges.values())])


class FolderWriter:
    """Writes a model folder under a temporary name and renames it when it is complete.

    ``with FolderWriter(out, layout) as folder:`` then ``folder.write(name, tensor)`` for every tensor of the layout, in
    any order and from any threads, and ``add_file`` and ``add_text`` for the rest. Memory never holds more than the
    tensors being written. The bytes are the same as those of ``safetensors.torch.save_file``.

    A weights file gets its name once it is complete and flushed to disk. With a ``key``, a process that is killed or
    interrupted leaves such files next to ``out``, and the next one with the same key starts with them (``done``). After
    an error, or without a key, nothing is left behind.

    Args:
        out: the folder to create. It may exist if it is empty.
        layout: the tensors; files are filled in this order.
        shard_bytes: the maximum bytes of tensors in a file, unless a single tensor is larger.
        sources: folders of models that must not be written into.
        key: identifies the content, in letters and digits: the same key must mean the same bytes.

    Raises:
        InputError: immediately, if ``out`` cannot be written or the disk is too small; later, if the disk is full.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        shard_bytes: int = SHARD_BYTES,
        *,
        sources: Sequence[Path] = (),
        key: str | None = None,
    ) -> None:
        self.out = out.absolute()
        self._key = key
        self._partial = self.out.parent / f".{self.out.name}.partial-{key or os.getpid()}"
        self._shapes = {name: (tuple(shape), dtype) for name, shape, dtype in layout}
        self._shards = _plan(layout, shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.ranges}
        self._waiting = {shard.file: set(shard.ranges) for shard in self._shards}
        self._open: dict[str, BinaryIO] = {}
        self._held: BinaryIO | None = None
        self._lock = threading.Lock()
        self._need = sum(shard.size for shard in self._shards) + _SLACK_BYTES
        check_target(self.out, sources)
        self._check_space()

    def __enter__(self) -> Self:
        with self._disk_faults():
            if self._key is None:
                shutil.rmtree(self._partial, ignore_errors=True)  # left by a killed process with the same id
                self._partial.mkdir(parents=True)
            else:
                self._take_over(self._key)
        return self

    def _take_over(self, key: str) -> None:
        """Keep the complete weights files that an earlier process left under this key, and nothing else."""
        for stale in self.out.parent.glob(f".{glob.escape(self.out.name)}.partial-*"):
            if stale != self._partial and not stale.name.rpartition("-")[2].isdigit():
                shutil.rmtree(stale, ignore_errors=True)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._held = (self._partial / _LOCK).open("wb")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.close()
            raise InputError(
                str(self.out), "is being written by another process", "Wait for it, or choose another folder."
            ) from None
        whole = {shard.file: shard.size for shard in self._shards}
        for file in self._partial.iterdir():
            if whole.get(file.name) == file.stat().st_size:
                self._waiting[file.name].clear()
            elif file.name != _LOCK:
                file.unlink()

    @property
    def done(self) -> set[str]:
        """Names of the tensors that have already been written."""
        return {name for name, shard in self._shard_of.items() if name not in self._waiting[shard.file]}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._disk_faults():
                    self._finish()
        finally:
            for stream in self._open.values():
                # A full disk fails again when the buffer is flushed; the file is deleted below.
                with suppress(OSError):
                    stream.close()
            if self._key is None or error is None or isinstance(error, Exception):
                shutil.rmtree(self._partial, ignore_errors=True)
            if self._held is not None:
                self._held.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor of the layout, from any device.

        Raises:
            KeyError: it is not in the layout, or was written before.
            ValueError: its shape or dtype is not that of the layout.
            InputError: the disk is full.
        """
        shard = self._shard_of[name]
        if (tuple(tensor.shape), tensor.dtype) != self._shapes[name]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; the layout says {self._shapes[name]}")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with self._disk_faults():
            with self._lock:
                if name not in self._waiting[shard.file]:
                    raise KeyError(name)
                if shard.file not in self._open:
                    self._open[shard.file] = (self._partial / (shard.file + _UNFINISHED)).open("xb", buffering=0)
                    self._open[shard.file].write(shard.header)
                stream = self._open[shard.file]
            _write_at(stream, raw.numpy().data, shard.ranges[name][0])
            with self._lock:
                self._waiting[shard.file].remove(name)
                last = not self._waiting[shard.file]
                if last:
                    del self._open[shard.file]
            if last:
                _sync(stream)
                (self._partial / (shard.file + _UNFINISHED)).rename(self._partial / shard.file)

    def add_text(self, name: str, text: str) -> None:
        """Write a text file (UTF-8) into the folder, or into a subfolder given in its name."""
        with self._disk_faults(), self._create(name) as stream:
            stream.write(text.encode())
            _sync(stream)

    def add_file(self, file: Path, name: str | None = None) -> None:
        """Copy a file into the folder, under its own name or another, like ``add_text``.

        Raises:
            InputError: it is not a regular file.
        """
        with (
            self._disk_faults(),
            open_file(file, str(file.parent)) as source,
            self._create(name or file.name) as stream,
        ):
            shutil.copyfileobj(source, stream)
            _sync(stream)

    def _create(self, name: str) -> BinaryIO:
        place = self._partial / name
        place.parent.mkdir(exist_ok=True)
        return place.open("xb")

    def complete(self) -> Path:
        """Write what is missing once all tensors are written, and return the folder under its temporary name.

        It has the full content of ``out``, so it can be loaded and checked before it appears.
        """
        if unwritten := [name for names in self._waiting.values() for name in names]:
            raise RuntimeError(f"{len(unwritten)} tensors were never written: {', '.join(sorted(unwritten)[:3])}")
        if len(self._shards) > 1 and not (self._partial / INDEX).exists():
            total = sum(end - begin for shard in self._shards for begin, end in shard.ranges.values())
            files = {name: shard.file for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": total}, "weight_map": files}
            self.add_text(INDEX, json.dumps(index, indent=2) + "\n")
        return self._partial

    def _finish(self) -> None:
        folder = self.complete()
        (folder / _LOCK).unlink(missing_ok=True)  # the open file still holds the lock
        sync(folder)
        try:
            self._partial.rename(self.out)  # also replaces an empty folder
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise InputError(
                    str(self.out), "was created by another process in the meantime", "Choose another folder."
                ) from None
            raise
        sync(self.out.parent)

    def _check_space(self) -> None:
        free = shutil.disk_usage(existing_parent(self.out)).free
        if self._need > free:
            raise InputError(
                str(self.out),
                f"{_size(self._need)} are needed ({len(self._shapes):,} tensors in {len(self._shards)} files and "
                f"{_size(_SLACK_BYTES)} for the rest), but the disk has {_size(free)} free",
                "Free some space, or choose a folder on another disk.",
            )

    @contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(existing_parent(self.out)).free
            raise InputError(
                str(self.out),
                f"the disk is full: {_size(self._need)} are needed in all, {_size(free)} are free now",
                "Free some space, or choose a folder on another disk. Nothing was left behind.",
            ) from error


def _plan(layout: Layout, shard_bytes: int) -> list[_Shard]:
    """Assign tensors to files in the order of the layout, then create each file's header."""
    groups: list[list[tuple[str, str, list[int], int]]] = [[]]
    filled = 0
    for name, shape, dtype in layout:
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, _NAMES[dtype], list(shape), size))
        filled += size
    count = len(groups)
    files = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [_shard(file, group) for file, group in zip(files, groups, strict=True)]


def _shard(file: str, tensors: list[tuple[str, str, list[int], int]]) -> _Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name, dtype, shape, size in sorted(tensors, key=lambda t: (_ORDER[t[1]], t[0])):
        offsets[name] = (position, position + size)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    start = 8 + len(text)
    ranges = {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}
    return _Shard(file, len(text).to_bytes(8, "little") + text, ranges)


def _write_at(stream: BinaryIO, raw: memoryview, offset: int) -> None:
    """Write all of ``raw`` without moving the file position, which other threads use."""
    while raw:
        written = os.pwrite(stream.fileno(), raw[: 1 << 30], offset)  # Linux writes at most 2 GiB at once
        raw, offset = raw[written:], offset + written


def _sync(stream: BinaryIO) -> None:
    with stream:
        stream.flush()
        os.fsync(stream.fileno())


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
