"""What routers and experts compute for tokens, beside the modules of a model.

This file imports torch and ``gates`` alone, and is copied into exported folders as it is, so that they compute what was
scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """

    router: Router
    gating: Gating
    bias: Tensor | None = None
    present: Tensor | None = None

    def gates(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and the gates of tokens, float32 [..., experts] each."""
        logits = self.router.logits(seen)
        return logits, gates_of(logits, self.gating, self.bias, self.present)


@dataclass(frozen=True)
class LowRankExperts:
    """The low-rank changes of one module, side by side: y = W0 x + sum_e g_e s_e B_e A_e x.

    Attributes:
        down: all A, [ranks, inputs], in the model's dtype.
        up: all B, [ranks, outputs].
        spread: float32 [experts, ranks], the scaling s_e at the ranks of expert e, and zeros elsewhere: what ranks are
            multiplied by is a product with it.
    """

    down: Tensor
    up: Tensor
    spread: Tensor

    def add(self, given: Tensor, gates: Tensor, output: Tensor) -> Tensor:
        """What the module gives, [..., outputs], and the experts' parts; in the memory of ``output``.

        Args:
            given: [..., inputs].
            gates: float32 [..., experts].
        """
        mixed = (F.linear(given, self.down) * (_own(gates, self.spread) @ self.spread)).to(self.up.dtype)
        flat = output.view(-1, output.shape[-1])
        return flat.addmm_(mixed.reshape(-1, mixed.shape[-1]), self.up).view(output.shape)


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
    module: nn.Module, form: str, experts: Callable[[], Experts], gates: Callable[[Tensor], Tensor]
) -> RemovableHandle:
    """Have a module give what it gives with experts.

    A batch comes as [rows, tokens, width], or with rows and tokens as one dimension.

    Args:
        form: "low_rank" changes of its weight, or vectors of its "inputs" or its "outputs".
        experts: asked for whenever the module is called.
        gates: of what routers look at there, or of a shape of it.
    """

    def after(called: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        own = experts()
        if isinstance(own, LowRankExperts):
            return own.add(given[0], gates(given[0]), output)
        return own.scaled(output, gates(output))

    def before(called: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        own = experts()
        assert isinstance(own, VectorExperts)
        return (own.scaled(given[0], gates(given[0])), *given[1:])

    return module.register_forward_pre_hook(before) if form == "inputs" else module.register_forward_hook(after)


def watch(module: nn.Module, is_output: bool, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Have what a module or block is given, or gives, taken whenever it is called."""
    if is_output:
        return module.register_forward_hook(lambda called, given, output: take(output))

    def before(called: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        take(given[0] if given else named["hidden_states"])

    return module.register_forward_pre_hook(before, with_kwargs=True)
