"""Errors in a search that can be found before its models and tasks are opened.

Opening imports torch, transformers and lm-eval, which takes longer than finding most mistakes. So everything that can
be checked from names, numbers and folders is checked first, with light imports: sources, method, space, optimizer,
metrics, files.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluators.base import FOLDER, MODEL, EvaluatorSettings
from evaluators.lengths import counts_tokens
from evomerge.checkpoints.references import adapter_types, check_reference, local_config, prompt_of
from evomerge.checkpoints.sharding import text_config
from evomerge.errors import InputError
from evomerge.files import open_file
from evomerge.genome import SearchSpace
from evomerge.method import find_method
from evomerge.optimizers import Feature
from evomerge.plugins import listed, unknown_name
from evomerge.recipes.prompts import PromptFacts
from evomerge.search.settings.fitting import PLACE, likelihood_settings
from evomerge.search.settings.folder import is_search
from evomerge.search.settings.layouts import check_layout
from evomerge.search.settings.runtime_env import runtime_env_of
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.settings.sections import Measure
from evomerge.search.settings.selecting import check_select, stand_in
from evomerge.search.settings.tables import check_is_table, check_table_search, table_names
from evomerge.step import find_step
from search_spaces.base import Measures, SpaceContext
from search_spaces.parameter_space import LAW
from search_spaces.state_dict_space import StateDictSpaceSettings

UNMEASURED = Measures()
"""A placeholder for measurements of weights that have not been read."""

_ANY_KAPPA = 1.0
"""Counts the kappa baselines of a space before the weights are read that decide how strong they are."""


def check_early(file: SearchFile) -> None:
    """Refuse errors in a search file or in what it names, as far as they can be found within a moment.

    Raises:
        InputError: naming the key of the search file and a hint.
    """
    for place, settings in file.evaluators().items():
        _check_named(settings, place)
        try:
            settings.check()
        except InputError as error:
            raise InputError(f"{place}: {error.place}", error.problem, error.hint) from None
        _check_metric(file.measures[place], settings, place)
    if file.fit is not None:
        _check_named(likelihood_settings(file.fit), PLACE)
    for name, reference in file.sources.items():
        if isinstance(file.space, StateDictSpaceSettings):
            check_is_table(reference, f"sources.{name}")
        else:
            check_reference(reference, f"sources.{name}")
    check_table_search(file)
    config = local_config(file.sources[file.tokenizer_source])
    if (depth := _depth(config)) is not None:
        check_layout(file, config, depth)
    if file.calibration is not None:
        file.calibration.check(file.sources)
    check_select(file)
    _check_space(stand_in(file))
    if file.pool == "ray":
        runtime_env_of(file.cluster)


def check_start(file: SearchFile) -> None:
    """Refuse to start from something that is not a search (InputError). A search that has begun no longer needs it."""
    for folder in file.start_from:
        if not is_search(folder):
            problem = f"{folder} is not the folder of a search"
            raise InputError("start_from", problem, "Name one that was started before.")


def changed_since(file: SearchFile, moment: float) -> bool:
    """Whether a file of an evaluator or of calibration texts is gone or was written after ``moment``, a Unix time.

    The folder where relative paths start does not count: it may contain searches and models.
    """
    fit = () if file.fit is None else (likelihood_settings(file.fit),)
    fields = (
        (s, key)
        for s in (*file.evaluators().values(), *fit)
        for key, field in type(s).model_fields.items()
        if FOLDER not in field.metadata
    )
    values = (getattr(settings, key) for settings, key in fields)
    named = (path for value in values for path in (value if isinstance(value, tuple) else [value]))
    texts = () if file.calibration is None else file.calibration.files
    return any(_is_newer(path, moment) for path in (*named, *texts) if isinstance(path, Path))


def _is_newer(path: Path, moment: float) -> bool:
    try:
        inside = path.rglob("*") if path.is_dir() else [path]
        return any(one.stat().st_mtime > moment for one in inside if "__pycache__" not in one.parts)
    except OSError:
        return True


def make_space(
    file: SearchFile, *, layers: int, tied: bool, depths: Mapping[str, int], measures: Measures = UNMEASURED
) -> SearchSpace:
    """The search space of a search file, for sources of these depths; see ``SpaceContext``.

    Raises:
        InputError: settings that do not fit the sources, or a budget that the baselines alone use up.
    """
    context = SpaceContext(
        sources=file.sources,
        base=file.base,
        tokenizer=file.tokenizer_source,
        layers=layers,
        tied=tied,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=file.seed,
        dtype=file.dtype,
        vocabulary=file.merged_vocabulary,
        depths=depths,
        measures=measures,
        prompts=_prompts(file),
        calibration=None if file.calibration is None else file.calibration.texts.digest,
        fit=None if file.fit_split is None else file.fit_split.digest,
        adapters=lambda name: adapter_types(file.sources[name], f"sources.{name}"),
        tensors=lambda: table_names(file.sources[file.tokenizer_source], f"sources.{file.tokenizer_source}"),
    )
    space = file.space.build(context)
    baselines = [LAW if mark.label.startswith(LAW) else mark.label for mark in space.baselines()]
    if file.budget.candidates is not None and file.budget.candidates < len(baselines):
        problem = f"is {file.budget.candidates}; the baselines alone are {len(baselines)} ({listed(baselines)})"
        hint = f"Give {len(baselines)} or more; what is beyond them is searched."
        raise InputError("budget.candidates", problem, hint)
    return space


def _check_space(file: SearchFile) -> None:
    """Build the space if all configurations give the number of layers; otherwise check that its methods exist."""
    depths = {name: _depth(local_config(reference)) for name, reference in file.sources.items()}
    known = {name: depth for name, depth in depths.items() if depth is not None}
    if len(known) < len(depths):
        named = getattr(file.space, "method", None)
        for method in (named,) if isinstance(named, str) else named or ():
            find_method(method, "space.method")
        for name in getattr(file.space, "steps", ()):
            find_step(name, f"space.steps.{name}")
        return
    has_law = file.base is not None and file.baselines.kappa
    measures = Measures(kappa=_ANY_KAPPA) if has_law else UNMEASURED
    space = make_space(file, layers=known[file.tokenizer_source], tied=False, depths=known, measures=measures)
    axes = [Feature(name, *feature.range, feature.bins) for name, feature in file.features.items()]
    file.optimizer.check(space.parameters, len(file.objectives), "optimizer", axes)


def _prompts(file: SearchFile) -> dict[str, PromptFacts]:
    """The facts about each source's prompt.

    Raises:
        InputError: there is one, and the space is over weights.
    """
    prompts = {name: prompt_of(reference, f"sources.{name}") for name, reference in file.sources.items()}
    known = {name: facts for name, facts in prompts.items() if facts is not None}
    for name, facts in known.items():
        if not file.space.takes_prompts:
            problem = f"is {facts.text}, which changes no weights"
            raise InputError(f"sources.{name}", problem, "Search over prompts: `space: {kind: prompts}`.")
    if known and file.together > 1:
        problem = f"is {file.together}, and candidates with different prompts cannot share a forward pass"
        raise InputError("together", problem, "Leave `together` out.")
    return known


def _depth(config: Mapping[str, Any]) -> int | None:
    """The number of layers in config.json; None if it is not on this machine, or has the number elsewhere."""
    depth = text_config(config).get("num_hidden_layers")
    return depth if isinstance(depth, int) and 0 < depth <= 1000 else None


def _check_named(settings: EvaluatorSettings, place: str) -> None:
    """Refuse missing files, special files, and missing models, before importing what would read them."""
    for key, field in type(settings).model_fields.items():
        if MODEL in field.metadata and (reference := getattr(settings, key)) is not None:
            check_reference(reference, f"{place}.{key}")
        if FOLDER not in field.metadata and isinstance(path := getattr(settings, key), Path):
            if not os.path.exists(path):  # unlike Path.exists, this is False for an impossible name
                hint = "A path is relative to the folder of the search file."
                raise InputError(f"{place}.{key}", f"there is no such file: {path}", hint)
            open_file(path, f"{place}.{key}").close()


def _check_metric(measure: Measure, settings: EvaluatorSettings, place: str) -> None:
    """Refuse a metric that the evaluator does not have, if its metrics are known beforehand.

    A harness task may list a metric that is scored as its logarithm, or under the name of its own filter.
    """
    try:
        metrics = settings.known_metrics()
    except InputError as error:
        raise InputError(f"{place}.{error.place}", error.problem, error.hint) from None
    if metrics is None or measure.metric in metrics or counts_tokens(settings, measure.metric):
        return
    names = {metric.partition(",")[0] for metric in metrics}
    if measure.metric.partition(",")[0].removeprefix("log_") not in names:
        raise unknown_name(measure.metric, metrics, f"{place}.metric", "metric")
