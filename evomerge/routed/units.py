"""Modules with the same input, such as those of a layer's queries, keys and values, for which routers and experts are
computed in a single product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints.live import LiveModel
from evomerge.routed.computing import Experts, LowRankExperts, Router, Routing
from evomerge.routed.sites import Site

_TOKENS = 2


@dataclass(frozen=True)
class Unit:
    """Sites that are computed together.

    Attributes:
        sites: in the order in which the model calls their modules.
        experts: those that are present there.
        routing: the routing of all sites.
        places: the places of its routers, in order: one for all sites, or one for each.
    """

    sites: tuple[Site, ...]
    experts: Experts
    routing: Routing
    places: tuple[str, ...]


@torch.inference_mode()
def given_alike(live: LiveModel, sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Group the sites whose modules receive the same tensor in a forward pass of the model.

    Sites with vectors are not grouped.

    Raises:
        ValueError: the model uses a weight without calling its module, so that nothing could be gated there.
    """
    seen: dict[str, Tensor] = {}  # kept alive, so that ids are unique

    def look(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            seen.setdefault(name, given[0])

    with ExitStack() as undo:
        for site in sites:
            module = live.model.get_submodule(site.module)
            undo.callback(module.register_forward_pre_hook(partial(look, site.module)).remove)
        live.model(torch.arange(_TOKENS, device=live.device)[None], use_cache=False)
    groups: dict[object, list[Site]] = defaultdict(list)
    by_name = {site.module: site for site in sites}
    if missing := sorted(by_name.keys() - seen.keys()):
        raise ValueError(f"the model computes without calling {missing[0]}: experts cannot be gated there")
    for name, given in seen.items():
        site = by_name[name]
        groups[(id(given), site.layer, site.kind) if site.form == "low_rank" else name].append(site)
    return [tuple(group) for group in groups.values()]


def joined_experts(of_modules: Sequence[LowRankExperts], *, own_routers: bool) -> LowRankExperts | None:
    """Combine the experts of several modules; None if there are none.

    Args:
        own_routers: whether each module has its own router, in which case gates are concatenated.
    """
    if len(of_modules) <= 1:
        return of_modules[0] if of_modules else None
    spreads = [experts.spread for experts in of_modules]
    return LowRankExperts(
        torch.cat([experts.down for experts in of_modules]),
        tuple(up for experts in of_modules for up in experts.ups),
        torch.block_diag(*spreads) if own_routers else torch.cat(spreads, dim=1),  # type: ignore[no-untyped-call]
    )


def are_alike(routings: Sequence[Routing]) -> bool:
    """Whether routers can be computed together, because their weights have the same shape."""
    return len({(one.router.kind, one.router.weight.shape, one.router.bias is None) for one in routings}) <= 1


def joined_routing(routings: Sequence[Routing]) -> Routing:
    """Combine routers that have the same input and gate in the same way, by concatenating their logits."""
    first = routings[0]
    if len(routings) == 1:
        return first
    biases = [routing.router.bias for routing in routings if routing.router.bias is not None]
    weight = torch.cat([routing.router.weight for routing in routings])
    router = Router(first.router.kind, weight, torch.cat(biases) if biases else None)
    return Routing(router, first.gating, first.bias, first.present, len(routings))
