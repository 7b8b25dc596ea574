"""Passes run on the CPU in pieces, on all cores.

A tensor is cut into pieces of half a million elements, which threads take one after another; the compiled passes
release the GIL. What a piece gives does not depend on where it begins, so neither does the result on the number of
threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.merging import kernels
from evomerge.merging.drops import limit
from evomerge.merging.passes import Combine, Elementwise, Pass, Select, Sparsify, by_rows

PIECE = 1 << 19  # elements: 1 MB of bfloat16, some 50 microseconds of work
_STREAM_BYTES = 1 << 22  # from this size on a tensor is written past the caches: most of it would not stay there
_local = threading.local()

Piece = tuple[int, int]
"""Elements ``begin`` to ``end`` - 1 of a flat tensor."""


class Job:
    """The making of one tensor.

    Args:
        plan: what to do.
        tensors: what ``plan.inputs`` names: of one shape, contiguous, of any float dtypes, on the CPU.
        out: written to; contiguous, of that shape, of a float dtype, on the CPU.
    """

    def __init__(self, plan: Pass, tensors: Sequence[Tensor], out: Tensor) -> None:
        self._plan = plan
        self._inputs = [tensor.view(-1) for tensor in tensors]
        self._out = out.view(-1)
        self._row = out.shape[-1] if out.shape else 1
        # Pairs must not straddle rows where rows matter.
        self._plain = isinstance(plan, Elementwise) or (by_rows(plan) and self._row % 2 == 1)
        self._stream = out.nbytes >= _STREAM_BYTES
        self._arguments = () if self._plain else _arguments(plan)

    @property
    def pieces(self) -> Iterator[Piece]:
        """Pieces of even length but for the last, or of whole rows where the pass needs them."""
        total = self._out.numel()
        step = max(1, PIECE // self._row) * self._row if by_rows(self._plan) and total else PIECE
        return ((begin, min(begin + step, total)) for begin in range(0, total, step))

    @torch.no_grad()
    def run(self, piece: Piece) -> None:
        """Make a piece. Different pieces may run at the same time in different threads."""
        begin, end = piece
        flat, out = [tensor[begin:end] for tensor in self._inputs], self._out[begin:end]
        if self._plain:
            out.copy_(self._plan.run([tensor.view(-1, self._row) for tensor in flat], begin).view(-1))
            return
        even = len(out) // 2 * 2
        if even:
            self._compiled([tensor[:even] for tensor in flat], out[:even], begin)
        if even < len(out):  # the last of an odd number, as half of a pair
            pair = torch.empty(2, dtype=out.dtype)
            self._compiled([tensor[[even, even]] for tensor in flat], pair, begin + even)
            out[even:].copy_(pair[:1])

    def _compiled(self, tensors: Sequence[Tensor], out: Tensor, begin: int) -> None:
        arrays = as_pairs(tensors)
        half = out.dtype is torch.float16  # has no compiled form of its own: computed as float32, cast by torch
        (target,) = (_scratch(-1, len(out)).numpy(),) if half else as_pairs([out])
        if isinstance(self._plan, Combine):
            kernels.combine(arrays, *self._arguments, target, self._stream)
        elif isinstance(self._plan, Select):
            kernels.select(arrays[0], arrays[1:], *self._arguments, target, self._stream)
        else:
            row, first = np.uint64(max(self._row // 2, 1)), np.uint64(begin // 2)
            kernels.sparsify(arrays[0], arrays[1:], *self._arguments, first, row, target, self._stream)
        if half:
            out.copy_(torch.from_numpy(target))


def _arguments(plan: Pass) -> tuple[Any, ...]:
    """What a compiled pass takes beside arrays and places, as the types that it is compiled for."""
    if isinstance(plan, Combine):
        return (tuple(np.float32(plan.coefficients[name]) for name in plan.inputs),)
    if isinstance(plan, Select):
        return tuple(np.float32(share) for share in plan.shares.values()), np.float32(plan.least)
    assert isinstance(plan, Sparsify)
    parts = plan.parts
    drawn, meeting = parts[0].key is not None, parts[0].rise is not None
    windowed = not drawn and any(part.high < math.inf for part in parts)
    return (
        tuple(np.float32(part.weight) for part in parts),
        tuple(np.float32(part.low) for part in parts),
        tuple(np.float32(part.high) for part in parts) if windowed else None,
        tuple((np.uint32(k), np.uint32(m)) for k, m in (part.key or (0, 0) for part in parts)) if drawn else None,
        tuple(np.int32(limit(part.levels)) for part in parts),
        tuple(np.int32(part.rise or 0) for part in parts) if meeting else None,
        tuple(np.float32(part.share) for part in parts) if plan.divide else None,
        True if plan.elect else None,
        np.float32(plan.scale),
    )


def as_pairs(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Flat tensors of even length as arrays of pairs of one dtype: words where all are bfloat16, else float32."""
    if all(tensor.dtype is torch.bfloat16 for tensor in tensors):
        words = [tensor.view(torch.int16).numpy().view(np.uint32) for tensor in tensors]
        return tuple(array if array.flags.aligned else array.copy() for array in words)
    wide = [t if t.dtype is torch.float32 else _scratch(k, len(t)).copy_(t) for k, t in enumerate(tensors)]
    return tuple(tensor.numpy() for tensor in wide)


def _scratch(number: int, length: int) -> Tensor:
    """A float32 buffer of this thread, kept: fresh memory would cost more than what is computed in it."""
    buffers: dict[int, Tensor] = _local.__dict__.setdefault("buffers", {})
    if number not in buffers or len(buffers[number]) < length:
        buffers[number] = torch.empty(length, dtype=torch.float32)
    return buffers[number][:length]


class Crew:
    """Threads that share work, as many as torch is set to use."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge")

    def each(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call ``work`` on every item, on whichever thread is free; raise the first exception when all have ended."""
        waiting, lock = iter(items), threading.Lock()

        def serve() -> None:
            while True:
                with lock:
                    item = next(waiting, lock)
                if item is lock:
                    return
                work(item)

        for done in [self._pool.submit(serve) for _ in range(self._threads)]:
            done.result()

    def run(self, jobs: Iterable[Job]) -> None:
        """Make the tensors of all jobs."""
        self.each(lambda task: task[0].run(task[1]), ((job, piece) for job in jobs for piece in job.pieces))
