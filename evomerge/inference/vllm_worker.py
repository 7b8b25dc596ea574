"""Code that runs inside vLLM's own worker processes, one per device if the model is divided.

The live model's tensors are not sent: a worker is told where each one is, maps that memory, and lets vLLM's loader copy
its share of one after another. No device thus ever holds more of the model than its layers and its share.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterable, Sequence
from functools import cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # makes tensors pickle as references to their memory


class SharedWeights:
    """Additional methods of vLLM's workers (``worker_extension_cls``)."""

    rank: int
    reload_weights: Any
    get_model: Any

    def take_weights(self, messages: Sequence[bytes]) -> None:
        """Load the weights described by ``places_of``; a worker uses the message with its own index."""
        weights = pickle.loads(messages[self.rank])
        self.reload_weights(weights_iterator=iter(weights))
        repack_head(self.get_model())
        if torch.accelerator.is_available():  # finish before the other process writes the next candidate there
            torch.accelerator.synchronize()


def places_of(weights: Iterable[tuple[str, torch.Tensor]], workers: int) -> list[bytes]:
    """Where weights are, one message per worker, because device memory is reference-counted per recipient.

    On a CPU they are moved to shared memory the first time.
    """
    named = [(name, tensor.detach()) for name, tensor in weights]
    before = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    # By name, which any process can open.
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    try:
        return [bytes(ForkingPickler.dumps(named)) for _ in range(workers)]
    finally:
        torch.multiprocessing.set_sharing_strategy(before)  # type: ignore[no-untyped-call]


def repack_head(model: Any) -> None:
    """Let vLLM's head load its weights again.

    A tied head has no weights of its own, so vLLM's reload skips it. On a CPU it computes with a packed copy, which
    would remain that of the first candidate. Elsewhere, and for other heads, this changes nothing.
    """
    kind = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding").ParallelLMHead
    for module in model.modules():
        if isinstance(module, kind):
            module.quant_method.process_weights_after_loading(module)


@cache
def hide_from_scans() -> None:
    """Make llvmlite's library object report that it has no ``__dict__``, which is the case.

    It answers to any name with a function of that name. On a CPU, vLLM inspects the ``__dict__`` of everything in any
    module, and fails on that function.
    """
    from llvmlite.binding import ffi

    kind = type(ffi.lib)
    original = kind.__getattr__

    def only_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    kind.__getattr__ = only_functions


hide_from_scans()  # a worker's process imports this first
