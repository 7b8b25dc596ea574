"""Parameter space: how much of each source goes into each part of the merged model.

A genome holds the numbers of one merge method (a weight, a density, ...) for every source and every layer group. This
is the parameter-space half of Akiba et al., "Evolutionary Optimization of Model Merging Recipes" (arXiv 2403.13187,
section 3.1). Weights are not normalised by default: the optimum that the paper reports has weights that sum to about 2,
which no normalised merge can reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, FiniteFloat

from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome, Parameter
from evomerge.method import Method, Point, Value, check_blend, named_method
from evomerge.recipes.base import Recipe
from evomerge.recipes.stack import Basis, Blend, ChoiceName, Role, StackRecipe, roles
from search_spaces.base import SpaceContext, SpaceSettings
from search_spaces.chosen_method import ChosenMethodGenes
from search_spaces.gene import check_ranges
from search_spaces.method_genes import MethodGenes, alone_at
from search_spaces.nearest import SCALE, blends_of, common_numbers, fit_profile, without_scale
from search_spaces.places import path_outside, path_to
from search_spaces.profiles import Cosines, Lines, Tiers, with_factor
from search_spaces.step_genes import StepSettings, check_steps
from search_spaces.vision import VisionSettings

T = TypeVar("T")

LAW = "kappa sqrt(N)"
"""The label of the baseline with lambda = kappa sqrt(N), followed by its kappa."""

FITTED = "fitted"
"""The method that is fitted to right answers, and a baseline of every search that has items to fit to."""


class ParameterSpaceSettings(SpaceSettings):
    """The ``space:`` section of a search file.

    Args:
        method: the merge method; "auto" for the one that docs/methods.md recommends; or several methods, one of which
            is chosen by a number of each layer group, with separate numbers for each method.
        granularity: how the model is divided into layer groups that have their own numbers. "model": one group.
            "layer": each layer, and the embedding, final norm and head. "block": like "layer", with attention and mlp
            separate (a layer's norms belong to its attention). A number n: groups of n layers. "adaptive": like
            ``finest``, but the optimizer begins with one number of each kind for the whole model, and splits it into
            halves as the number of candidates allows, down to those groups.
        finest: "layer", "block" or a number n, with granularity "adaptive".
        bounds: a parameter's range, in place of the method's own: ``weight: [0, 2]``. Parameters that are not searched
            by default (``lambda``, ``gamma``, ``epsilon``) are searched if they are given bounds. With several methods,
            ``ties.weight`` applies to one method, and ``weight`` to all that have it; the same holds for ``fixed`` and
            ``switches``.
        fixed: a parameter that is not searched: ``density: 0.5``.
        switches: the method's yes/no settings: ``normalize: true``.
        basis: "core" if all sources except the base are low-rank adapters of it (LoRA): the method merges these in the
            few coordinates that hold all of their changes. By default the basis of the weights themselves.
        steps: the steps after the method, in this order: ``activations: {}``, or with ``bounds`` and ``fixed``.
        profile: a dependence on depth with a few numbers for all layers; requires granularity "model". "lines": the
            change of each layer is scaled, linearly from ``profile.first`` to ``profile.last``. "tiers": one factor for
            each third of the layers, those whose changes can be trusted least, more and most (``profile.low``,
            ``profile.middle``, ``profile.high``). {cosines: 4}: each weight of a source is a smooth curve with 4
            numbers.
        vision: how the vision parts are combined, with a separate number, if several sources have them; by default they
            come from the source that provides the tokenizer.
    """

    kind: Literal["parameter_space"] = "parameter_space"
    method: Annotated[str | Annotated[tuple[str, ...], Field(min_length=2)], BeforeValidator(named_method)]
    granularity: Literal["model", "layer", "block", "adaptive"] | Annotated[int, Field(ge=1)] = "model"
    finest: Literal["layer", "block"] | Annotated[int, Field(ge=1)] | None = None
    bounds: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(default_factory=dict)
    fixed: dict[str, FiniteFloat | ChoiceName] = Field(default_factory=dict)
    switches: dict[str, bool] = Field(default_factory=dict)
    basis: Basis | None = None
    steps: dict[str, StepSettings] = Field(default_factory=dict)
    profile: Literal["lines", "tiers"] | Cosines | None = None
    vision: VisionSettings | None = None

    def build(self, context: SpaceContext) -> ParameterSpace:
        methods = self.methods
        if repeated := [name for number, name in enumerate(methods) if name in methods[:number]]:
            raise InputError("space.method", f"names {repeated[0]} twice")
        for name in methods:
            self._check_method(context.method(name), context)
        self._check_names([context.method(name) for name in methods])
        if self.basis is not None and context.base is None:
            raise InputError("space.basis", "merges changes of a base, and there is none", "Name it: `base: NAME`.")
        if self.finest is not None and self.granularity != "adaptive":
            raise InputError("space.finest", "is for `granularity: adaptive`", "Leave it out.")
        if isinstance(self.groups, int) and self.groups > context.layers:
            key = "finest" if self.granularity == "adaptive" else "granularity"
            raise InputError(f"space.{key}", f"is {self.groups}, but the sources have {context.layers} layers")
        check_steps(self.steps, context)
        self._check_profile(context)
        if self.vision is not None:
            self.vision.check(context.sources, context.tokenizer)
        space = ParameterSpace(self, context)
        if not space.parameters:
            raise InputError("space.fixed", "leaves nothing to search", "Leave out at least one parameter.")
        return space

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def groups(self) -> str | int:
        """The layer groups that have their own numbers, or with "adaptive", the groups after all splits."""
        return (self.finest or "layer") if self.granularity == "adaptive" else self.granularity

    def of_method(self, values: Mapping[str, T], name: str) -> dict[str, T]:
        """The part of ``bounds``, ``fixed`` or ``switches`` that applies to one of several methods."""
        own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
        return {key: value for key, value in values.items() if "." not in key} | own

    def _check_method(self, method: Method, context: SpaceContext) -> None:
        context.check_needs(method, "space.method")
        if method.needs_base and context.base is None:
            raise InputError("base", f"{method.name} merges task vectors and needs a base", "Name it: `base: NAME`.")

    def _check_names(self, methods: Sequence[Method]) -> None:
        if len(methods) == 1:
            (method,) = methods
            check_ranges(method.name, method.parameters, self.bounds, self.fixed, "space")
            _check_known("switches", self.switches, method.switches, f"{method.name} has no such setting; it has")
            return
        for field, values in (("bounds", self.bounds), ("fixed", self.fixed), ("switches", self.switches)):
            known: set[str] = set()
            for method in methods:
                names = set(method.switches) if field == "switches" else {p.name for p in method.parameters}
                own = {f"{method.name}.{name}" for name in names}
                mine = [name for name in values if name.startswith(f"{method.name}.")]
                _check_known(field, mine, own, f"{method.name} has no such setting; it has")
                known |= names | own
            others = [name for name in values if name.partition(".")[0] not in self.methods]
            _check_known(field, others, known, f"none of {', '.join(self.methods)} has such a setting; they have")
        for method in methods:
            known = {p.name for p in method.parameters}
            bounds = _only(self.of_method(self.bounds, method.name), known)
            fixed = _only(self.of_method(self.fixed, method.name), known)
            check_ranges(method.name, method.parameters, bounds, fixed, "space", partial(self._key, method.name))

    def _key(self, method: str, field: str, name: str) -> str:
        """The search file's name for a parameter of one of several methods."""
        own = f"{method}.{name}"
        return own if own in (self.bounds if field == "bounds" else self.fixed) else name

    def _check_profile(self, context: SpaceContext) -> None:
        if self.profile is None:
            return
        if self.granularity != "model":
            problem = f"is for one blend over all layers, and with granularity {self.granularity} there are several"
            raise InputError("space.profile", problem, "Leave out `granularity:`, or the profile.")
        if isinstance(self.profile, Cosines):
            self.profile.check([context.method(name) for name in self.methods], list(self.fixed), context.layers)
        elif context.base is None:
            raise InputError("base", "a profile scales what layers add to a base", "Name it: `base: NAME`.")


def _check_known(field: str, values: Iterable[str], known: Collection[str], problem: str) -> None:
    for name in values:
        if name not in known:
            raise InputError(f"space.{field}.{name}", f"{problem}: {', '.join(sorted(known)) or 'none'}")


def _only(values: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    return {name: value for name, value in values.items() if name in names}


class ParameterSpace:
    """The numbers of one merge method for every layer group; see the module docstring."""

    def __init__(self, settings: ParameterSpaceSettings, context: SpaceContext) -> None:
        self._settings = settings
        self._context = context
        self._group_of = {role: self._group(role) for role in roles(context.layers)}
        of_methods = [self._genes_of(context.method(name)) for name in settings.methods]
        self._genes = of_methods[0] if len(of_methods) == 1 else ChosenMethodGenes(of_methods)
        self._profile = self._profile_of(context)
        self._groups = list(dict.fromkeys(self._group_of.values()))
        self.parameters = [p for group in self._groups for p in self._genes.parameters(group, group)]
        if settings.granularity == "adaptive":
            self.parameters = list(self._with_places(self.parameters))
        if self._profile is not None:
            smooth = any(genes.has_derivatives for genes in of_methods)
            self.parameters += [replace(p, differentiable=smooth) for p in self._profile.parameters]
        if settings.vision is not None:
            self.parameters.append(settings.vision.parameter(context.tokenizer))
        self.layer_buffers = self.hops = context.layers
        for method, numbers in self._genes.defaults():
            check_blend(self._genes.blend(numbers), method, "space")

    def _genes_of(self, method: Method) -> MethodGenes:
        settings, known = self._settings, {p.name for p in method.parameters}
        bounds = _only(settings.of_method(settings.bounds, method.name), known)
        fixed = _only(settings.of_method(settings.fixed, method.name), known)
        switches = _only(settings.of_method(settings.switches, method.name), method.switches)
        cosines = settings.profile.cosines if isinstance(settings.profile, Cosines) else 1
        return MethodGenes(method, self._context, bounds, fixed, switches, settings.basis, settings.steps, cosines)

    def _profile_of(self, context: SpaceContext) -> Lines | Tiers | None:
        if self._settings.profile == "lines":
            return Lines(context.layers)
        if self._settings.profile == "tiers":
            tiers = context.measures.tiers
            return Tiers.by_depth(context.layers) if tiers is None else Tiers(tiers)
        return None

    def decode(self, genome: Genome) -> StackRecipe:
        numbers, size, vision = genome.tolist(), len(self._genes), self._settings.vision
        seen = None if vision is None else vision.blend(numbers.pop())
        blends = {
            group: self._genes.blend(numbers[place * size : (place + 1) * size])
            for place, group in enumerate(self._groups)
        }
        at = {role: blends[group] for role, group in self._group_of.items()}
        if self._settings.profile is not None:
            of_layer = {layer: self._in_layer(numbers, layer) for layer in (None, *range(self._context.layers))}
            at = {role: of_layer[role.layer] for role in at}
        return StackRecipe.compose(
            sources=self._context.sources,
            tokenizer=self._context.tokenizer,
            embedding=at[Role("embedding")],
            hops=(
                (i, at[Role("attention", i)], at[Role("mlp", i)], at[Role("norm", i)])
                for i in range(self._context.layers)
            ),
            norm=at[Role("norm")],
            head=at[Role("head")],
            vocabulary=self._context.vocabulary,
            vision=seen,
            seed=self._context.recipe_seed,
            dtype=self._context.dtype,
            calibration=self._context.calibration_of(blends.values()),
            fit=self._context.fit_of(blends.values()),
        )

    def _in_layer(self, numbers: Sequence[float], layer: int | None) -> Blend:
        """The blend of a layer according to the profile; None for the parts outside the stack."""
        size = len(self._genes)
        if self._profile is not None:
            return with_factor(self._genes.blend(numbers[:size]), self._profile.factor(numbers[size:], layer))
        return self._genes.blend(numbers, self._depth(layer))

    def _depth(self, layer: int | None) -> float | None:
        """The depth of the middle of a layer, from 0 to 1; None for the parts outside the stack."""
        return None if layer is None else (layer + 0.5) / self._context.layers

    def baselines(self) -> Iterator[Baseline]:
        """Every single source, the uniform average of the merged ones, and the method's usual defaults.

        Also the soups of the context, if it has any; task arithmetic with the scaling of ``merging.measured.amplitude``
        if kappa is known; and, if there are items to fit to, the fit of each source's share in each tensor.
        """
        mixed = self._context.mixed
        for name in self._context.sources:
            alone = self._genome_at(partial(alone_at, mixed=mixed, source=name), name)
            vision = self._settings.vision
            seen = None if vision is None else vision.blend(*self._of_vision(name))
            recipe = self._context.uniform(Blend.weighted_sum({name: 1.0}), seen)
            yield Baseline(name, "source", recipe, alone)
        share = {name: 1.0 / len(mixed) for name in mixed}
        uniform = self._genome_at(lambda method: method.uniform(mixed) if method.uniform is not None else None)
        yield Baseline("uniform average", "average", self._context.uniform(Blend.weighted_sum(share)), uniform)
        for method, numbers in self._genes.defaults():
            usual = self._genome_of(numbers)
            yield Baseline(f"{method.name} defaults", "default", self.decode(usual), usual)
        for soup in self._context.measures.soups:
            blend = Blend.weighted_sum(dict(soup.weights))
            yield Baseline(soup.label, "default", self._context.uniform(blend), None)
        if (kappa := self._context.measures.kappa) is not None and any(map(self._has_strength, self._genes.methods)):
            yield self._at_law(kappa)
        if self._context.fit is not None and self._context.base is not None:
            yield from self._fitted(self._context.base)

    def genome_of(self, recipe: Recipe) -> Genome | None:
        """The point closest to a merge of weights: each group has the mean of the recipe's numbers for its parts.

        A scaling at the end of a blend, which is how a profile is written, is expressed by the profile of this space,
        by a scale step if the space has one, or else by the shares of the sources.
        """
        blends = blends_of(recipe, self._context.layers)
        if blends is None:
            return None
        factors: dict[Role, float] = {}
        if SCALE not in self._settings.steps:
            for role, blend in blends.items():
                blends[role], factors[role] = without_scale(blend)
        rows: dict[str, list[list[float]]] = {group: [] for group in self._groups}
        for role, blend in blends.items():
            factor = factors.get(role, 1.0) if self._profile is None else 1.0
            numbers = self._genes.nearest(blend, factor)
            if numbers is None:
                return None
            rows[self._group_of[role]].append(numbers)
        parameters = self._genes.parameters("", "")
        genome = [number for group in self._groups for number in common_numbers(rows[group], parameters)]
        if self._profile is not None:
            genome += fit_profile(self._profile, {role.layer: factor for role, factor in factors.items()})
        for weight, place, wave in self._genes.curves:  # only with a single group
            (of_roles,) = rows.values()
            over_depth = [(self._depth(r.layer), row[weight]) for r, row in zip(blends, of_roles, strict=True)]
            genome[place] = wave.nearest([(depth, number) for depth, number in over_depth if depth is not None])
        if self._settings.vision is not None:
            seen = recipe.seen if isinstance(recipe, StackRecipe) else None
            genome.append(self._settings.vision.nearest(seen, self._context.tokenizer))
        return np.array(genome, dtype=np.float64)

    def _has_strength(self, method: Method) -> bool:
        """Whether this method has a number for how far a merge goes: it uses task vectors, with weights or a factor."""
        named = {p.name for p in method.parameters}
        return method.needs_base and len(self._context.mixed) > 1 and not named.isdisjoint({"weight", "lambda"})

    def _at_law(self, kappa: float) -> Baseline:
        """Task arithmetic with lambda = kappa sqrt(N) on the mean of N task vectors, whatever the method here."""
        context = self._context
        mixed, weight = context.mixed, kappa / math.sqrt(len(context.mixed))

        def point_of(method: Method) -> Point | None:
            divides = self._settings.of_method(self._settings.switches, method.name).get("normalize", False)
            return None if method.arithmetic is None or divides else method.arithmetic(mixed, weight)

        genome = self._genome_at(point_of)
        same: dict[str, Value] = dict.fromkeys(mixed, weight)
        blend = Blend(
            method="task_arithmetic",
            sources=mixed,
            base=context.base,
            parameters={"weight": same, "lambda": 1.0, "normalize": False},
        )
        recipe = self._context.uniform(blend) if genome is None else self.decode(genome)
        return Baseline(f"{LAW}, kappa {kappa:g}", "default", recipe, genome)

    def _fitted(self, base: str) -> Iterator[Baseline]:
        """The fit to right answers, unless it is a method of this space, whose default it then is."""
        if any(method.name == FITTED for method in self._genes.methods):
            return
        mixed = self._context.mixed
        blend = Blend(method=FITTED, sources=mixed, base=base, parameters={"weight": dict.fromkeys(mixed, 1.0)})
        yield Baseline(FITTED, "fit", self._context.uniform(blend), None)

    def _with_places(self, parameters: Iterable[Parameter]) -> Iterator[Parameter]:
        """The parameters with their places in the model and their kinds, so that an optimizer can tie them."""
        groups, layers = self._settings.groups, self._context.layers
        paths: dict[str, tuple[str, ...]] = {}
        for role, group in self._group_of.items():
            if role.layer is None:
                paths[group] = path_outside(group)
            else:
                path = path_to(role.layer, layers, groups if isinstance(groups, int) else 1)
                paths[group] = (*path, group) if groups == "block" else path
        for p in parameters:
            yield replace(p, places=paths[p.group], what=p.name.removeprefix(f"{p.group}."))

    def _group(self, role: Role) -> str:
        granularity = self._settings.groups
        if granularity == "model":
            return "model"
        if role.layer is None:
            # A tied head shares the embedding's tensor; a gene for it would have no effect.
            return "embedding" if role.kind == "head" and self._context.tied else role.kind
        if granularity == "layer":
            return f"layers.{role.layer}"
        if granularity == "block":
            return f"layers.{role.layer}.{'mlp' if role.kind == 'mlp' else 'attention'}"
        assert isinstance(granularity, int)
        first = role.layer // granularity * granularity
        return f"layers.{first}-{min(first + granularity, self._context.layers) - 1}"

    def _genome_at(self, point_of: Callable[[Method], Point | None], source: str | None = None) -> Genome | None:
        """The genome with every group at a method's point and no scaling; None if there is none.

        Args:
            source: the source of the vision parts, if several have them.
        """
        numbers = self._genes.numbers_at(point_of)
        if numbers is None:
            return None
        of_profile = () if self._profile is None else self._profile.neutral
        return np.array([*numbers * len(self._groups), *of_profile, *self._of_vision(source)], dtype=np.float64)

    def _genome_of(self, numbers: Sequence[float]) -> Genome:
        """The genome with these numbers in every group, and the profile at its defaults."""
        of_profile = () if self._profile is None else [p.default for p in self._profile.parameters]
        return np.array([*[*numbers] * len(self._groups), *of_profile, *self._of_vision()], dtype=np.float64)

    def _of_vision(self, source: str | None = None) -> list[float]:
        """The number that selects a source's vision parts, by default the tokenizer's; empty if not searched."""
        vision = self._settings.vision
        if vision is None:
            return []
        return [vision.number_of(source if source in vision.sources else self._context.tokenizer)]
