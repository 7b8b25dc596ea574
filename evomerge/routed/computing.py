"""What routers and experts compute for tokens, beside the modules of a model.

This file imports torch and ``gates`` alone, and is copied into exported folders as it is, so that they compute what was
scored.
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
    """Gives the logits of experts for tokens.

    Attributes:
        kind: "linear", R x + b; "absolute", |R x|; "norm", the norm of each block of rows of R times x.
        weight: R, float32 [experts, width], of a "norm" [experts, rows, width].
        bias: b, float32 [experts]; None for none.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, seen: Tensor) -> Tensor:
        """float32 [..., experts] for what the router looks at, [..., width]."""
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
        routers: how many routers that see the same are one here, whose logits come one after another.
    """

    router: Router
    gating: Gating
    bias: Tensor | None = None
    present: Tensor | None = None
    routers: int = 1

    def gates(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and the gates of tokens: float32 [..., experts] each, of several [..., routers, experts]."""
        logits = self.router.logits(seen)
        if self.routers > 1:
            logits = logits.view(*logits.shape[:-1], self.routers, -1)
        return logits, gates_of(logits, self.gating, self.bias, self.present)


@dataclass(frozen=True)
class LowRankExperts:
    """The low-rank changes of modules that are given the same, side by side: y = W0 x + sum_e g_e s_e B_e A_e x.

    Attributes:
        down: all A of all modules, [ranks, inputs], in the model's dtype.
        ups: of each module all its B, [its ranks, outputs].
        spread: float32 [gates, ranks], the scaling s_e at the ranks that a gate of expert e lets through, and zeros
            elsewhere: what ranks are multiplied by is a product with it. There is a gate for each expert, of several
            routers one after another.
    """

    down: Tensor
    ups: tuple[Tensor, ...]
    spread: Tensor

    def mixed(self, given: Tensor, gates: Tensor) -> Sequence[Tensor]:
        """What of each module is to be multiplied by its B: [..., its ranks].

        Args:
            given: [..., inputs].
            gates: float32 [..., experts], of several routers [..., routers, experts].
        """
        if gates.dim() > given.dim():
            own = gates[..., : len(self.spread) // gates.shape[-2]].flatten(-2)
        else:
            own = _own(gates, self.spread)
        mixed = (F.linear(given, self.down) * (own @ self.spread)).to(self.down.dtype)
        return (mixed,) if len(self.ups) == 1 else torch.split(mixed, [len(up) for up in self.ups], -1)

    def add(self, mixed: Tensor, module: int, output: Tensor) -> Tensor:
        """What a module gives, [..., outputs], and its experts' parts; in the memory of ``output``."""
        flat = output.view(-1, output.shape[-1])
        return flat.addmm_(mixed.reshape(-1, mixed.shape[-1]), self.ups[module]).view(output.shape)


@dataclass(frozen=True)
class VectorExperts:
    """The (IA)3 vectors of one module: y = x (1 + sum_e g_e (l_e - 1)), element by element.

    Of gates that sum to 1 that is x sum_e g_e l_e (MoV, arXiv 2309.05444, equation 2); of none it is x.

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
    """The gates of experts without that of the base, where it is one more: it changes nothing."""
    return gates if gates.shape[-1] == len(experts) else gates[..., : len(experts)]


Experts: TypeAlias = LowRankExperts | VectorExperts


def gate_experts(
    modules: Sequence[nn.Module], form: str, experts: Callable[[], Experts], gates: Callable[[Tensor], Tensor]
) -> list[RemovableHandle]:
    """Have modules give what they give with experts.

    A batch comes as [rows, tokens, width], or with rows and tokens as one dimension.

    Args:
        modules: that are given the same; with vectors it is one.
        form: "low_rank" changes of its weight, or vectors of its "inputs" or its "outputs".
        experts: asked for whenever a module is called.
        gates: of what routers look at there, or of a shape of it.
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
    """Adds low-rank experts to what modules give; the first of them computes what is of the input alone for all."""

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
    """Have what a module or block is given, or gives, taken whenever it is called."""
    if is_output:
        return module.register_forward_hook(lambda called, given, output: take(output))

    def before(called: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        take(given[0] if given else named["hidden_states"])

    return module.register_forward_pre_hook(before, with_kwargs=True)
