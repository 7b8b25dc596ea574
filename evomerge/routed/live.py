"""Experts on the live model of their base: hooks that gate them for every token.

Nothing is written into weights: beside the modules that experts change lie their factors, side by side, and hooks add
what routers let through (``computing``). What a candidate costs is to exchange the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints.live import LiveModel
from evomerge.recipes.routed import RoutedRecipe
from evomerge.routed.computing import Experts, LowRankExperts, Routing, VectorExperts, gate_experts, watch
from evomerge.routed.factors import only, side_by_side, vectors_of
from evomerge.routed.sites import Place, Site, place_of
from evomerge.routed.units import Unit, are_alike, given_alike, joined_experts, joined_routing


class Listener(Protocol):
    """Is told what routers say while tokens pass."""

    def tokens(self, mask: Tensor | None) -> None:
        """A forward pass begins: bool [rows, tokens], where there are texts and not padding; None for all."""
        ...

    def routed(self, place: str, logits: Tensor, gates: Tensor) -> None:
        """The logits and the gates of all its tokens at a place, float32 [..., experts] each."""
        ...

    def done(self) -> None:
        """The forward pass is over."""
        ...


Tell = Callable[[str, Tensor, Tensor], None]


def _nobody(place: str, logits: Tensor, gates: Tensor) -> None:
    """Is told nothing."""


@dataclass(frozen=True)
class _Gate:
    """The gates of a unit's tokens: by routers of its own, or as its block's has said."""

    unit: Unit
    place: Place
    blocks: Mapping[str, Tensor]
    tell: Tell

    def __call__(self, values: Tensor) -> Tensor:
        """float32 [..., experts], of several routers or heads [..., routers or heads, experts].

        Args:
            values: what the routers look at, or a shape of such.
        """
        if self.place.is_block:
            return self.blocks[self.place.name].reshape(*values.shape[:-1], -1)
        logits, gates = self.unit.routing.gates(self.place.seen(values))
        if len(self.unit.places) == 1:
            self.tell(self.place.name, logits, gates)
        else:
            for number, name in enumerate(self.unit.places):
                self.tell(name, logits[..., number, :], gates[..., number, :])
        return gates


class LiveExperts:
    """The experts of a family, on a live model of their base.

    Args:
        live: holds the base, or another model of its structure.
        sites: all that experts change.
        names: of the experts, in the order of the sites' changes.

    Raises:
        InputError: an adapter has NaN or Inf.
        ValueError: the model computes with a weight, but not through its module.
    """

    def __init__(self, live: LiveModel, sites: Sequence[Site], names: Sequence[str]) -> None:
        self._live = live
        self.sites = sites
        self._experts: dict[str, Experts] = {}
        for site in sites:
            weight = live.model.get_submodule(site.module).weight
            if site.form == "low_rank":
                self._experts[site.module] = side_by_side(site, names, weight.device, live.model.dtype)
            else:
                of_rows = (site.form == "outputs") != isinstance(live.model.get_submodule(site.module), Conv1D)
                width = weight.shape[0 if of_rows else 1]
                self._experts[site.module] = vectors_of(site, names, width, weight.device)
        self._groups = given_alike(live, sites)
        self._kept: dict[tuple[str, ...], tuple[object, tuple[Site, ...], LowRankExperts | None]] = {}

    def is_of(self, live: LiveModel) -> bool:
        """Whether they lie beside this very model."""
        return live.model is self._live.model

    def install(
        self,
        recipe: RoutedRecipe,
        places: Mapping[str, Place],
        routings: Mapping[str, Routing],
        listener: Listener | None = None,
        *,
        apart: bool = False,
    ) -> ExitStack:
        """Have the live model compute with routed experts, until what is given back is closed.

        Args:
            places: where its routers look.
            routings: of these places; where there is none, there are no experts.
            listener: told of every forward pass.
            apart: each router computes by itself, so that what it computes follows its weights wherever they go.
        """
        undo = ExitStack()
        blocks: dict[str, Tensor] = {}
        if listener is not None:
            _listen(self._live.model, listener, undo)
        tell = _nobody if listener is None else listener.routed
        routings = {name: _beside(self._live.model.get_submodule(name), each) for name, each in routings.items()}
        for name, place in places.items():
            if place.is_block and name in routings:
                look = partial(_keep, name, routings[name], blocks, tell)
                undo.callback(watch(self._live.model.get_submodule(name), False, look).remove)
        for unit in self.units(recipe, routings, apart=apart):
            self._hook(unit, _Gate(unit, places[unit.places[0]], blocks, tell), undo)
        return undo

    def units(self, recipe: RoutedRecipe, routings: Mapping[str, Routing], *, apart: bool = False) -> Iterator[Unit]:
        """What a recipe has of experts, with the routers that gate them.

        Args:
            routings: by place; where there is none, there are no experts.
            apart: no site is together with another one.
        """
        own_routers = recipe.router.per == "module"
        for group in self._groups:
            sites = [site for site in group if place_of(recipe, site) in routings]
            is_one = not own_routers or are_alike([routings[place_of(recipe, site)] for site in sites])
            for part in [sites] if is_one and not apart else [[site] for site in sites]:
                there, experts = self._present(recipe, part, own_routers)
                if experts is not None:
                    names = tuple(dict.fromkeys(place_of(recipe, site) for site in there))
                    yield Unit(there, experts, joined_routing([routings[name] for name in names]), names)

    def _hook(self, unit: Unit, gate: _Gate, undo: ExitStack) -> None:
        modules = [self._live.model.get_submodule(site.module) for site in unit.sites]
        for site, module in zip(unit.sites, modules, strict=True):
            if not isinstance(module, nn.Linear | Conv1D):
                raise ValueError(f"{site.module} is a {type(module).__name__}, to whose output nothing can be added")
        for handle in gate_experts(modules, unit.sites[0].form, lambda: unit.experts, gate):
            undo.callback(handle.remove)

    def _present(
        self, recipe: RoutedRecipe, sites: Sequence[Site], own_routers: bool
    ) -> tuple[tuple[Site, ...], Experts | None]:
        """Which of some sites that are computed together have experts, and those; None where no site has any."""
        if not sites:
            return (), None
        every = [self._experts[site.module] for site in sites]
        if isinstance(every[0], VectorExperts):  # a vector whose gate is 0 costs nothing more
            return tuple(sites), every[0]
        experts = recipe.group_of(sites[0].layer).experts
        present = tuple(number for number, name in enumerate(recipe.experts) if name in experts)
        modules, key = tuple(site.module for site in sites), (present, own_routers)
        # What an earlier candidate had present is let go of: there may be as many subsets as candidates.
        if (kept := self._kept.get(modules)) is None or kept[0] != key:
            found = [only(of_site, present) for of_site in every if isinstance(of_site, LowRankExperts)]
            there = tuple(site for site, experts in zip(sites, found, strict=True) if experts is not None)
            joined = joined_experts([one for one in found if one is not None], own_routers=own_routers)
            kept = self._kept[modules] = key, there, joined
        return kept[1:]


def _listen(model: Any, listener: Listener, undo: ExitStack) -> None:
    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None
        listener.tokens(None if mask is None else mask[:, -tokens.shape[1] :].bool())

    undo.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
    undo.callback(model.register_forward_hook(lambda module, given, output: listener.done()).remove)


def _beside(module: nn.Module, routing: Routing) -> Routing:
    """The numbers of a routing on the device of a module's weights."""
    device, router = next(module.parameters()).device, routing.router

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    moved = replace(router, weight=router.weight.to(device), bias=there(router.bias))
    return replace(routing, router=moved, bias=there(routing.bias), present=there(routing.present))


def _keep(name: str, routing: Routing, blocks: dict[str, Tensor], tell: Tell, seen: Tensor) -> None:
    """Keep the gates of a block's tokens for the modules in it."""
    logits, blocks[name] = routing.gates(seen)
    tell(name, logits, blocks[name])
