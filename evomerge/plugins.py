"""Finds parts by name: this project's own, and those that packages add through entry points.

There is one lookup for merge methods and steps, search spaces, kinds of recipes and their builders, evaluators,
optimizers and observers. A part is imported when it is first requested by name.
"""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, TypeVar

from evomerge.errors import InputError
from evomerge.printable import printable

OWN: Mapping[str, Mapping[str, str]] = {
    "evomerge.merge_methods": {
        "linear": "evomerge.methods.linear:LINEAR",
        "passthrough": "evomerge.methods.passthrough:PASSTHROUGH",
        "slerp": "evomerge.methods.slerp:SLERP",
        "nuslerp": "evomerge.methods.nuslerp:NUSLERP",
        "multislerp": "evomerge.methods.multislerp:MULTISLERP",
        "karcher": "evomerge.methods.karcher:KARCHER",
        "task_arithmetic": "evomerge.methods.task_arithmetic:TASK_ARITHMETIC",
        "model_stock": "evomerge.methods.model_stock:MODEL_STOCK",
        "ties": "evomerge.methods.ties:TIES",
        "dare_linear": "evomerge.methods.dare:DARE_LINEAR",
        "dare_ties": "evomerge.methods.dare:DARE_TIES",
        "della_linear": "evomerge.methods.della:DELLA_LINEAR",
        "della": "evomerge.methods.della:DELLA",
        "breadcrumbs": "evomerge.methods.breadcrumbs:BREADCRUMBS",
        "breadcrumbs_ties": "evomerge.methods.breadcrumbs:BREADCRUMBS_TIES",
        "sce": "evomerge.methods.sce:SCE",
        "ram": "evomerge.methods.ram:RAM",
        "ramplus_tl": "evomerge.methods.ram:RAMPLUS_TL",
        "arcee_fusion": "evomerge.methods.arcee_fusion:ARCEE_FUSION",
        "nearswap": "evomerge.methods.nearswap:NEARSWAP",
        "gram": "evomerge.methods.gram:GRAM",
        "wudi": "evomerge.methods.wudi:WUDI",
        "actmat": "evomerge.methods.gram:ACTMAT",
        "swudi": "evomerge.methods.wudi:SWUDI",
        "ace": "evomerge.methods.ace:ACE",
        "regmean": "evomerge.methods.regmean:REGMEAN",
        "tsv": "evomerge.methods.tsv:TSV",
        "yoyo": "evomerge.methods.yoyo:YOYO",
        "magmax": "evomerge.methods.magmax:MAGMAX",
        "consensus": "evomerge.methods.consensus:CONSENSUS",
        "pcb": "evomerge.methods.pcb:PCB",
        "resmerge": "evomerge.methods.resmerge:RESMERGE",
        "cabs": "evomerge.methods.cabs:CABS",
        "localize_and_stitch": "evomerge.methods.localize_and_stitch:LOCALIZE_AND_STITCH",
        "fitted": "evomerge.methods.fitted:FITTED",
        "regmean_plus_plus": "evomerge.methods.regmean_plus_plus:REGMEAN_PLUS_PLUS",
    },
    "evomerge.merge_steps": {
        "scale": "evomerge.steps.scale:SCALE",
        "iso": "evomerge.steps.iso:ISO",
        "iso_cts": "evomerge.steps.iso_cts:ISO_CTS",
        "subspace_boosting": "evomerge.steps.subspace_boosting:SUBSPACE_BOOSTING",
        "svc": "evomerge.steps.svc:SVC",
        "activations": "evomerge.steps.activations:ACTIVATIONS",
    },
    "evomerge.search_spaces": {
        "parameter_space": "search_spaces.parameter_space:ParameterSpaceSettings",
        "data_flow_space": "search_spaces.data_flow_space:DataFlowSpaceSettings",
        "hybrid_space": "search_spaces.hybrid_space:HybridSpaceSettings",
        "routed": "search_spaces.routed_space:RoutedSpaceSettings",
        "prompts": "search_spaces.prompts_space:PromptsSpaceSettings",
        "mixture": "search_spaces.mixture_space:MixtureSpaceSettings",
        "staged": "search_spaces.staged_space:StagedSpaceSettings",
        "state_dict": "search_spaces.state_dict_space:StateDictSpaceSettings",
    },
    "evomerge.recipes": {
        "stack": "evomerge.recipes.stack:StackRecipe",
        "mixture": "evomerge.recipes.mixture:MixtureRecipe",
        "routed": "evomerge.recipes.routed:RoutedRecipe",
        "prompts": "evomerge.recipes.prompts:PromptsRecipe",
        "staged": "evomerge.recipes.staged:StagedRecipe",
        "state_dict": "evomerge.recipes.state_dict:StateDictRecipe",
    },
    "evomerge.builders": {
        "stack": "evomerge.merging.building.stack_builder:StackBuilder",
        "mixture": "evomerge.mixture.builder:MixtureBuilder",
        "routed": "evomerge.routed.builder:RoutedBuilder",
        "prompts": "evomerge.prompts.builder:PromptsBuilder",
        "staged": "evomerge.merging.building.staged_builder:StagedBuilder",
        "state_dict": "evomerge.raw.builder:StateDictBuilder",
    },
    "evomerge.evaluators": {
        "lm_eval": "evaluators.lm_eval:LmEvalSettings",
        "mgsm": "evaluators.mgsm:MgsmSettings",
        "multiple_choice": "evaluators.multiple_choice:MultipleChoiceSettings",
        "likelihood": "evaluators.likelihood:LikelihoodSettings",
        "rouge": "evaluators.rouge:RougeSettings",
        "exact_match": "evaluators.exact_match:ExactMatchSettings",
        "language": "evaluators.language:LanguageSettings",
        "reward_model": "evaluators.reward_model:RewardModelSettings",
        "cost": "evaluators.cost:CostSettings",
        "change": "evaluators.change:ChangeSettings",
        "python": "evaluators.function:FunctionSettings",
    },
    "evomerge.optimizers": {
        "cma": "evomerge.optimizers.cma_es:CmaSettings",
        "lq_cma": "evomerge.optimizers.lq_cma:LqCmaSettings",
        "catcma": "evomerge.optimizers.catcma:CatCmaSettings",
        **dict.fromkeys(
            ("nsga2", "nsga3", "tpe", "gp", "random", "qmc"), "evomerge.optimizers.optuna_samplers:OptunaSettings"
        ),
        "greedy_soup": "evomerge.optimizers.soups:SoupSettings",
        "proxy_descent": "evomerge.optimizers.proxy_descent:ProxyDescentSettings",
        "map_elites": "evomerge.optimizers.map_elites:MapElitesSettings",
        "cycle_qd": "evomerge.optimizers.cycle_qd:CycleQdSettings",
        "dns": "evomerge.optimizers.dns:DnsSettings",
        "m2n2": "evomerge.optimizers.m2n2:M2n2Settings",
        "map": "evomerge.optimizers.pareto_map:MapSettings",
    },
    "evomerge.observers": {
        "logs": "evomerge.observers.logs:LogsSettings",
        "mlflow": "evomerge.observers.mlflow:MlflowSettings",
        "prometheus": "evomerge.observers.prometheus:PrometheusSettings",
        "tensorboard": "evomerge.observers.tensorboard:TensorBoardSettings",
        "wandb": "evomerge.observers.wandb:WandbSettings",
    },
}
"""This project's parts: for each group of entry points, the location of each name. They need no installation, so that a
new one is available as soon as its line is here; a package's part with the same name does not replace it."""

