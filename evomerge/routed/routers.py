"""The routers of a recipe: computed once, cached as evidence, and computed again if missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.merging.fitting.fit import Fit
from evomerge.merging.measured.evidence import Evidence, Tensors
from evomerge.merging.measured.inputs import Inputs
from evomerge.recipes.base import canonical_text
from evomerge.recipes.routed import LayerGroup, RoutedRecipe
from evomerge.routed.arrow import arrow_weights
from evomerge.routed.computing import Router, Routing
from evomerge.routed.fitted import fit_routers
from evomerge.routed.gates import Gating
from evomerge.routed.live import LiveExperts
from evomerge.routed.probing import means_over
from evomerge.routed.prototypes import prototype_router
from evomerge.routed.sites import Place, Site
from evomerge.routed.spectral import normalised, spectral_weights
from evomerge.routed.stored import stored_router

_ARROW, _SPECTRAL, _LENGTHS = "arrow routers 1", "spectral routers 1", "lengths of changes 1"
_MEANS, _FITTED = "inputs of routers 1", "fitted routers 2"


class Routers:
    """Computes routers.

    Args:
        evidence: where they are cached.
        live: returns a live model of a base, without routing.
        inputs: the calibration texts of sources; None if there are none.
        fit: the items to fit to; None if there are none.
        dtype: the dtype in which models compute.
    """

    def __init__(
        self,
        evidence: Evidence,
        live: Callable[[RoutedRecipe], LiveModel],
        inputs: Inputs | None,
        fit: Fit | None,
        dtype: str,
    ) -> None:
        self._evidence, self._live = evidence, live
        self._inputs, self._fit, self._dtype = inputs, fit, dtype

    def of(
        self,
        recipe: RoutedRecipe,
        sites: Sequence[Site],
        places: Mapping[str, Place],
        experts: Callable[[LiveModel], LiveExperts],
    ) -> dict[str, Router]:
        """The router of each place, for all experts of the recipe, with the base last if it counts as an expert.

        Args:
            experts: attaches the experts to a live model.

        Raises:
            InputError: required texts or items are missing, or differ from those that the recipe was made with.
        """
        kind = recipe.router.kind
        if kind == "fitted":
            return self._fitted(recipe, places, experts)
        found = getattr(self, f"_{kind}")(recipe, sites, places)
        return _with_base(found) if recipe.router.base_expert else found

    def record(self, recipe: RoutedRecipe, source: str, sites: Sequence[Site], places: Mapping[str, Place]) -> None:
        """Run the base on the texts of one source, if routers of this kind need it."""
        if source not in recipe.experts:
            return
        if recipe.router.kind == "prototypes":
            self._means(recipe, source, places)
        elif recipe.router.kind == "spectral":
            self._lengths(recipe, source, places, self._spectra(recipe, sites, places))

    def _arrow(self, recipe: RoutedRecipe, sites: Sequence[Site], places: Mapping[str, Place]) -> dict[str, Router]:
        width = {name: place.width for name, place in places.items()}
        weights = self._evidence.get(_ARROW, self._key(recipe), lambda: arrow_weights(sites, width))
        return {name: Router("absolute", weights[name]) for name in places}

    def _stored(self, recipe: RoutedRecipe, sites: Sequence[Site], places: Mapping[str, Place]) -> dict[str, Router]:
        return {site.module: stored_router(site, places[site.module].width) for site in sites}

    def _spectral(self, recipe: RoutedRecipe, sites: Sequence[Site], places: Mapping[str, Place]) -> dict[str, Router]:
        spectra = self._spectra(recipe, sites, places)
        lengths = [self._lengths(recipe, name, places, spectra) for name in recipe.experts]
        own = {name: torch.stack([of[name][expert] for expert, of in enumerate(lengths)]) for name in places}
        return {name: Router("norm", weight) for name, weight in normalised(spectra, own).items()}

    def _spectra(self, recipe: RoutedRecipe, sites: Sequence[Site], places: Mapping[str, Place]) -> Tensors:
        width = {name: place.width for name, place in places.items()}
        return self._evidence.get(_SPECTRAL, self._key(recipe), lambda: spectral_weights(sites, width))

    def _lengths(self, recipe: RoutedRecipe, expert: str, places: Mapping[str, Place], spectra: Tensors) -> Tensors:
        """The mean norm of every expert's change on the texts of one of them, float32 [experts] by place."""

        def compute() -> Tensors:
            live = self._live(recipe)
            return means_over(
                live,
                places,
                self._texts(recipe, expert, live),
                lambda name, seen: Router("norm", spectra[name].to(seen.device)).logits(seen),
            )

        key = *self._key(recipe), self._dtype, *self._text_key(recipe, expert)
        return self._evidence.get(_LENGTHS, key, compute)

    def _prototypes(
        self, recipe: RoutedRecipe, sites: Sequence[Site], places: Mapping[str, Place]
    ) -> dict[str, Router]:
        means = [self._means(recipe, name, places) for name in recipe.experts]
        found = {name: prototype_router(torch.stack([of[name] for of in means])) for name in places}
        return {name: Router("linear", *numbers) for name, numbers in found.items()}

    def _means(self, recipe: RoutedRecipe, expert: str, places: Mapping[str, Place]) -> Tensors:
        """The mean of the routers' inputs on the texts of an expert, float32 [width] by place."""

        def compute() -> Tensors:
            live = self._live(recipe)
            return means_over(live, places, self._texts(recipe, expert, live), lambda name, seen: seen.float())

        base = self._evidence.content_of(recipe.base)
        key = base, tuple(sorted(places)), recipe.router.per, self._dtype, *self._text_key(recipe, expert)
        return self._evidence.get(_MEANS, key, compute)

    def _fitted(
        self, recipe: RoutedRecipe, places: Mapping[str, Place], experts: Callable[[LiveModel], LiveExperts]
    ) -> dict[str, Router]:
        fit = self._fit
        digest = None if fit is None else fit.digest
        if fit is None or digest != recipe.fit:
            has = "there are none here" if digest is None else f"these have {digest}"
            problem = f"its routers are fitted to items with the digest {recipe.fit}, and {has}"
            raise InputError("recipe.fit", problem, "Give the items and settings that it was made by.")
        whole = recipe if recipe.router.refitted else everywhere(recipe)

        def compute() -> Tensors:
            live = self._live(recipe)
            return _kept(fit_routers(live, experts(live), whole, places, partial(routings, whole, places), fit))

        settings = canonical_text(
            {"router": recipe.router.model_dump(mode="json"), "where": recipe.where}
            | ({"groups": [g.model_dump(mode="json") for g in recipe.groups]} if recipe.router.refitted else {})
        )
        kept = self._evidence.get(_FITTED, (*self._key(recipe), settings, digest, self._dtype), compute)
        return {name: Router("linear", kept[f"weight.{name}"], kept[f"bias.{name}"]) for name in places}

    def _texts(self, recipe: RoutedRecipe, expert: str, live: LiveModel) -> list[Tensor]:
        assert self._inputs is not None  # otherwise the key could not be computed
        return self._inputs.tokens_of(expert, live, recipe.base)

    def _text_key(self, recipe: RoutedRecipe, expert: str) -> tuple[str, ...]:
        if self._inputs is None or self._inputs.digest != recipe.calibration:
            has = "there are none here" if self._inputs is None else f"these have {self._inputs.digest}"
            problem = f"is made by the calibration texts with the digest {recipe.calibration}, and {has}"
            raise InputError("recipe.calibration", problem, "Give those that the recipe was made by.")
        return self._inputs.own_key_of(expert)

    def _key(self, recipe: RoutedRecipe) -> tuple[str | tuple[str, ...], ...]:
        contents = tuple(self._evidence.content_of(name) for name in recipe.experts)
        return self._evidence.content_of(recipe.base), contents, recipe.where


