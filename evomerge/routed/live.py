"""Experts on the live model of their base, gated for every token by hooks.

Nothing is written into weights: the experts' factors are stored, concatenated, beside the modules that they change, and
hooks add their gated contributions (``computing``). A candidate only requires replacing the hooks.
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
    """Receives the routers' outputs while tokens pass."""

    def tokens(self, mask: Tensor | None) -> None:
        """A forward pass begins: bool [rows, tokens], True for text and False for padding; None for no padding."""
        ...

    def routed(self, place: str, logits: Tensor, gates: Tensor) -> None:
        """The logits and gates of all tokens at a place, float32 [..., experts] each."""
        ...

    def done(self) -> None:
        """The forward pass has ended."""
        ...


Tell = Callable[[str, Tensor, Tensor], None]


def _nobody(place: str, logits: Tensor, gates: Tensor) -> None:
    """Ignores everything."""


@dataclass(frozen=True)
class _Gate:
    """The gates of a unit's tokens: from its own routers, or those already computed for its block."""

    unit: Unit
    place: Place
    blocks: Mapping[str, Tensor]
    tell: Tell

    def __call__(self, values: Tensor) -> Tensor:
        """float32 [..., experts]; for several routers or heads [..., routers or heads, experts].

        Args:
            values: the routers' input, or a tensor with its shape.
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
    """The experts of a search, on a live model of their base.

    Args:
        live: the live model of the base, or another model with its structure.
        sites: everything that experts change.
        names: the names of the experts, in the order of the sites' changes.

    Raises:
        InputError: an adapter contains NaN or Inf.
        ValueError: the model uses a weight without calling its module.
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
        """Whether they are attached to this model."""
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
        """Make the live model compute with routed experts, until the returned stack is closed.

        Args:
            places: the inputs of the routers.
            routings: the routers of these places; a place without one has no experts.
            listener: called during every forward pass.
            apart: each router computes separately, so that it uses its own weights even when they change.
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
        """The units of a recipe's experts, with the routers that gate them.

        Args:
            routings: by place; a place without one has no experts.
            apart: no sites are combined.
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
        """Which of some combined sites have experts, and these experts; None if no site has any."""
        if not sites:
            return (), None
        every = [self._experts[site.module] for site in sites]
        if isinstance(every[0], VectorExperts):  # a vector with gate 0 has no extra cost
            return tuple(sites), every[0]
        experts = recipe.group_of(sites[0].layer).experts
        present = tuple(number for number, name in enumerate(recipe.experts) if name in experts)
        modules, key = tuple(site.module for site in sites), (present, own_routers)
        # Earlier candidates' subsets are discarded: there may be as many subsets as candidates.
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
    """The tensors of a routing on the device of a module's weights."""
    device, router = next(module.parameters()).device, routing.router

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    moved = replace(router, weight=router.weight.to(device), bias=there(router.bias))
    return replace(routing, router=moved, bias=there(routing.bias), present=there(routing.present))


def _keep(name: str, routing: Routing, blocks: dict[str, Tensor], tell: Tell, seen: Tensor) -> None:
    """Store the gates of a block's tokens for the modules in it."""
    logits, blocks[name] = routing.gates(seen)
    tell(name, logits, blocks[name])
