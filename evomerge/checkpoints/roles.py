"""Tensor roles, found from the model's own structure rather than from a list of names."""

from __future__ import annotations

from typing import Any

from torch import nn

from evomerge.checkpoints.structure import decoder_of, layer_stack, stored_tensors
from evomerge.recipes.stack import Role, RoleKind


def model_roles(model: Any, layers: int) -> dict[str, Role]:
    """The role of every tensor that a model stores, by its name in the model, from modules and names alone.

    Raises:
        LookupError: the model has no stack of ``layers`` layers.
    """
    stack_name, stack = layer_stack(model, layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    text = {*decoder_of(model).modules(), *([] if head is None else head.modules())}
    roles = {}
    for name in stored_tensors(model):
        if name.startswith(stack_name + "."):
            index, _, rest = name.removeprefix(stack_name + ".").partition(".")
            roles[name] = Role(inside_layer(stack[int(index)], rest), int(index))
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            roles[name] = Role(_outside_stack(owner, embedding, head) if owner in text else "vision")
    return roles


def inside_layer(layer: nn.Module, rest: str) -> RoleKind:
    """The kind of a tensor by its name inside a layer."""
    module = getattr(layer, rest.partition(".")[0])
    if not isinstance(module, nn.Module):
        return "mlp"  # a parameter of the layer itself, such as a scale
    kind = type(module).__name__
    if "Attention" in kind or hasattr(module, "layer_idx"):  # modules with a layer_idx use the cache
        return "attention"
    if "Norm" in kind and all(p.ndim == 1 for p in module.parameters()):
        return "norm"
    return "mlp"


def _outside_stack(owner: nn.Module, embedding: nn.Module, head: nn.Module | None) -> RoleKind:
    if owner is embedding or "Embedding" in type(owner).__name__:  # also embeddings of positions
        return "embedding"
    return "head" if owner is head else "norm"
