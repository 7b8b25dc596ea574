"""From a search file to everything that a search needs, opened and checked before anything expensive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluators.base import Evaluator
from evaluators.change import ChangeEvaluator, ChangeSettings
from evaluators.cost import COUNTED
from evaluators.likelihood import LikelihoodEvaluator
from evomerge.blends import observed
from evomerge.calibration import Calibration
from evomerge.checkpoints.checks import check_compatible, check_keeps_vision
from evomerge.checkpoints.fingerprints import Untouched
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.vocabulary import align
from evomerge.errors import InputError
from evomerge.genome import SearchSpace
from evomerge.inference.reading import Reader
from evomerge.merging.adapters.low_rank import are_adapters, low_rank_problem
from evomerge.merging.building.builders import check_recipe
from evomerge.optimizers import ProxyDescentSettings
from evomerge.raw.blocks import grouped
from evomerge.raw.merging import check_alike
from evomerge.raw.table import open_table
from evomerge.recipes.base import STACK
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.preparing.asking import item_warnings, reader_of
from evomerge.search.preparing.evaluators import Evaluators, refuse_test_items
from evomerge.search.preparing.mixtures import check_mixtures
from evomerge.search.preparing.setup import (
    ConstraintInfo,
    EvaluatorInfo,
    FeatureInfo,
    ObjectiveInfo,
    ProxyInfo,
    ScreenInfo,
    Setup,
)
from evomerge.search.preparing.texts import text_warnings
from evomerge.search.settings.early import UNMEASURED, make_space
from evomerge.search.settings.fitting import PLACE
from evomerge.search.settings.gradient import gradient_problem
from evomerge.search.settings.layouts import check_layout
from evomerge.search.settings.runtime_env import runtime_env_of
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.settings.selecting import PLACE as SELECT
from evomerge.search.settings.selecting import stand_in
from search_spaces.base import Measures
from search_spaces.parameter_space import ParameterSpaceSettings
from search_spaces.prompts_space import PromptsSpace
from search_spaces.state_dict_space import StateDictSpaceSettings

_EXPERT = "recipe.experts."
"""The place that builders name in errors about one of a recipe's experts."""


@dataclass(frozen=True)
class Prepared:
    """An opened search: what the driver knows, and what a worker in this process can use directly.

    ``warnings`` are sentences for people, about items and calibration texts.
    """

    file: SearchFile
    setup: Setup
    sources: dict[str, Source]
    opened: Evaluators
    untouched: Untouched
    calibration: Calibration | None = None
    warnings: tuple[str, ...] = ()

    @property
    def named_evaluators(self) -> dict[str, Evaluator]:
        """Each evaluator by the first place in the search file that names it."""
        return self.opened.named

    @property
    def evaluators(self) -> tuple[Evaluator, ...]:
        """The evaluators, in the order in which jobs refer to them."""
        return self.opened.opened

    def reader(self) -> Reader:
        """The reader of the merged models."""
        return reader_of(self.sources[self.file.tokenizer_source])


