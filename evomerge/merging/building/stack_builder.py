"""The builder of stack recipes: one live model that every candidate is written into, and plain folders."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.blends import observed
from evomerge.checkpoints.source import Source
from evomerge.merging.building.builders import BuildContext
from evomerge.merging.building.export import write_model
from evomerge.merging.fitting.coefficients import Coefficients
from evomerge.merging.materialise import Materialiser, check_stack
from evomerge.merging.measured.change import change_of
from evomerge.merging.measured.inputs import Inputs
from evomerge.merging.path import configured_by
from evomerge.method import find_method
from evomerge.recipes.base import STACK
from evomerge.recipes.stack import StackRecipe

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


_LIBC = ctypes.CDLL(None)


def _return_freed_memory() -> None:
    """Have the C library return freed memory to the system, if it can: glibc keeps most of it."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def stack_builder(context: BuildContext) -> StackBuilder:
    """The builder of stacks that all builders of a context share, and with it one live model."""
    made = context.shared.setdefault(STACK, StackBuilder(context))
    assert isinstance(made, StackBuilder)  # plug-ins cannot replace it
    return made


class StackBuilder:
    """Makes models whose layers are merged, repeated, left out or reordered; see ``Builder``.

    Args:
        live: the model that every candidate is written into, if there is one already.
    """

    def __init__(self, context: BuildContext, live: LiveModel | None = None) -> None:
        self._context = context
        self._given = live

    @property
    def sources(self) -> Mapping[str, Source]:
        """By the names that recipes use."""
        return self._context.sources

    @property
    def base(self) -> str | None:
        """The source that models' changes are measured from."""
        return self._context.base

    @cached_property
    def materialiser(self) -> Materialiser:
        """Writes recipes into the live model."""
        context = self._context
        return Materialiser(
            context.sources,
            evidence=context.evidence,
            residency=context.residency,
            inputs=self.inputs,
            fitted=self._coefficients,
            device=context.devices[0],
            base=context.base,
            live=lambda: self.live,
        )

    @property
    def beside(self) -> ExitStack:
        """Is closed before another model is written."""
        return self.materialiser.beside

    @cached_property
    def inputs(self) -> Inputs | None:
        """The inputs of sources' layers on the calibration texts; None without texts."""
        context = self._context
        if context.calibration is None:
            return None
        return Inputs(context.sources, context.calibration, context.evidence, context.devices)

    @cached_property
    def _coefficients(self) -> Coefficients | None:
        context = self._context
        if context.fit is None:
            return None
        return Coefficients(
            context.fit, context.sources, context.tokenizer, context.dtype, context.evidence,
            lambda: self.materialiser, self._write,
        )  # fmt: skip

    @cached_property
    def live(self) -> LiveModel:
        """The model that every candidate is written into."""
        if self._given is not None:
            return self._given
        from evomerge.checkpoints.live import live_model

        context = self._context
        source = context.sources[context.tokenizer]
        live = live_model(source, context.devices, context.dtype, context.layers)
        if context.engine is not None:
            live.engine = context.engine(live)
        return live

    @staticmethod
    def check(recipe: StackRecipe, sources: Mapping[str, Source]) -> None:
        """Refuse a recipe that cannot be made from these sources; see ``check_stack``."""
        check_stack(recipe, sources)

    def start(self) -> None:
        """Build the live model."""
        _ = self.live

    def calibrate(self, recipe: StackRecipe, source: str) -> None:
        """Record the inputs of a source's layers, as far as the recipe needs them."""
        self.record([recipe], source)

    def record(self, recipes: Sequence[StackRecipe], source: str) -> None:
        """Record the inputs of a source's layers, as far as any of the recipes needs them."""
        if self.inputs is None:
            return
        needs = observed(recipes, [source]).get(source, set())
        if "calibration" in needs:
            self.inputs.record(source)
        if "channels" in needs:
            self.inputs.record_channels(source)

    def fit(self, recipe: StackRecipe) -> None:
        """Fit the amount of each source to right answers, for the recipe's blends that need it."""
        if self._coefficients is None or recipe.fit is None:
            return
        for blend in recipe.blends:
            if "fit" in find_method(blend.method, "recipe.blends").needs and blend.base is not None:
                self._coefficients.found(blend.base, blend.sources)

    def write(self, recipe: StackRecipe) -> LiveModel:
        """The live model with the recipe's weights and path, and with a source's own settings if it is its copy."""
        self.fit(recipe)  # it writes other models
        return self._write(recipe)

    def _write(self, recipe: StackRecipe) -> LiveModel:
        from evomerge.checkpoints.live import check_live, configured

        on_cpu = self.live.device.type == "cpu"
        if on_cpu:  # merging maps all sources, and scoring needs memory for batches: not both at once
            _return_freed_memory()
        self.materialiser.write(recipe, self.live)
        if on_cpu:  # mapping them again takes 0.15 s per gigabyte, less than scoring
            for source in self.sources.values():
                source.release_files()
        name = configured_by(recipe, self._context.sources)
        live = self.live if name == recipe.tokenizer else configured(self.live, self._context.sources[name])
        live.change = self.materialiser.change
        check_live(live)
        if live.engine is not None:
            live.engine.load(live)
        return live

    def export(
        self,
        recipe: StackRecipe,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """A plain Hugging Face folder; see ``write_model``."""
        self.fit(recipe)
        write_model(
            recipe,
            self._context.sources,
            out,
            texts=texts,
            materialiser=self.materialiser,
            check=check,
            progress=progress,
        )

    def reload(self, folder: Path) -> LiveModel:
        """The folder, loaded with plain transformers."""
        from evomerge.checkpoints.plain import plain_model
        from evomerge.checkpoints.source import open_source

        source = open_source("export", str(folder), place=str(folder))
        live = plain_model(source, self._context.devices, None)
        if self._context.base is not None:
            live.change = change_of(live, source, self._context.sources[self._context.base])
        return live
