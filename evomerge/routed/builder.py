"""The builder of routed recipes: one live model of the trunk, with the experts beside its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.building.stack_builder import StackBuilder, stack_builder
from evomerge.merging.materialise import check_stack
from evomerge.mixture.builder import MixtureBuilder
from evomerge.mixture.routed import mixture_of_routed
from evomerge.recipes.routed import RoutedRecipe
from evomerge.recipes.stack import StackRecipe
from evomerge.recipes.use import BASE
from evomerge.routed.arrow_folder import write_arrow
from evomerge.routed.routers import Routers, routings
from evomerge.routed.sites import check_layers, places_of, sites_of
from evomerge.routed.trunk import base_alone, trunk_of

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel
    from evomerge.routed.computing import Router
    from evomerge.routed.live import Listener, LiveExperts
    from evomerge.routed.sites import Place, Site
    from evomerge.routed.use import UseMeter


class RoutedBuilder:
    """Builds models whose experts are gated for every token; see ``Builder``."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._stack: StackBuilder = stack_builder(context)
        self._family: tuple[tuple[str, ...], LiveExperts] | None = None

    @staticmethod
    def check(recipe: RoutedRecipe, sources: Mapping[str, Source]) -> None:
        """Reject a recipe whose experts are not adapters of its base, or whose groups do not fit it."""
        base = sources[recipe.base]
        check_layers(recipe, base)
        places_of(recipe, sites_of(recipe, sources), base)
        check_stack(trunk_of(recipe, base.layers), sources)

    def start(self) -> None:
        """Build the live model."""
        if self._context.engine is not None:
            raise InputError("engine", "cannot gate experts token by token", "Take `engine: transformers`.")
        self._stack.start()

    def calibrate(self, recipe: RoutedRecipe, source: str) -> None:
        """Run the base on a source's texts, if routers are computed from them."""
        sites, places = self._layout(recipe)
        self._routers.record(recipe, source, sites, places)

    def fit(self, recipe: RoutedRecipe) -> None:
        """Fit routers, if the recipe's routers are fitted."""
        if recipe.router.kind == "fitted":
            self.routers(recipe)

    def write(self, recipe: RoutedRecipe) -> LiveModel:
        """The live model with the recipe's trunk, and its gated experts beside it."""
        from evomerge.checkpoints.live import check_live

        meter = self._meter(recipe)
        live = self._install(recipe, meter)
        check_live(live)
        meter.take()  # discard the use measured during the check
        return replace(live, change=None, use=meter)

    def _meter(self, recipe: RoutedRecipe) -> UseMeter:
        from evomerge.routed.use import UseMeter

        _, places = self._layout(recipe)
        names = (*recipe.experts, *([BASE] if recipe.router.base_expert else []))
        return UseMeter(names, places, self._context.sources[recipe.base].layers)

    def _install(self, recipe: RoutedRecipe, listener: Listener) -> LiveModel:
        """The live model with a recipe's trunk and experts, valid until it is written to again."""
        self.check(recipe, self._context.sources)
        routers = self.routers(recipe)
        live = self._stack.write(trunk_of(recipe, self._context.sources[recipe.base].layers))
        _, places = self._layout(recipe)
        gating = routings(recipe, places, routers)
        self._stack.beside.push(self._experts(recipe, live).install(recipe, places, gating, listener))
        return live

    def routers(self, recipe: RoutedRecipe) -> dict[str, Router]:
        """The router of each place where experts are gated, on the CPU."""
        sites, places = self._layout(recipe)
        return self._routers.of(recipe, sites, places, lambda live: self._experts(recipe, live))

    @cached_property
    def _routers(self) -> Routers:
        context = self._context
        return Routers(context.evidence, self._base_alone, self._stack.inputs, context.fit, str(context.dtype))

    def _base_alone(self, recipe: RoutedRecipe) -> LiveModel:
        return self._stack.write(base_alone(recipe, self._context.sources[recipe.base].layers))

    def _layout(self, recipe: RoutedRecipe) -> tuple[list[Site], dict[str, Place]]:
        sites = sites_of(recipe, self._context.sources)
        return sites, places_of(recipe, sites, self._context.sources[recipe.base])

    def _experts(self, recipe: RoutedRecipe, live: LiveModel) -> LiveExperts:
        """The experts beside the live model; those of the previous recipe if they are the same."""
        from evomerge.routed.live import LiveExperts

        key = (recipe.base, recipe.where, *recipe.experts)
        if self._family is None or self._family[0] != key or not self._family[1].is_of(live):
            sites, _ = self._layout(recipe)
            self._family = key, LiveExperts(live, sites, recipe.experts)
        return self._family[1]

    def export(
        self,
        recipe: RoutedRecipe,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """Export a plain folder of the merge by mean gates, or the routed model itself in one of its ``forms``."""
        if self._context.form is None:
            self._stack.export(self.flattened(recipe), out, texts=texts, check=check, progress=progress)
            return
        if self._context.form == "peft":
            write_arrow(recipe, self._context.sources, out, texts=texts, check=check)
            return
        if self._context.form == "mixture":
            routers = {name: (router.weight, router.bias) for name, router in self.routers(recipe).items()}
            mixture, rows = mixture_of_routed(recipe, routers, self._context.sources)
            self._mixtures.export_with(rows, mixture, out, texts=texts, check=check, progress=progress)
            return
        trunk = trunk_of(recipe, self._context.sources[recipe.base].layers)

        def finish(folder: Path) -> None:
            self._add_experts(recipe, folder)
            if check is not None:
                check(folder)

        self._stack.export(trunk, out, texts=texts, check=finish, progress=progress)

    @cached_property
    def _mixtures(self) -> MixtureBuilder:
        return MixtureBuilder(self._context)

    def _add_experts(self, recipe: RoutedRecipe, folder: Path) -> None:
        from evomerge.routed.remote_code import add_experts

        live = self._install(recipe, self._meter(recipe))
        _, places = self._layout(recipe)
        gating = routings(recipe, places, self.routers(recipe))
        add_experts(folder, places, [*self._experts(recipe, live).units(recipe, gating)])

    def flattened(self, recipe: RoutedRecipe) -> StackRecipe:
        """The plain merge by the mean gates of a recipe (``flattening``)."""
        from evomerge.routed.flattening import flattened, run_over_texts

        meter = self._meter(recipe)
        live = self._install(recipe, meter)
        run_over_texts(recipe, live, self._context.fit, self._stack.inputs)
        sites, _ = self._layout(recipe)
        return flattened(recipe, sites, meter.means, self._context.sources)

    def reload(self, folder: Path) -> LiveModel:
        """Load the folder with plain transformers, with transformers and its own code, or with peft."""
        if self._context.form is None:
            return self._stack.reload(folder)
        if self._context.form == "mixture":
            return self._mixtures.reload(folder)
        from evomerge.routed.loading import loaded

        return loaded(folder, self._context)