def prepare(file: SearchFile, *, tries: bool = False) -> Prepared:
    """Open sources (headers only) and evaluators, and check that everything fits together.

    Args:
        tries: whether to try what evaluators do without a model, before scoring in this process.

    Raises:
        InputError: naming the key of the search file, or the file of a source, and a hint.
    """
    asked, file = file, stand_in(file)  # check what will be searched
    _check_engine(file)
    if file.pool == "ray":
        runtime_env_of(file.cluster)
    sources = open_sources(asked)
    model = sources[file.tokenizer_source]
    check_layout(file, model.described, model.layers)
    untouched = Untouched(sources.values())
    space = space_of(file, sources)
    check_mixtures(file, space, sources)
    if file.engine == "vllm" and file.space.moves_layers:
        from evomerge.inference.vllm_engine import check_paths

        check_paths(sources, file.tokenizer_source)
    evaluators = Evaluators.open(file, tries=tries)
    if not file.search_on_test_items:
        evaluators.refuse_test_items()
    _check_fit(file, evaluators)
    _check_change(file, space, evaluators)
    _check_together(file, space, _those_of(file, sources), evaluators.opened)
    reader = _with_room(reader_of(model), space)
    asking = evaluators.named | ({} if file.fit_split is None else {PLACE: file.fit_split.evaluator})
    warnings = (*item_warnings(asking, reader), *_text_warnings(file, space, sources, reader))
    setup = Setup(
        name=file.name,
        seed=file.seed,
        space=space,
        optimizer=file.optimizer,
        objectives=tuple(_objective(file, name, evaluators) for name in file.objectives),
        constraints=tuple(_constraint(file, name, evaluators) for name in file.constraints),
        features=tuple(_feature(file, name, evaluators) for name in file.features),
        screen=_screen(file, evaluators),
        proxy=_proxy(file, space, evaluators),
        racing=file.racing,
        mode=file.mode,
        answers=file.answers,
        prices=file.cluster.prices,
        evaluators=tuple(
            EvaluatorInfo(e.name, e.version, len(e.items("search")), len(e.items("held_out")))
            for e in evaluators.opened
        ),
        budget=file.budget,
        confirm=file.confirm,
        attempts=file.attempts,
    )
    file.optimizer.check(space.parameters, len(setup.objectives), "optimizer", setup.axes)
    _check_niches(file, setup)
    if asked.select is not None:
        _check_selectable(setup)
    calibration = None if file.calibration is None else file.calibration.texts
    return Prepared(asked, setup, sources, evaluators, untouched, calibration, warnings)


def with_sources(prepared: Prepared, file: SearchFile) -> Prepared:
    """The same search over other sources, which are opened here.

    Raises:
        InputError: they cannot be merged, or a setting does not fit them.
    """
    sources = open_sources(file)
    setup, calibration = replace(prepared.setup, space=build_space(file, sources)), file.calibration
    return replace(
        prepared, file=file, setup=setup, sources=sources, untouched=Untouched(sources.values()),
        calibration=None if calibration is None else calibration.texts,
    )  # fmt: skip


def space_of(file: SearchFile, sources: Mapping[str, Source], measures: Measures = UNMEASURED) -> SearchSpace:
    """The space of a search file; if sources are yet to be chosen, one over as many as will be kept."""
    file = stand_in(file)
    return build_space(file, _those_of(file, sources), measures)


def _those_of(file: SearchFile, sources: Mapping[str, Source]) -> dict[str, Source]:
    return {name: sources[name] for name in file.sources}


def _check_selectable(setup: Setup) -> None:
    """Refuse to choose sources for a space without averages, or by objectives that do not count solved items."""
    if not any(objective.maximise for objective in setup.objectives):
        raise InputError(
            SELECT, "compares sources by the items that they solve, and no objective is maximised", "Leave it out."
        )
    if others := sorted({mark.recipe.kind for mark in setup.space.baselines()} - {STACK}):
        problem = f"averages the sources that it does not keep, and models of the kind {others[0]} have no average"
        raise InputError(SELECT, problem, "Leave it out, or search over weights: `kind: parameter_space`.")


def _with_room(reader: Reader, space: SearchSpace) -> Reader:
    """The reader of texts behind the longest prompt of a space.

    Raises:
        InputError: it leaves at most half of the context.
    """
    if not isinstance(space, PromptsSpace) or reader.context is None:
        return reader
    if 2 * space.tokens > reader.context:
        problem = f"{space.tokens} tokens may stand before a text, and the context holds {reader.context} with it"
        raise InputError("space.tokens", problem, "Give fewer: `tokens: N`.")
    return replace(reader, context=reader.context - space.tokens)


