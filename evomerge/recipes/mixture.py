"""The recipe of a plain mixture of experts, made of dense fine-tunes of one base.

The mlp of each layer becomes several, its *slots*, each made by a blend of the sources as any merged mlp is; attention,
norms, embedding and head are merged once. A router gives each token, from what the mlp is given, a logit for each slot
of the layer, W x; the ``top_k`` best slots compute the token, weighted by the gates that the architecture makes of
their logits (docs/mixtures.md). What comes of it is a model of transformers with no code of its own.

What the recipe says are numbers and names; the routers' weights follow from it, from the sources, and from texts
(``prototypes``) or the items of ``fit`` (``fitted``): they are evidence, as what methods know of their sources is.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from evomerge.recipes.base import Frozen, Recipe, group_holding
from evomerge.recipes.stack import Blend, Number, StackRecipe
from evomerge.recipes.stack_text import blend_text

Architecture = Literal["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"]
RouterKind = Literal["prototypes", "fitted", "random", "uniform"]

BIASED: Architecture = "glm4_moe"
"""The architecture whose routers have a bias for each expert, by which some can also be missing in a layer."""


class SlotRouter(Frozen):
    """How the routers' rows are found, one row for each slot and layer.

    They are found once, with slots and the rest of the model made as said here, whatever other blends a recipe has: so
    all candidates of a search share them.

    Attributes:
        kind: "prototypes": the mean of what the router is given on the texts of a slot, minus that on the others'.
            "fitted": by gradient, with all slots at once. "random": normally distributed by the recipe's seed.
            "uniform": zero, so that all slots weigh the same.
        rest: the blend of all but the mlps, by number.
        slots: the blend of each slot's mlps; the names are those of the texts.
        against: slots that have texts of what they are not for, under the name "not NAME".
    """

    kind: RouterKind
    rest: int
    slots: dict[str, int] = Field(min_length=2)
    against: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> SlotRouter:
        if unknown := sorted(set(self.against) - set(self.slots)):
            raise ValueError(f"says what {unknown[0]!r} is not for, which is no slot")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_what_says_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        if not self.against:
            written.pop("against", None)
        return written


class SlotGroup(Frozen):
    """Layers that follow each other, and the experts of all of them.

    Attributes:
        layers: how many.
        slots: the blend of each slot that is there, by number.
        temperature: that logits are divided by: the router's rows are, which is exact.
        bias: added to a slot's score where the best are chosen, and nowhere else; of ``glm4_moe`` alone.
    """

    layers: int = Field(ge=1)
    slots: dict[str, int] = Field(min_length=1)
    temperature: Number = Field(default=1.0, gt=0)
    bias: dict[str, Number] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _biases_are_of_slots(self) -> SlotGroup:
        if unknown := sorted(set(self.bias) - set(self.slots)):
            raise ValueError(f"has a bias for {unknown[0]!r}, which is not there")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_no_bias(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        if not self.bias:
            written.pop("bias", None)
        return written


class SharedExpert(Frozen):
    """A mlp beside the slots that computes every token: its blend, and what its result is multiplied by."""

    blend: int
    scale: Number = 1.0


class MixtureRecipe(Recipe):
    """One mixture of experts, as data.

    ``rest`` is the blend of attention and norms, ``embedding`` that of embedding and head. ``normalised`` says that
    the gates of the slots that a token keeps are divided by their sum.
    """

    kind: ClassVar[str] = "mixture"

    architecture: Architecture
    blends: tuple[Blend, ...]
    rest: int
    embedding: int
    groups: tuple[SlotGroup, ...] = Field(min_length=1)
    top_k: int = Field(ge=1)
    normalised: bool = True
    router: SlotRouter
    shared: SharedExpert | None = None

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> MixtureRecipe:
        used = [self.rest, self.embedding, self.router.rest, *self.router.slots.values()]
        used += [number for group in self.groups for number in group.slots.values()]
        used += [] if self.shared is None else [self.shared.blend]
        if max(used) >= len(self.blends) or min(used) < 0:
            raise ValueError(f"a part uses blend {max(used)}, but there are {len(self.blends)} blends")
        self.refuse_unknown_sources()
        if self.router.kind == "fitted" and self.fit is None:
            raise ValueError("its routers are fitted, and it does not say on what")
        if self.router.kind == "prototypes" and self.calibration is None:
            raise ValueError("its routers are prototypes, and it does not say of which texts")
        for number, group in enumerate(self.groups):
            self._check_group(number, group)
        return self

    def _check_group(self, number: int, group: SlotGroup) -> None:
        if unknown := sorted(set(group.slots) - set(self.router.slots)):
            raise ValueError(f"group {number} has the slot {unknown[0]!r}, for which the router has no row")
        if self.top_k > len(group.slots):
            raise ValueError(f"keeps {self.top_k} slots of a token, and group {number} has {len(group.slots)}")
        if self.architecture == BIASED:
            return
        if group.bias:
            raise ValueError(f"group {number} has a bias, and routers of a {self.architecture} have none")
        if len(group.slots) < len(self.router.slots):
            raise ValueError(f"group {number} lacks a slot, and layers of a {self.architecture} have equally many")

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return sum(group.layers for group in self.groups)

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of all slots, in the order of the experts."""
        return tuple(self.router.slots)

    def group_of(self, layer: int) -> SlotGroup:
        """The group that holds a layer. IndexError where there is none."""
        return group_holding(self.groups, layer)

    def used_sources(self) -> set[str]:
        return {name for blend in self.blends for name in (*blend.sources, *filter(None, (blend.base,)))}

    def mixed_sources(self) -> set[str]:
        return {name for blend in self.blends for name in blend.sources}

    def dense(self, slot: str | None) -> StackRecipe:
        """The dense model that has a slot's mlps in every layer, those of the shared expert when None.

        In a layer that lacks the slot its mlp is some other one's, which the mixture does not use.
        """
        numbers = []
        for layer in range(self.layers):
            there = self.group_of(layer).slots
            shared = None if self.shared is None else self.shared.blend
            numbers.append(shared if slot is None else there.get(slot, next(iter(there.values()))))
        return self._dense(self.rest, self.embedding, [n if n is not None else self.rest for n in numbers])

    def landmark(self) -> MixtureRecipe:
        """The mixture that the router's rows are found with: every slot in every layer, and all of them kept."""
        router = self.router
        group = SlotGroup(layers=self.layers, slots=router.slots)
        changes = {"groups": (group,), "top_k": len(router.slots), "rest": router.rest, "embedding": router.rest}
        return self.model_copy(update={**changes, "shared": None})

    def _dense(self, rest: int, embedding: int, mlps: list[int]) -> StackRecipe:
        blends = self.blends
        return StackRecipe.compose(
            sources=self.sources,
            tokenizer=self.tokenizer,
            embedding=blends[embedding],
            hops=[(layer, blends[rest], blends[mlp], blends[rest]) for layer, mlp in enumerate(mlps)],
            norm=blends[rest],
            head=blends[embedding],
            seed=self.seed,
            dtype=self.dtype,
            calibration=self.calibration,
        )

    def written(self, content: dict[str, Any]) -> dict[str, Any]:
        if self.shared is None:
            content.pop("shared", None)
        return content

    def lines(self) -> list[str]:
        count = len(self.slots)
        kept = f"top {self.top_k}" if self.top_k < count else "all"
        lines = [f"{self.architecture} of {count} experts, {kept} of them for each token, {self.router.kind} router"]
        first = 0
        for group in self.groups:
            lines.append(f"layers {first} to {first + group.layers - 1}, temperature {group.temperature:.3g}:")
            for slot, number in group.slots.items():
                bias = f", bias {group.bias[slot]:+.3g}" if slot in group.bias else ""
                lines.append(f"  expert {slot}: {blend_text(self.blends[number])}{bias}")
            first += group.layers
        lines.append(f"attention and norms: {blend_text(self.blends[self.rest])}")
        lines.append(f"embedding and head: {blend_text(self.blends[self.embedding])}")
        if self.shared is not None:
            lines.append(f"shared expert, times {self.shared.scale:.3g}: {blend_text(self.blends[self.shared.blend])}")
        return lines
