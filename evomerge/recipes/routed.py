"""The recipe of a model whose adapters are mixed by routers, separately for every token.

A module with stored weight W0 computes, for the experts e with changes D_e that are present in its layer,

    y = W0 x + gain sum_e g_e(x) D_e x,        g(x) = gates of the logits R x + b

(MoLORA, arXiv 2309.05444, equation 3; with (IA)3 vectors instead of low-rank changes it is MoV, equation 2). The recipe
only contains numbers and names. The routers' weights R and b are determined by it, the sources and, if they are fitted,
the items of ``fit``: they are evidence, like everything that methods measure.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from evomerge.recipes.base import Frozen, Recipe, group_holding
from evomerge.recipes.stack import Blend, Number

RouterKind = Literal["fitted", "prototypes", "arrow", "spectral", "stored"]
Gate = Literal["softmax", "sigmoid"]
Where = Literal["all", "attention", "mlp"]


class Balance(Frozen):
    """Weights of balancing losses, relative to the loss on right answers, while routers are fitted.

    ``switch`` is the loss of Switch Transformers, as used by MoLA; ``localized`` that of LoRAMoE, whose two groups
    differ by ``delta``; ``z`` the mean square of log sum exp of the logits (ST-MoE, arXiv 2202.08906, equation 5).
    """

    switch: Number = Field(default=0.0, ge=0)
    localized: Number = Field(default=0.0, ge=0)
    delta: Number = Field(default=0.1, ge=0, le=1)
    z: Number = Field(default=0.0, ge=0)


class Router(Frozen):
    """The inputs of routers, and how their logits become gates.

    Attributes:
        kind: how the routers' weights are found.
        gate: softmax over the experts that are present and selected, or a sigmoid of each logit, with any sum.
        per: one router for each adapted module, or one for attention and one for the mlp of each layer, whose input is
            that of the block.
        heads: for keys and values each head of a token is routed separately, by its own activation (MoV).
        base_expert: "no adapter" is one more expert, with its own logit.
        renormalised: the softmax gates of the selected experts are divided by their sum.
        balance: the balancing losses of fitted routers.
        refitted: routers are fitted to exactly the experts, temperatures and gains of this recipe, not shared.
    """

    kind: RouterKind = "fitted"
    gate: Gate = "softmax"
    per: Literal["module", "block"] = "module"
    heads: bool = False
    base_expert: bool = False
    renormalised: bool = True
    balance: Balance = Balance()
    refitted: bool = False

    @model_validator(mode="after")
    def _is_possible(self) -> Router:
        if self.kind in ("arrow", "spectral", "stored") and self.per == "block":
            raise ValueError(f"{self.kind} looks at what single modules change: it is `per: module`")
        if self.kind != "fitted" and (self.refitted or self.balance != Balance()):
            raise ValueError(f"{self.kind} routers are not fitted: they have no balance, and are not refitted")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_what_says_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        if self.balance == Balance():
            written.pop("balance", None)
        if not self.refitted:
            written.pop("refitted", None)
        return written


class LayerGroup(Frozen):
    """Consecutive layers, and how experts are gated in all of them.

    Attributes:
        layers: how many.
        experts: those that are present; without any, the layers equal those of the base.
        top_k: how many of them a token uses; None for all.
        temperature: divides the logits.
        gain: multiplies the gated sum, in attention and in the mlp.
        bias: added to the logits after division by the temperature, by expert; missing ones are 0.
    """

    layers: int = Field(ge=1)
    experts: tuple[str, ...]
    top_k: int | None = Field(default=None, ge=1)
    temperature: Number = Field(default=1.0, gt=0)
    attention_gain: Number = 1.0
    mlp_gain: Number = 1.0
    bias: dict[str, Number] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_possible(self) -> LayerGroup:
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("names an expert twice")
        if self.top_k is not None and self.top_k > len(self.experts):
            raise ValueError(f"keeps {self.top_k} experts of a token, and {len(self.experts)} are present")
        if unknown := sorted(set(self.bias) - set(self.experts)):
            raise ValueError(f"has a bias for {unknown[0]!r}, which is not present")
        return self


class RoutedRecipe(Recipe):
    """A base, adapters of it as experts, and how they are gated from layer to layer.

    ``where`` says which blocks are routed; the other one is made by the blend ``rest``, and is the base's if None.
    """

    kind: ClassVar[str] = "routed"
    forms: ClassVar[tuple[str, ...]] = ("routed", "peft", "mixture")

    base: str
    experts: tuple[str, ...] = Field(min_length=1)
    groups: tuple[LayerGroup, ...] = Field(min_length=1)
    router: Router = Router()
    where: Where = "all"
    rest: Blend | None = None

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> RoutedRecipe:
        for number, group in enumerate(self.groups):
            if unknown := sorted(set(group.experts) - set(self.experts)):
                raise ValueError(f"group {number} has the expert {unknown[0]!r}, which is not one of the recipe's")
        self.refuse_unknown_sources()
        if self.router.kind == "fitted" and self.fit is None:
            raise ValueError("its routers are fitted, and it does not say on what")
        if self.router.kind in ("prototypes", "spectral") and self.calibration is None:
            raise ValueError(f"its {self.router.kind} routers follow from calibration texts, and it names none")
        if self.rest is not None and self.where == "all":
            raise ValueError("says how blocks that are not routed are made, and all are routed")
        return self

    def group_of(self, layer: int) -> LayerGroup:
        """The group that contains a layer. IndexError if there is none."""
        return group_holding(self.groups, layer)

    @property
    def is_fitted(self) -> bool:
        return self.router.kind == "fitted"  # for other kinds, the use of experts is measured on the items

    def used_sources(self) -> set[str]:
        rest = () if self.rest is None else (*self.rest.sources, *filter(None, (self.rest.base,)))
        return {self.base, *self.experts, *rest}

    def unlike(self, form: str | None) -> str:
        if form == "routed":
            return ""
        if form == "mixture":
            return "It is the same function as a plain mixture of experts, which rounds otherwise in the last digits."
        if form == "peft":
            return (
                "Experts are gated by Arrow as peft computes it, which finds their directions by a power iteration, "
                "not exactly as was done when the candidate was scored."
            )
        return (
            "What was scored gates its experts anew for every token. This is the plain merge that its gates come to on "
            "average: another model, with scores of its own."
        )

    def lines(self) -> list[str]:
        kind = {"arrow": "Arrow", "prototypes": "prototypes"}.get(self.router.kind, f"{self.router.kind} routers")
        how = f"{kind}{', fitted to this candidate' if self.router.refitted else ''}, {self.router.gate} gates"
        lines, first = [f"{how} over {', '.join(self.experts)} on {self.base}"], 0
        for group in self.groups:
            kept = "all" if group.top_k is None else f"top {group.top_k}"
            present = ", ".join(group.experts) or "the base alone"
            lines.append(
                f"{'layer' if group.layers == 1 else 'layers'} {_places(first, group.layers)}: {present}; {kept}, "
                f"temperature {group.temperature:.3g}, gain {group.attention_gain:.3g} and {group.mlp_gain:.3g}"
            )
            first += group.layers
        return lines


def _places(first: int, layers: int) -> str:
    return str(first) if layers == 1 else f"{first} to {first + layers - 1}"