def _text_warnings(
    file: SearchFile, space: SearchSpace, sources: Mapping[str, Source], reader: Reader
) -> Iterator[str]:
    """Warnings about the calibration texts, if models of the space use them."""
    if file.calibration is None:
        return
    needs = observed((mark.recipe for mark in space.baselines()), sources)
    yield from text_warnings(file.calibration.texts, sources, file.tokenizer_source, reader.tokenizer, needs)


def _check_engine(file: SearchFile) -> None:
    """Refuse an engine that is not installed here, or that cannot run models of this space."""
    if file.engine not in file.space.engines:
        problem = f"is {file.engine}, which cannot answer with models of a {file.space.kind} space"
        raise InputError("engine", problem, f"Take `engine: {file.space.engines[0]}`.")
    if file.engine == "vllm":
        from evomerge.inference.vllm_engine import import_vllm

        import_vllm()


def open_sources(file: SearchFile) -> dict[str, Source]:
    """Open every source of a search file, align them to one vocabulary, and refuse those that cannot be merged."""
    if isinstance(file.space, StateDictSpaceSettings):
        return _open_tables(file, file.space)
    prompts = file.space.takes_prompts
    sources = {
        name: open_source(name, reference, place=f"sources.{name}", prompts=prompts)
        for name, reference in file.sources.items()
    }
    _refuse_unmovable_layers(file, sources)
    _refuse_strange_prompts(file, sources)
    check_keeps_vision(sources, file.tokenizer_source)
    aligned = align(sources, file.tokenizer_source, file.merged_vocabulary)
    check_compatible(
        aligned,
        None if file.space.mixes_tensors else _every_layer(file, aligned),
        same_tokens=file.vocabulary.kind == "same",
        same_special=file.tokenizer is None,
    )
    return aligned


def _open_tables(file: SearchFile, space: StateDictSpaceSettings) -> dict[str, Source]:
    """Open every table of tensors, and refuse those that cannot be merged."""
    tables = {name: open_table(name, ref, Path(), f"sources.{name}") for name, ref in file.sources.items()}
    first = tables[file.tokenizer_source]
    for name, table in tables.items():
        if table.is_folder != first.is_folder:
            whole = "a folder of diffusers" if table.is_folder else "a file of tensors"
            problem = f"is {whole}, and {file.tokenizer_source} is not: their tensors have other names"
            raise InputError(f"sources.{name}", problem, "Convert one to the layout of the other.")
    names = {key for table in tables.values() for key in table.source.tensors}
    merged = grouped(names, space.patterns(tuple(first.source.tensors)))
    check_alike(tables, space.keys, names - merged.keys(), "sources")
    return {name: table.source for name, table in tables.items()}


def _every_layer(file: SearchFile, sources: Mapping[str, Source]) -> StackRecipe:
    """A path through all layers of all sources, to check what a search over paths requires."""
    copies = {name: Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}}) for name in sources}
    model = copies[file.tokenizer_source]
    return StackRecipe.compose(
        sources=file.sources,
        tokenizer=file.tokenizer_source,
        embedding=model,
        hops=[(i, copies[name], copies[name], copies[name]) for name, s in sources.items() for i in range(s.layers)],
        norm=model,
        head=model,
        vocabulary=file.merged_vocabulary,
    )


def build_space(file: SearchFile, sources: Mapping[str, Source], measures: Measures = UNMEASURED) -> SearchSpace:
    """The search space of a search file over these sources, given measurements of their weights."""
    model = sources[file.tokenizer_source]
    depths = {name: source.layers for name, source in sources.items()}
    space = make_space(file, layers=model.layers, tied=model.tied, depths=depths, measures=measures)
    # Check the corners of the space: a bound that the method cannot compute would fail every candidate there.
    for corner in ("low", "high"):
        genome = np.array([getattr(parameter, corner) for parameter in space.parameters], dtype=np.float64)
        try:
            check_recipe(space.decode(genome), sources)
        except InputError as error:
            if error.place.endswith(".basis"):  # independent of the values
                raise InputError("space.basis", error.problem, error.hint) from error
            if error.place.startswith(_EXPERT):
                source = error.place.removeprefix(_EXPERT)
                raise InputError(f"sources.{source}", error.problem, error.hint) from error
            raise InputError(
                "space", f"its {corner}est values do not make a recipe: {error.problem}", error.hint
            ) from error
    return space