def everywhere(recipe: RoutedRecipe) -> RoutedRecipe:
    """The recipe with all experts in every layer, without selection, temperature or scaling."""
    layers = sum(group.layers for group in recipe.groups)
    return recipe.model_copy(update={"groups": (LayerGroup(layers=layers, experts=recipe.experts),)})


def routings(recipe: RoutedRecipe, places: Mapping[str, Place], routers: Mapping[str, Router]) -> dict[str, Routing]:
    """How the routers of a recipe gate, by place; omits layers without experts."""
    found = {}
    for name, place in places.items():
        group = recipe.group_of(place.layer)
        if not group.experts:
            continue
        router = routers[name]
        gain = group.attention_gain if place.kind == "attention" else group.mlp_gain
        gating = Gating(
            recipe.router.gate, group.top_k, group.temperature, gain, renormalised=recipe.router.renormalised
        )
        base = [True] * recipe.router.base_expert
        present = torch.tensor([expert in group.experts for expert in recipe.experts] + base)
        bias = torch.tensor([group.bias.get(expert, 0.0) for expert in recipe.experts] + [0.0] * len(base))
        found[name] = Routing(router, gating, bias if group.bias else None, None if bool(present.all()) else present)
    return found


def _kept(routers: Mapping[str, Router]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, router in routers.items():
        assert router.bias is not None
        found |= {f"weight.{name}": router.weight.cpu(), f"bias.{name}": router.bias.cpu()}
    return found


def _with_base(routers: Mapping[str, Router]) -> dict[str, Router]:
    """Routers with one more expert, whose logit is always 0."""
    found = {}
    for name, router in routers.items():
        weight = torch.cat([router.weight, torch.zeros_like(router.weight[:1])])
        bias = None if router.bias is None else torch.cat([router.bias, torch.zeros(1)])
        found[name] = Router(router.kind, weight, bias)
    return found
