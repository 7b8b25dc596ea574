"""Gradients with respect to a live model's weights, each freed as soon as it has been used.

A live model computes without gradients. While gradients are wanted, its modules temporarily hold other parameters over
the same memory, which require gradients: for a layer used in several hops, one parameter per hop, so that each hop's
gradient is known separately; for a tied embedding a single one, whose gradient covers both uses. Afterwards the model
is as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evomerge.checkpoints.live import LiveModel

Take = Callable[[Tensor], None]
"""(the gradient of a tensor, in its shape and dtype) -> nothing. The gradient must not be kept."""

Listening = Callable[[bool], AbstractContextManager[None]]
"""(whether layers are recomputed) -> a context in which a backward pass delivers gradients."""


def no_listener(recomputed: bool) -> AbstractContextManager[None]:
    """Receives no gradients."""
    return nullcontext()


@dataclass(frozen=True)
class _Scope:
    """A scope in which parameters are not shared with others: all modules outside the stack of layers, or one hop.

    Attributes:
        modules: its modules.
        tensors: the tensors of the merged model, by name, that are their parameters or parts of them.
    """

    modules: Sequence[nn.Module]
    tensors: Mapping[str, Tensor]


@contextmanager
def gradients(live: LiveModel, takes: Mapping[str, Take], *, recomputed: bool = False) -> Iterator[None]:
    """Within the context, a backward pass through the live model delivers the gradients of some of its tensors.

    Args:
        takes: by the tensor's name in the merged model. The function for a tensor is called during the backward pass,
            once, with the full gradient; not at all if the loss does not depend on the tensor.
        recomputed: keep only the input of each layer during the forward pass, and recompute the rest when the backward
            pass reaches it.

    Raises:
        ValueError: a tensor is not a parameter of the model, or not part of one.
    """
    if live.stack is None:
        raise ValueError("a model that is never written to has no merged tensors")
    left = set(takes)
    with ExitStack() as undo:
        for scope in _scopes(live):
            wanted = {name: tensor for name, tensor in scope.tensors.items() if name in takes}
            left -= set(wanted)
            _replace(scope.modules, wanted, takes, undo)
        if left:
            raise ValueError(f"the model has no tensor {min(left)} by which there could be a gradient")
        for hop in live.stack.hops if recomputed else ():
            hop.forward = partial(_again, hop.forward)
            undo.callback(hop.__dict__.pop, "forward")
        yield


def _scopes(live: LiveModel) -> Iterator[_Scope]:
    assert live.stack is not None
    hops = [list(hop.modules()) for hop in live.stack.hops]
    within = {id(module) for hop in hops for module in hop}
    yield _Scope([module for module in live.model.modules() if id(module) not in within], live.outside)
    for number, (step, modules) in enumerate(zip(live.stack.path, hops, strict=True)):
        yield _Scope(modules, dict(live.stack.tensors_of(number, step)))


def _replace(
    modules: Sequence[nn.Module], wanted: Mapping[str, Tensor], takes: Mapping[str, Take], undo: ExitStack
) -> None:
    """Replace the parameters of wanted tensors by ones that require gradients, until ``undo`` is closed."""
    parts: dict[int, list[str]] = {}  # the wanted tensors by memory address
    for name, tensor in wanted.items():
        parts.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    replaced: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None or (storage := parameter.untyped_storage().data_ptr()) not in parts:
                continue
            if id(parameter) not in replaced:
                other = nn.Parameter(parameter.detach())
                views = [(wanted[part], takes[part]) for part in parts[storage]]
                other.register_post_accumulate_grad_hook(partial(_hand_over, views))  # type: ignore[no-untyped-call]
                replaced[id(parameter)] = other
            undo.callback(module._parameters.__setitem__, name, parameter)
            module._parameters[name] = replaced[id(parameter)]
    found = {parameter.untyped_storage().data_ptr() for parameter in replaced.values()}
    if missing := [names[0] for storage, names in parts.items() if storage not in found]:
        raise ValueError(f"{missing[0]} is no parameter of the model")


def _hand_over(views: Sequence[tuple[Tensor, Take]], parameter: Tensor) -> None:
    """Pass the gradient of a parameter to the receivers of its parts, and free it."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    gradient = gradient.contiguous()
    for part, take in views:
        begin = part.storage_offset() - parameter.storage_offset()
        take(gradient.as_strided(part.shape, part.stride(), begin))


def _again(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False, **named)
