"""Partial forward passes: from one layer, given its hidden state, up to another.

A pass still runs the model's own code, with its masks and positions, so nothing needs to be known about how an
architecture calls its layers. Layers before the stretch return their input, and the hidden state is inserted at its
first layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn


class PassEndsError(Exception):
    """Ends a forward pass after the last layer that is needed."""


class Stretches:
    """Runs stretches of the layers of one model.

    Args:
        model: called with token ids.
        layers: its stack; each module takes the hidden state as its first argument and returns it, alone or as the
            first of several outputs.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module]) -> None:
        self._model = model
        self._layers = layers
        self._others: dict[int, tuple[Any, ...] | None] = {}

    def run(self, text: Tensor, begin: int, hidden: Tensor | None) -> None:
        """Run the layers from ``begin`` on, and everything after them.

        Args:
            text: int64 [1, tokens].
            begin: a layer that another pass has reached.
            hidden: [1, tokens, width], that layer's input; None to run all layers.

        Raises:
            PassEndsError: raised by a hook.
        """
        with ExitStack() as changed:
            for number in range(begin if hidden is not None else 0):
                changed.enter_context(_passed_over(self._layers[number], self._others[number]))
            if hidden is not None:
                changed.enter_context(_given(self._layers[begin], hidden))
            self._model(text, use_cache=False)

    def reach(self, text: Tensor, begin: int, hidden: Tensor | None, end: int) -> Tensor:
        """The input of layer ``end``, [1, tokens, width]; other arguments as for ``run``."""
        reached: list[Tensor] = []

        def stop(module: Any, given: Any, named: Any) -> None:
            reached.append(given[0] if given else named["hidden_states"])
            raise PassEndsError

        hooks = [self._layers[end].register_forward_pre_hook(stop, with_kwargs=True)]
        for number in range(begin, end):
            hooks.append(self._layers[number].register_forward_hook(partial(self._note, number)))
        try:
            with suppress(PassEndsError):
                self.run(text, begin, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return reached[0]

    def _note(self, number: int, module: Any, given: Any, out: Any) -> None:
        """Remember a layer's outputs other than the hidden state, which it returns when it is skipped."""
        self._others[number] = tuple(out[1:]) if isinstance(out, tuple) else None


@contextmanager
def _passed_over(layer: nn.Module, others: tuple[Any, ...] | None) -> Iterator[None]:
    """Within the context, a layer returns the hidden state that it is given."""

    def forward(*given: Any, **named: Any) -> Any:
        hidden = given[0] if given else named["hidden_states"]
        return hidden if others is None else (hidden, *others)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def _given(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within the context, a layer's input is replaced by this hidden state, moved to the device of its own input."""

    def put(module: Any, given: Any, named: Any) -> Any:
        if given:
            return (hidden.to(given[0].device), *given[1:]), named
        return given, {**named, "hidden_states": hidden.to(named["hidden_states"].device)}

    hook = layer.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
