"""Scores models on any task of lm-evaluation-harness, with one score per item.

lm-eval's own driver, ``simple_evaluate``, is made to score one model once: it reseeds every random generator of the
process, rebuilds the prompts, draws different few-shot examples the second time, and runs a dozen subprocesses to
describe the system. Here the task and its prompts are built once, the model answers them, and the task grades the
answers; a test verifies that the scores equal those of ``simple_evaluate``.

lm-eval and torch take seconds to import, so they are imported when an evaluator is built and not with the settings.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, JsonValue

from evaluators.base import FOLDER, Direct, Evaluator, Graded, Item, Outcome, Split, texts
from evaluators.benchmarks import benchmark_of
from evaluators.lengths import CountedSettings
from evaluators.lm_eval_files import check_folder, metrics_of
from evaluators.prompts import ItemRequests
from evomerge.errors import InputError
from evomerge.inference.reading import Prompt, Reader
from evomerge.inference.requests import BatchSize, Engine, Generate, Request, Response

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from evaluators.lm_eval_items import Items
    from evaluators.lm_eval_model import ResidentLM
    from evomerge.checkpoints.live import LiveModel


class LmEvalSettings(CountedSettings):
    """The settings of an lm-eval task.

    Attributes:
        task: its name, looked up in ``task_folders``, this project and lm-eval, in that order.
        search: the items to search on: ``training``, ``validation`` or ``test`` of the task, or a split of its dataset
            by name, optionally with a slice (``test[250:]``).
        held_out: the items for confirmation. The two may not overlap.
        num_fewshot: worked examples before each question; by default the task's own number.
        generation: changes to the task's ``generation_kwargs``, such as ``max_gen_toks`` (lm-eval's default is 256).
        batch_size: the maximum number of prompts in one forward pass; ``auto`` is 256, or as many as fit on a GPU.
        task_folders: folders of the user's own task files.
        data_folder: the folder that relative paths in these files start from; the current folder by default.
        allow_task_code: consent to run code in the files of ``task_folders``.
    """

    kind: Literal["lm_eval"] = "lm_eval"
    task: str = Field(min_length=1)
    search: str = "validation"
    held_out: str = "test"
    num_fewshot: int | None = Field(default=None, ge=0)
    generation: dict[str, JsonValue] = Field(default_factory=dict)
    batch_size: BatchSize = "auto"
    task_folders: tuple[Path, ...] = ()
    data_folder: Annotated[Path | None, FOLDER] = None
    allow_task_code: bool = False

    def __hash__(self) -> int:  # `generation` is a dict, which is not hashable
        return hash(self.model_dump_json())

    def known_metrics(self) -> Collection[str] | None:
        return metrics_of(self.task, self.task_folders)

    def check(self) -> None:
        if self.task_folders and not self.allow_task_code:
            raise InputError(
                "task_folders",
                "hold task files, which can run code on this machine (`!function`, and Jinja templates too)",
                "Read them, then set `allow_task_code: true`.",
            )
        for folder in self.task_folders:
            if not folder.is_dir():
                raise InputError("task_folders", f"there is no folder {folder}")
            check_folder(folder)

    def build(self) -> LmEvalEvaluator:
        """Load the task, read both splits and build every prompt.

        Raises:
            InputError: an unknown or broken task, task code without consent, an empty or overlapping split.
        """
        return LmEvalEvaluator(self)


class LmEvalEvaluator(Evaluator):
    """An lm-eval task, ready to score one live model after another.

    An item's score is the task's own aggregation of that item alone: for the usual metrics, which are means, the item's
    value. A perplexity is scored as its logarithm and named so (``log_perplexity``), because a mean over items of the
    perplexities themselves would be dominated by the least likely item.

    Attributes:
        name: the task's name.
        version: hash of lm-eval's version, of how the task grades, of every item and prompt, and of the settings.
        metrics: each metric, and whether higher is better: ``acc``, or ``exact_match,strict-match`` if the task names
            its filters. Metrics without a meaning for a single item, such as F1, are omitted.
    """

    def __init__(self, settings: LmEvalSettings) -> None:
        from evaluators.lm_eval_grading import find_measures, fingerprint
        from evaluators.lm_eval_items import build_requests, read_splits
        from evaluators.lm_eval_quiet import quiet, restored_generators
        from evaluators.lm_eval_tasks import load_task

        self.name = settings.task
        self._settings = settings
        with quiet(), restored_generators(), contextlib.redirect_stdout(sys.stderr):  # some task files print
            self._task, public = load_task(settings)
            config = self._task.config  # for a task included in lm-eval, the split that lm-eval itself scores
            self._benchmark_split = (config.test_split or config.validation_split) if public else None
            self._items = read_splits(self._task, settings)
            self._instances = {
                split: build_requests(self._task, items, settings) for split, items in self._items.items()
            }
            measures = [
                find_measures(self._task, items, self._instances[split], f"task {self.name}: {split}")
                for split, items in self._items.items()
            ]
        self._measures = {key: measure for key, measure in measures[0].items() if key in measures[1]}
        self.metrics: Mapping[str, bool] = {key: measure.higher_is_better for key, measure in self._measures.items()}
        parts = [(items, self._instances[split]) for split, items in self._items.items()]
        self.version = fingerprint(self._task, settings, parts)
        self._lm: ResidentLM | None = None
        self._rendered_for: object = None
        self._requests = ItemRequests(self._make)
        self.splits = {split: self._shown(items) for split, items in self._items.items()}

    def _shown(self, items: Items) -> list[Item]:
        """The items of a split. For a task included in lm-eval, the items that lm-eval scores are a benchmark's; other
        benchmark items are recognised by content."""
        whole = self.name if items.source == self._benchmark_split else None
        return [
            Item(hashed, question, answer, whole or benchmark_of(doc), media, place=items.place(index))
            for index, (hashed, (question, answer), doc, media) in enumerate(
                zip(items.hashes, items.texts, items.docs, items.media, strict=True)
            )
        ]

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request | Direct]:
        """The items' instances, each as a request; those that only lm-eval can answer are in one ``Direct`` at the end.

        Raises:
            InputError: the model's context, vocabulary or chat template does not fit the task.
        """
        self._render(reader)
        asked: list[Request] = []
        rest: dict[int, Prompt] = {}
        instances = self._flat(split, indices)
        for number, request in enumerate(self._requests(reader, split, indices)):
            if isinstance(request, Prompt):
                rest[number] = request
            else:
                asked.append(request)
        if not rest:
            return asked
        own = {number: instances[number] for number in rest}
        return [*asked, Direct(partial(self._by_lm_eval, own), tuple(rest.values()))]

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """The task's own grades."""
        from evaluators.lm_eval_grading import give, grade, written
        from evaluators.lm_eval_quiet import quiet, restored_generators

        docs, groups = self._items[split].docs, [self._instances[split][index] for index in indices]
        answers: dict[int, Any] = next((r.value for r in responses if isinstance(r, Outcome)), {})
        given = iter(texts([response for response in responses if not isinstance(response, Outcome)]))
        with quiet(), restored_generators():
            for number, instance in enumerate(self._flat(split, indices)):
                give(instance, answers[number] if number in answers else next(given))
            written_by_item = {i: written(self._task, docs[i], group) for i, group in zip(indices, groups, strict=True)}
            graded = grade(self._task, [docs[index] for index in indices], groups)
            scores = {
                key: np.array([measure.of(grades) for grades in graded], dtype=np.float32)
                for key, measure in self._measures.items()
            }
        return Graded(scores, {i: text for i, text in written_by_item.items() if text is not None})

    def _make(self, reader: Reader, split: Split, index: int) -> list[Generate | Prompt]:
        from evaluators.lm_eval_model import request_of

        items = self._items[split]
        place = f"task {self.name}, {items.place(index)}"
        return [
            request_of(instance, reader, self._settings, place, items.media[index])
            for instance in self._instances[split][index]
        ]

    def _flat(self, split: Split, indices: Sequence[int]) -> list[Instance]:
        """The instances of items, item after item."""
        return [instance for index in indices for instance in self._instances[split][index]]

    def _by_lm_eval(self, instances: Mapping[int, Instance], live: LiveModel, engine: Engine) -> dict[int, Any]:
        """lm-eval's own answers, by the indices of the instances.

        Raises:
            InputError: they are not plain greedy decoding, and the engine supports nothing else.
        """
        from evaluators.lm_eval_model import ask, refuse_non_greedy
        from evaluators.lm_eval_quiet import quiet, restored_generators

        if engine.greedy_only:
            refuse_non_greedy(instances.values(), Reader.of(live))
        with quiet(), restored_generators():
            return ask(self._resident(live), instances)

    def _resident(self, live: LiveModel) -> ResidentLM:
        """lm-eval's view of the model, created when the model is first used."""
        from evaluators.lm_eval_model import ResidentLM

        if self._lm is None or self._lm.model is not live.model or self._lm.tokenizer is not live.tokenizer:
            self._lm = ResidentLM(live.model, live.tokenizer, self._settings.batch_size, self._settings.max_length)
        return self._lm

    def _render(self, reader: Reader) -> None:
        """Apply the model's chat template to the prompts, if wanted, when the model is first used."""
        from evaluators.lm_eval_items import build_requests
        from evaluators.lm_eval_model import chat
        from evaluators.lm_eval_quiet import quiet, restored_generators

        if not self._settings.apply_chat_template or self._rendered_for is reader.templates:
            return
        with quiet(), restored_generators():
            for split, items in self._items.items():
                self._instances[split] = build_requests(self._task, items, self._settings, chat(reader, self._settings))
        self._rendered_for = reader.templates
