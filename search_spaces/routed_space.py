"""Routed space: which adapters are present in which layers, how many a token uses, and how sharply and strongly.

Routers are made once, for all experts in all layers. A genome masks their rows, sets the temperature of their logits
and scales their output, so no candidate needs a gradient (``recipes/routed.py`` has the form and its origin).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome, Parameter
from evomerge.plugins import unknown_name
from evomerge.recipes.base import Recipe
from evomerge.recipes.routed import Balance, Gate, LayerGroup, RoutedRecipe, Router, RouterKind, Where
from evomerge.recipes.stack import Blend
from search_spaces.base import SpaceContext, SpaceSettings
from search_spaces.parameter_space import FITTED
from search_spaces.paths import MAX_PARAMETERS
from search_spaces.places import layers_name
from search_spaces.routed_forms import FORMS, MOLA_SHAPES, OVERRIDABLE, Form
from search_spaces.routed_genes import ALL, BOUNDS, GroupGenes, Presence, group_of, spans

ARROW_KEPT = 3
"""How many experts a token uses with Arrow in peft (``ArrowConfig.top_k``)."""

_FROM_TEXTS = ("prototypes", "spectral")
"""Routers that are computed from separate texts for each expert."""


class RoutedSpaceSettings(SpaceSettings):
    """The ``space:`` section of a search file.

    Args:
        like: the exact form of a paper, including trained routers: "mov", "molora", "loramoe" or "mola". Its settings
            cannot be overridden, except temperature, gain and bias through ``bounds``, which it otherwise leaves at 1.
        experts: the adapters, in the order in which a fixed number of them is taken; by default all sources except the
            base.
        groups: how many groups of layers have their own numbers; or "layer".
        granularity: "model": one set of numbers for all layers. "group": one for each group.
        presence: "each": every expert's presence in a group is a separate choice. "allocation": one number says how
            many experts are present, and priorities, the same in all groups, say which.
        router: "fitted" to right answers (requires `fit:` in the file); "prototypes" or "spectral", from separate
            calibration texts for each expert; "arrow", from the adapters alone; "stored", as trained with the experts
            of one folder. "fitted" by default.
        gate: "softmax", which sums to 1 before the gain, or "sigmoid", which need not.
        per: one router for each adapted "module", or for each "block" (attention or mlp) of a layer.
        heads: for (IA)3 vectors: each head of keys and values is routed separately.
        base_expert: "no adapter" is one more expert.
        renormalised: the gates of the experts used are divided by their sum.
        where: the blocks that are routed: "all", "attention" or "mlp".
        rest: the content of the other blocks: the "base", or the "mean" of the experts.
        balance: balancing losses on the use of experts while routers are fitted.
        refits: for how many of the best candidates routers are fitted at the end of a search; each fit makes a new
            candidate.
        bounds: ranges of temperature and gain; a bias for each expert and group is searched if it has a range.
        fixed: temperature, gain or top_k (a number or "all") that is not searched.
    """

    engines: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["routed"] = "routed"
    like: Form | None = None
    experts: tuple[str, ...] | None = None
    groups: Literal["layer"] | Annotated[int, Field(ge=1)] = 4
    granularity: Literal["group", "model"] = "group"
    presence: Presence = "each"
    router: RouterKind = "fitted"
    gate: Gate = "softmax"
    per: Literal["module", "block"] = "module"
    heads: bool = False
    base_expert: bool = False
    renormalised: bool = True
    where: Where = "all"
    rest: Literal["base", "mean"] = "base"
    balance: Balance = Balance()
    refits: int = Field(default=0, ge=0)
    bounds: dict[Literal["temperature", "gain", "bias"], tuple[FiniteFloat, FiniteFloat]] = Field(default_factory=dict)
    fixed: dict[Literal["top_k", "temperature", "gain"], FiniteFloat | Literal["all"]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _forms_are_whole(self) -> Self:
        if self.like is None:
            return self
        form = FORMS[self.like]
        for key, value in form.items():
            if key in self._given() - OVERRIDABLE and getattr(self, key) != value:
                raise ValueError(f"{key}: is {value} in `like: {self.like}`; leave out one of the two")
        if "top_k" in self.fixed and self.fixed["top_k"] != form["fixed"]["top_k"]:
            raise ValueError(f"fixed.top_k: is {form['fixed']['top_k']} in `like: {self.like}`; leave it out")
        return self

    def _given(self) -> set[str]:
        """The keys that differ from their defaults: the record of a search contains all keys."""
        fields = type(self).model_fields
        return {k for k, field in fields.items() if getattr(self, k) != field.get_default(call_default_factory=True)}

    def in_form(self) -> RoutedSpaceSettings:
        """These settings with everything that the paper named by ``like`` prescribes."""
        if self.like is None:
            return self
        form = dict(FORMS[self.like])
        numbers = {name: 1.0 for name in ("temperature", "gain") if name not in self.bounds}
        form["fixed"] = numbers | form["fixed"] | self.fixed
        given = {key: getattr(self, key) for key in self._given() & (OVERRIDABLE - {"fixed"})}
        if self.router != "fitted":
            form.pop("balance", None)
        return self.model_copy(update=form | given)

    def build(self, context: SpaceContext) -> RoutedSpace:
        settings = self.in_form()
        experts = _experts(settings.experts, context)
        _check_layers(settings, context)
        _check_numbers(settings, len(experts))
        _check_router(settings, context, [kind for name in experts for kind in context.adapters(name)])
        space = RoutedSpace(settings, experts, context)
        if len(space.parameters) > MAX_PARAMETERS:
            problem = f"makes {len(space.parameters):,} parameters; {MAX_PARAMETERS:,} is the limit"
            raise InputError("space.groups", problem, "Take fewer groups, or `granularity: model`.")
        return space


def _experts(names: Sequence[str] | None, context: SpaceContext) -> tuple[str, ...]:
    """The experts of a space. Raises InputError: they are not adapters, or too few to be routed."""
    if context.base is None:
        raise InputError("base", "routed experts are adapters of a base, and there is none", "Name it: `base: NAME`.")
    experts = context.mixed if names is None else tuple(names)
    for number, name in enumerate(experts):
        if name not in context.sources:
            raise unknown_name(name, context.sources, "space.experts", "source")
        if name == context.base:
            problem = f"holds {name}, which is the base"
            raise InputError("space.experts", problem, "To let tokens abstain from all adapters: `base_expert: true`.")
        if name in experts[:number]:
            raise InputError("space.experts", f"holds {name} twice", "Leave it out once.")
        if not context.adapters(name):
            problem = f"{context.sources[name]} is a whole model, and experts are adapters of the base"
            hint = "Leave it out of `space.experts`; whole models are merged by `kind: parameter_space`."
            raise InputError(f"sources.{name}", problem, hint)
    if len(experts) < 2:
        problem = f"has one adapter alone, {experts[0]}" if experts else "has no adapter"
        raise InputError("space.experts", f"{problem}, and tokens are routed between two or more", "Add sources.")
    return experts


def _check_layers(settings: RoutedSpaceSettings, context: SpaceContext) -> None:
    if isinstance(settings.groups, int) and settings.groups > context.layers:
        problem = f"is {settings.groups}, so that groups would be empty: the base has {context.layers} layers"
        raise InputError("space.groups", problem, "Give at most as many, or `groups: layer`.")
    if settings.rest == "mean" and settings.where == "all":
        raise InputError("space.rest", "applies to blocks that are not routed, and all are", "Leave it out.")


def _check_numbers(settings: RoutedSpaceSettings, experts: int) -> None:
    for bounded, (low, high) in settings.bounds.items():
        place = f"space.bounds.{bounded}"
        if bounded in settings.fixed:
            raise InputError(f"space.fixed.{bounded}", "is given bounds as well", "Keep one of the two.")
        if low >= high:
            raise InputError(place, f"the lower bound {low:g} is not below the upper bound {high:g}")
        if bounded != "bias" and not (low > 0 and high <= 1e6):
            raise InputError(place, f"{low:g} to {high:g} is no range of a factor", "Stay above 0.")
    for name, value in settings.fixed.items():
        if name != "top_k" and (isinstance(value, str) or not 0 < value <= 1e6):
            raise InputError(f"space.fixed.{name}", f"is {value}; it must be a number above 0")
    top_k = settings.fixed.get("top_k", ALL)
    if top_k != ALL and not (isinstance(top_k, float | int) and top_k == int(top_k) and 1 <= top_k <= experts):
        shown = top_k if isinstance(top_k, str) else f"{top_k:g}"
        raise InputError("space.fixed.top_k", f"is {shown}, and there are {experts} experts", 'Take "all", or fewer.')


def _check_router(settings: RoutedSpaceSettings, context: SpaceContext, kinds: Sequence[str]) -> None:
    kind = settings.router
    if kind == "fitted" and context.fit is None:
        problem = "fitted routers learn from right answers, and there are none to fit to"
        raise InputError("fit", problem, "Give a file of them, `fit:`, or take `router: arrow`.")
    if kind in _FROM_TEXTS and context.calibration is None:
        problem = f"is {kind}, which needs separate texts for each expert, and there are none"
        raise InputError("space.router", problem, "Give them: `calibration:` with `sources:`.")
    if context.fit is None and context.calibration is None:
        problem = "how much experts are used is measured on texts, and there are none"
        raise InputError("space.router", problem, "Give some: `fit:` or `calibration:`.")
    if settings.per == "block" and kind in ("arrow", "spectral", "stored"):
        problem = f"is block, and {kind} routers look at what single modules do to their inputs"
        raise InputError("space.per", problem, "Take `per: module`.")
    if settings.refits and kind != "fitted":
        raise InputError("space.refits", f"fits routers anew, and {kind} routers are not fitted", "Leave it out.")
    if settings.balance != Balance() and kind != "fitted":
        raise InputError("space.balance", f"is of the fit, and {kind} routers have none", "Leave it out.")
    vectors = [kind == "IA3" for kind in kinds]
    if settings.heads and not all(vectors):
        hint = "Take (IA)3 adapters, or `like: molora` for LoRA."
        raise InputError("space.like" if settings.like else "space.heads", "applies only to (IA)3 vectors", hint)
    if any(vectors) and kind in ("arrow", "spectral", "stored"):
        problem = f"is {kind}, which uses the factors of LoRA, and (IA)3 vectors have none"
        raise InputError("space.router", problem, "Take `router: fitted` or `router: prototypes`.")


class RoutedSpace:
    """The numbers of every layer group of routed experts; see the module docstring.

    Attributes:
        left_out: the baselines that the search lacks the inputs for, each with the reason.
    """

    def __init__(self, settings: RoutedSpaceSettings, experts: tuple[str, ...], context: SpaceContext) -> None:
        assert context.base is not None
        self._settings = settings
        self._experts = experts
        self._context = context
        self._base = context.base
        groups = context.layers if settings.groups == "layer" else settings.groups
        self._spans = spans(context.layers, 1 if settings.granularity == "model" else groups)
        top_k = settings.fixed.get("top_k", ALL)
        temperature, gain = (float(settings.fixed.get(name, 1.0)) for name in ("temperature", "gain"))
        self._genes = GroupGenes(
            experts,
            settings.presence,
            settings.where,
            {name: BOUNDS[name] for name in ("temperature", "gain") if name not in settings.fixed} | settings.bounds,
            None if isinstance(top_k, str) else int(top_k),
            "top_k" not in settings.fixed,
            temperature,
            gain,
        )
        names = [layers_name(span.start, span.stop) for span in self._spans]
        self.parameters = [*self._priorities(), *(p for name in names for p in self._genes.parameters(name, name))]
        self.layer_buffers = self.hops = context.layers
        self.left_out = tuple(self._left_out())

    def _priorities(self) -> Iterator[Parameter]:
        if self._settings.presence == "allocation":
            count = len(self._experts)
            for number, expert in enumerate(self._experts):
                yield Parameter(f"priority.{expert}", 0, 1, 1 - (number + 0.5) / count, group="priority")

    def decode(self, genome: Genome) -> RoutedRecipe:
        numbers = iter(genome.tolist())
        ranked = self._experts
        if self._settings.presence == "allocation":
            priority = {expert: next(numbers) for expert in self._experts}
            ranked = tuple(sorted(self._experts, key=lambda expert: -priority[expert]))
        return self._recipe([self._genes.read(numbers, len(span), ranked) for span in self._spans], self._router())

    def genome_of(self, recipe: Recipe) -> Genome | None:
        """The point whose groups are closest to a routed recipe that shares some experts with this space."""
        if not isinstance(recipe, RoutedRecipe) or set(recipe.experts).isdisjoint(self._experts):
            return None
        if sum(group.layers for group in recipe.groups) != self._context.layers:
            return None
        groups = [recipe.group_of(layer) for layer in range(self._context.layers)]
        numbers = []
        if self._settings.presence == "allocation":
            living = [float(np.mean([expert in group.experts for group in groups])) for expert in self._experts]
            ranked = sorted(range(len(self._experts)), key=lambda number: -living[number])
            numbers += [1 - (ranked.index(number) + 0.5) / len(ranked) for number in range(len(ranked))]
        for span in self._spans:
            numbers += self._genes.nearest([groups[layer] for layer in span])
        return np.array(numbers, dtype=np.float64)

    def baselines(self) -> Iterator[Baseline]:
        """The base and every single adapter, their mean and sum, the fit of each one's share in each tensor, Arrow, and
        routers that are soft, hard or as in MoLA.

        Routers are fitted if there are items to fit to, and otherwise of this space's kind. Each recipe comes once.
        """
        names = (self._base, *self._experts)
        for name in names:
            yield Baseline(name, "source", self._context.uniform(Blend.weighted_sum({name: 1.0})), None)
        mean = dict.fromkeys(self._experts, 1.0 / len(self._experts))
        yield Baseline("uniform average", "average", self._context.uniform(Blend.weighted_sum(mean)), None)
        total = self._task_vectors(dict.fromkeys(self._experts, 1.0))
        yield Baseline("sum", "default", self._context.uniform(total), None)
        if self._context.fit is not None:
            yield Baseline(FITTED, "fit", self._context.uniform(self._fitted()), None)
        seen = set()
        for label, recipe in self._routed_baselines():
            if recipe.hash not in seen:
                seen.add(recipe.hash)
                yield Baseline(label, "default", recipe, self._point(recipe))

    def _routed_baselines(self) -> Iterator[tuple[str, RoutedRecipe]]:
        if self._has_factors:
            yield "Arrow", self._recipe(self._everywhere(ARROW_KEPT), Router(kind="arrow"))
        soft, paper = self._baseline_router(), self._baseline_router(as_paper=True)
        yield f"{soft.kind} soft", self._recipe(self._everywhere(None), soft)
        yield f"{soft.kind} top 1", self._recipe(self._everywhere(1), paper)
        if self._context.layers >= len(MOLA_SHAPES[0]):
            for shape in MOLA_SHAPES:
                yield f"MoLA {'-'.join(map(str, shape))}", self._recipe(self._shaped(shape), paper)

    def _left_out(self) -> Iterator[str]:
        if self._context.fit is None:
            yield f"no fitted routers, because there is no `fit:`; those of baselines are {self._settings.router}"
        if not self._has_factors:
            yield "not Arrow, which uses the factors of LoRA"
        if self._context.layers < len(MOLA_SHAPES[0]):
            yield f"not the shapes of MoLA, which need {len(MOLA_SHAPES[0])} layers or more"

    @property
    def _has_factors(self) -> bool:
        """Whether all experts are LoRA adapters."""
        return all(kind == "LORA" for name in self._experts for kind in self._context.adapters(name))

    def _everywhere(self, top_k: int | None) -> list[LayerGroup]:
        return [group_of(len(span), self._experts, top_k) for span in self._spans]

    def _shaped(self, shape: Sequence[int]) -> list[LayerGroup]:
        """A shape of MoLA, scaled from its eight experts to those here; experts named first are used first."""
        quarters, count = spans(self._context.layers, len(shape)), len(self._experts)
        living = [max(1, round(count * number / 8)) for number in shape]
        return [group_of(len(span), self._experts[:number], 2) for span, number in zip(quarters, living, strict=True)]

    def _point(self, recipe: RoutedRecipe) -> Genome | None:
        """The genome that decodes to a recipe; None if there is none."""
        genome = self.genome_of(recipe)
        return genome if genome is not None and self.decode(genome).hash == recipe.hash else None

    @property
    def refits(self) -> int:
        """See ``RoutedSpaceSettings``."""
        return self._settings.refits

    def refitted(self, recipe: Recipe) -> RoutedRecipe | None:
        """A recipe with routers fitted to its own experts, temperatures and gains; None if they already are."""
        if not isinstance(recipe, RoutedRecipe) or recipe.router.kind != "fitted" or recipe.router.refitted:
            return None
        if recipe.groups == (group_of(self._context.layers, recipe.experts, None),):  # the shared routers' own fit
            return None
        return recipe.model_copy(update={"router": recipe.router.model_copy(update={"refitted": True})})

    def _router(self) -> Router:
        settings = self._settings
        return Router(
            kind=settings.router,
            gate=settings.gate,
            per=settings.per,
            heads=settings.heads,
            base_expert=settings.base_expert,
            renormalised=settings.renormalised,
            balance=settings.balance,
        )

    def _baseline_router(self, *, as_paper: bool = False) -> Router:
        """The router of baselines: fitted if possible; ``as_paper`` with gates that sum to 1."""
        router, is_fitted = self._router(), self._settings.router == "fitted"
        if not is_fitted and self._context.fit is not None:
            router = router.model_copy(update={"kind": "fitted"})
        return router.model_copy(update={"gate": "softmax", "renormalised": True}) if as_paper else router

    def _recipe(self, groups: Sequence[LayerGroup], router: Router) -> RoutedRecipe:
        context = self._context
        # Either what routers are computed from, or what the use of experts is measured on, but not both.
        by_texts = router.kind in _FROM_TEXTS or context.fit is None
        return RoutedRecipe(
            sources=dict(context.sources),
            tokenizer=context.tokenizer,
            seed=context.recipe_seed,
            dtype=context.dtype,
            calibration=context.calibration if by_texts else None,
            fit=None if by_texts else context.fit,
            base=self._base,
            experts=self._experts,
            groups=_joined(groups),
            router=router,
            where=self._settings.where,
            rest=self._rest(),
        )

    def _rest(self) -> Blend | None:
        if self._settings.rest == "base":
            return None
        return self._task_vectors(dict.fromkeys(self._experts, 1.0 / len(self._experts)))

    def _task_vectors(self, weights: Mapping[str, float]) -> Blend:
        return Blend(
            method="task_arithmetic",
            sources=tuple(weights),
            base=self._base,
            parameters={"weight": dict(weights), "normalize": False, "lambda": 1.0},
        )

    def _fitted(self) -> Blend:
        """The fitted share of each adapter in each tensor: a plain merge that routing should beat."""
        experts, ones = self._experts, dict.fromkeys(self._experts, 1.0)
        return Blend(method=FITTED, sources=experts, base=self._base, parameters={"weight": {**ones}})


def _joined(groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Join neighbouring groups that are equal, so that equal models have equal recipes."""
    found: list[LayerGroup] = []
    for group in groups:
        if found and found[-1].model_copy(update={"layers": group.layers}) == group:
            group = group.model_copy(update={"layers": found.pop().layers + group.layers})
        found.append(group)
    return tuple(found)
