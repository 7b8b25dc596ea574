"""Headers of safetensors files, read and checked without reading any tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes, the header's length n as a little-endian unsigned
integer; n bytes of JSON that gives each tensor's dtype, shape and byte range; then the tensors' bytes, without gaps or
overlaps.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from evomerge.errors import InputError
from evomerge.files import open_file, parse_json
from evomerge.printable import printable

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own cap
_MAX_SIZES = 64  # dimensions of a shape, as in torch
_MAX_SIZE = 2**63 - 1
_MAX_NAME = 1_000  # characters

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""The dtypes that can be merged, by their names in safetensors."""

STORED_DTYPES = {**TORCH_DTYPES, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""The above, and the dtypes of tensors that can be copied unchanged."""


_mapped: WeakValueDictionary[tuple[int, ...], torch.Tensor] = WeakValueDictionary()
"""Files that are currently mapped, by device, inode, size and modification time."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The location of a tensor: bytes ``begin`` to ``end`` of ``file``, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def map_file(file: Path) -> torch.Tensor:
    """All bytes of a file as uint8, memory-mapped: pages are read when accessed, and shared between processes.

    A file is mapped only once while it is in use, so a model under several adapters counts once as process memory.

    Raises:
        InputError: it is larger than the address space available to this process.
    """
    about = file.stat()
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if (mapped := _mapped.get(key)) is None:
        try:
            mapped = torch.from_file(str(file), shared=False, size=about.st_size, dtype=torch.uint8)
        except RuntimeError:
            problem = f"its {about.st_size:,} bytes cannot be mapped into memory"
            raise InputError(str(file), problem, "Raise the limit of this process's memory (ulimit -v).") from None
        _mapped[key] = mapped
    return mapped


def view_entry(entry: TensorEntry, mapped: torch.Tensor) -> torch.Tensor:
    """The tensor of an entry inside its mapped file. Only for ``STORED_DTYPES``; it must never be written to."""
    raw, dtype = mapped[entry.begin : entry.end], STORED_DTYPES[entry.dtype]
    if entry.begin % dtype.itemsize:  # the format does not require alignment, though its own writer provides it
        raw = raw.clone()
    return raw.view(dtype).view(entry.shape)


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def release_pages(mapped: torch.Tensor, begin: int, end: int) -> None:
    """Drop bytes ``begin`` to ``end`` of a mapped file from this process's memory; they stay in the page cache.

    Mapped pages count as memory of the process until the system reclaims them, so a merge of a large model would seem
    to hold all of its sources in memory. They are read again when accessed.
    """
    begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        _madvise(mapped.data_ptr() + begin, end - begin, mmap.MADV_DONTNEED)


def read_header(file: Path, place: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        InputError: the file is not a safetensors file, is truncated, or its header contradicts itself or the file size.
    """

    def refuse(problem: str, hint: str = "") -> InputError:
        return InputError(place, f"{file.name} {problem}", hint)

    with open_file(file, place) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(128)
        length = int.from_bytes(start[:8], "little")
        # Any length may look like the start of another format, so other formats are considered only if it is invalid.
        if (start[8:9] != b"{" or not 2 <= length <= MAX_HEADER_BYTES) and (problem := _other_format(start, size)):
            raise refuse(problem, "Download the file again.")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise refuse(f"claims a header of {length:,} bytes: it is not a safetensors file", "Download it again.")
        if 8 + length > size:
            raise refuse(f"is cut short: {size:,} bytes, with a header of {length:,}", "Download it again.")
        stream.seek(8)
        text = stream.read(length)
    try:
        header = parse_json(text, unique=True)
    except ValueError as error:
        raise refuse(f"has a header that cannot be read ({error})", "Download it again.") from None
    if not isinstance(header, dict):
        raise refuse("has a header that is not a JSON object", "Download it again.")
    header.pop("__metadata__", None)
    entries = []
    for name, fields in header.items():
        if len(name) > _MAX_NAME:
            raise refuse(f"has a tensor whose name has {len(name):,} characters", "Do not use this file.")
        entry = _entry(fields, file, 8 + length)
        if isinstance(entry, str):
            raise refuse(f"has a header that lies about {name!r}: {entry}", "Do not use this file.")
        entries.append((entry.begin, entry.end, name, entry))
    entries.sort(key=lambda item: item[:2])
    position = 8 + length
    for begin, end, name, _ in entries:
        if begin != position:
            fault = "overlaps another tensor" if begin < position else "leaves a hole before it"
            raise refuse(f"has a header that lies about {name!r}: it {fault}", "Do not use this file.")
        position = end
    if position > size:
        raise refuse(f"is cut short: {size:,} bytes instead of {position:,}", "Download it again.")
    if position < size:
        raise refuse(f"has {size - position:,} bytes behind its last tensor", "Do not use this file.")
    return {name: entry for _, _, name, entry in entries}


def _other_format(start: bytes, size: int) -> str:
    """The format of a file that cannot be safetensors; empty if unknown."""
    if size < 10:
        return "is empty" if size == 0 else f"is cut short: {size} bytes"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: the download is incomplete"
    if start.lstrip().startswith(b"<"):
        return "is a web page, not the weights: the download failed"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a pickled PyTorch file under another name"
    return ""


def _entry(fields: Any, file: Path, data_start: int) -> TensorEntry | str:
    """One tensor of a header, or a description of what is wrong with it."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return "it needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"unknown dtype {dtype!r}"
    if not _whole_numbers(shape, _MAX_SIZES):
        return f"shape {_short(shape)}"
    if not _whole_numbers(offsets, 2) or len(offsets) != 2:
        return f"data_offsets {_short(offsets)}"
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        return f"shape {shape} of {dtype} does not fill {offsets[1] - offsets[0]:,} bytes"
    return TensorEntry(dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(values: Any, most: int) -> bool:
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and 0 <= value <= _MAX_SIZE for value in values)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > _MAX_SIZES:
        return f"of {len(value):,} numbers"
    return printable(repr(value), 100)
