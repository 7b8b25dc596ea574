"""Stages: merges one after another, each either fixed or with its own searched numbers."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evomerge.errors import InputError
from evomerge.faults import explain
from evomerge.genome import Baseline, Genome, Parameter, SearchSpace
from evomerge.mergekit import load_recipe_file
from evomerge.plugins import find_plugin
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.recipes.staged import Stage, StagedRecipe
from search_spaces.base import Measures, SpaceContext, SpaceSettings
from search_spaces.hybrid_space import no_mergekit

_SPACES = ("parameter_space", "data_flow_space", "hybrid_space")
"""Spaces whose recipes are stacks, as stages require."""


class StageSettings(BaseModel):
    """One stage.

    Args:
        name: the name by which later stages refer to it.
        sources: what it merges: sources of the file except the base, and earlier stages; by default all sources and no
            stage.
        base: the source or stage that its task vectors are relative to; by default the file's base.
        recipe: a recipe file, for a stage that is not searched, relative to the search file. Its sources have the same
            names as here.
        space: the space of a stage that is searched, as under `space:`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")
    sources: tuple[str, ...] | None = None
    base: str | None = None
    recipe: Path | None = None
    space: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_fixed_or_searched(self) -> Self:
        if (self.recipe is None) == (self.space is None):
            raise ValueError("needs either `recipe:`, a file, or `space:`, what is searched of it")
        return self


class StagedSpaceSettings(SpaceSettings):
    """The ``space:`` section of a search file.

    Args:
        stages: in the order in which they are made; the last one is the model.
    """

    kind: Literal["staged"] = "staged"
    stages: tuple[StageSettings, ...] = Field(min_length=2)

    def at(self, root: Path) -> Self:
        def placed(stage: StageSettings) -> StageSettings:
            if stage.recipe is None:
                return stage
            path = Path(os.path.realpath(os.path.join(root, os.path.expanduser(stage.recipe))))
            return stage.model_copy(update={"recipe": path})

        return self.model_copy(update={"stages": tuple(placed(stage) for stage in self.stages)})

    def build(self, context: SpaceContext) -> SearchSpace:
        return StagedSpace(self, context)


@dataclass(frozen=True)
class _Stage:
    """A stage that can be built: from a fixed recipe, or from a space."""

    name: str
    takes: Mapping[str, str]
    recipe: StackRecipe | None
    space: SearchSpace | None

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters of its space, prefixed with the stage's name."""
        if self.space is None:
            return []
        return [
            replace(
                p,
                name=f"{self.name}.{p.name}",
                group=f"{self.name} {p.group}".strip(),
                share_of="",
                places=(),
                what="",
                differentiable=False,
            )
            for p in self.space.parameters
        ]

    def made(self, genome: Genome) -> Stage:
        """The stage for these numbers of its space."""
        recipe = self.recipe if self.space is None else self.space.decode(genome)
        assert isinstance(recipe, StackRecipe)
        return Stage.of(self.name, self.takes, recipe)