NOUNS: Mapping[str, str] = {
    "evomerge.merge_methods": "merge method",
    "evomerge.merge_steps": "step",
    "evomerge.search_spaces": "search space",
    "evomerge.recipes": "recipe kind",
    "evomerge.builders": "recipe builder",
    "evomerge.evaluators": "evaluator",
    "evomerge.optimizers": "optimizer",
    "evomerge.observers": "observer",
}
"""The noun for a part of each group."""

Base = TypeVar("Base")

_MAX_NAME, _MAX_LISTED = 100, 300  # characters


def plugins(group: str) -> Mapping[str, EntryPoint]:
    """Every part of a group by name: this project's own first, then those of packages, sorted by name."""
    return _installed(group, tuple(sys.path))


@cache
def _installed(group: str, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """``plugins`` for this search path, cached, because reading the metadata of all packages takes ten milliseconds."""
    own = {name: EntryPoint(name, target, group) for name, target in OWN.get(group, {}).items()}
    added = sorted(entry_points(group=group), key=lambda point: point.name)
    return own | {point.name: point for point in added if point.name not in own}


def find_plugin(group: str, name: str, place: str) -> object:
    """Load the part ``name`` of ``group``.

    Raises:
        InputError: there is none with that name (suggests the closest, or lists all), or its package fails to load.
    """
    known, noun = plugins(group), NOUNS[group]
    if name not in known:
        raise unknown_name(name, known, place, noun)
    try:
        return _load(known[name])
    except Exception as error:  # a package's code may raise anything on import
        if name in OWN.get(group, {}):
            raise
        what = f"{noun} {name!r} of {known[name].value} cannot be loaded: {type(error).__name__}: {error}"
        raise InputError(place, f"the {printable(what)}", "Repair the package, or remove it.") from error


class Named(Protocol):
    """An object that knows its own name."""

    @property
    def name(self) -> str: ...


Part = TypeVar("Part", bound=Named)


def find_named(group: str, name: str, place: str, kind: type[Part]) -> Part:
    """Load the part ``name`` of a group whose entry points name objects of one class, such as merge methods.

    Raises:
        InputError: as for ``find_plugin``; or the object has another class or another name.
    """
    part = find_plugin(group, name, place)
    if not isinstance(part, kind):
        problem = f"what the package names {name} is not {_with_article(NOUNS[group])}"
        raise InputError(place, problem, f"Let it name a {kind.__name__}.")
    if part.name != name:
        raise InputError(place, f"the {kind.__name__.lower()} that is installed as {name} calls itself {part.name}")
    return part


def find_class(group: str, name: str, place: str, base: type[Base]) -> type[Base]:
    """The settings class of the part ``name`` of ``group``.

    Raises:
        InputError: as for ``find_plugin``, or it is not a subclass of ``base``.
    """
    part = find_plugin(group, name, place)
    if not (isinstance(part, type) and issubclass(part, base)):
        problem = f"what the package names {name} is not {_with_article(NOUNS[group])}"
        raise InputError(place, problem, f"Let it name a subclass of {base.__name__}.")
    return part


@cache
def _load(point: EntryPoint) -> object:
    """Cached, because merging looks up the method for every tensor."""
    return point.load()


def unknown_name(name: str, known: Iterable[str], place: str, noun: str) -> InputError:
    """The error for an unknown name, with the closest known name, or as many known names as fit on a line or two."""
    names = sorted(known)
    near = difflib.get_close_matches(name[:_MAX_NAME], names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {listed(names)}."
    return InputError(place, f"there is no {noun} {printable(name, _MAX_NAME)!r}", hint)


def listed(names: Sequence[str]) -> str:
    """As many of the names as fit on a line or two, and how many more there are."""
    ends = itertools.accumulate(len(name) + 2 for name in names)
    fitting = sum(end <= _MAX_LISTED for end in ends)
    if fitting == len(names):
        return ", ".join(names)
    return f"{', '.join(names[:fitting])} and {len(names) - fitting:,} more"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
