"""The recipe of a plain mixture of experts, made from dense fine-tunes of one base.

The mlp of each layer is replaced by several, its *slots*, each made by a blend of the sources like any merged mlp;
attention, norms, embedding and head are merged once. From the mlp's input x, a router computes a logit for each slot of
the layer, W x; the ``top_k`` best slots process the token, weighted by gates that the architecture computes from their
logits (docs/mixtures.md). The result is a transformers model without custom code.

The recipe only contains numbers and names. The routers' weights are determined by it, the sources, and texts
(``prototypes``) or the items of ``fit`` (``fitted``): they are evidence, like everything that methods measure.
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
"""The architecture whose routers have a selection bias per expert, with which experts can also be absent in a layer."""


class SlotRouter(Frozen):
    """How the router rows are found, one row for each slot and layer.

    They are found once, with slots and the rest of the model made as given here, whatever other blends a recipe has, so
    that all candidates of a search share them.

    Attributes:
        kind: "prototypes": the mean of the router's inputs on the texts of a slot, minus that on the others'. "fitted":
            by gradient descent, with all slots at once. "random": normally distributed, from the recipe's seed.
            "uniform": zero, so that all slots have equal weight.
        rest: the index of the blend of everything but the mlps.
        slots: the blend of each slot's mlps; the names are those of the texts.
        against: slots with negative texts, which have the name "not NAME".
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
    """Consecutive layers, and the experts of all of them.

    Attributes:
        layers: how many.
        slots: the index of the blend of each slot that is present.
        temperature: divides the logits; applied exactly by dividing the router's rows.
        bias: added to a slot's score only for selecting the best; for ``glm4_moe`` only.
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
    """A mlp beside the slots that processes every token: its blend, and the factor on its output."""

    blend: int
    scale: Number = 1.0


class MixtureRecipe(Recipe):
    """One mixture of experts, as data.

    ``rest`` is the blend of attention and norms, ``embedding`` that of embedding and head. ``normalised`` means that
    the gates of a token's selected slots are divided by their sum.
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
            raise ValueError("its routers are prototypes, and it does not name the texts")
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
        """The group that contains a layer. IndexError if there is none."""
        return group_holding(self.groups, layer)

    def used_sources(self) -> set[str]:
        return {name for blend in self.blends for name in (*blend.sources, *filter(None, (blend.base,)))}

    def mixed_sources(self) -> set[str]:
        return {name for blend in self.blends for name in blend.sources}

    def dense(self, slot: str | None) -> StackRecipe:
        """The dense model with one slot's mlps in every layer, or those of the shared expert if None.

        In a layer that lacks the slot, its mlp is that of another slot, which the mixture does not use.
        """
        numbers = []
        for layer in range(self.layers):
            there = self.group_of(layer).slots
            shared = None if self.shared is None else self.shared.blend
            numbers.append(shared if slot is None else there.get(slot, next(iter(there.values()))))
        return self._dense(self.rest, self.embedding, [n if n is not None else self.rest for n in numbers])

    def reference_mixture(self) -> MixtureRecipe:
        """The mixture with which the router rows are found: every slot in every layer, with all of them selected."""
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
