"""Recipes in stages: a sequence of merges in which later ones use earlier ones like models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator

from evomerge.recipes.base import Frozen, Recipe
from evomerge.recipes.stack import StackRecipe


class Stage(Frozen):
    """One merge of several.

    Attributes:
        name: the name by which later stages refer to it.
        takes: for each source of its recipe, the source of the whole recipe or the earlier stage that it is.
        recipe: the merge; its own references are meaningless.
    """

    name: str = Field(min_length=1)
    takes: dict[str, str]
    recipe: StackRecipe

    @classmethod
    def of(cls, name: str, takes: Mapping[str, str], recipe: StackRecipe) -> Stage:
        """A stage for a recipe, without the recipe's references."""
        bare = recipe.model_copy(update={"sources": dict.fromkeys(recipe.sources, "")})
        return cls(name=name, takes={source: takes[source] for source in recipe.sources}, recipe=bare)


class StagedRecipe(Recipe):
    """A sequence of merges, each of sources and of earlier merges; the last one is the model.

    A stage is never rounded before the next one uses it: it is computed in float32, tensor by tensor, on demand.
    """

    kind: ClassVar[str] = "staged"

    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> StagedRecipe:
        known = set(self.sources)
        for stage in self.stages:
            if missing := sorted(set(stage.takes.values()) - known):
                raise ValueError(f"stage {stage.name!r} takes {missing[0]!r}, no source and no stage before it")
            if stage.takes.keys() != stage.recipe.sources.keys():
                raise ValueError(f"stage {stage.name!r} does not say what each of its sources is")
            if stage.name in known:
                raise ValueError(f"{stage.name!r} names two of the sources and stages")
            for key in ("calibration", "fit"):
                if getattr(stage.recipe, key) is not None:
                    raise ValueError(f"stage {stage.name!r} has a {key}; make that merge first, and name its folder")
            known.add(stage.name)
        self.refuse_unknown_sources()
        return self

    @classmethod
    def of(cls, stages: tuple[Stage, ...], sources: Mapping[str, str]) -> StagedRecipe:
        """The recipe for some stages; the tokenizer is that of the source from which the last stage takes its own."""
        by_name = {stage.name: stage for stage in stages}
        tokenizer = stages[-1].name
        while tokenizer in by_name:
            stage = by_name[tokenizer]
            tokenizer = stage.takes[stage.recipe.tokenizer]
        last = stages[-1].recipe
        return cls(sources=dict(sources), tokenizer=tokenizer, seed=last.seed, dtype=last.dtype, stages=stages)

    def used_sources(self) -> set[str]:
        return {taken for stage in self.stages for taken in stage.takes.values()} & self.sources.keys()

    def lines(self) -> list[str]:
        made = []
        for number, stage in enumerate(self.stages):
            what = "the model" if number == len(self.stages) - 1 else f"stage {stage.name}"
            renamed = [f"{own} is {taken}" for own, taken in stage.takes.items() if own != taken]
            made.append(f"{what}{' where ' + ', '.join(renamed) if renamed else ''}:")
            made.extend(f"  {line}" for line in stage.recipe.lines())
        return made
