"""Mixtures of experts made from dense fine-tunes: what goes into each expert, and how tokens are routed.

A slot is named after the source whose texts or answers its router rows are learnt from, but is merged from all sources
with the method of the space: in measurements pure experts lost to merges, and blends were on the front
(docs/mixtures.md). The router rows come from one reference mixture, of the pure sources' mlps on the mean of their
attention. A candidate only changes their temperature, so it needs no gradient computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, FiniteFloat

from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome, Parameter
from evomerge.method import Method, Point, check_blend
from evomerge.plugins import unknown_name
from evomerge.recipes.base import Recipe
from evomerge.recipes.mixture import BIASED, Architecture, MixtureRecipe, RouterKind, SlotGroup, SlotRouter
from evomerge.recipes.stack import Blend, ChoiceName
from search_spaces.base import SpaceContext, SpaceSettings
from search_spaces.gene import check_ranges
from search_spaces.method_genes import MethodGenes

_TEMPERATURES = (-1.0, 1.0)  # as powers of ten
_BIASES = (-0.5, 0.5)  # relative to scores from 0 to 1
_MAX_SLOTS = 8


class MixtureSpaceSettings(SpaceSettings):
    """The ``space:`` section of a search file.

    Args:
        architecture: the mixture's architecture: "mixtral" from llama and mistral, "qwen2_moe" from qwen2 and llama,
            "qwen3_moe" from qwen3, "glm4_moe" from llama, mistral and qwen2.
        method: the merge method of every blend; by default task arithmetic with a base, else a linear sum.
        slots: the sources after which the slots are named; by default all merged sources.
        router: how the router rows are found: "fitted" requires `fit`, "prototypes" separate texts for each slot
            (`calibration: {file: FILE, sources: {NAME: FILE}}`).
        groups: how many groups the layers are divided into, each with its own temperature.
        top_k: how many slots a token uses; searched from 1 to all by default.
        bias: whether slots have selection biases in each group; only for glm4_moe.
        embedding: whether embedding and head have their own numbers, or those of attention and norms.
        bounds: a parameter's range, in place of the method's own: ``weight: [0, 1.5]``.
        fixed: a parameter that is not searched.
    """

    engines: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["mixture"]
    architecture: Architecture
    method: str | None = None
    slots: tuple[str, ...] | None = None
    router: RouterKind = "fitted"
    groups: int = Field(default=1, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    bias: bool = False
    embedding: bool = False
    bounds: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(default_factory=dict)
    fixed: dict[str, FiniteFloat | ChoiceName] = Field(default_factory=dict)

    def build(self, context: SpaceContext) -> MixtureSpace:
        slots = context.mixed if self.slots is None else self.slots
        for number, name in enumerate(slots):
            if name not in context.sources:
                raise unknown_name(name, context.sources, f"space.slots[{number}]", "source")
        if len(set(slots)) < len(slots):
            hint = "A copy of an expert only splits its share of the tokens."
            raise InputError("space.slots", "names a source twice", hint)
        if not 2 <= len(slots) <= _MAX_SLOTS:
            raise InputError("space.slots", f"are {len(slots)}; a mixture has 2 to {_MAX_SLOTS} experts")
        if self.top_k is not None and self.top_k > len(slots):
            raise InputError("space.top_k", f"is {self.top_k}, but there are {len(slots)} slots")
        if self.groups > context.layers:
            raise InputError("space.groups", f"is {self.groups}, but the sources have {context.layers} layers")
        if self.bias and self.architecture != BIASED:
            raise InputError("space.bias", f"is for a {BIASED}; routers of a {self.architecture} have none")
        if self.router == "fitted" and context.fit is None:
            hint = "Name the items: `fit: ...`; or choose `router: prototypes`, which needs `calibration`."
            raise InputError("space.router", "is fitted, and there is nothing to fit it to", hint)
        if self.router == "prototypes" and context.calibration is None:
            hint = "Give each slot its texts: `calibration: {file: FILE, sources: {NAME: FILE}}`."
            raise InputError("space.router", "is of prototypes, and there are no texts to take them from", hint)
        method = context.method(self.method or ("linear" if context.base is None else "task_arithmetic"))
        context.check_needs(method, "space.method")
        if "fit" in method.needs:
            raise InputError("space.method", f"is {method.name}, which is fitted to whole models and not to experts")
        if method.needs_base and context.base is None:
            raise InputError("base", f"{method.name} merges task vectors and needs a base", "Name it: `base: NAME`.")
        check_ranges(method.name, method.parameters, self.bounds, self.fixed, "space")
        return MixtureSpace(self, context, method, tuple(slots))


class MixtureSpace:
    """See ``evomerge.genome.SearchSpace``, and the module docstring.

    A genome has the method's numbers for each slot, for the rest, and for the embedding if it has its own; then the
    temperature of each group and its biases (the first slot has none: only differences matter); then top-k.
    """

    def __init__(
        self, settings: MixtureSpaceSettings, context: SpaceContext, method: Method, slots: tuple[str, ...]
    ) -> None:
        self._settings, self._context, self._method, self._slots = settings, context, method, slots
        self._genes = MethodGenes(method, context, settings.bounds, settings.fixed)
        check_blend(self._genes.blend(), method, "space")
        self._blends = [*(f"experts.{slot}" for slot in slots), "rest", *(["embedding"] if settings.embedding else [])]
        self._sizes = [len(part) for part in np.array_split(np.arange(context.layers), settings.groups)]
        self.parameters: Sequence[Parameter] = [
            *(p for name in self._blends for p in self._genes.parameters(name, name)),
            *(p for number in range(settings.groups) for p in self._of_group(number)),
            *self._of_top_k(),
        ]
        self.layer_buffers = self.hops = context.layers

    def _of_group(self, number: int) -> Iterator[Parameter]:
        name = f"router.{number}" if self._settings.groups > 1 else "router"
        yield Parameter(f"{name}.log_temperature", *_TEMPERATURES, 0.0, group=name)
        if self._settings.bias:
            for slot in self._slots[1:]:
                yield Parameter(f"{name}.bias.{slot}", *_BIASES, 0.0, group=name)

    def _of_top_k(self) -> list[Parameter]:
        if self._settings.top_k is not None:
            return []
        return [Parameter("router.top_k", 1.0, float(len(self._slots)), float(len(self._slots)), "int", "router")]

    def decode(self, genome: Genome) -> MixtureRecipe:
        numbers, size = genome.tolist(), len(self._genes)
        blends = [self._genes.blend(numbers[i * size : (i + 1) * size]) for i in range(len(self._blends))]
        rest = numbers[len(blends) * size :]
        step = 1 + (len(self._slots) - 1 if self._settings.bias else 0)
        routed = [rest[number * step : (number + 1) * step] for number in range(self._settings.groups)]
        top_k = self._settings.top_k or int(numbers[-1])
        count = len(self._slots)
        embedding = blends[count + 1] if self._settings.embedding else blends[count]
        return self._recipe(blends[:count], blends[count], embedding, routed, top_k)

    def _recipe(
        self,
        slots: Sequence[Blend],
        rest: Blend,
        embedding: Blend,
        routed: Sequence[Sequence[float]],
        top_k: int,
    ) -> MixtureRecipe:
        """A mixture of these blends; ``routed`` has the log temperature and the biases of each group."""
        context, settings = self._context, self._settings
        alone = [_alone(slot) for slot in self._slots]
        blends = list(dict.fromkeys(map(_text, [*slots, rest, embedding, *alone, _mean(self._slots)])))
        number_of = {text: number for number, text in enumerate(blends)}

        def number(blend: Blend) -> int:
            return number_of[_text(blend)]

        there = {name: number(blend) for name, blend in zip(self._slots, slots, strict=True)}
        groups = [
            SlotGroup(
                layers=size,
                slots=there,
                temperature=10.0 ** numbers[0],
                bias=dict(zip(self._slots[1:], numbers[1:], strict=False)),
            )
            for size, numbers in zip(self._sizes, routed, strict=True)
        ]
        learnt = settings.router in ("fitted", "prototypes")
        used = [Blend.model_validate_json(text) for text in blends]
        return MixtureRecipe(
            sources=dict(context.sources),
            tokenizer=context.tokenizer,
            seed=context.recipe_seed,
            dtype=context.dtype,
            architecture=settings.architecture,
            blends=tuple(used),
            rest=number(rest),
            embedding=number(embedding),
            groups=tuple(groups),
            top_k=top_k,
            router=SlotRouter(
                kind=settings.router,
                rest=number(_mean(self._slots)),
                slots={name: number(blend) for name, blend in zip(self._slots, alone, strict=True)},
            ),
            calibration=context.calibration if settings.router == "prototypes" else context.calibration_of(used),
            fit=context.fit if learnt and settings.router == "fitted" else None,
        )

    def genome_of(self, recipe: Recipe) -> Genome | None:
        if not isinstance(recipe, MixtureRecipe) or recipe.slots != self._slots:
            return None
        group = recipe.groups[0]
        used = [*(group.slots[slot] for slot in self._slots if slot in group.slots), recipe.rest]
        used += [recipe.embedding] if self._settings.embedding else []
        of_blends = [self._genes.nearest(recipe.blends[number]) for number in used]
        if len(used) < len(self._blends) or any(numbers is None for numbers in of_blends):
            return None
        genome = [number for numbers in of_blends for number in numbers or ()]
        starts = np.cumsum([0, *self._sizes[:-1]])
        for group in (recipe.group_of(int(first)) for first in starts):
            genome.append(float(np.log10(group.temperature)))
            genome += [group.bias.get(slot, 0.0) for slot in self._slots[1:]] if self._settings.bias else []
        genome += [] if self._settings.top_k is not None else [float(recipe.top_k)]
        bounds = np.array([(p.low, p.high) for p in self.parameters])
        return np.clip(np.array(genome, dtype=np.float64), bounds[:, 0], bounds[:, 1])

    def baselines(self) -> Iterator[Baseline]:
        """Each source unchanged, their average, and the pure experts on the average with top-k all and top-1."""
        for name in self._context.sources:
            yield Baseline(name, "source", self._context.uniform(_alone(name)), None)
        yield Baseline("uniform average", "average", self._context.uniform(_mean(self._context.mixed)), None)
        for top_k in sorted({self._settings.top_k} if self._settings.top_k else {1, len(self._slots)}):
            kept = "all of them" if top_k == len(self._slots) else f"top {top_k}"
            genome = self._pure(top_k)
            recipe = self._pure_recipe(top_k) if genome is None else self.decode(genome)
            yield Baseline(f"pure experts, {kept}", "default", recipe, genome)

    def _pure(self, top_k: int) -> Genome | None:
        """The genome of the pure sources' mlps on the average; None if the method has no such points."""
        mixed = self._context.mixed

        def alone(method: Method, slot: str) -> Point | None:
            if method.alone is None or not (slot in mixed or method.needs_base):
                return None
            return method.alone(mixed, slot if slot in mixed else None)

        uniform = self._genes.numbers_at(lambda method: None if method.uniform is None else method.uniform(mixed))
        of_slots = [self._genes.numbers_at(partial(alone, slot=slot)) for slot in self._slots]
        if uniform is None or any(numbers is None for numbers in of_slots):
            return None
        others = len(self._blends) - len(self._slots)
        numbers = [number for of_slot in of_slots for number in of_slot or ()] + uniform * others
        numbers += [p.default for p in self.parameters[len(numbers) :]]
        if self._settings.top_k is None:
            numbers[-1] = float(top_k)
        return np.array(numbers, dtype=np.float64)

    def _pure_recipe(self, top_k: int) -> MixtureRecipe:
        """The recipe of the same mixture, whatever the method."""
        mean = _mean(self._context.mixed)
        routed = [[0.0] * (len(self._slots) if self._settings.bias else 1)] * self._settings.groups
        return self._recipe([_alone(slot) for slot in self._slots], mean, mean, routed, top_k)


def _text(blend: Blend) -> str:
    return blend.model_dump_json()


def _alone(source: str) -> Blend:
    """One source, unchanged."""
    return Blend.weighted_sum({source: 1.0})


def _mean(sources: Sequence[str]) -> Blend:
    return Blend.weighted_sum({name: 1.0 / len(sources) for name in sources})
