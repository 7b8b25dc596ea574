"""Gradients by a live model's weights, each let go of as soon as it is there.

A live model computes without gradients. While gradients are wanted, its modules hold other parameters over the same
memory, which want them: of a layer that stands in several hops a parameter for each hop, so that each hop's gradient is
known by itself; of a tied embedding one, whose gradient is of both uses. Afterwards the model is as it was.
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
"""(the gradient by a tensor, in its shape and dtype) -> nothing. It must not be kept."""

Listening = Callable[[bool], AbstractContextManager[None]]
"""(whether layers are computed again) -> in which a backward pass hands over gradients."""


def nobody(recomputed: bool) -> AbstractContextManager[None]:
    """Listens to no weight's gradient."""
    return nullcontext()


@dataclass(frozen=True)
class _Scope:
    """Modules in which one parameter is one: all outside of the stack of layers, or those of a hop.

    Attributes:
        modules: these.
        tensors: of the merged model, by name, that are their parameters or parts of them.
    """

    modules: Sequence[nn.Module]
    tensors: Mapping[str, Tensor]


@contextmanager
def gradients(live: LiveModel, takes: Mapping[str, Take], *, recomputed: bool = False) -> Iterator[None]:
    """While open, a backward pass through the live model hands over the gradient by each of some of its tensors.

    Args:
        takes: by the tensor's name in the merged model. What is called for a tensor is called in the midst of the
            backward pass, once, with the whole gradient; not at all where the loss does not depend on the tensor.
        recomputed: keep no more of a layer's forward pass than what it was given, and compute the rest again when the
            backward pass comes to it.

    Raises:
        ValueError: a tensor is no parameter of the model, or none of its.
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
    """Put parameters that want gradients in the place of those with wanted tensors, until ``undo`` is closed."""
    parts: dict[int, list[str]] = {}  # the wanted tensors by where their memory begins
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
    """Give the gradient by a parameter to those who wait for the gradient by a part of it, and let go of it."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    gradient = gradient.contiguous()
    for part, take in views:
        begin = part.storage_offset() - parameter.storage_offset()
        take(gradient.as_strided(part.shape, part.stride(), begin))


def _again(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False, **named)
