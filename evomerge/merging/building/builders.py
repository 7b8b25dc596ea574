"""Builders: make the models that recipes describe, one builder for each kind of recipe.

A builder is a class under the entry point group ``evomerge.builders``, by the name of its kind (``recipes/base.py``).
Code that needs models asks ``Builders`` or ``find_builder`` for it, and does not know any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch

from evomerge.calibration import Calibration
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.arithmetic.device import Residency
from evomerge.merging.fitting.fit import Fit
from evomerge.merging.materialise import check_opened
from evomerge.merging.measured.evidence import Evidence
from evomerge.plugins import find_plugin
from evomerge.recipes.base import STACK, Recipe

if TYPE_CHECKING:  # a live model needs transformers, which takes seconds to import; a merge to a folder does not
    from evomerge.checkpoints.live import LiveModel, ServingEngine


CPU = torch.device("cpu")

_Made = TypeVar("_Made", bound=Recipe, contravariant=True)


def _nothing(done: int, of: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class BuildContext:
    """What models are made from and for.

    Attributes:
        sources: opened, by the names that recipes use.
        evidence: about these sources, shared with other processes.
        devices: where live models are kept; several devices share a model's layers.
        dtype: of their weights; None means that of the tokenizer's source.
        tokenizer: the source that gives tokenizer and configuration.
        layers: the largest number of different layers in a recipe of the search.
        residency: where sources are kept for a model on a GPU; None chooses by the available room.
        calibration: texts that methods may need.
        fit: items that numbers may be fitted to.
        engine: makes the engine that answers prompts with a live model; None for transformers.
        base: the source that models' changes are measured from (``merging.measured.change``), or None.
        keep: where the stages of recipes are kept as folders; None does not keep them.
        form: the one of its recipe's ``forms`` in which a model is exported; None for the usual one.
        shared: the builders of this context by kind, so that one can use another's live model.
    """

    sources: Mapping[str, Source]
    tokenizer: str
    evidence: Evidence = field(default_factory=Evidence)
    devices: tuple[torch.device, ...] = (CPU,)
    dtype: torch.dtype | None = None
    layers: int | None = None
    residency: Residency | None = None
    calibration: Calibration | None = None
    fit: Fit | None = None
    engine: Callable[[LiveModel], ServingEngine] | None = None
    base: str | None = None
    keep: Path | None = None
    form: str | None = None
    shared: dict[str, object] = field(default_factory=dict, compare=False, repr=False)


class Builder(Protocol[_Made]):
    """Makes the models of one kind of recipe, in one process.

    What is scored is what is exported: ``write`` and ``export`` make the same model of the same recipe, on every
    machine, whatever was made before.
    """

    def __init__(self, context: BuildContext) -> None: ...

    @staticmethod
    def check(recipe: _Made, sources: Mapping[str, Source]) -> None:
        """Refuse a recipe that cannot be made from these sources. Opens no tensor; called for every candidate.

        Raises:
            InputError: naming the part of the recipe.
        """
        ...

    def start(self) -> None:
        """Allocate the memory for live models, and report errors in them before the first candidate.

        Raises:
            InputError: such as a tokenizer that cannot be loaded.
        """
        ...

    def calibrate(self, recipe: _Made, source: str) -> None:
        """Record what recipes like this one need from running a source over the calibration texts."""
        ...

    def fit(self, recipe: _Made) -> None:
        """Fit the fitted parts of recipes like this one to the items of ``BuildContext.fit``, and keep them as
        evidence.

        Existing results are not computed again. Called before the first candidate for every baseline that names a fit;
        ``write`` and ``export`` must compute the same if evidence is lost.

        Raises:
            InputError: it cannot be fitted, for example because the recipe names another fit.
            NotFiniteError: the loss or a derivative of it is NaN or Inf.
        """
        ...

    def write(self, recipe: _Made) -> LiveModel:
        """The model, ready to be scored, until the next one is written.

        Raises:
            InputError: it cannot be made from these sources.
            NotFiniteError: it contains or computes NaN or Inf.
        """
        ...

    def export(
        self,
        recipe: _Made,
        out: Path,
        *,
        texts: Mapping[str, str],
        check: Callable[[Path], None] | None = None,
        progress: Callable[[int, int], None] = _nothing,
    ) -> None:
        """Make the folder ``out`` with the model and ``texts`` by file name, or nothing (see ``export.write_model``).

        Args:
            check: called with the complete folder under its temporary name, which is removed if it raises.
            progress: called with the number of written tensors and of all tensors.
        """
        ...

    def reload(self, folder: Path) -> LiveModel:
        """An exported folder, loaded as its users would load it, without any state of this process.

        Raises:
            InputError: it cannot be loaded, or contains or computes NaN or Inf.
        """
        ...


class BuilderBase:
    """The base of a builder whose models need no calibration texts and have nothing that is fitted."""

    def calibrate(self, recipe: Recipe, source: str) -> None:
        """Do nothing: no weight follows from what layers are given."""

    def fit(self, recipe: Recipe) -> None:
        """Do nothing: no number is fitted to items."""


def find_builder(kind: str) -> type[Builder[Recipe]]:
    """The class of the builder of a kind of recipe.

    Raises:
        InputError: none is installed.
    """
    return cast(type[Builder[Recipe]], find_plugin("evomerge.builders", kind, "recipe.kind"))


def check_recipe(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """Refuse a recipe that cannot be made from these sources. Opens no tensor.

    Raises:
        InputError: a source is not open, reads images where a recipe of this kind knows of none, or what its builder
            says.
    """
    check_opened(recipe, sources)
    seeing = [name for name in sorted(recipe.used_sources()) if sources[name].takes_images]
    if seeing and recipe.kind != STACK:
        problem = f"{seeing[0]} reads images, and a {recipe.kind} is made of text-only models"
        raise InputError(sources[seeing[0]].place, problem, "Merge weights or layers: `kind: parameter_space`.")
    find_builder(recipe.kind).check(recipe, sources)


class Builders:
    """The builders of one process, created with the first recipe of their kind."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context

    @property
    def evidence(self) -> Evidence:
        """Keeps what is computed once, for all processes of a search."""
        return self._context.evidence

    def start(self, kinds: Iterable[str]) -> None:
        """Have builders allocate their memory. Raises InputError: an error in a model."""
        for kind in sorted(kinds):
            self.of_kind(kind).start()

    def of(self, recipe: Recipe) -> Builder[Recipe]:
        """The builder of a recipe's kind."""
        return self.of_kind(recipe.kind)

    def of_kind(self, kind: str) -> Builder[Recipe]:
        """The builder of a kind of recipe."""
        shared = self._context.shared
        if kind not in shared:
            shared[kind] = find_builder(kind)(self._context)
        return cast(Builder[Recipe], shared[kind])
