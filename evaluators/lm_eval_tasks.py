"""Finds lm-eval tasks, decides which of them may run, and loads them with actionable error messages.

A task file can run code: ``!function`` names Python, and even a plain Jinja template can reach it. The files of this
project and those included in lm-eval are trusted like any installed package. A user's own need ``allow_task_code``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.api.metrics  # noqa: F401 (registers the metrics)
import yaml
from jinja2 import Template
from lm_eval import utils
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from evaluators.lm_eval_files import OWN_TASKS, library_file, library_tasks
from evomerge.errors import InputError
from evomerge.plugins import unknown_name

if TYPE_CHECKING:
    from evaluators.lm_eval import LmEvalSettings

LIBRARY_TASKS = library_tasks()
_MAX_CHARACTERS, _MAX_SECONDS, _MAX_TURNS = 10_000_000, 5.0, 1_000_000  # limits for one template and one item
TASK_KEYS = {field.name for field in dataclasses.fields(TaskConfig)} | {"class", "group", "task_list"}


@lru_cache(maxsize=256)
def _compiled(template: str) -> Template:
    compiled: Template = utils.env.from_string(template)
    return compiled


def _apply_template(template: str, doc: Mapping[str, Any]) -> str:
    """Render a template for an item, piece by piece, because a loop in it may not terminate in reasonable time.

    Raises:
        ValueError: the output is longer than any prompt, or takes longer than any prompt should.
    """
    pieces, size, started = [], 0, time.thread_time()
    for piece in _compiled(template).generate(**doc):
        pieces.append(piece)
        size += len(piece)
        if size > _MAX_CHARACTERS or time.thread_time() - started > _MAX_SECONDS:
            raise ValueError(f"its template has made {size:,} characters of an item, and does not end")
    return "".join(pieces)


def _range(*bounds: int) -> range:
    """Jinja's ``range``, limited to more numbers than any prompt could contain."""
    numbers = range(*bounds)
    if len(numbers) > _MAX_TURNS:
        raise ValueError(f"its template counts to {len(numbers):,}")
    return numbers


# lm-eval compiles a task's templates four times for every item, which takes seconds whenever a worker starts.
utils.apply_template = _apply_template
utils.env.globals["range"] = _range


def load_task(settings: LmEvalSettings) -> tuple[ConfigurableTask, bool]:
    """Find the task, check its file, load it with its data, and apply the settings to it.

    Returns:
        The task, and whether it is included in lm-eval.

    Raises:
        InputError: no such task, a group of tasks, a broken file or data, code without consent, sampled answers.
    """
    name, place = settings.task, f"task {settings.task}"
    settings.check()
    manager = find_manager(name, settings.task_folders)
    _check_config(manager.task_index[name].cfg, place)
    try:
        with contextlib.chdir(_data_folder(settings)):
            task = manager.load([name])["tasks"][name]
    except Exception as error:  # task files may contain any code, which may raise anything
        raise explain(error, place) from error
    if not isinstance(task, ConfigurableTask):
        raise InputError(place, "is a Python class that lm-eval cannot configure, so its items cannot be split")
    _set_fewshot(task, settings, place)
    _set_generation(task, settings, place)
    file = manager.task_index[name].yaml_path  # None for tasks that lm-eval makes in Python
    return task, file is None or file.is_relative_to(LIBRARY_TASKS)


def _data_folder(settings: LmEvalSettings) -> Path:
    """The folder that relative paths in task files start from; the current one if a worker does not have it."""
    folder = settings.data_folder
    return folder if folder is not None and folder.is_dir() else Path.cwd()


def find_manager(name: str, folders: tuple[Path, ...]) -> TaskManager:
    """A task manager that knows this task: for the folders, else for lm-eval's own files.

    Raises:
        InputError: the name is unknown (suggests the closest), or is a group, whose tasks it lists.
    """
    manager = TaskManager(include_path=[OWN_TASKS, *folders], include_defaults=False)
    if name not in manager.task_index and (file := library_file(name)):
        manager = TaskManager(include_path=[file.parent], include_defaults=False)
    if name not in manager.task_index:
        for file, fault in _unreadable(folders):
            raise InputError(str(file), f"is not a task file: {fault}")
        manager = _library(folders)
    if name not in manager.task_index:
        raise unknown_name(name, manager.all_subtasks, "task", "task")
    if manager.task_index[name].kind.name in ("GROUP", "TAG"):
        members = ", ".join(dict.fromkeys(_members(name, manager)))
        raise InputError(f"task {name}", "is a group, not one task", f"Make an objective of one of: {members}.")
    return manager


@cache
def _library(folders: tuple[Path, ...]) -> TaskManager:
    return TaskManager(include_path=[OWN_TASKS, *folders])


