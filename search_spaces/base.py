"""What search spaces are built from, and the base class of their settings in the search file."""

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
    """A weighted sum of sources that was found before the search; its label names the baseline."""

    label: str
    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Measures:
    """What was measured about the sources' weights at the start of the search.

    Attributes:
        kappa: the factor that gives a space over task vectors one more baseline (``merging.measured.amplitude``); None
            if there is to be no such baseline.
        tiers: the tier of each layer (``merging.adapters.tiers``); None if not measured, in which case they follow the
            depth.
        soups: weighted sums chosen by the losses on calibration texts.
    """

    kappa: float | None = None
    tiers: tuple[int, ...] | None = None
    soups: tuple[Soup, ...] = ()


@dataclass(frozen=True)
class SpaceContext:
    """What the search knows about its models when it builds the space.

    ``sources`` maps names to references, including the base if there is one. ``layers`` is the number of layers of the
    source that provides the tokenizer, ``depths`` that of every source whose number may differ; ``tied`` means that the
    head shares the embedding's weights. ``method`` looks up a merge method by name, and raises InputError if it is
    unknown. ``recipe_seed``, ``dtype`` and ``vocabulary`` become part of every recipe, and ``calibration``, the digest
    of the calibration texts if there are any, part of those whose method needs it; ``fit`` is the digest of the items
    that numbers may be fitted to. ``adapters`` lists the PEFT types of the adapters on each source according to its
    reference, and ``prompts`` what is known about each source's prompt, if it has one. ``measures`` concerns the
    sources' weights, which are only read once a search begins. ``tensors`` lists the names of all tensors of the source
    that provides the tokenizer, if sources are tables of tensors.
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
        """The sources that are merged: all except the base."""
        return tuple(name for name in self.sources if name != self.base)

    def check_needs(self, part: Needing, place: str) -> None:
        """Reject a method or step that needs something the search does not have.

        Raises:
            InputError: naming ``place``.
        """
        check_needs(part, place, has_texts=self.calibration is not None, has_fit=self.fit is not None)

    def calibration_of(self, blends: Iterable[Blend]) -> str | None:
        """The ``calibration`` of a recipe with these blends."""
        return self.calibration if any(map(needs_texts, map(self._needs_of, blends))) else None

    def fit_of(self, blends: Iterable[Blend]) -> str | None:
        """The ``fit`` of a recipe with these blends."""
        return self.fit if any("fit" in self._needs_of(blend) for blend in blends) else None

    def uniform(self, blend: Blend, vision: Blend | None = None) -> StackRecipe:
        """A dense model with the same blend in every part, for example a baseline; ``vision`` as in ``StackRecipe``."""
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
    """The ``space:`` section of the search file; every space has a subclass with its own ``kind``.

    ``mixes_tensors`` means that tensors of different sources are mixed, so that all must have the same number of
    layers; ``moves_layers`` that layers may be moved to other positions; ``engines`` lists the engines that can run the
    space's models; ``takes_prompts`` means that sources may be soft prompts and prefixes, which have no weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mixes_tensors: ClassVar[bool] = True
    moves_layers: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    takes_prompts: ClassVar[bool] = False

    kind: str

    def at(self, root: Path) -> Self:
        """These settings, with relative paths resolved against the folder ``root``."""
        return self

    def build(self, context: SpaceContext) -> SearchSpace:
        """Build the space.

        Raises:
            InputError: the settings do not fit the sources; the place starts with ``space.``.
        """
        raise NotImplementedError
