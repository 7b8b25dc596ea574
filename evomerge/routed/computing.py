"""The computation of routers and experts for tokens, beside the modules of a model.

This file imports only torch and ``gates``, and is copied unchanged into exported folders, so that they compute exactly
what was scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evomerge.routed.gates import Gating, gates_of


@dataclass(frozen=True)
class Router:
    """Computes the logits of experts for tokens.

    Attributes:
        kind: "linear", R x + b; "absolute", |R x|; "norm", the norm of each block of rows of R times x.
        weight: R, float32 [experts, width]; for a "norm" [experts, rows, width].
        bias: b, float32 [experts]; None if there is none.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, seen: Tensor) -> Tensor:
        """float32 [..., experts] for the router's input, [..., width]."""
        rows = self.weight.flatten(0, -2)
        found = F.linear(seen.float(), rows, self.bias)
        if self.kind == "absolute":
            return found.abs()
        if self.kind == "norm":
            found = torch.linalg.vector_norm(found.view(*found.shape[:-1], *self.weight.shape[:2]), dim=-1)
        return found


@dataclass(frozen=True)
class Routing:
    """A router and how its logits become gates.

    Attributes:
        bias, present: see ``gates_of``.
        routers: the number of routers with the same input that are combined here, with concatenated logits.
    """

    router: Router
    gating: Gating
    bias: Tensor | None = None
    present: Tensor | None = None
    routers: int = 1

    def gates(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and gates of tokens: float32 [..., experts] each; for several routers [..., routers, experts]."""
        logits = self.router.logits(seen)
        if self.routers > 1:
            logits = logits.view(*logits.shape[:-1], self.routers, -1)
        return logits, gates_of(logits, self.gating, self.bias, self.present)


@dataclass(frozen=True)
class LowRankExperts:
    """The concatenated low-rank changes of modules with the same input: y = W0 x + sum_e g_e s_e B_e A_e x.

    Attributes:
        down: all A of all modules, [ranks, inputs], in the model's dtype.
        ups: for each module all its B, [its ranks, outputs].
        spread: float32 [gates, ranks], the scaling s_e for the ranks controlled by the gate of expert e, and zeros
            elsewhere: multiplying gates by it gives the factors of the ranks. There is a gate for each expert; those of
            several routers are concatenated.
    """

    down: Tensor
    ups: tuple[Tensor, ...]
    spread: Tensor

    def mixed(self, given: Tensor, gates: Tensor) -> Sequence[Tensor]:
        """For each module, the input of its B: [..., its ranks].

        Args:
            given: [..., inputs].
            gates: float32 [..., experts]; for several routers [..., routers, experts].
        """
        if gates.dim() > given.dim():
            own = gates[..., : len(self.spread) // gates.shape[-2]].flatten(-2)
        else:
            own = _own(gates, self.spread)
        mixed = (F.linear(given, self.down) * (own @ self.spread)).to(self.down.dtype)
        return (mixed,) if len(self.ups) == 1 else torch.split(mixed, [len(up) for up in self.ups], -1)

    def add(self, mixed: Tensor, module: int, output: Tensor) -> Tensor:
        """A module's output, [..., outputs], plus its experts' parts; reuses the memory of ``output``."""
        flat = output.view(-1, output.shape[-1])
        return flat.addmm_(mixed.reshape(-1, mixed.shape[-1]), self.ups[module]).view(output.shape)


@dataclass(frozen=True)
class VectorExperts:
    """The (IA)3 vectors of one module: y = x (1 + sum_e g_e (l_e - 1)), element by element.

    For gates that sum to 1 this is x sum_e g_e l_e (MoV, arXiv 2309.05444, equation 2); without gates it is x.

    Attributes:
        deltas: l_e - 1, float32 [experts, width].
    """

    deltas: Tensor

    def scaled(self, values: Tensor, gates: Tensor) -> Tensor:
        """[..., width], in the dtype of ``values``.

        Args:
            values: [..., width].
            gates: float32 [..., experts], or [..., heads, experts], each for its part of the width.
        """
        gates = _own(gates, self.deltas)
        if gates.dim() == values.dim():
            return values * (1 + gates @ self.deltas).to(values.dtype)
        heads = gates.shape[-2]
        by_head = self.deltas.view(len(self.deltas), heads, -1).transpose(0, 1)  # [heads, experts, width of a head]
        factor = 1 + (gates.unsqueeze(-2) @ by_head).squeeze(-2)
        return (values.view(factor.shape) * factor.to(values.dtype)).flatten(-2)


def _own(gates: Tensor, experts: Tensor) -> Tensor:
    """The gates of experts without that of the base, if the base is one more expert: it changes nothing."""
    return gates if gates.shape[-1] == len(experts) else gates[..., : len(experts)]


Experts: TypeAlias = LowRankExperts | VectorExperts


def gate_experts(
    modules: Sequence[nn.Module], form: str, experts: Callable[[], Experts], gates: Callable[[Tensor], Tensor]
) -> list[RemovableHandle]:
    """Make modules add the contributions of experts to their outputs.

    A batch is [rows, tokens, width], or has rows and tokens as one dimension.

    Args:
        modules: modules with the same input; a single one for vectors.
        form: "low_rank" changes of its weight, or vectors of its "inputs" or its "outputs".
        experts: called whenever a module is called.
        gates: maps the routers' input, or a tensor with its shape, to gates.
    """

    def vectors() -> VectorExperts:
        own = experts()
        assert isinstance(own, VectorExperts)
        return own

    def before(called: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (vectors().scaled(given[0], gates(given[0])), *given[1:])

    if form == "low_rank":
        mixing = _Mixing(len(modules), experts, gates)
        return [module.register_forward_hook(partial(mixing.after, n)) for n, module in enumerate(modules)]
    (module,) = modules
    if form == "inputs":
        return [module.register_forward_pre_hook(before)]
    return [module.register_forward_hook(lambda called, given, output: vectors().scaled(output, gates(output)))]


class _Mixing:
    """Adds low-rank experts to modules' outputs; the first module computes for all what depends only on the input."""

    def __init__(self, count: int, experts: Callable[[], Experts], gates: Callable[[Tensor], Tensor]) -> None:
        self._count, self._experts, self._gates = count, experts, gates
        self._given: Tensor | None = None
        self._mixed: Sequence[Tensor] = ()

    def after(self, number: int, called: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        """The hook of a module."""
        own = self._experts()
        assert isinstance(own, LowRankExperts)
        if number == 0 or self._given is not given[0]:
            self._given, self._mixed = given[0], own.mixed(given[0], self._gates(given[0]))
        mixed = self._mixed[number]
        if number == self._count - 1:
            self._given, self._mixed = None, ()
        return own.add(mixed, number, output)


def watch(module: nn.Module, is_output: bool, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``take`` with the input or output of a module or block whenever it is called."""
    if is_output:
        return module.register_forward_hook(lambda called, given, output: take(output))

    def before(called: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        take(given[0] if given else named["hidden_states"])

    return module.register_forward_pre_hook(before, with_kwargs=True)