def _refuse_strange_prompts(file: SearchFile, sources: Mapping[str, Source]) -> None:
    """Refuse prompts of another model than the base: with another model they are noise."""
    base = None if file.base is None else sources[file.base]
    for name, source in sources.items():
        if source.prompt is not None and base is not None and (source.folder != base.folder or base.adapters):
            problem = f"is a prompt of {source.folder}, and the base {file.base} is {base.reference}"
            hint = "A prompt works only with the model that it was trained on: name that as the base."
            raise InputError(f"sources.{name}", problem, hint)


def _refuse_unmovable_layers(file: SearchFile, sources: Mapping[str, Source]) -> None:
    """Refuse paths through layers that cannot change places: every candidate would fail."""
    if not file.space.moves_layers:
        return
    for source in sources.values():
        if why := source.reordering_problem:
            kind = source.config["model_type"]
            problem = f"makes paths through layers, and the layers of a {kind} cannot change places: {why}"
            raise InputError("space", problem, "Search over weights: `kind: parameter_space`.")


def _check_fit(file: SearchFile, evaluators: Evaluators) -> None:
    """Refuse a fit to items that candidates are scored on or that belong to a benchmark, and one without gradients."""
    if (split := file.fit_split) is None:
        return
    if file.engine != "transformers":
        raise InputError(PLACE, f"needs a gradient, and {file.engine} has none", "Take `engine: transformers`.")
    split.refuse_shared(evaluators.named)
    if not file.search_on_test_items:
        refuse_test_items(PLACE, split.items)


def _check_change(file: SearchFile, space: SearchSpace, evaluators: Evaluators) -> None:
    """Refuse to measure the distance from the base if there is none, or if it is not measured for this kind."""
    for place, settings in evaluators.wanted.items():
        if not isinstance(settings, ChangeSettings) or settings.model is not None:
            continue
        if file.base is None:
            hint = "Name it (`base: NAME`), or the model to measure from (`model: MODEL`)."
            raise InputError(place, "measures how far candidates are from the base, and there is none", hint)
        if others := sorted({mark.recipe.kind for mark in space.baselines()} - {STACK}):
            problem = f"measures how far candidates are from the base, which is not known of the kind {others[0]}"
            raise InputError(place, problem, "Name the model to measure from: `model: MODEL`.")


def _check_together(
    file: SearchFile, space: SearchSpace, sources: Mapping[str, Source], evaluators: Sequence[Evaluator]
) -> None:
    """Refuse to score several candidates at once unless they are weighted sums of adapters on one model."""
    if file.together == 1:
        return
    hint = "Leave `together` out."
    if file.engine != "transformers":
        raise InputError("together", f"is {file.together}, and {file.engine} answers for one candidate at a time", hint)
    for evaluator in evaluators:
        if evaluator.measured:
            what = ", ".join(sorted(evaluator.measured))
            raise InputError("together", f"{evaluator.name} measures {what}, which several candidates share", hint)
        if isinstance(evaluator, ChangeEvaluator):
            why = "reads merged weights, and candidates that are scored together are never merged"
            raise InputError("together", f"{evaluator.name} {why}", hint)
    if isinstance(file.space, ParameterSpaceSettings) and file.space.basis is None and are_adapters(sources):
        hint = "Leave `together` out, or merge adapters in core space, by any method: `basis: core` in the space."
    middle = np.array([parameter.default for parameter in space.parameters], dtype=np.float64)
    for recipe in (*(mark.recipe for mark in space.baselines()), space.decode(middle)):
        if problem := low_rank_problem(recipe, sources):
            raise InputError("together", problem, hint)


