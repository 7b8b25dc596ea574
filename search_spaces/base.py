"""What a search space is made from, and the settings that the search file gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

from evomerge.genome import SearchSpace
from evomerge.method import Method, Need, Needing, check_needs, needs_texts
from evomerge.recipes.base import DType
from evomerge.recipes.prompts import PromptFacts
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.step import needs_of_steps
from evomerge.vocabulary import Vocabulary


@dataclass(frozen=True)
class Soup:
    """A weighted sum of sources that was found before the search, a baseline by its label."""

    label: str
    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Measures:
    """What was measured of the sources' weights when the search began.

    Attributes:
        kappa: the factor of the law by which a space over task vectors has one more baseline
            (``merging.measured.amplitude``); None where it is to have none.
        tiers: that of each layer (``merging.adapters.tiers``); None where they are not measured: they then follow the
            depth.
        soups: by the losses of calibration texts.
    """

    kappa: float | None = None
    tiers: tuple[int, ...] | None = None
    soups: tuple[Soup, ...] = ()


@dataclass(frozen=True)
class SpaceContext:
    """What the search knows of its models when it builds the space.

    ``sources`` maps names to references and holds the base too, when there is one. ``layers`` counts the layers of the
    tokenizer's source, ``depths`` those of each source whose number may be another; ``tied`` says that the head is the
    embedding. ``method`` looks a merge method up by name and raises InputError for an unknown one. ``recipe_seed``,
    ``dtype`` and ``vocabulary`` go into every recipe, and ``calibration``, the digest of the calibration texts where
    there are any, into those whose method needs it; ``fit`` is that of the items that numbers may be fitted to.
    ``adapters`` gives the PEFT types of the adapters on a source, as references tell, and ``prompts`` what is known of
    each source's prompt, where it has one. ``measures`` are of the sources' weights, which nobody reads before a search
    begins. ``tensors`` gives the names of all tensors of the tokenizer's source, where sources are tables of tensors.
    """

    sources: Mapping[str, str]
    base: str | None
    tokenizer: str
    layers: int
    tied: bool
    method: Callable[[str], Method]
    recipe_seed: int
    dtype: DType | None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    depths: Mapping[str, int] = field(default_factory=dict)
    calibration: str | None = None
    fit: str | None = None
    adapters: Callable[[str], tuple[str, ...]] = lambda name: ()
    measures: Measures = field(default_factory=Measures)
    prompts: Mapping[str, PromptFacts] = field(default_factory=dict)
    tensors: Callable[[], Sequence[str]] = tuple

    @property
    def mixed(self) -> tuple[str, ...]:
        """The sources that are merged: all but the base."""
        return tuple(name for name in self.sources if name != self.base)

    def check_needs(self, part: Needing, place: str) -> None:
        """Refuse a method or a step that needs what the search has not.

        Raises:
            InputError: naming ``place``.
        """
        check_needs(part, place, has_texts=self.calibration is not None, has_fit=self.fit is not None)

    def calibration_of(self, blends: Iterable[Blend]) -> str | None:
        """What a recipe of these blends says of calibration."""
        return self.calibration if any(map(needs_texts, map(self._needs_of, blends))) else None

    def fit_of(self, blends: Iterable[Blend]) -> str | None:
        """What a recipe of these blends says of a fit."""
        return self.fit if any("fit" in self._needs_of(blend) for blend in blends) else None

    def uniform(self, blend: Blend, vision: Blend | None = None) -> StackRecipe:
        """A dense model of one blend in every part, such as a baseline; ``vision`` as in ``StackRecipe``."""
        return StackRecipe.uniform(
            blend,
            vision=vision,
            fit=self.fit_of([blend]),
            sources=self.sources,
            tokenizer=self.tokenizer,
            layers=self.layers,
            vocabulary=self.vocabulary,
            seed=self.recipe_seed,
            dtype=self.dtype,
        )

    def _needs_of(self, blend: Blend) -> set[Need]:
        return {*self.method(blend.method).needs, *needs_of_steps(blend)}

    def depth(self, source: str) -> int:
        """How many layers a source has."""
        return self.depths.get(source, self.layers)


class SpaceSettings(BaseModel):
    """What the search file says of a space; each space's file has its own subclass with its own ``kind``.

    ``mixes_tensors`` says that tensors of different sources are mixed, so that all must have equally many layers;
    ``moves_layers`` that layers may stand in other places than their own; ``engines`` which can answer with its models;
    ``takes_prompts`` that sources may be soft prompts and prefixes, which have no weights of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mixes_tensors: ClassVar[bool] = True
    moves_layers: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    takes_prompts: ClassVar[bool] = False

    kind: str

    def at(self, root: Path) -> Self:
        """These settings, with the paths in them taken from the folder ``root``."""
        return self

    def build(self, context: SpaceContext) -> SearchSpace:
        """Make the space.

        Raises:
            InputError: settings that do not fit the sources; the place starts with ``space.``.
        """
        raise NotImplementedError
