"""Passes run on the CPU in pieces, on all cores.

A tensor is cut into pieces of half a million elements, which threads take one after another; the compiled passes
release the GIL. What a piece gives does not depend on where it begins, so neither does the result on the number of
threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.arithmetic.passes import Grain, Kernel, Pass, Span, call

PIECE = 1 << 19  # elements: 1 MB of bfloat16, some 50 microseconds of work
_STREAM_BYTES = 1 << 22  # from this size on a tensor is written past the caches: most of it would not stay there
_local = threading.local()
_setting_threads = threading.Lock()

Item = TypeVar("Item")
Made = TypeVar("Made")

Piece = tuple[int, int]
"""Elements ``begin`` to ``end`` - 1 of a flat tensor."""


class TensorJob:
    """The making of one tensor.

    Args:
        plan: what to do.
        tensors: what ``plan.inputs`` names: of one shape, contiguous, of any float dtypes, on the CPU.
        out: written to; contiguous, of that shape, of a float dtype, on the CPU.
    """

    def __init__(self, plan: Pass, tensors: Sequence[Tensor], out: Tensor) -> None:
        self._plan = plan
        self._shape = out.shape
        self._inputs = [tensor.view(-1) for tensor in tensors]
        self._out = out.view(-1)
        self._row = out.shape[-1] if out.shape else 1
        # Pairs must not straddle rows where rows matter.
        straddling = plan.grain != "element" and self._row % 2 == 1
        self._kernel = None if straddling else plan.kernel()
        self._stream = out.nbytes >= _STREAM_BYTES

    @property
    def pieces(self) -> Iterator[Piece]:
        """Pieces of even length but for the last, of whole rows where the pass needs them, or the whole tensor."""
        total = self._out.numel()
        if self._plan.grain == "tensor":
            return iter([(0, total)] if total else [])
        step = max(1, PIECE // self._row) * self._row if self._plan.grain == "row" and total else PIECE
        return ((begin, min(begin + step, total)) for begin in range(0, total, step))

    @torch.no_grad()
    def run(self, piece: Piece) -> None:
        """Make a piece. Different pieces may run at the same time in different threads."""
        begin, end = piece
        flat, out = [tensor[begin:end] for tensor in self._inputs], self._out[begin:end]
        if self._kernel is None:
            shaped = [in_grain(self._plan.grain, tensor, self._shape) for tensor in flat]
            out.copy_(self._plan.run(shaped, begin, call).reshape(-1))
            return
        even = len(out) // 2 * 2
        if even:
            self._compiled(self._kernel, [tensor[:even] for tensor in flat], out[:even], begin)
        if even < len(out):  # the last of an odd number, as half of a pair
            pair = torch.empty(2, dtype=out.dtype)
            self._compiled(self._kernel, [tensor[[even, even]] for tensor in flat], pair, begin + even)
            out[even:].copy_(pair[:1])

    def _compiled(self, kernel: Kernel, tensors: Sequence[Tensor], out: Tensor, begin: int) -> None:
        arrays = as_pairs(tensors)
        half = out.dtype is torch.float16  # has no compiled form of its own: computed as float32, cast by torch
        (target,) = (_scratch(-1, len(out)).numpy(),) if half else as_pairs([out])
        kernel(arrays, target, Span(begin, self._row, self._stream))
        if half:
            out.copy_(torch.from_numpy(target))


def in_grain(grain: Grain, piece: Tensor, shape: Sequence[int]) -> Tensor:
    """A flat piece of a tensor of ``shape`` in the shape in which a pass of this grain takes it."""
    if grain == "tensor":
        return piece.view(tuple(shape))
    return piece.view(-1, shape[-1] if shape else 1) if grain == "row" else piece


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


def _use_one_thread() -> None:
    """Have torch compute in this thread alone what is called from it, and as before what is called from others.

    Threads that each bring threads of their own wait for each other: a decomposition took a hundred times as long. And
    what a product of matrices gives in its last bit hangs on how many threads share it.
    """
    with _setting_threads:
        others = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of all threads that begin from now on
        restored = threading.Thread(target=torch.set_num_threads, args=(others,))
        restored.start()
        restored.join()


class WorkerThreads:
    """Threads that share work, as many as torch is set to use. In each of them torch itself uses that one alone."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge", initializer=_use_one_thread)
        self._lock, self._have_begun = threading.Lock(), False

    def each(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call ``work`` on every item, on whichever thread is free; raise the first exception when all have ended."""
        self._begin()
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

    def in_order(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """What ``work`` makes of every item, in the order of the items; no more of it waits than there are threads."""
        self._begin()
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(work, item))
                if len(waiting) > self._threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
            wait(waiting)

    def _begin(self) -> None:
        """Have every thread there: one that begins later changes for a moment what torch uses in other new ones."""
        with self._lock:
            if not self._have_begun:
                together = threading.Barrier(self._threads)
                for done in [self._pool.submit(together.wait) for _ in range(self._threads)]:
                    done.result()
                self._have_begun = True

    def run(self, jobs: Iterable[TensorJob]) -> None:
        """Make the tensors of all jobs."""
        self.each(lambda task: task[0].run(task[1]), ((job, piece) for job in jobs for piece in job.pieces))
