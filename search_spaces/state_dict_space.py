"""State dicts: how much of each table of tensors goes into each group of tensors, for any network.

Groups are the blocks of image models by their usual names (IN00 ... OUT11), patterns of tensor names, or all tensors at
once. Tensors in no group, and the blocks that are always kept (``evomerge.raw.layouts.KEPT``) unless a group names
them, are copied from the first source, or from the one that ``tokenizer`` or ``base`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, FiniteFloat

from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome, Parameter
from evomerge.method import Method, Point, named_method
from evomerge.raw.blocks import blocks_of, grouped
from evomerge.raw.layouts import KEPT, LAYOUTS
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, ChoiceName
from evomerge.recipes.state_dict import Keys, StateDictRecipe, TensorGroup
from evomerge.step import Step, find_step
from search_spaces.base import SpaceContext, SpaceSettings
from search_spaces.gene import check_ranges
from search_spaces.method_genes import MethodGenes, alone_at
from search_spaces.step_genes import StepSettings, check_steps

Patterns = str | Annotated[tuple[str, ...], Field(min_length=1)]

_EVERY = {"model": ("*",)}


class StateDictSpaceSettings(SpaceSettings):
    """The ``space:`` section of a search file.

    Args:
        method: the merge method, which must need only weights.
        groups: what has its own numbers. "model": all tensors. "blocks": each named block. Or patterns of names of
            tensors or blocks, with a display name: ``{attention: "*attn*", ends: [IN00, OUT11], rest: "*"}``; a tensor
            belongs to the first group that matches it.
        keys: how to treat tensors that not all sources have: "same" rejects them, "union" copies them from the first
            source that has them, "intersection" leaves them out.
        bounds, fixed, switches, steps: as in a parameter space.
    """

    engines: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["state_dict"]
    method: Annotated[str, BeforeValidator(named_method)]
    groups: Literal["model", "blocks"] | Annotated[dict[str, Patterns], Field(min_length=1)] = "model"
    keys: Keys = "same"
    bounds: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(default_factory=dict)
    fixed: dict[str, FiniteFloat | ChoiceName] = Field(default_factory=dict)
    switches: dict[str, bool] = Field(default_factory=dict)
    steps: dict[str, StepSettings] = Field(default_factory=dict)

    def build(self, context: SpaceContext) -> StateDictSpace:
        method = context.method(self.method)
        parts: dict[str, Method | Step] = {"space.method": method}
        parts |= {f"space.steps.{name}": find_step(name, f"space.steps.{name}") for name in self.steps}
        for place, part in parts.items():
            if part.needs:
                problem = f"{part.name} needs {' and '.join(part.needs)}, and a table of tensors cannot be run on texts"
                raise InputError(place, problem, "Choose one that uses only weights, such as linear or ties.")
        if method.needs_base and context.base is None:
            raise InputError("base", f"{method.name} merges task vectors and needs a base", "Name it: `base: NAME`.")
        check_ranges(method.name, method.parameters, self.bounds, self.fixed, "space")
        check_steps(self.steps, context)
        for name in self.switches:
            if name not in method.switches:
                known = ", ".join(sorted(method.switches)) or "none"
                raise InputError(f"space.switches.{name}", f"{method.name} has no such setting; it has: {known}")
        patterns = self.patterns(context.tensors())
        space = StateDictSpace(self, context, method, patterns)
        if not space.parameters:
            raise InputError("space.fixed", "leaves nothing to search", "Leave out at least one parameter.")
        return space

    def patterns(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The patterns of each group.

        Args:
            names: the names of the first source's tensors.

        Raises:
            InputError: there are no blocks, or a pattern matches no tensor.
        """
        if self.groups == "model":
            return dict(_EVERY)
        if self.groups == "blocks":
            blocks = sorted({block for block in blocks_of(names).values() if block and block not in KEPT})
            if not blocks:
                problem = "is blocks, and the names of these tensors match no model with known blocks"
                known = ", ".join(layout.name for layout in LAYOUTS)
                hint = f'Give patterns of names: `groups: {{first: "layer1.*"}}`. Known models: {known}.'
                raise InputError("space.groups", problem, hint)
            return {block: (block,) for block in blocks}
        by_group = {g: (one,) if isinstance(one, str) else one for g, one in self.groups.items()}
        for group, patterns in by_group.items():
            for pattern in patterns:
                if not grouped(names, {group: (pattern,)}):
                    problem = f"{pattern!r} is the name of no tensor and of no block of the first source"
                    blocks = sorted({block for block in blocks_of(names).values() if block})
                    known = f"Blocks: {', '.join(blocks)}. " if blocks else ""
                    raise InputError(f"space.groups.{group}", problem, f"{known}A tensor is called {names[0]}.")
        held = set(grouped(names, by_group).values())
        if empty := [group for group in by_group if group not in held]:
            problem = "has no tensor: those of its patterns are all in groups before it"
            raise InputError(f"space.groups.{empty[0]}", problem, "Put it before them, or leave it out.")
        return by_group


