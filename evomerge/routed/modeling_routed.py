"""A causal language model whose adapters are gated for every token, to be loaded with `trust_remote_code=True`.

Evomerge wrote this file beside a model, substituting the classes of that model in the imports below. The files
`gates.py` and `computing.py` beside it are those with which its candidates were scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as Base

from evomerge.routed.computing import (
    Experts,
    LowRankExperts,
    Router,
    Routing,
    VectorExperts,
    gate_experts,
    watch,
)
from evomerge.routed.gates import Gating


class RoutedConfig(BaseConfig):  # type: ignore[misc]
    """The configuration of the base model, with `routed`: places of routers and sites of experts."""

    model_type = "evomerge_routed"


class RouterNumbers(nn.Module):
    """The numbers of one place's router, which stay in float32 whatever the model's dtype."""

    def __init__(self, place: dict[str, Any]) -> None:
        super().__init__()
        self._place = place
        self.gating = Gating(**place["gating"])
        for name, shape in place["shapes"].items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32))

    def routing(self) -> Routing:
        """The router with its numbers on their current device."""
        router = Router(self._place["kind"], self.get_buffer("weight"), self._buffers.get("bias"))
        present = None if (kept := self._buffers.get("present")) is None else kept > 0
        return Routing(router, self.gating, self._buffers.get("added"), present, self._place["routers"])

    def seen(self, values: Tensor) -> Tensor:
        """The router's input, given a module's input or output."""
        heads = self._place["heads"]
        return values if heads == 1 else values.view(*values.shape[:-1], heads, -1)


class ExpertNumbers(nn.Module):
    """The factors of the experts of some modules, in the model's dtype."""

    def __init__(self, site: dict[str, Any]) -> None:
        super().__init__()
        self._count = len(site["modules"])
        for name, shape in site["shapes"].items():
            self.register_buffer(name, torch.empty(shape))

    def experts(self, float32: nn.Module) -> Experts:
        """All experts, with the parts that stay in float32."""
        if "deltas" in float32._buffers:
            return VectorExperts(float32.get_buffer("deltas"))
        ups = tuple(self.get_buffer(f"up{number}") for number in range(self._count))
        return LowRankExperts(self.get_buffer("down"), ups, float32.get_buffer("spread"))


class Float32Numbers(nn.Module):
    """The parts of some modules' experts that stay in float32: scalings, or vectors."""

    def __init__(self, site: dict[str, Any]) -> None:
        super().__init__()
        for name, shape in site["float32"].items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32))


class RoutedForCausalLM(Base):  # type: ignore[misc]
    """See the docstring of this file."""

    config_class = RoutedConfig
    _keep_in_fp32_modules_strict = ("routers_float32", "experts_float32")

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        places, sites = config.routed["places"], config.routed["sites"]
        self.routers_float32 = nn.ModuleList([RouterNumbers(place) for place in places])
        self.experts_float32 = nn.ModuleList([Float32Numbers(site) for site in sites])
        self.experts = nn.ModuleList([ExpertNumbers(site) for site in sites])
        self._blocks: dict[int, Tensor] = {}
        for number, place in enumerate(places):
            if place["is_block"]:
                watch(self.get_submodule(place["name"]), False, self._keeper(number))
        for number, site in enumerate(sites):
            self._gate(number, site)

    def _keeper(self, number: int) -> Any:
        router = self.routers_float32[number]
        assert isinstance(router, RouterNumbers)

        def keep(seen: Tensor) -> None:
            _, self._blocks[number] = router.routing().gates(seen)

        return keep

    def _gate(self, number: int, site: dict[str, Any]) -> None:
        factors, float32 = self.experts[number], self.experts_float32[number]
        place = site["place"]
        is_block, router = self.config.routed["places"][place]["is_block"], self.routers_float32[place]
        assert isinstance(factors, ExpertNumbers)
        assert isinstance(router, RouterNumbers)

        def gates(values: Tensor) -> Tensor:
            if is_block:
                return self._blocks[place].reshape(*values.shape[:-1], -1)
            return router.routing().gates(router.seen(values))[1]

        modules = [self.get_submodule(name) for name in site["modules"]]
        gate_experts(modules, site["form"], lambda: factors.experts(float32), gates)
