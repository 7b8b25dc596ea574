"""The builder of recipes in stages: each stage is a source of later ones; the last one is a model like any merge."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.checkpoints.source import Source
from evomerge.checkpoints.vocabulary import align
from evomerge.errors import InputError
from evomerge.merging.building.builders import BuildContext, BuilderBase
from evomerge.merging.building.export import write_model
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.building.staged_source import StagedSource, key_of, opened_stage, stages_key
from evomerge.merging.materialise import check_opened, check_stack
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.path import is_made_in_order
from evomerge.recipes.staged import Stage, StagedRecipe

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


class StagedBuilder(BuilderBase):
    """Makes models in stages; see ``Builder``. A stage that two candidates share is opened once."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._known: dict[str, Source] = {}  # the stages of the last model, by name
        self._stack: StackBuilder | None = None

    @cached_property
    def _above(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="evomerge-stages-")

    @cached_property
    def _plain(self) -> StackBuilder:
        """Holds the live model."""
        return StackBuilder(replace(self._context, shared={}))

    @staticmethod
    def check(recipe: StagedRecipe, sources: Mapping[str, Source]) -> None:
        """Refuse a recipe that cannot be made from these sources, as far as that shows without its stages."""
        check_opened(recipe, sources)
        for stage in recipe.stages:
            if is_made_in_order(stage.recipe):
                problem = f"stage {stage.name} makes layers from the outputs of the merged layers before them"
                raise InputError("recipe.stages", problem, "Make it first, and name its folder.")
            if set(stage.takes.values()) <= sources.keys():
                own = {name: sources[taken] for name, taken in stage.takes.items()}
                check_stack(stage.recipe, align(own, stage.recipe.tokenizer, stage.recipe.vocabulary))

    def start(self) -> None:
        """Build the live model."""
        self._plain.start()

    def write(self, recipe: StagedRecipe) -> LiveModel:
        """The live model with the weights of the last stage."""
        own, changed = self._opened(recipe)
        if self._stack is None or changed:
            # The content of the live model is tracked by the names of its inputs, which have changed. Evidence is kept
            # for this process alone: it belongs to files, and stages have none.
            sources = {**self._context.sources, **own}
            context = replace(self._context, sources=sources, evidence=Evidence(), shared={})
            self._stack = StackBuilder(context, self._plain.live)
        return self._stack.write(recipe.stages[-1].recipe)

    def export(
        self,
        recipe: StagedRecipe,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """A plain Hugging Face folder of the last stage."""
        own, _ = self._opened(recipe)
        last = recipe.stages[-1].recipe.model_copy(update={"dtype": recipe.dtype})
        own = align(own, last.tokenizer, last.vocabulary)
        write_model(last, own, out, texts=texts, check=check, progress=progress, follows=stages_key(own))

    def reload(self, folder: Path) -> LiveModel:
        """The folder, loaded with plain transformers."""
        return self._plain.reload(folder)

    def _opened(self, recipe: StagedRecipe) -> tuple[dict[str, Source], bool]:
        """The sources of the last stage, by the names of its recipe, and whether any stage has changed."""
        self.check(recipe, self._context.sources)
        opened: dict[str, Source] = {}
        for stage in recipe.stages[:-1]:
            made = opened_stage(stage, self._own(stage, opened), Path(self._above.name), self._context.keep)
            before = self._known.get(stage.name)
            opened[stage.name] = before if before is not None and key_of(before) == key_of(made) else made
        changed = {name: key_of(one) for name, one in opened.items()} != {n: key_of(s) for n, s in self._known.items()}
        kept = {source.folder for source in opened.values()}
        for source in self._known.values():
            if isinstance(source, StagedSource) and source.folder not in kept:
                shutil.rmtree(source.folder, ignore_errors=True)
        self._known = opened
        return self._own(recipe.stages[-1], opened), changed

    def _own(self, stage: Stage, opened: Mapping[str, Source]) -> dict[str, Source]:
        known = {**self._context.sources, **opened}
        return {name: known[taken] for name, taken in stage.takes.items()}
