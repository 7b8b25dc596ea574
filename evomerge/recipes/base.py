"""What every kind of recipe is: a model of a search as data, with one canonical text and a hash of it.

A kind is a subclass of ``Recipe`` under the entry point group ``evomerge.recipes``; what makes its models is a builder
(``merging/building/builders.py``) under ``evomerge.builders``, of the same name. Reading a recipe needs no builder, so
that searches can be looked at without one.
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
"""The kind that a canonical text is of when it names none: recipes are older than their kinds."""


class Frozen(BaseModel):
    """Data that does not change, and refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Recipe(Frozen, ABC):
    """One model of a search, as data.

    ``sources`` maps the short names that the recipe uses to references (a folder or ``org/name@revision``). References
    say where weights lie today, so the hash leaves them out; what they hold is fixed by the fingerprints of a search.

    ``tokenizer`` names the source that gives tokenizer, configuration and chat template. ``dtype`` is what the model's
    weights are stored as (that of the tokenizer's source when None). ``seed`` keys whatever is drawn.
    ``calibration`` is the digest of the texts that it is made by, where a method needs any, and ``fit`` that of the
    items and settings by which numbers of it are fitted (``merging/fitting/fit.py``).
    """

    kind: ClassVar[str]
    """The name of this kind, which is that of its entry points."""

    takes_prompts: ClassVar[bool] = False
    """Whether its sources may be soft prompts and prefixes, which change no weights."""

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
        """Those of them that stand in the model themselves: not a base that changes are taken against alone."""
        return self.used_sources()

    def refuse_unknown_sources(self, used: Iterable[str] = ()) -> None:
        """Raise ValueError where a source that is used, or ``used`` besides, is none of the recipe's."""
        if missing := sorted((self.used_sources() | {*used, self.tokenizer}) - set(self.sources)):
            raise ValueError(f"unknown source {missing[0]!r}; the sources are {', '.join(sorted(self.sources))}")

    @abstractmethod
    def lines(self) -> list[str]:
        """What the model is made of, in a few lines that people read."""

    @property
    def is_fitted(self) -> bool:
        """Whether numbers of it are fitted to the items of ``fit``, which take that long to find."""
        return self.fit is not None

    forms: ClassVar[tuple[str, ...]] = ()
    """In what other forms than the usual one models of this kind are exported, for `evomerge export --as`."""

    def unlike(self, form: str | None) -> str:
        """What an exported model is where it is another one than was scored, as a sentence; empty where it is the same.

        Args:
            form: one of ``forms``; None for the usual one.
        """
        return ""

    @property
    def rounds_on_export(self) -> bool:
        """Whether the exported model rounds otherwise than the live one, so that scores may differ by as much."""
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
        """What is written down of the fields' ``content``: a kind leaves out what says nothing."""
        return content

    def canonical(self) -> str:
        """The one JSON text of this recipe: sorted keys, shortest floats, no white space, no references."""
        return canonical_text(self.model_dump(mode="json") | {"sources": sorted(self.sources)})

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical text."""
        return text_hash(self.canonical())


class LayerCount(Protocol):
    """Layers that follow each other, and something that is alike in all of them."""

    @property
    def layers(self) -> int: ...


_Group = TypeVar("_Group", bound=LayerCount)


def group_holding(groups: Sequence[_Group], layer: int) -> _Group:
    """The group that holds a layer, counted from 0 through all groups. IndexError where there is none."""
    for group in groups:
        if layer < group.layers:
            return group
        layer -= group.layers
    raise IndexError(layer)


def read_recipe(text: str, sources: Mapping[str, str]) -> Recipe:
    """Read a canonical text back; ``sources`` gives the references that it leaves out.

    Raises:
        InputError: it is of a kind that is not installed.
    """
    content = json.loads(text)
    named = {"sources": {name: sources[name] for name in content["sources"]}}
    return recipe_kind(content, "recipe").model_validate(content | named)


def recipe_kind(content: Mapping[str, Any], place: str) -> type[Recipe]:
    """The kind of recipe that some content says it is.

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
    """The hash of a recipe whose canonical text is at hand."""
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
