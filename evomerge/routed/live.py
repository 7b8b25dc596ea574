"""Experts on the live model of their base: hooks that gate them for every token.

Nothing is written into weights: beside the modules that experts change lie their factors, side by side, and hooks add
what routers let through (``computing``). What a candidate costs is to exchange the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """The gates of a module's tokens: by a router of its own, or as its block's has said."""

    place: Place
    routing: Routing
    blocks: Mapping[str, Tensor]
    tell: Tell

    def __call__(self, values: Tensor) -> Tensor:
        """float32 [..., experts], or [..., heads, experts], for what the router looks at or a shape of such."""
        if self.place.is_block:
            return self.blocks[self.place.name].reshape(*values.shape[:-1], -1)
        logits, gates = self.routing.gates(self.place.seen(values))
        self.tell(self.place.name, logits, gates)
        return gates


class LiveExperts:
    """The experts of a family, on a live model of their base.

    Args:
        live: holds the base, or another model of its structure.
        sites: all that experts change.
        names: of the experts, in the order of the sites' changes.

    Raises:
        InputError: an adapter has NaN or Inf.
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
        self._only: dict[tuple[str, tuple[int, ...]], LowRankExperts | None] = {}
        self._reached: set[str] = set()

    def is_of(self, live: LiveModel) -> bool:
        """Whether they lie beside this very model."""
        return live.model is self._live.model

    def install(
        self,
        recipe: RoutedRecipe,
        places: Mapping[str, Place],
        routings: Mapping[str, Routing],
        listener: Listener | None = None,
    ) -> ExitStack:
        """Have the live model compute with routed experts, until what is given back is closed.

        Args:
            places: where its routers look.
            routings: of these places; where there is none, there are no experts.
            listener: told of every forward pass.
        """
        undo = ExitStack()
        blocks: dict[str, Tensor] = {}
        self._reached = {site.module for site in self.sites}
        if listener is not None:
            _listen(self._live.model, listener, undo)
        tell = _nobody if listener is None else listener.routed
        routings = {name: _beside(self._live.model.get_submodule(name), each) for name, each in routings.items()}
        for name, place in places.items():
            if place.is_block and name in routings:
                look = partial(_keep, name, routings[name], blocks, tell)
                undo.callback(watch(self._live.model.get_submodule(name), False, look).remove)
        for site in self.sites:
            name = place_of(recipe, site)
            if name in routings and (experts := self._present(recipe, site)) is not None:
                gate = _Gate(places[name], routings[name], blocks, tell)
                self._hook(site, gate, experts, undo)
            else:
                self._reached.discard(site.module)
        return undo

    def check_reached(self) -> None:
        """Refuse a model that computes with a weight, but not through its module, so that nothing was gated.

        Raises:
            ValueError: no forward pass since ``install`` came through a module.
        """
        if self._reached:
            raise ValueError(f"the model computes without calling {min(self._reached)}: experts cannot be gated there")

    def present(self, recipe: RoutedRecipe) -> dict[str, Experts]:
        """The experts that a recipe has, by the module of the site."""
        found = {site.module: self._present(recipe, site) for site in self.sites}
        return {module: experts for module, experts in found.items() if experts is not None}

    def _hook(self, site: Site, gate: _Gate, experts: Experts, undo: ExitStack) -> None:
        module, reached = self._live.model.get_submodule(site.module), self._reached
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(f"{site.module} is a {type(module).__name__}, to whose output nothing can be added")

        def here() -> Experts:
            reached.discard(site.module)
            return experts

        undo.callback(gate_experts(module, site.form, here, gate).remove)

    def _present(self, recipe: RoutedRecipe, site: Site) -> Experts | None:
        """What of the experts of a site is there; a vector whose gate is 0 costs nothing more."""
        every = self._experts[site.module]
        if isinstance(every, VectorExperts):
            return every
        group = recipe.group_of(site.layer)
        present = tuple(number for number, name in enumerate(recipe.experts) if name in group.experts)
        key = site.module, present
        if key not in self._only:
            # What earlier candidates had present is let go of: there may be as many subsets as candidates.
            self._only = {old: kept for old, kept in self._only.items() if old[0] != site.module}
            self._only[key] = only(every, present)
        return self._only[key]


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
