"""Detects whether the weights that process pictures have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 20


def fingerprint(model: Any) -> str | None:
    """A hash of all weights that process pictures; None if adapters compute beside them.

    It consists of sums of the elements' bits and of their products with positions, modulo 2^64: fast on any device, and
    always different after a merge that changed a single element.
    """
    import torch

    text = {id(model.get_decoder()), id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    digest = hashlib.sha256()
    with torch.inference_mode():
        for name, module in _outside(model, text):
            if any(map(_is_foreign, module._forward_hooks.values())):
                return None
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for tensor_name, tensor in own:
                digest.update(f"{name}.{tensor_name} {tuple(tensor.shape)} {_bit_sums(tensor)}\n".encode())
    return digest.hexdigest()


def _is_foreign(hook: Any) -> bool:
    """Whether a hook may compute something: transformers has some that only collect outputs of modules."""
    return not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("transformers.")


def _outside(model: Any, text: set[int]) -> Iterator[tuple[str, Any]]:
    """Modules by name, except those of the text model."""
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        name, module = stack.pop()
        yield name, module
        stack += [(f"{name}.{child}", one) for child, one in module.named_children() if id(one) not in text]


def _bit_sums(tensor: Tensor) -> list[int]:
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for number, part in enumerate(torch.split(bits, _CHUNK)):
        values = part.long()
        places = torch.arange(1, len(values) + 1, device=bits.device) * 2 + number
        sums += torch.stack([values.sum(), (values * places).sum()])
    found: list[int] = sums.tolist()
    return found
