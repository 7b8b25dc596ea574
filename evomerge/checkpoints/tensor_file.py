"""Writes a safetensors file from tensors that arrive one at a time, with sizes unknown in advance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from evomerge.checkpoints.headers import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TensorFile:
    """Writes tensors to a file without holding them in memory: the header, which comes first, is added at the end.

    ``with TensorFile(path) as file:`` then ``file.add(name, tensor)``; the file exists once the block is left. Tensors
    in wide dtypes must come first, so that all are aligned.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = path.with_name(path.name + ".unfinished")
        self._entries: dict[str, dict[str, object]] = {}
        self._end = 0

    def __enter__(self) -> Self:
        self._stream = self._waiting.open("xb")
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor.

        Raises:
            KeyError: there is already one with that name.
            OSError: for example, the disk is full.
        """
        flat = tensor.detach().contiguous().reshape(-1)
        self.add_bytes(name, flat.view(torch.uint8), _NAMES[tensor.dtype], tensor.shape)

    def add_bytes(self, name: str, raw: torch.Tensor, dtype: str, shape: Sequence[int]) -> None:
        """Write a tensor of any dtype of the format, with the bytes that it has in another file.

        Args:
            raw: its bytes, uint8.
            dtype: its name in the format.
        """
        if name in self._entries:
            raise KeyError(name)
        self._stream.write(raw.numpy().data)
        end = self._end + raw.nbytes
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._end, end]}
        self._end = end

    @property
    def size(self) -> int:
        """Bytes of tensors written so far."""
        return self._end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
        if error is None:
            text = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # aligns the tensors
            with self._path.open("xb") as whole, self._waiting.open("rb") as tensors:
                whole.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(tensors, whole, 1 << 24)
        self._waiting.unlink()
