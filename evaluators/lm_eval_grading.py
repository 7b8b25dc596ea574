"""Grades the answers of items with an lm-eval task, and finds which of its metrics give every item a number."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, weighted_mean
from lm_eval.api.registry import get_aggregation
from lm_eval.api.task import ConfigurableTask

from evaluators.lm_eval_items import Items, digest
from evaluators.lm_eval_tasks import explain
from evaluators.prompts import ENCODING
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evaluators.lm_eval import LmEvalSettings

Grades = dict[tuple[str, str], Any]
"""A task's results for one item, by (metric, filter): a number, or whatever the metric's aggregation takes."""

OF_MANY_ITEMS = {get_aggregation(name) for name in ("f1", "matthews_corrcoef", "bypass")}

LOGARITHMS: dict[Callable[[list[Any]], Any], Callable[[list[Any]], Any]] = {
    get_aggregation("perplexity"): lambda items: -mean(items),
    get_aggregation("weighted_perplexity"): lambda items: -weighted_mean(items),
}
"""Perplexities are scored as their logarithm: otherwise one unlikely item would outweigh all others, or overflow."""

_WHERE_ONLY = {"search", "held_out", "task_folders", "data_folder", "allow_task_code", "count_tokens"}
"""Settings that only say where a task and its items come from; the fingerprint covers the items themselves. Counting
the tokens of answers has a version of its own."""

BLANK_ANSWERS = {"generate_until": "", "loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}


@dataclass(frozen=True)
class FilteredMetric:
    """One metric after one filter, and how the task aggregates it."""

    metric: str
    filter: str
    aggregate: Callable[[list[Any]], Any]
    higher_is_better: bool

    def of(self, grades: Grades) -> float:
        """The item's score: the task's aggregation of this item alone."""
        return float(self.aggregate([grades[self.metric, self.filter]]))


def give(request: Instance, answer: Any) -> None:
    """Write an answer into a request. A task that wants several gets copies, because decoding is greedy."""
    request.resps, request.filtered_resps = [answer] * (request.repeats or 1), {}


def grade(
    task: ConfigurableTask, docs: Sequence[Mapping[str, Any]], requests: Sequence[Sequence[Instance]]
) -> list[Grades]:
    """Grade items whose requests have been answered."""
    task._instances = [request for group in requests for request in group]  # apply_filters expects them here
    task.apply_filters()
    graded = []
    for doc, group in zip(docs, requests, strict=True):
        grades: Grades = {}
        for name in group[0].filtered_resps:
            # a copy, because some tasks write into the document that they grade
            results = task.process_results(dict(doc), [request.filtered_resps[name] for request in group])
            grades |= {(metric, name): value for metric, value in results.items()}
        graded.append(grades)
    return graded


def written(task: ConfigurableTask, doc: Mapping[str, Any], requests: Sequence[Instance]) -> str | None:
    """What the model wrote for an item, or which choice it found most likely; None if neither."""
    answers = [request.resps[0] for request in requests]
    if requests[0].request_type == "generate_until":
        return str(answers[0])
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return None
    choices = task.doc_to_choice(doc)
    likeliest = max(range(len(choices)), key=lambda i: answers[i][0])  # some tasks have more requests
    return str(choices[likeliest])


def find_measures(
    task: ConfigurableTask, items: Items, requests: Sequence[Sequence[Instance]], place: str
) -> dict[str, FilteredMetric]:
    """The metrics that give every item a number, found by grading empty answers.

    This also detects grading code that fails before any model has been run.

    Raises:
        InputError: the grading fails on an item, or no metric gives every item a number.
    """
    graded = []
    for row, doc, group in zip(items.rows, items.docs, requests, strict=True):
        for request in group:
            give(request, BLANK_ANSWERS[request.request_type])
        try:
            graded += grade(task, [doc], [group])
        except Exception as error:
            raise explain(error, f"{place}, grading of row {row}") from error
    directions, aggregations = task.higher_is_better(), task.aggregation()
    measures, left_out = {}, []
    for metric, name in graded[0]:
        aggregate = aggregations.get(metric, mean)
        logarithm = LOGARITHMS.get(aggregate)
        measure = FilteredMetric(metric, name, logarithm or aggregate, bool(directions.get(metric)))
        key = ("log_" if logarithm else "") + metric + ("" if name == "none" else f",{name}")
        if metric in directions and _is_number_for_all(measure, graded):
            measures[key] = measure
        else:
            left_out.append(key)
    if not measures:
        raise InputError(
            place,
            f"has no metric that gives every item a number ({', '.join(left_out) or 'it has no metric at all'})",
            "Choose a task, or write one, whose metric is a mean over items.",
        )
    return measures


def _is_number_for_all(measure: FilteredMetric, graded: Sequence[Grades]) -> bool:
    if measure.aggregate in OF_MANY_ITEMS:
        return False
    try:
        return all(math.isfinite(measure.of(grades)) for grades in graded)
    except Exception:  # a custom aggregation that needs more than one item
        return False


def fingerprint(
    task: ConfigurableTask, settings: LmEvalSettings, parts: Sequence[tuple[Items, Sequence[Sequence[Instance]]]]
) -> str:
    """A hash of everything that determines the scores of a given model."""
    config = task.config
    return digest(
        [
            lm_eval.__version__,
            ENCODING,
            settings.model_dump(mode="json", exclude=_WHERE_ONLY),
            task.VERSION,
            _described([type(task), config.process_results, config.metric_list, config.filter_list, config.repeats]),
            [
                [
                    *([items.hashes] if any(items.media) else []),
                    [_without_pictures(doc) for doc in items.docs],
                    [[_without_pictures(request.args) for request in group] for group in requests],
                ]
                for items, requests in parts
            ],
        ]
    )


def _without_pictures(value: Any) -> Any:
    """A document or request arguments without pictures, whose content is part of the item's hash."""
    from PIL.Image import Image

    if isinstance(value, Mapping):
        return {key: _without_pictures(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_pictures(part) for part in value]
    return None if isinstance(value, Image) else value


def _described(value: Any) -> Any:
    """Configuration as JSON: a function, class or partial becomes its name and a hash of its whole source file."""
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if isinstance(value, partial):
        return [_described(value.func), _described(value.args), _described(value.keywords)]
    if callable(value):
        code = value if hasattr(value, "__qualname__") else type(value)
        return [code.__qualname__, hashlib.sha256(Path(inspect.getfile(code)).read_bytes()).hexdigest()]
    return value