class StateDictSpace:
    """See the module docstring, and ``evomerge.genome.SearchSpace``."""

    layer_buffers = hops = 0

    def __init__(
        self,
        settings: StateDictSpaceSettings,
        context: SpaceContext,
        method: Method,
        patterns: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._settings, self._context, self._method, self._patterns = settings, context, method, patterns
        self._genes = MethodGenes(
            method, context, settings.bounds, settings.fixed, settings.switches, steps=settings.steps
        )
        self.parameters: tuple[Parameter, ...] = tuple(
            parameter for group in patterns for parameter in self._genes.parameters(group, group)
        )

    def decode(self, genome: Genome) -> StateDictRecipe:
        numbers, size = genome.tolist(), len(self._genes)
        return self._recipe(
            {group: self._genes.blend(numbers[n * size : (n + 1) * size]) for n, group in enumerate(self._patterns)}
        )

    def genome_of(self, recipe: Recipe) -> Genome | None:
        """The point of a recipe with the same groups; None for any other."""
        if not isinstance(recipe, StateDictRecipe) or [g.name for g in recipe.groups] != list(self._patterns):
            return None
        numbers: list[float] = []
        for group in recipe.groups:
            if (nearest := self._genes.nearest(group.blend)) is None:
                return None
            numbers += nearest
        return np.array(numbers, dtype=np.float64)

    def baselines(self) -> Iterator[Baseline]:
        """Every single source, unchanged; the average; the method's defaults."""
        mixed = self._context.mixed
        covered = len(grouped(self._context.tensors(), self._patterns)) == len(self._context.tensors())
        sources = dict(self._context.sources)
        for name in sources:
            alone = self._genome_at(partial(alone_at, mixed=mixed, source=name)) if covered else None
            recipe = StateDictRecipe(sources=sources, tokenizer=name, seed=self._context.recipe_seed)
            yield Baseline(name, "source", recipe, alone)
        average = Blend.weighted_sum({name: 1.0 / len(mixed) for name in mixed})
        uniform = self._genome_at(lambda method: None if method.uniform is None else method.uniform(mixed))
        yield Baseline("uniform average", "average", self._recipe(dict.fromkeys(self._patterns, average)), uniform)
        for method, numbers in self._genes.defaults():
            usual = self._genome(numbers)
            yield Baseline(f"{method.name} defaults", "default", self.decode(usual), usual)

    def _genome_at(self, point_of: Callable[[Method], Point | None]) -> Genome | None:
        """The genome with every group at a point of the method; None if there is none."""
        numbers = self._genes.numbers_at(point_of)
        return None if numbers is None else self._genome(numbers)

    def _genome(self, numbers: Sequence[float]) -> Genome:
        return np.array([*numbers] * len(self._patterns), dtype=np.float64)

    def _recipe(self, blends: Mapping[str, Blend]) -> StateDictRecipe:
        return StateDictRecipe(
            sources=dict(self._context.sources),
            tokenizer=self._context.tokenizer,
            seed=self._context.recipe_seed,
            dtype=self._context.dtype,
            groups=tuple(TensorGroup(name=g, patterns=self._patterns[g], blend=blends[g]) for g in self._patterns),
            keys=self._settings.keys,
        )
