"""Memory for large temporary tensors, reused once they are gone.

A merge folds adapters into hundreds of tensors for every candidate. Newly allocated memory costs more than the
computation itself, and the allocator splits returned memory for small, long-lived objects, so that a process grows to
several times what it holds.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_MAX_KEPT = 1 << 28
"""Buffers up to this many bytes are kept; larger ones (an embedding) are returned to the system."""


class Buffers:
    """Lends memory, and takes it back when no tensor uses it any more.

    It keeps no more buffers than were in use at one time. Threads may borrow concurrently.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """An uninitialised tensor: float32, contiguous, on the CPU."""
        count = math.prod(shape)
        buffer = self._take(count)
        lent = buffer[:count]  # lives as long as the tensor's storage, which all of its views share
        if buffer.nbytes <= _MAX_KEPT:
            weakref.finalize(lent, self._free.append, buffer).atexit = False
        return torch.from_numpy(lent).view(tuple(shape))

    def _take(self, count: int) -> NDArray[Any]:
        with self._lock:  # buffers may be returned meanwhile, but nobody else takes one
            fitting = [k for k in range(len(self._free)) if len(self._free[k]) >= count]
            if fitting:
                return self._free.pop(min(fitting, key=lambda k: len(self._free[k])))
            if self._free:  # all are too small: replace one by a larger one
                self._free.pop()
        # Allocated by torch, which aligns memory to vectors: the rounding of products may depend on the alignment.
        return np.asarray(torch.empty(count, dtype=torch.float32).numpy())