def _unreadable(folders: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """YAML files that lm-eval would skip without notice. Tags are not resolved, so no code runs."""
    for folder in folders:
        for file in sorted(folder.glob("**/*.yaml")):
            try:
                yaml.compose(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
                yield file, " ".join(str(error).split())


def _members(name: str, manager: TaskManager) -> Iterator[str]:
    """The tasks of a group, of a tag, and of the groups inside it."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name not in ("GROUP", "TAG"):
        yield name
    elif entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    else:
        for member in entry.cfg.get("task") or []:
            inner = member if isinstance(member, str) else str(member.get("task") or member.get("group"))
            yield from _members(inner, manager)


def _check_config(config: Mapping[str, Any], place: str) -> None:
    """Report settings to which lm-eval would respond with a bare KeyError or TypeError, or only after scoring."""
    if config.get("unsafe_code"):
        raise InputError(place, "runs what the model writes (`unsafe_code: true`), which Evomerge does not do")
    if config.get("doc_to_audio"):
        raise InputError(place, "plays sounds (`doc_to_audio`), and no model here hears any")
    for key in config:
        if key not in TASK_KEYS:
            raise unknown_name(key, TASK_KEYS, place, "key")
    for entry in config.get("metric_list") or []:
        metric, aggregation = entry.get("metric"), entry.get("aggregation")
        named = isinstance(metric, str) and os.sep not in metric  # an unresolved `!function` is a path
        if (
            named
            and not config.get("process_results")
            and not entry.get("hf_evaluate")
            and metric not in METRIC_REGISTRY
        ):
            raise unknown_name(str(metric), METRIC_REGISTRY.keys(), place, "metric")
        named = isinstance(aggregation, str) and os.sep not in aggregation
        if named and aggregation not in AGGREGATION_REGISTRY:
            raise unknown_name(str(aggregation), AGGREGATION_REGISTRY.keys(), place, "aggregation")


def _set_fewshot(task: ConfigurableTask, settings: LmEvalSettings, place: str) -> None:
    own, wanted = task.config.num_fewshot, settings.num_fewshot
    if wanted is not None and own == 0 and wanted != 0:
        raise InputError(
            place,
            f"fixes the number of examples at 0, so it cannot have num_fewshot {wanted} (lm-eval would ignore it)",
            "Leave `num_fewshot` out.",
        )
    task.config.num_fewshot = own or 0 if wanted is None else wanted


def _set_generation(task: ConfigurableTask, settings: LmEvalSettings, place: str) -> None:
    if task.config.output_type != "generate_until":
        if settings.generation:
            raise InputError(place, f"has no generation settings: it is a {task.config.output_type} task")
        return
    wanted = task.config.generation_kwargs | settings.generation
    if unknown := sorted(settings.generation.keys() - _GENERATION_KEYS):
        raise unknown_name(unknown[0], _GENERATION_KEYS, f"{place}: generation", "setting")
    _check_generation(wanted, f"{place}: generation")
    temperature = float(wanted.get("temperature") or 0.0)
    if wanted.get("do_sample", temperature > 0) and (temperature > 0 or "temperature" not in wanted):
        raise InputError(
            place,
            "samples its answers, so the same model would get another score each time",
            "Set `generation: {do_sample: false, temperature: 0}`.",
        )
    task.config.generation_kwargs = wanted | {"do_sample": False, "temperature": 0.0}


def _check_generation(wanted: Mapping[str, Any], place: str) -> None:
    """Reject generation settings that would only fail once a candidate is scored."""
    until = wanted.get("until", [])
    if not isinstance(until, str) and not (isinstance(until, list) and all(isinstance(text, str) for text in until)):
        raise InputError(f"{place}.until", "is neither a text nor a list of texts", 'Write `until: ["\\n"]`.')
    for key, value in wanted.items():
        a_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _ANSWER_LENGTHS and not (isinstance(value, int) and a_number and 1 <= value <= _MAX_TOKENS):
            raise InputError(f"{place}.{key}", f"must be a whole number from 1 to {_MAX_TOKENS:,}")
        if key in _NUMBERS and value is not None and not (a_number and math.isfinite(value)):
            raise InputError(f"{place}.{key}", "must be a finite number")
        if key in _SWITCHES and value is not None and not isinstance(value, bool):
            raise InputError(f"{place}.{key}", "must be true or false")


_ANSWER_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MAX_TOKENS = 2**31 - 1
_NUMBERS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams")
_SWITCHES = ("do_sample", "early_stopping", "use_cache")
_GENERATION_KEYS = {*vars(GenerationConfig()), *_ANSWER_LENGTHS, "until"}

_ONE_A_LINE = "Give it one JSON object a line, all with the same keys."

_FAULTS = {  # part of "Type: message", for each error with a clearer explanation
    "StopIteration": ("a data file is empty", _ONE_A_LINE),
    "corresponds to no data": ("a data file is empty", _ONE_A_LINE),
    "DatasetGenerationError": ("a data file cannot be read", _ONE_A_LINE),
    "FileNotFoundError": ("a data file is missing", "Paths in a task file start from the folder of the search file."),
    "UndefinedError": ("an item lacks a field that its prompt or answer needs", "Fix the data or the task file."),
    "OfflineModeIsEnabled": ("its data is not on this machine", "Fetch it once without HF_HUB_OFFLINE; it is cached."),
    "ConnectionError": ("its data cannot be fetched", "Fetch it once with the network on; it is cached."),
}


def explain(error: BaseException, place: str) -> InputError:
    """Turn an exception from lm-eval, datasets or a task's own code into a readable error."""
    problem, hint = "cannot be used", ""
    cause: BaseException | None = error
    while cause is not None:
        said = f"{type(cause).__name__}: {cause}"
        problem, hint = next((plain for part, plain in _FAULTS.items() if part in said), (problem, hint))
        error, cause = cause, cause.__cause__
    message = " ".join(str(error).split())[:300]
    return InputError(place, f"{problem} ({type(error).__name__}{': ' if message else ''}{message})", hint)
