"""From a search file to all that a search needs, opened and checked before the first expensive second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluators.base import Evaluator, EvaluatorSettings
from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.vocabulary import align
from evomerge.errors import InputError
from evomerge.genome import SearchSpace
from evomerge.merging.materialise import check_recipe
from evomerge.merging.registry import find_method
from evomerge.plugins import unknown_name
from evomerge.recipe import Blend, Recipe
from evomerge.search.search_file import SearchFile
from evomerge.search.setup import EvaluatorInfo, ObjectiveInfo, Setup
from search_spaces.base import SpaceContext


@dataclass(frozen=True)
class Prepared:
    """An opened search: what the driver knows, and what a worker in this process can use at once."""

    file: SearchFile
    setup: Setup
    sources: dict[str, Source]
    evaluators: tuple[Evaluator, ...]


def prepare(file: SearchFile) -> Prepared:
    """Open sources (headers only) and evaluators, and check that everything fits together.

    Raises:
        InputError: naming the key of the search file, or the file of a source, and the mend.
    """
    sources = open_sources(file)
    space = build_space(file, sources)
    settings = distinct_evaluators(file)
    evaluators = tuple(_build(file, each) for each in settings)
    setup = Setup(
        name=file.name,
        seed=file.seed,
        space=space,
        optimizer=file.optimizer,
        objectives=tuple(_objective(file, name, settings, evaluators) for name in file.objectives),
        evaluators=tuple(
            EvaluatorInfo(e.name, e.version, len(e.items("search")), len(e.items("held_out"))) for e in evaluators
        ),
        budget=file.budget,
        confirm=file.confirm,
        attempts=file.attempts,
    )
    file.optimizer.check(space.parameters, len(setup.objectives), "optimizer")
    return Prepared(file, setup, sources, evaluators)


def open_sources(file: SearchFile) -> dict[str, Source]:
    """Open every source of a search file, lay them out for one vocabulary, and refuse those that cannot be merged."""
    sources = {name: open_source(name, reference, place=f"sources.{name}") for name, reference in file.sources.items()}
    aligned = align(sources, file.tokenizer_source, file.merged_vocabulary)
    check_compatible(
        aligned,
        None if file.space.mixes_tensors else _every_layer(file, aligned),
        same_tokens=file.vocabulary.kind == "same",
        same_special=file.tokenizer is None,
    )
    return aligned


def _every_layer(file: SearchFile, sources: Mapping[str, Source]) -> Recipe:
    """One path through all layers of all sources: what must hold for a search that puts layers after each other."""
    copies = {name: Blend(method="passthrough", sources=(name,), parameters={"scale": {name: 1.0}}) for name in sources}
    model = copies[file.tokenizer_source]
    return Recipe.compose(
        sources=file.sources,
        tokenizer=file.tokenizer_source,
        embedding=model,
        hops=[(i, copies[name], copies[name], copies[name]) for name, s in sources.items() for i in range(s.layers)],
        norm=model,
        head=model,
        vocabulary=file.merged_vocabulary,
    )


def build_space(file: SearchFile, sources: Mapping[str, Source]) -> SearchSpace:
    """The search space of a search file over these sources."""
    model = sources[file.tokenizer_source]
    context = SpaceContext(
        sources=file.sources,
        base=file.base,
        tokenizer=file.tokenizer_source,
        layers=model.layers,
        tied=model.tied,
        method=lambda name: find_method(name, "space.method").spec,
        recipe_seed=file.seed,
        dtype=file.dtype,
        vocabulary=file.merged_vocabulary,
        depths={name: source.layers for name, source in sources.items()},
    )
    space = file.space.build(context)
    # The corners of the space: a bound that the method cannot compute would otherwise fail candidate after candidate.
    for corner in ("low", "high"):
        genome = np.array([getattr(parameter, corner) for parameter in space.parameters], dtype=np.float64)
        try:
            check_recipe(space.decode(genome), sources)
        except InputError as error:
            raise InputError("space", f"its {corner}est values make no recipe: {error.problem}", error.mend) from error
    landmarks = len(list(space.landmarks()))
    if file.budget.candidates is not None and file.budget.candidates < landmarks:
        raise InputError("budget.candidates", f"is {file.budget.candidates}; the landmarks alone are {landmarks}")
    return space


def distinct_evaluators(file: SearchFile) -> list[EvaluatorSettings]:
    """The evaluators of a search file, each once, in the order that jobs refer to them."""
    distinct: list[EvaluatorSettings] = []
    for settings in file.evaluators().values():
        if settings not in distinct:
            distinct.append(settings)
    return distinct


def _build(file: SearchFile, settings: EvaluatorSettings) -> Evaluator:
    """Build an evaluator; what is wrong with it is said with the objective that named it."""
    try:
        return settings.build()
    except InputError as error:
        name = next(name for name, found in file.evaluators().items() if found == settings)
        raise InputError(f"objectives.{name}: {error.place}", error.problem, error.mend) from error


def _objective(
    file: SearchFile, name: str, settings: Sequence[EvaluatorSettings], evaluators: Sequence[Evaluator]
) -> ObjectiveInfo:
    objective = file.objectives[name]
    position = settings.index(file.evaluators()[name])
    evaluator = evaluators[position]
    if objective.metric not in evaluator.metrics:
        raise unknown_name(objective.metric, evaluator.metrics, f"objectives.{name}.metric", "metric")
    higher_is_better = evaluator.metrics[objective.metric]
    items = len(evaluator.items("search"))
    if objective.items is not None and objective.items > items:
        raise InputError(f"objectives.{name}.items", f"asks for {objective.items} of {items} items in the search split")
    return ObjectiveInfo(
        name=name,
        evaluator=position,
        metric=objective.metric,
        maximise=higher_is_better if objective.direction is None else objective.direction == "maximize",
        items=objective.items or items,
    )
