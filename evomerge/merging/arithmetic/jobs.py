"""How passes run on the CPU: in pieces, on all cores.

A tensor is cut into pieces of half a million elements, which threads take one after another; the compiled passes
release the GIL. The result of a piece does not depend on where the piece begins, so no result depends on the number of
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
_STREAM_BYTES = 1 << 22  # tensors of this size or more are written past the caches, which could not hold them anyway
_local = threading.local()
_setting_threads = threading.Lock()

Item = TypeVar("Item")
Made = TypeVar("Made")

Piece = tuple[int, int]
"""Elements ``begin`` to ``end`` - 1 of a flat tensor."""


class TensorJob:
    """Computes one tensor, piece by piece.

    Args:
        plan: the pass that makes it.
        tensors: what ``plan.inputs`` names: of one shape, contiguous, of any float dtypes, on the CPU.
        out: is written; contiguous, of the same shape and any float dtype, on the CPU.
    """

    def __init__(self, plan: Pass, tensors: Sequence[Tensor], out: Tensor) -> None:
        self._plan = plan
        self._shape = out.shape
        self._inputs = [tensor.view(-1) for tensor in tensors]
        self._out = out.view(-1)
        self._row = out.shape[-1] if out.shape else 1
        # If rows matter, no pair of elements may straddle two of them.
        straddling = plan.grain != "element" and self._row % 2 == 1
        self._kernel = None if straddling else plan.kernel()
        self._stream = out.nbytes >= _STREAM_BYTES

    @property
    def pieces(self) -> Iterator[Piece]:
        """Pieces of even length (except the last), of whole rows, or the whole tensor, as the pass needs them."""
        total = self._out.numel()
        if self._plan.grain == "tensor":
            return iter([(0, total)] if total else [])
        step = max(1, PIECE // self._row) * self._row if self._plan.grain == "row" and total else PIECE
        return ((begin, min(begin + step, total)) for begin in range(0, total, step))

    @torch.no_grad()
    def run(self, piece: Piece) -> None:
        """Compute a piece. Different pieces may run at the same time in different threads."""
        begin, end = piece
        flat, out = [tensor[begin:end] for tensor in self._inputs], self._out[begin:end]
        if self._kernel is None:
            shaped = [in_grain(self._plan.grain, tensor, self._shape) for tensor in flat]
            out.copy_(self._plan.run(shaped, begin, call).reshape(-1))
            return
        even = len(out) // 2 * 2
        if even:
            self._compiled(self._kernel, [tensor[:even] for tensor in flat], out[:even], begin)
        if even < len(out):  # the last of an odd number of elements, twice, as a pair
            pair = torch.empty(2, dtype=out.dtype)
            self._compiled(self._kernel, [tensor[[even, even]] for tensor in flat], pair, begin + even)
            out[even:].copy_(pair[:1])

    def _compiled(self, kernel: Kernel, tensors: Sequence[Tensor], out: Tensor, begin: int) -> None:
        arrays = as_pairs(tensors)
        half = out.dtype is torch.float16  # kernels cannot write it: computed in float32, cast by torch
        (target,) = (_scratch(-1, len(out)).numpy(),) if half else as_pairs([out])
        kernel(arrays, target, Span(begin, self._row, self._stream))
        if half:
            out.copy_(torch.from_numpy(target))


def in_grain(grain: Grain, piece: Tensor, shape: Sequence[int]) -> Tensor:
    """A flat piece of a tensor of ``shape``, in the shape that a pass of this grain expects (see ``Pass.run``)."""
    if grain == "tensor":
        return piece.view(tuple(shape))
    return piece.view(-1, shape[-1] if shape else 1) if grain == "row" else piece


def as_pairs(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Flat tensors of even length as arrays of pairs: uint32 [pairs] if all are bfloat16, else float32 [elements]."""
    if all(tensor.dtype is torch.bfloat16 for tensor in tensors):
        words = [tensor.view(torch.int16).numpy().view(np.uint32) for tensor in tensors]
        return tuple(array if array.flags.aligned else array.copy() for array in words)
    wide = [t if t.dtype is torch.float32 else _scratch(k, len(t)).copy_(t) for k, t in enumerate(tensors)]
    return tuple(tensor.numpy() for tensor in wide)


def _scratch(number: int, length: int) -> Tensor:
    """A float32 buffer of this thread, reused: allocating one would take longer than the computation in it."""
    buffers: dict[int, Tensor] = _local.__dict__.setdefault("buffers", {})
    if number not in buffers or len(buffers[number]) < length:
        buffers[number] = torch.empty(length, dtype=torch.float32)
    return buffers[number][:length]


def _use_one_thread() -> None:
    """Make torch use one thread for calls from the current thread, and as many as before for calls from others.

    Worker threads that each use several threads of torch wait for each other: a decomposition took a hundred times as
    long. And the last bits of a matrix product depend on the number of threads that share it.
    """
    with _setting_threads:
        others = torch.get_num_threads()
        torch.set_num_threads(1)  # for this thread, and all threads that start from now on
        restored = threading.Thread(target=torch.set_num_threads, args=(others,))
        restored.start()
        restored.join()


class WorkerThreads:
    """Threads that share work, by default as many as torch is set to use; in each of them torch uses only that one."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge", initializer=_use_one_thread)
        self._lock, self._have_begun = threading.Lock(), False

    def each(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call ``work`` on every item, in any order; if calls failed, raise the exception of one of them."""
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
        """The results of ``work`` on every item, in order; at most one result per thread waits to be consumed."""
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
        """Start all threads at once: each changes, for a moment, how many threads torch gives to other new ones."""
        with self._lock:
            if not self._have_begun:
                together = threading.Barrier(self._threads)
                for done in [self._pool.submit(together.wait) for _ in range(self._threads)]:
                    done.result()
                self._have_begun = True

    def run(self, jobs: Iterable[TensorJob]) -> None:
        """Compute the tensors of all jobs."""
        self.each(lambda task: task[0].run(task[1]), ((job, piece) for job in jobs for piece in job.pieces))
