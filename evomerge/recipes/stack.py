"""The recipe of a model whose layers are merged, repeated, omitted or reordered.

It lists the *blends* that it uses (a merge method with its parameters) and says which blend makes which part of the
model.

The stack of layers is a list of *hops*. If only weights are merged, hop i is layer i of every source; in a search over
data flow, the same list can repeat, skip or reorder layers.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from evomerge.recipes.base import STACK, DType, Frozen, Recipe, canonical_text
from evomerge.recipes.stack_text import stack_lines
from evomerge.vocabulary import Vocabulary

RoleKind = Literal["embedding", "attention", "mlp", "norm", "head", "vision", "matrix"]
Scaling = Literal["stream", "update"]
Basis = Literal["core"]


@dataclass(frozen=True, slots=True)
class Role:
    """A tensor's function in the model, by which the recipe decides how it is made.

    ``layer`` is None outside the stack of layers. A "norm" with a layer is a norm in that layer outside its attention
    and its mlp; a "norm" without one is the norm before the head. "vision" is everything that processes images: tower,
    projector, and all else beside the text model. In a table of tensors, whose layers are unknown, "matrix" is the
    weight of a linear layer, and everything else is "embedding" and uses its blend.
    """

    kind: RoleKind
    layer: int | None = None


def _no_negative_zero(value: float) -> float:
    return value + 0.0  # -0.0 + 0.0 is 0.0; equal numbers must give equal text


Number = Annotated[FiniteFloat, AfterValidator(_no_negative_zero)]
ChoiceName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=100)]
"""The name of a choice, which cannot be mistaken for a number."""


class BlendStep(Frozen):
    """A step that changes the result of a blend's method; omitted parameters have their defaults."""

    name: str
    parameters: dict[str, Number | ChoiceName] = Field(default_factory=dict)


class Blend(Frozen):
    """How one part of a model is made: a method, the sources it mixes, and its numbers.

    ``parameters`` maps a parameter's name to one value, to a value per source by name, or to a yes/no switch. A value
    is a number (stored as a float, even if whole) or the name of a choice. ``sources`` contains the base only if the
    base is also mixed in as a source (as in a linear average with it).

    ``basis`` is the coordinate system in which the method merges: that of the weights, or "core", the few coordinates
    that hold everything that low-rank adapters change in a weight. The method is then given changes of ``base``, whose
    own change is zero, and its result is added to the base (``merging/core_space.py``).

    ``steps`` change the method's result, one after another, in the weights' own coordinates; in core space, steps that
    are independent of the basis (``Step.in_any_basis``) are applied there.
    """

    method: str
    sources: tuple[str, ...] = Field(min_length=1)
    base: str | None = None
    parameters: dict[str, bool | Number | ChoiceName | dict[str, Number | ChoiceName]] = Field(default_factory=dict)
    basis: Basis | None = None
    steps: tuple[BlendStep, ...] = ()

    @model_serializer(mode="wrap")
    def _leave_out_what_says_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        for key in ("basis", "steps"):
            if not getattr(self, key):
                written.pop(key, None)
        return written

    @classmethod
    def copy_of(cls, source: str) -> Blend:
        """One source, unchanged."""
        return cls(method="passthrough", sources=(source,), parameters={"scale": {source: 1.0}})

    @classmethod
    def weighted_sum(cls, weights: Mapping[str, Number | ChoiceName]) -> Blend:
        """The sum of sources, each multiplied by its weight."""
        return cls(method="linear", sources=tuple(weights), parameters={"weight": dict(weights), "normalize": False})

    def value(self, name: str, source: str | None = None) -> float:
        """A number of this blend; for ``source`` if the parameter has one per source. KeyError if absent."""
        return float(self._value(name, source))

    def choice(self, name: str, source: str | None = None) -> str:
        """The name of a choice, looked up like ``value``."""
        return str(self._value(name, source))

    def _value(self, name: str, source: str | None) -> bool | float | str:
        if name not in self.parameters:
            raise KeyError(f"{self.method} has no parameter {name}; it has: {', '.join(self.parameters) or 'none'}")
        value = self.parameters[name]
        if isinstance(value, dict):
            if source is None:
                raise KeyError(f"{name} has a value for each source; say which")
            return value[source]
        return value


LayerIndex = Annotated[int, Field(ge=0)]


