"""Hybrid space: searches both weights and paths, one after the other or at once.

One after the other, as in Akiba et al. (arXiv 2403.13187, section 3.3): a merge that was found before joins the pool of
a data-flow search as its model A. At once: every hop is itself a merge of layers of several sources.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

import numpy as np
from pydantic import BeforeValidator, Field

from evomerge.blends import check_whole
from evomerge.errors import InputError
from evomerge.files import absolute_reference
from evomerge.genome import Baseline, Genome, SearchSpace
from evomerge.mergekit import load_recipe_file
from evomerge.method import named_method
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import StackRecipe
from search_spaces.base import SpaceContext
from search_spaces.data_flow_space import DataFlowSpace, Layer, Member, other_sources, source_member
from search_spaces.method_genes import MethodGenes
from search_spaces.parameter_space import ParameterSpaceSettings
from search_spaces.path_encodings import Slot
from search_spaces.paths import MAX_PARAMETERS, EncodingName, PathGenes, PathSettings
from search_spaces.step_genes import StepSettings

MERGED = "merged"
"""The name of the earlier winner in the pool; "winner" is already the name of the best candidate of a search."""


class HybridSpaceSettings(PathSettings):
    """The ``space:`` section of a search file, in addition to ``PathSettings``; either ``winner`` or ``method`` is set.

    Args:
        encoding: as for every path, but "integers" by default.
        winner: a recipe file, such as the ``recipe.yaml`` of an export, relative to the search file. The merge that it
            describes joins the sources under the name "merged" and is model A.
        others: the sources whose layers a path may use besides those of the winner; all sources of the file by default.
        method: the merge method for every hop, which merges the layers of one index; or "auto".
        granularity: what has its own weights: with "hop", the default, each slot of the encoding, the embedding, the
            final norm and the head; with "model", only the model as a whole.
        steps: the steps after the method, as in a parameter space.
    """

    kind: Literal["hybrid_space"] = "hybrid_space"
    encoding: EncodingName = "integers"
    winner: Path | None = None
    others: tuple[str, ...] | None = None
    method: Annotated[str | None, BeforeValidator(named_method)] = None
    granularity: Literal["hop", "model"] | None = None
    steps: dict[str, StepSettings] = Field(default_factory=dict)

    def at(self, root: Path) -> Self:
        if self.winner is None:
            return self
        return self.model_copy(
            update={"winner": Path(os.path.realpath(os.path.join(root, os.path.expanduser(self.winner))))}
        )

    def build(self, context: SpaceContext) -> SearchSpace:
        if self.winner is not None and self.method is not None:
            problem = "is for merging hops, and those of the winner are already merged"
            raise InputError("space.method", problem, "Leave out one of the two.")
        if self.winner is not None:
            return self._after(self.winner, context)
        if self.method is None:
            hint = "Give `winner: RECIPE.yaml` or a merge method, such as `method: linear`."
            raise InputError("space", "needs a merge to start from, or a method to merge hops by", hint)
        if self.others is not None:
            raise InputError("space.others", "is for paths with a `winner`; a joint search merges all", "Leave it out.")
        if "merged_inputs" in context.method(self.method).needs:
            problem = f"{self.method} computes each layer from the outputs of the merged layers before it"
            raise InputError("space.method", problem, "Search over weights alone: `kind: parameter_space`.")
        baselines = list(ParameterSpaceSettings(method=self.method, steps=self.steps).build(context).baselines())
        return JointSpace(self, context, self.method, baselines)

    def _after(self, winner: Path, context: SpaceContext) -> DataFlowSpace:
        for key, given in (("granularity", self.granularity), ("steps", self.steps)):
            if given:
                raise InputError(f"space.{key}", "is for merging hops, and not for a `winner`", "Leave it out.")
        if MERGED in context.sources:
            raise InputError(f"sources.{MERGED}", "is the name of the winner in the pool", "Give it another name.")
        recipe = read_winner(winner, context)
        others = other_sources(self, self.others, context, None)
        pool = [winner_member(recipe), *(source_member(name, context.depth(name)) for name in others)]
        return DataFlowSpace(
            self, pool, context, seed=recipe.seed, dtype=recipe.dtype, calibration=recipe.calibration, fit=recipe.fit
        )


def read_winner(path: Path, context: SpaceContext) -> StackRecipe:
    """The recipe of an earlier winner, which must reproduce with the models and settings of this search.

    Raises:
        InputError: it cannot be read, uses other models or settings than the search, or has scales or blends for single
            tensors.
    """
    place = "space.winner"
    try:
        recipe = load_recipe_file(path, no_mergekit)
    except InputError as error:
        raise InputError(f"{place}: {error.place}", error.problem, error.hint) from error
    if not isinstance(recipe, StackRecipe):
        raise InputError(place, f"is a recipe of the kind {recipe.kind}, which has no layers to reorder")
    if recipe.is_scaled or recipe.tensors:
        what = "scales hops" if recipe.is_scaled else "merges single tensors differently from their layer"
        raise InputError(place, f"{what}, which its layers cannot keep on another path", "Give a merge of weights.")
    used = recipe.used_sources() | recipe.vocabulary.used_sources() | {recipe.tokenizer}
    here = Path(os.path.realpath(path)).parent  # paths in an exported recipe are relative to this
    recipe = recipe.model_copy(
        update={"sources": {name: absolute_reference(reference, here) for name, reference in recipe.sources.items()}}
    )
    for name in sorted(used):
        if name not in context.sources:
            raise InputError(
                place, f"merges {name}, which is not a source of this search", f"Add it: `sources.{name}`."
            )
        if recipe.sources[name] != context.sources[name]:
            problem = f"uses {recipe.sources[name]} as {name}, and this search uses {context.sources[name]}"
            raise InputError(place, problem, "If they are the same model, write the same in both files.")
    for key, theirs, ours in (
        ("tokenizer", recipe.tokenizer, context.tokenizer),
        ("dtype", recipe.dtype, context.dtype or recipe.dtype),
        ("vocabulary", recipe.vocabulary, context.vocabulary),
    ):
        if theirs != ours:
            hint = f"Write the same `{key}:` as for the search that found the winner."
            raise InputError(key, f"differs from that of the winner, which is {theirs}", hint)
    _check_makable(recipe, context, place)
    return recipe


def no_mergekit(reference: str) -> NoReturn:
    hint = "Merge it with `evomerge merge`, and give the recipe.yaml of the folder that this writes."
    raise InputError("merge_method", "belongs to a mergekit configuration", hint)


def _check_makable(recipe: StackRecipe, context: SpaceContext, place: str) -> None:
    for number, blend in enumerate(recipe.blends):
        check_whole(
            blend,
            f"{place}: blends[{number}]",
            has_texts=recipe.calibration is not None,
            has_fit=recipe.fit is not None,
        )
        if "merged_inputs" in context.method(blend.method).needs:
            problem = f"{blend.method} computes each layer for its position, and a path changes positions"
            raise InputError(f"{place}: blends[{number}]", problem, "Export the winner, and name that as a source.")
    for number, hop in enumerate(recipe.hops):
        blends = [recipe.blends[index] for index in (hop.attention, hop.mlp, hop.norm)]
        for name in {name for blend in blends for name in (*blend.sources, *((blend.base,) if blend.base else ()))}:
            if hop.layer_of(name) >= context.depth(name):
                problem = f"takes layer {hop.layer_of(name)} of {name}, which has {context.depth(name)} layers"
                raise InputError(f"{place}: hops[{number}]", problem)


def winner_member(recipe: StackRecipe) -> Member:
    """The model of a recipe, with its hops as layers."""
    blends = recipe.blends
    layers = [Layer(hop.layer, blends[hop.attention], blends[hop.mlp], blends[hop.norm]) for hop in recipe.hops]
    return Member(MERGED, blends[recipe.embedding], layers, blends[recipe.norm], blends[recipe.head])


class JointSpace:
    """Paths in which every hop is a merge of the layers with the same index in all sources.

    For a path that uses every layer once and unscaled, this equals the parameter space of ``method``.

    Args:
        settings: the settings of the paths and the weights.
        context: what is known about the search.
        method: the method that merges hops.
        baselines: the baselines of the parameter space of this method on the whole model.

    Raises:
        InputError: the settings contradict each other or do not fit the sources.
    """

    def __init__(
        self, settings: HybridSpaceSettings, context: SpaceContext, method: str, baselines: Sequence[Baseline]
    ) -> None:
        self._settings = settings
        self._context = context
        self._genes = MethodGenes(context.method(method), context, steps=settings.steps)
        self._baselines = baselines
        self._path = PathGenes(settings, {"merged": context.layers})
        slots = [Slot(name, name) for name in ("embedding", "norm", *([] if context.tied else ["head"]))]
        slots = [Slot("model", "model")] if self._one else [*self._path.slots, *slots]
        self._merges = len(slots)
        self.parameters = [
            *self._path.parameters,
            *(p for slot in slots for p in self._genes.parameters(slot.name, slot.group)),
        ]
        if len(self.parameters) > MAX_PARAMETERS:
            problem = f"makes {len(self.parameters):,} parameters; {MAX_PARAMETERS:,} is the limit"
            raise InputError("space.granularity", problem, "Set it to model.")
        self.hops = max(self._path.most, context.layers)
        self.layer_buffers = context.layers if self._one else self.hops

    @property
    def _one(self) -> bool:
        """Whether the whole model has the same weights."""
        return self._settings.granularity == "model"

    def decode(self, genome: Genome) -> StackRecipe:
        numbers = genome.tolist()
        cut, size = len(self._path.parameters), len(self._genes)
        picks, scales = self._path.read(numbers[:cut])
        blends = [self._genes.blend(numbers[start : start + size]) for start in range(cut, len(numbers), size)]
        of_slots = blends * len(self._path.slots) if self._one else blends
        embedding, norm, *head = blends * 3 if self._one else blends[len(self._path.slots) :]
        return StackRecipe.compose(
            sources=self._context.sources,
            tokenizer=self._context.tokenizer,
            embedding=embedding,
            hops=(Layer(pick.layer, *[of_slots[pick.slot]] * 3) for pick in picks),
            norm=norm,
            head=head[0] if head else embedding,  # a tied head shares the embedding's tensor
            scales=scales,
            scaling=self._settings.scaling,
            vocabulary=self._context.vocabulary,
            seed=self._context.recipe_seed,
            dtype=self._context.dtype,
            calibration=self._context.calibration_of(blends),
            fit=self._context.fit_of(blends),
        )

    def genome_of(self, recipe: Recipe) -> Genome | None:
        return None  # many genomes represent one path

    def baselines(self) -> Iterator[Baseline]:
        """Those of the parameter space: every single source, the uniform average, and the method's usual defaults."""
        path = self._path.point(range(self._context.layers))
        for baseline in self._baselines:
            if path is None or baseline.genome is None:
                yield replace(baseline, genome=None)
            else:
                yield replace(baseline, genome=np.concatenate([path, np.tile(baseline.genome, self._merges)]))