class StagedSpace:
    """The parameters of all searched stages, one stage after another.

    Raises:
        InputError: a stage refers to something that does not exist, or its space does not fit its sources.
    """

    def __init__(self, settings: StagedSpaceSettings, context: SpaceContext) -> None:
        self._context = context
        if context.vocabulary.aligns:
            hint = "Merge models of one tokenizer in stages, or make the first stage with `evomerge merge`."
            raise InputError("vocabulary", "takes rows of tokens from sources, and a stage has none", hint)
        self._stages: list[_Stage] = []
        known = {name: context.depth(name) for name in context.sources}
        for number, stage in enumerate(settings.stages):
            place = f"space.stages[{number}]"
            if stage.name in known:
                raise InputError(f"{place}.name", f"{stage.name!r} is the name of a source or of a stage before it")
            made, depth = self._stage(stage, known, place)
            self._stages.append(made)
            known[stage.name] = depth
        used = {taken for stage in self._stages for taken in stage.takes.values()}
        if unused := [made.name for made in self._stages[:-1] if made.name not in used]:
            hint = f"Name it in a later stage: `sources: [{unused[0]}, ...]`."
            raise InputError("space.stages", f"{unused[0]} is used by no later stage", hint)
        self.parameters = [parameter for stage in self._stages for parameter in stage.parameters]
        if not self.parameters:
            raise InputError("space.stages", "none of them is searched", "Give one of them `space:`.")
        last = self._stages[-1]
        self.hops = context.layers if last.space is None else last.space.hops
        self.layer_buffers = context.layers if last.space is None else last.space.layer_buffers

    def _stage(self, stage: StageSettings, known: Mapping[str, int], place: str) -> tuple[_Stage, int]:
        base = stage.base or self._context.base
        names = [name for name in self._context.sources if name != base] if stage.sources is None else stage.sources
        wanted = list(dict.fromkeys([*([base] if base is not None else []), *names]))
        for name in wanted:
            if name not in known:
                problem = f"there is no source and no earlier stage {name!r}"
                raise InputError(place, problem, f"There are: {', '.join(known)}.")
        takes = {name: name for name in wanted}
        if stage.recipe is not None:
            recipe = self._fixed(stage.recipe, takes, f"{place}.recipe")
            return _Stage(stage.name, {name: takes[name] for name in recipe.sources}, recipe, None), len(recipe.hops)
        context = replace(
            self._context, sources={name: self._context.sources.get(name, name) for name in wanted}, base=base,
            tokenizer=base or wanted[0], depths={name: known[name] for name in wanted}, layers=known[base or wanted[0]],
            calibration=None, fit=None, measures=Measures(), prompts={}, adapters=lambda name: (),
        )  # fmt: skip
        space = _space(stage.space or {}, context, f"{place}.space")
        return _Stage(stage.name, takes, None, space), space.hops

    def _fixed(self, path: Path, takes: Mapping[str, str], place: str) -> StackRecipe:
        recipe = load_recipe_file(path, no_mergekit)
        if not isinstance(recipe, StackRecipe):
            raise InputError(place, f"is a recipe of the kind {recipe.kind}, which cannot be a stage")
        recipe = recipe.model_copy(update={"sources": {n: r for n, r in recipe.sources.items() if n in _used(recipe)}})
        if missing := sorted(recipe.sources.keys() - takes.keys()):
            problem = f"merges {missing[0]!r}, which is not among this stage's sources"
            raise InputError(place, problem, f"Name it under `sources:`; these are {', '.join(takes)}.")
        return recipe

    def decode(self, genome: Genome) -> StagedRecipe:
        stages, start = [], 0
        for stage in self._stages:
            stop = start + len(stage.parameters)
            stages.append(stage.made(genome[start:stop]))
            start = stop
        return self._recipe(tuple(stages))

    def _recipe(self, stages: tuple[Stage, ...]) -> StagedRecipe:
        recipe = StagedRecipe.of(stages, self._context.sources)
        update = {"seed": self._context.recipe_seed, "dtype": self._context.dtype, "tokenizer": self._context.tokenizer}
        return recipe.model_copy(update=update)

    def genome_of(self, recipe: Recipe) -> Genome | None:
        return None  # several searched stages can represent one model in many ways

    def baselines(self) -> Iterator[Baseline]:
        """Every single source, the uniform average, and all stages at the defaults of their parameters."""
        context = self._context
        alone = [name for name in context.sources if context.depth(name) == context.layers]
        for name in alone:
            yield Baseline(name, "source", self._one(Blend.copy_of(name), [name]), None)
        mixed = [name for name in context.mixed if name in alone]
        if len(mixed) > 1:
            mean = Blend.weighted_sum(dict.fromkeys(mixed, 1.0 / len(mixed)))
            yield Baseline("uniform average", "average", self._one(mean, mixed), None)
        defaults = np.array([parameter.default for parameter in self.parameters])
        yield Baseline("stages at their defaults", "default", self.decode(defaults), defaults)

    def _one(self, blend: Blend, names: list[str]) -> StagedRecipe:
        """A model with one stage."""
        sources = dict.fromkeys(dict.fromkeys([*names, self._context.tokenizer]), "")
        recipe = StackRecipe.uniform(
            blend, sources=sources, tokenizer=self._context.tokenizer, layers=self._context.layers
        )
        return self._recipe((Stage.of("alone", {name: name for name in sources}, recipe),))


def _used(recipe: StackRecipe) -> set[str]:
    return recipe.used_sources() | {recipe.tokenizer}


def _space(content: Mapping[str, Any], context: SpaceContext, place: str) -> SearchSpace:
    kind = str(content.get("kind", _SPACES[0]))
    if kind not in _SPACES:
        raise InputError(f"{place}.kind", f"{kind!r} makes no stage", f"These do: {', '.join(_SPACES)}.")
    settings: Any = find_plugin("evomerge.search_spaces", kind, f"{place}.kind")
    given = {**content, "kind": kind}
    try:
        built: SearchSpace = settings.model_validate(given).build(context)
    except InputError as error:
        raise InputError(f"{place}: {error.place}", error.problem, error.hint) from error
    except ValidationError as error:
        raise explain(error, place, settings, given, ".") from None
    return built