def _objective(file: SearchFile, name: str, evaluators: Evaluators) -> ObjectiveInfo:
    objective = file.objectives[name]
    resolved = evaluators.resolve(file, f"objectives.{name}")
    maximise = resolved.higher_is_better if objective.direction is None else objective.direction == "maximize"
    return ObjectiveInfo(name, resolved.evaluator, objective.metric, maximise, resolved.items)


def _constraint(file: SearchFile, name: str, evaluators: Evaluators) -> ConstraintInfo:
    constraint = file.constraints[name]
    resolved = evaluators.resolve(file, f"constraints.{name}")
    least = constraint.at_least is not None
    threshold = constraint.at_least if constraint.at_least is not None else constraint.at_most
    assert threshold is not None  # checked by the search file
    return ConstraintInfo(name, resolved.evaluator, constraint.metric, least, resolved.items, threshold)


def _feature(file: SearchFile, name: str, evaluators: Evaluators) -> FeatureInfo:
    feature = file.features[name]
    resolved = evaluators.resolve(file, f"features.{name}")
    (low, high), bins = feature.range, feature.bins
    return FeatureInfo(
        name, resolved.evaluator, feature.metric, resolved.higher_is_better, resolved.items, low, high, bins
    )


def _check_niches(file: SearchFile, setup: Setup) -> None:
    """Refuse features that are equal for all candidates, and a screen together with niches."""
    for feature in setup.features:
        counted = setup.evaluators[feature.evaluator].name == "cost" and feature.metric in COUNTED
        if counted and not file.space.moves_layers:
            problem = f"{feature.metric} is the same for every candidate: this space mixes weights layer by layer"
            raise InputError(f"features.{feature.name}", problem, "Take another metric, or a space of paths.")
    if setup.screen is not None and setup.build_optimizer().keeps == "niches":
        problem = f"rejects candidates by their scores, and {file.optimizer.name} looks for the best of each niche"
        raise InputError("screen", problem, "Leave it out.")


def _screen(file: SearchFile, evaluators: Evaluators) -> ScreenInfo | None:
    screen = file.screen
    if screen is None:
        return None
    resolved = evaluators.resolve(file, "screen")
    objective = list(file.objectives).index(screen.objective) if screen.objective is not None else 0
    return ScreenInfo(
        "screen", resolved.evaluator, screen.metric, resolved.higher_is_better, resolved.items,
        objective=objective, least_tau=screen.least_tau, drop=screen.drop,
    )  # fmt: skip


def _proxy(file: SearchFile, space: SearchSpace, evaluators: Evaluators) -> ProxyInfo | None:
    proxy = file.proxy
    if proxy is None:
        if isinstance(file.optimizer, ProxyDescentSettings):
            raise InputError("optimizer", "proxy_descent follows a proxy, and there is none", "Give one: `proxy:`.")
        return None
    if (problem := gradient_problem(space)) is not None:
        hint = "Leave it out, or take a method whose merges follow its weights smoothly, such as task_arithmetic."
        raise InputError("proxy", f"needs a gradient, and {problem}", hint)
    if file.engine != "transformers":
        raise InputError("proxy", f"needs a gradient, and {file.engine} has none", "Take `engine: transformers`.")
    resolved = evaluators.resolve(file, "proxy")
    if not isinstance(evaluators.opened[resolved.evaluator], LikelihoodEvaluator):
        problem = f"asks {proxy.evaluator}, and only the likelihood of answers has a gradient"
        raise InputError("proxy.evaluator", problem, "Take `evaluator: likelihood`.")
    drawn = min(proxy.drawn, resolved.items)
    return ProxyInfo(resolved.evaluator, resolved.items, drawn, proxy.steps, proxy.rate)
