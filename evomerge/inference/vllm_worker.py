"""What runs inside vLLM's own worker processes, of which there are as many as devices where it divides a model.

The live model's tensors are not sent: a worker is told where each lies, maps that memory, and has vLLM's loader copy
its share of one after the other. So no device ever holds more of the model than its layers and its share.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterable, Sequence
from functools import cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # which has tensors pickled as the places where they lie


class SharedWeights:
    """What vLLM's worker can do beside its own (``worker_extension_cls``)."""

    rank: int
    reload_weights: Any
    get_model: Any

    def take_weights(self, messages: Sequence[bytes]) -> None:
        """Load the weights that ``places_of`` has written down; the message with this worker's number is its own."""
        weights = pickle.loads(messages[self.rank])
        self.reload_weights(weights_iterator=iter(weights))
        repack_head(self.get_model())
        if torch.accelerator.is_available():  # before the other process writes the next candidate there
            torch.accelerator.synchronize()


def places_of(weights: Iterable[tuple[str, torch.Tensor]], workers: int) -> list[bytes]:
    """Where weights lie, a message for each worker: memory of a device is counted by who was told of it.

    On a CPU they are moved to memory that processes share, the first time.
    """
    named = [(name, tensor.detach()) for name, tensor in weights]
    before = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    # By a name, which any process may open.
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    try:
        return [bytes(ForkingPickler.dumps(named)) for _ in range(workers)]
    finally:
        torch.multiprocessing.set_sharing_strategy(before)  # type: ignore[no-untyped-call]


def repack_head(model: Any) -> None:
    """Have vLLM's head take its weights again.

    A head that is the embedding gets no weights of its own, so vLLM's reload passes it by. On a CPU it computes with a
    packed copy, which would stay the one of the first candidate. Elsewhere, and for other heads, this changes nothing.
    """
    kind = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding").ParallelLMHead
    for module in model.modules():
        if isinstance(module, kind):
            module.quant_method.process_weights_after_loading(module)


@cache
def hide_from_scans() -> None:
    """Have llvmlite's library object answer that it has no ``__dict__``, as is the case.

    It answers to any name with a function of that name. On a CPU, vLLM looks into the ``__dict__`` of everything that
    any module holds, and falls over that function.
    """
    from llvmlite.binding import ffi

    kind = type(ffi.lib)
    original = kind.__getattr__

    def only_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    kind.__getattr__ = only_functions


hide_from_scans()  # before a worker's process, which imports this first, looks