class Hop(Frozen):
    """One step of the path: a layer of the sources, and the indices of the blends for its three kinds of tensor.

    ``layer`` is a single number if all sources use the same layer, otherwise a number per source by name. ``scale``
    applies to this step only; ``Recipe.scaling`` says what it multiplies.
    """

    layer: LayerIndex | dict[str, LayerIndex]
    attention: int = Field(ge=0)
    mlp: int = Field(ge=0)
    norm: int = Field(ge=0)
    scale: Number = 1.0

    @field_validator("layer")
    @classmethod
    def _one_number_where_all_agree(cls, layer: int | dict[str, int]) -> int | dict[str, int]:
        if layer == {}:
            raise ValueError("names no source")
        if isinstance(layer, dict) and len(set(layer.values())) == 1:  # equal hops must give equal text
            return next(iter(layer.values()))
        return layer

    @model_serializer(mode="wrap")
    def _leave_out_a_scale_of_one(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        if self.scale == 1.0:
            written.pop("scale", None)
        return written

    def layer_of(self, source: str) -> int:
        """The layer that ``source`` contributes to this hop. KeyError if the hop does not use it."""
        return self.layer[source] if isinstance(self.layer, dict) else self.layer


class _Numbering:
    """Numbers distinct blends, in the order of first use.

    Attributes:
        blends: the blends so far, by their numbers.
    """

    def __init__(self) -> None:
        self.blends: list[Blend] = []
        self._numbers: dict[str, int] = {}
        # By identity, because serialising a blend takes a while, and the same object is often used in many places.
        self._met: dict[int, tuple[Blend, int]] = {}

    def __call__(self, blend: Blend) -> int:
        if id(blend) not in self._met:
            key = canonical_text(blend.model_dump(mode="json"))
            if key not in self._numbers:
                self._numbers[key] = len(self.blends)
                self.blends.append(blend)
            self._met[id(blend)] = blend, self._numbers[key]
        return self._met[id(blend)][1]


class StackRecipe(Recipe):
    """One merged model, as data: a blend for each part of it. ``seed`` keys the random drops of DARE.

    ``tensors`` are exceptions, which are made differently from their part: the tensor's name in the merged model, which
    is its name in the files of the tokenizer's source with the number of the hop in place of the layer, and the index
    of the blend.

    ``vocabulary`` says which tokens the model has if sources differ in that.

    ``vision`` is the blend of the vision parts; if omitted, they are the tokenizer's source's own, and the other
    sources need not have them.

    ``scaling`` says what the scale s of a hop does to the hidden state x of the residual stream: "stream" multiplies
    all of it before the hop, x -> s x + blocks(norm(s x)); "update" what the hop adds, x -> x + s blocks(norm(x)).
    Both are used in practice and give different models (docs/data-flow.md).
    """

    kind: ClassVar[str] = STACK

    blends: tuple[Blend, ...]
    embedding: int
    hops: tuple[Hop, ...]
    norm: int
    head: int
    scaling: Scaling = "stream"
    tensors: dict[str, int] = Field(default_factory=dict)
    vocabulary: Vocabulary = Vocabulary()
    vision: int | None = None

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> StackRecipe:
        used = [self.embedding, self.norm, self.head, *self.tensors.values()]
        used += [] if self.vision is None else [self.vision]
        for hop in self.hops:
            used += (hop.attention, hop.mlp, hop.norm)
        if max(used) >= len(self.blends) or min(used) < 0:
            raise ValueError(f"a part uses blend {max(used)}, but there are {len(self.blends)} blends")
        self.refuse_unknown_sources(self.vocabulary.used_sources())
        for number, hop in enumerate(self.hops):
            if isinstance(hop.layer, dict):
                self._check_layers(number, hop, hop.layer)
            if self.scaling == "stream" and hop.scale <= 0:
                problem = f"hop {number} scales the stream by {hop.scale:g}; only numbers above 0 can be folded away"
                raise ValueError(problem)
        return self

    def _check_layers(self, number: int, hop: Hop, layers: Mapping[str, int]) -> None:
        mixed = _sources(self.blends[index] for index in (hop.attention, hop.mlp, hop.norm))
        if missing := sorted(mixed - set(layers)):
            raise ValueError(f"hop {number} mixes {missing[0]!r}, but does not say which layer of it")
        # An exception may mix sources that the rest of its hop does not use.
        if unused := sorted(set(layers) - mixed - _sources(self.blends[index] for index in self.tensors.values())):
            raise ValueError(f"hop {number} names a layer of {unused[0]!r}, but does not mix it")

    def written(self, content: dict[str, Any]) -> dict[str, Any]:
        if not self.tensors:
            content.pop("tensors", None)
        if self.vocabulary == Vocabulary():
            content.pop("vocabulary", None)
        if self.vision is None:
            content.pop("vision", None)
        if not self.is_scaled:
            content.pop("scaling", None)
        return content

    @classmethod
    def compose(
        cls,
        *,
        sources: Mapping[str, str],
        tokenizer: str,
        embedding: Blend,
        hops: Iterable[tuple[int | Mapping[str, int], Blend, Blend, Blend]],
        norm: Blend,
        head: Blend,
        scales: Sequence[float] | None = None,
        scaling: Scaling = "stream",
        tensors: Mapping[str, Blend] | None = None,
        vocabulary: Vocabulary | None = None,
        vision: Blend | None = None,
        seed: int = 0,
        dtype: DType | None = None,
        calibration: str | None = None,
        fit: str | None = None,
    ) -> StackRecipe:
        """Build a recipe from blends; equal blends are numbered once, in order of first use.

        ``hops`` gives (layer, attention, mlp, norm), ``scales`` a number for each hop. The numbering depends only on
        the content, so equivalent recipes have the same text and hash; ``vision`` is numbered after the path, and
        ``tensors`` last, in the order of their names.
        """
        number = _Numbering()
        first, stack = number(embedding), list(hops)
        path = tuple(
            Hop(
                layer=layer if isinstance(layer, int) else dict(layer),
                attention=number(attention),
                mlp=number(mlp),
                norm=number(layer_norm),
                scale=scale,
            )
            for (layer, attention, mlp, layer_norm), scale in zip(stack, scales or [1.0] * len(stack), strict=True)
        )
        final_norm, last = number(norm), number(head)
        seeing = None if vision in (None, Blend.copy_of(tokenizer)) else number(vision)
        exceptions = {name: number(blend) for name, blend in sorted((tensors or {}).items())}
        return cls(
            sources=dict(sources),
            tokenizer=tokenizer,
            blends=tuple(number.blends),
            embedding=first,
            hops=path,
            norm=final_norm,
            head=last,
            scaling=scaling if any(hop.scale != 1.0 for hop in path) else "stream",
            tensors=exceptions,
            vocabulary=vocabulary or Vocabulary(),
            vision=seeing,
            seed=seed,
            dtype=dtype,
            calibration=calibration,
            fit=fit,
        )

    @classmethod
    def uniform(
        cls,
        blend: Blend,
        *,
        sources: Mapping[str, str],
        tokenizer: str,
        layers: int,
        vocabulary: Vocabulary | None = None,
        vision: Blend | None = None,
        seed: int = 0,
        dtype: DType | None = None,
        fit: str | None = None,
    ) -> StackRecipe:
        """The same blend for every part of a model with ``layers`` layers, except for the vision parts."""
        return cls.compose(
            sources=sources,
            tokenizer=tokenizer,
            embedding=blend,
            norm=blend,
            head=blend,
            vocabulary=vocabulary,
            vision=vision,
            seed=seed,
            dtype=dtype,
            fit=fit,
            hops=((layer, blend, blend, blend) for layer in range(layers)),
        )

    def blend_for(self, role: Role, name: str | None = None) -> Blend:
        """The blend that makes a tensor with this role; ``role.layer`` counts hops here.

        With ``name``, the tensor's name in the merged model, exceptions for this tensor are taken into account.
        """
        number = self.blend_number(role, name)
        return Blend.copy_of(self.tokenizer) if number is None else self.blends[number]

    def blend_number(self, role: Role, name: str | None = None) -> int | None:
        """The number of that blend; None for a tensor copied from the tokenizer's source by default."""
        if name in self.tensors:
            return self.tensors[name]
        if role.kind == "vision":
            return self.vision
        if role.layer is None:
            return {"embedding": self.embedding, "matrix": self.embedding, "head": self.head}.get(role.kind, self.norm)
        hop = self.hops[role.layer]
        return {"attention": hop.attention, "mlp": hop.mlp}.get(role.kind, hop.norm)

    @property
    def seen(self) -> Blend | None:
        """The blend of the vision parts; None if they are the tokenizer's source's own."""
        return None if self.vision is None else self.blends[self.vision]

    @property
    def is_scaled(self) -> bool:
        """Whether any hop has a scale other than 1."""
        return any(hop.scale != 1.0 for hop in self.hops)

    @property
    def factors(self) -> tuple[float, ...]:
        """The factor on each hop's blocks before they are added to the residual stream.

        With scaling "update" these are the scales. With "stream", let p_t be the product of the scales up to hop t, x_t
        the hidden state after it, and y_t = x_t / p_t. Blocks read the stream through norms, which are independent of
        its size, so x_t = s_t x_{t-1} + blocks(norm(s_t x_{t-1})) becomes y_t = y_{t-1} + blocks(norm(y_{t-1})) / p_t:
        the factor is 1 / p_t, and the norm before the head removes the rest. So a scaled path is a plain model with
        different output projections. (The norms' eps, about 1e-6 of the mean square of x, is not scaled.)
        """
        if self.scaling == "update":
            return tuple(hop.scale for hop in self.hops)
        return tuple(1.0 / p for p in itertools.accumulate((hop.scale for hop in self.hops), operator.mul))

    def used_sources(self) -> set[str]:
        return _sources(self.blends)

    def mixed_sources(self) -> set[str]:
        return {name for blend in self.blends for name in blend.sources}

    @property
    def rounds_on_export(self) -> bool:
        return self.is_scaled  # scales are folded into the weights

    def lines(self) -> list[str]:
        return stack_lines(self)


def _sources(blends: Iterable[Blend]) -> set[str]:
    return {name for b in blends for name in (*b.sources, *((b.base,) if b.base else ()))}


def renumber(name: str, role: Role, layer: int) -> str:
    """The name of the tensor that corresponds in layer ``layer`` to ``name``, which has this role in its own layer."""
    if role.layer in (None, layer):
        return name
    parts = name.split(".")
    parts[parts.index(str(role.layer))] = str(layer)
    return ".".join(parts)


def roles(layers: int) -> Iterator[Role]:
    """Every role of a model with ``layers`` layers, in the order of the forward pass."""
    yield Role("embedding")
    for layer in range(layers):
        yield Role("attention", layer)
        yield Role("mlp", layer)
        yield Role("norm", layer)
    yield Role("norm")
    yield Role("head")
