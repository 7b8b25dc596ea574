"""The base of all kinds of recipes: a model of a search as data, with a canonical text and a hash of it.

A kind is a subclass of ``Recipe`` in the entry point group ``evomerge.recipes``. Its models are made by a builder
(``merging/building/builders.py``) with the same name under ``evomerge.builders``. Reading a recipe needs no builder, so
that searches can be inspected without one.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from evomerge.errors import InputError
from evomerge.plugins import find_plugin

DType = Literal["float32", "float16", "bfloat16"]

STACK = "stack"
"""The kind of a canonical text that names none: recipes are older than kinds."""


class Frozen(BaseModel):
    """Immutable data that rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Recipe(Frozen, ABC):
    """One model of a search, as data.

    ``sources`` maps the short names that the recipe uses to references (a folder or ``org/name@revision``). References
    only say where weights currently are, so the hash excludes them; their contents are fixed by a search's
    fingerprints.

    ``tokenizer`` names the source that provides tokenizer, configuration and chat template. ``dtype`` is the dtype in
    which the model's weights are stored (that of the tokenizer's source if None). ``seed`` keys random numbers.
    ``calibration`` is the digest of the calibration texts, if a method needs them, and ``fit`` that of the items and
    settings to which some of its numbers are fitted (``merging/fitting/fit.py``).
    """

    kind: ClassVar[str]
    """The name of this kind, which is also that of its entry points."""

    takes_prompts: ClassVar[bool] = False
    """Whether its sources may be soft prompts and prefixes, which do not change weights."""

    sources: dict[str, str]
    tokenizer: str
    seed: int = 0
    dtype: DType | None = None
    calibration: str | None = None
    fit: str | None = None

    @abstractmethod
    def used_sources(self) -> set[str]:
        """Names of the sources whose weights this recipe reads."""

    def mixed_sources(self) -> set[str]:
        """The sources that are part of the model itself: without a base that only serves to compute changes."""
        return self.used_sources()

    def refuse_unknown_sources(self, used: Iterable[str] = ()) -> None:
        """Raise ValueError if a source that is used, or one of ``used``, is not one of the recipe's."""
        if missing := sorted((self.used_sources() | {*used, self.tokenizer}) - set(self.sources)):
            raise ValueError(f"unknown source {missing[0]!r}; the sources are {', '.join(sorted(self.sources))}")

    @abstractmethod
    def lines(self) -> list[str]:
        """A description of what the model consists of, in a few lines."""

    @property
    def is_fitted(self) -> bool:
        """Whether some of its numbers are fitted to the items of ``fit``, which takes as long as a fit."""
        return self.fit is not None

    forms: ClassVar[tuple[str, ...]] = ()
    """Additional forms in which models of this kind can be exported, for `evomerge export --as`."""

    def unlike(self, form: str | None) -> str:
        """A sentence on what the exported model is, if it differs from the scored one; empty if it is the same.

        Args:
            form: one of ``forms``; None for the default.
        """
        return ""

    @property
    def rounds_on_export(self) -> bool:
        """Whether the exported model rounds differently from the live one, so that scores may differ slightly."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _of_this_kind(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "kind" not in content:
            return content
        if content["kind"] != cls.kind:
            raise ValueError(f"is of the kind {content['kind']!r}, not {cls.kind!r}")
        return {key: value for key, value in content.items() if key != "kind"}

    @model_serializer(mode="wrap")
    def _with_its_kind(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = self.written(write(self))
        for digest in ("calibration", "fit"):
            if content.get(digest) is None:
                content.pop(digest, None)
        return content if self.kind == STACK else {"kind": self.kind, **content}

    def written(self, content: dict[str, Any]) -> dict[str, Any]:
        """The ``content`` of the fields to write: a kind omits those that carry no information."""
        return content

    def canonical(self) -> str:
        """The canonical JSON text of this recipe: sorted keys, shortest floats, no white space, no references."""
        return canonical_text(self.model_dump(mode="json") | {"sources": sorted(self.sources)})

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical text."""
        return text_hash(self.canonical())


class LayerCount(Protocol):
    """Consecutive layers with something in common."""

    @property
    def layers(self) -> int: ...


_Group = TypeVar("_Group", bound=LayerCount)


def group_holding(groups: Sequence[_Group], layer: int) -> _Group:
    """The group that contains a layer, counted from 0 through all groups. IndexError if there is none."""
    for group in groups:
        if layer < group.layers:
            return group
        layer -= group.layers
    raise IndexError(layer)


def read_recipe(text: str, sources: Mapping[str, str]) -> Recipe:
    """Parse a canonical text; ``sources`` provides the references that it omits.

    Raises:
        InputError: it is of a kind that is not installed.
    """
    content = json.loads(text)
    named = {"sources": {name: sources[name] for name in content["sources"]}}
    return recipe_kind(content, "recipe").model_validate(content | named)


def recipe_kind(content: Mapping[str, Any], place: str) -> type[Recipe]:
    """The kind of recipe that the content names.

    Raises:
        InputError: the kind is not installed, or its entry point is something else.
    """
    name = str(content.get("kind", STACK))
    kind = find_plugin("evomerge.recipes", name, f"{place}.kind")
    if not (isinstance(kind, type) and issubclass(kind, Recipe)):
        raise InputError(f"{place}.kind", f"the entry point {name} of evomerge.recipes is not a subclass of Recipe")
    return kind


def canonical_text(content: object) -> str:
    """JSON with sorted keys, shortest floats and no white space."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_hash(canonical: str) -> str:
    """The hash of a recipe, given its canonical text."""
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
