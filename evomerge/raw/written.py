"""A candidate table on disk, which a search passes to evaluators in place of a live model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.checkpoints.headers import TORCH_DTYPES, read_header
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.inference.requests import Batch, Response
from evomerge.raw.merging import WEIGHTS

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class WrittenTable:
    """Takes the place of the model in a ``LiveModel``, but cannot be run.

    Attributes:
        path: its file of tensors, or its diffusers folder.
        dtype: the dtype of its first floating-point tensor.
    """

    path: Path
    dtype: torch.dtype


class NoAnswers:
    """The engine of a table, which cannot answer."""

    greedy_only = True

    def load(self, live: LiveModel) -> None:
        """Does nothing: it has no weights."""

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        """Raises InputError."""
        raise InputError("evaluator", "asks a model, and a table of tensors cannot answer", "Take `given: weights`.")


def written_table(folder: Path) -> LiveModel:
    """The table in a folder written by a search or an export.

    Raises:
        InputError: its header cannot be read.
    """
    single = folder / WEIGHTS
    path = single if single.is_file() else folder
    first = single if single.is_file() else min(folder.glob("*/*.safetensors"))
    stored = (TORCH_DTYPES.get(entry.dtype) for entry in read_header(first, str(folder)).values())
    table = WrittenTable(path, next((dtype for dtype in stored if dtype is not None), torch.float32))
    return LiveModel(table, None, engine=NoAnswers(), devices=(_CPU,))
