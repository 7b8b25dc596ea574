"""Several devices where there is one processor: tensors without values, which refuse to meet on different devices."""

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
"""As names of devices they stand apart from each other and from ``cpu``. Tensors with values that are put there are on
the processor, and are computed with as on a GPU: by the plain definitions of passes."""


class _Values(TorchFunctionMode):
    """Answers for tensors that have none, so that programs go on: zeros, and yes."""

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
    """Within, tensors have a device and a shape alone, and an operation on tensors of two devices raises."""
    zeros = mock.patch.object(FakeTensor, "tolist", lambda tensor: np.zeros(tensor.shape, dtype=int).tolist())
    with FakeTensorMode(allow_non_fake_inputs=True), _Values(), zeros:
        yield
