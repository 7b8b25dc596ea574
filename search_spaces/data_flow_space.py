"""Data-flow space: the path that a token takes through the layers of all sources, whose weights do not change.

This is the data-flow half of Akiba et al., "Evolutionary Optimization of Model Merging Recipes" (arXiv 2403.13187,
section 3.2). Model A, the source that provides the tokenizer, also provides the embedding, the final norm and the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome
from evomerge.plugins import unknown_name
from evomerge.recipes.base import DType, Recipe
from evomerge.recipes.stack import Blend, StackRecipe
from search_spaces.base import SpaceContext
from search_spaces.paths import PathGenes, PathSettings


class DataFlowSpaceSettings(PathSettings):
    """The ``space:`` section of a search file, in addition to ``PathSettings``.

    Args:
        first: the name of model A, which must be the source that provides the tokenizer; that is also the default.
        others: the sources whose layers a path may use besides those of A; all sources of the file by default. They may
            differ in their number of layers, but not in width.
    """

    mixes_tensors: ClassVar[bool] = False

    kind: Literal["data_flow_space"] = "data_flow_space"
    first: str | None = None
    others: tuple[str, ...] | None = None

    def build(self, context: SpaceContext) -> DataFlowSpace:
        first = context.tokenizer
        if self.first is not None and self.first not in context.sources:
            raise unknown_name(self.first, context.sources, "space.first", "source")
        if self.first not in (None, first):
            problem = f"is {self.first}, but {first} gives the tokenizer, and model A gives the embeddings for it"
            raise InputError("space.first", problem, f"Write `tokenizer: {self.first}`.")
        names = (first, *other_sources(self, self.others, context, first))
        pool = [source_member(name, context.depth(name)) for name in names]
        return DataFlowSpace(self, pool, context, seed=context.recipe_seed, dtype=context.dtype)


def other_sources(
    settings: PathSettings, others: Sequence[str] | None, context: SpaceContext, first: str | None
) -> tuple[str, ...]:
    """The sources besides model A; ``first`` is A's name if it is a source.

    Raises:
        InputError: ``others`` names something that is not a source, or a source twice, or A; or it is given for
            pruning, which uses only A.
    """
    if others is None:
        return () if settings.encoding == "pruning" else tuple(name for name in context.sources if name != first)
    for number, name in enumerate(others):
        if name not in context.sources:
            raise unknown_name(name, context.sources, "space.others", "source")
        if name == first:
            raise InputError("space.others", f"names {name}, which is model A and takes part anyway", "Leave it out.")
        if name in others[:number]:
            raise InputError("space.others", f"names {name} twice", "Once is enough: paths may repeat layers.")
    if others and settings.encoding == "pruning":
        raise InputError("space.others", "names sources, but pruning uses only model A", "Leave it out.")
    return tuple(others)


class Layer(NamedTuple):
    """The content of a hop, in the form that ``StackRecipe.compose`` takes."""

    layer: int | Mapping[str, int]
    attention: Blend
    mlp: Blend
    norm: Blend


@dataclass(frozen=True)
class Member:
    """A model of the pool, named by its label: its layers, and the parts outside them."""

    label: str
    embedding: Blend
    layers: Sequence[Layer]
    norm: Blend
    head: Blend


def source_member(name: str, layers: int) -> Member:
    """A source, unchanged."""
    blend = Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}})
    return Member(name, blend, [Layer(layer, blend, blend, blend) for layer in range(layers)], blend, blend)


class DataFlowSpace:
    """Paths through the layers of a pool of models, the first of which is model A; see the module docstring.

    Args:
        settings: the settings of the paths.
        pool: the models.
        context: what is known about the search.
        seed: the seed of every recipe.
        dtype: the dtype of every recipe.

    Raises:
        InputError: the settings contradict each other or do not fit the pool.
    """

    def __init__(
        self,
        settings: PathSettings,
        pool: Sequence[Member],
        context: SpaceContext,
        *,
        seed: int,
        dtype: DType | None,
        calibration: str | None = None,
        fit: str | None = None,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._context = context
        self._seed, self._dtype, self._calibration, self._fit = seed, dtype, calibration, fit
        self._layers = [layer for member in pool for layer in member.layers]
        self._genes = PathGenes(settings, {member.label: len(member.layers) for member in pool})
        self.parameters = self._genes.parameters
        self.layer_buffers, self.hops = len(self._layers), self._genes.most

    def decode(self, genome: Genome) -> StackRecipe:
        picks, scales = self._genes.read(genome.tolist())
        return self._recipe(self._pool[0], [pick.layer for pick in picks], scales)

    def genome_of(self, recipe: Recipe) -> Genome | None:
        return None  # many genomes represent one path

    def baselines(self) -> Iterator[Baseline]:
        """Every single model of the pool, and paths that people commonly stack by hand, each recipe once.

        The latter are: the lower half of A with the upper half of another model; the middle of another model between
        the lowest and the highest quarter of A; and depth up-scaling, A without its last quarter followed by A without
        its first (Kim et al., "SOLAR 10.7B", arXiv 2312.15166), if that many hops are allowed. If the ends of A are
        fixed, these paths respect that.
        """
        seen = set()
        for member, layers in zip(self._pool, self._spans(), strict=True):
            recipe = self._recipe(member, layers)
            seen.add(recipe.hash)
            yield Baseline(member.label, "source", recipe, self._point(layers) if member is self._pool[0] else None)
        for label, path in self._by_hand():
            path = self._genes.with_fixed_ends(path)
            recipe = self._recipe(self._pool[0], path)
            if len(path) <= self._genes.most and recipe.hash not in seen:
                seen.add(recipe.hash)
                yield Baseline(label, "default", recipe, self._point(path))

    def _spans(self) -> list[range]:
        """The layer numbers of each model."""
        spans, start = [], 0
        for member in self._pool:
            spans.append(range(start, start + len(member.layers)))
            start += len(member.layers)
        return spans

    def _by_hand(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        (first, *others), (a, *rest) = self._pool, self._spans()
        quarter = max(1, len(a) // 4)
        for member, b in zip(others, rest, strict=True):
            yield f"{first.label} then {member.label}", (*a[: len(a) // 2], *b[len(b) // 2 :])
        for member, b in zip(others, rest, strict=True):
            middle = b[max(1, len(b) // 4) : len(b) - max(1, len(b) // 4)]
            yield f"{member.label} inside {first.label}", (*a[:quarter], *middle, *a[-quarter:])
        if len(a) > 1:
            yield f"{first.label} up-scaled", (*a[:-quarter], *a[quarter:])

    def _point(self, path: Sequence[int]) -> Genome | None:
        numbers = self._genes.point(path)
        return None if numbers is None else np.array(numbers, dtype=np.float64)

    def _recipe(self, ends: Member, path: Sequence[int], scales: Sequence[float] | None = None) -> StackRecipe:
        """The recipe of a path; ``ends`` provides the parts outside of it."""
        return StackRecipe.compose(
            sources=self._context.sources,
            tokenizer=self._context.tokenizer,
            embedding=ends.embedding,
            hops=(self._layers[layer] for layer in path),
            norm=ends.norm,
            head=ends.head,
            scales=scales,
            scaling=self._settings.scaling,
            vocabulary=self._context.vocabulary,
            seed=self._seed,
            dtype=self._dtype,
            calibration=self._calibration,
            fit=self._fit,
        )
