"""Memory for large tensors that are made for a moment, used again when they are gone.

A merge folds adapters into hundreds of tensors for every candidate. Memory that is fresh each time costs more than what
is computed in it, and what the allocator gets back it cuts up for small things that stay, so that a process grows to
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
"""Bytes of a buffer up to which it is kept: what is larger (an embedding) goes back to the system."""


class Buffers:
    """Lends memory, and takes it back when no tensor lies in it any more.

    It keeps no more buffers than were lent at one time. Threads may borrow at the same time.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """A tensor whose values are whatever is there: float32, contiguous, on the CPU."""
        count = math.prod(shape)
        buffer = self._take(count)
        lent = buffer[:count]  # lives as long as the tensor's storage, which all views of it share
        if buffer.nbytes <= _MAX_KEPT:
            weakref.finalize(lent, self._free.append, buffer).atexit = False
        return torch.from_numpy(lent).view(tuple(shape))

    def _take(self, count: int) -> NDArray[Any]:
        with self._lock:  # buffers may come back meanwhile, but nobody else takes one
            fitting = [k for k in range(len(self._free)) if len(self._free[k]) >= count]
            if fitting:
                return self._free.pop(min(fitting, key=lambda k: len(self._free[k])))
            if self._free:  # all are too small: a larger one takes the place of one
                self._free.pop()
        # By torch, whose memory begins at a multiple of a vector's width: by where a matrix begins, products may round.
        return np.asarray(torch.empty(count, dtype=torch.float32).numpy())
