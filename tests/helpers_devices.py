"""Several devices on one processor: tensors without values, which cannot be combined across devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

FIRST, SECOND, THIRD = (torch.device("cpu", number) for number in (1, 2, 3))
"""Devices that differ from each other and from ``cpu``. Tensors with values there are on the processor, and are
computed as on a GPU: with the plain definitions of passes."""


class _Values(TorchFunctionMode):
    """Values for tensors without any, so that programs continue: zero for numbers, and True for conditions."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (torch.Tensor.__bool__, torch.Tensor.item):
            return True
        device = given.pop("device", None) if func is torch.tensor else None
        made = func(*args, **given)
        return (
            made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)
        )  # `tensor` forgets the number


@contextmanager
def without_values() -> Iterator[None]:
    """A context in which tensors have only a device and a shape, and operations on tensors of two devices raise."""
    zeros = mock.patch.object(FakeTensor, "tolist", lambda tensor: np.zeros(tensor.shape, dtype=int).tolist())
    with FakeTensorMode(allow_non_fake_inputs=True), _Values(), zeros:
        yield
