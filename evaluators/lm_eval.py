"""Scores models on any task of lm-evaluation-harness, one score per item.

lm-eval's own driver, ``simple_evaluate``, is made to score one model once: it reseeds every random generator of the
process, rebuilds the prompts, draws other few-shot examples the second time, and asks the system about itself with a
dozen subprocesses. Here the task and its prompts are made once, the model answers them, and the task grades the
answers; a test holds the scores equal to those of ``simple_evaluate``.

lm-eval and torch take seconds to import, so they are imported when an evaluator is built and not with the settings.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from evaluators.base import FOLDER, Split
from evaluators.benchmarks import benchmark_of, count
from evaluators.generation import BatchSize
from evaluators.lm_eval_files import check_folder, metrics_of
from evaluators.prompts import Asked, PromptSettings, Reader
from evomerge.errors import InputError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from evaluators.lm_eval_model import ResidentLM
    from evomerge.checkpoints.live import LiveModel


class LmEvalSettings(PromptSettings):
    """What the search file says of an lm-eval task.

    Attributes:
        task: its name, in ``task_folders``, in this project or in lm-eval, in that order.
        search: items to search on: ``training``, ``validation`` or ``test`` of the task, or a split of its dataset by
            name; a slice may follow (``test[250:]``).
        held_out: items to confirm on. The two may not share an item.
        num_fewshot: worked examples before each question; the task's own number when left out.
        generation: changes to the task's ``generation_kwargs``, such as ``max_gen_toks`` (lm-eval's default is 256).
        batch_size: most prompts in one forward pass; ``auto`` is 256, or as many as a GPU has room for.
        task_folders: folders of a person's own task files.
        data_folder: where relative paths in these files start from; the current folder when left out.
        allow_task_code: consent to run the code that files in ``task_folders`` hold.
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

    def __hash__(self) -> int:  # `generation` is a dict, which has none
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


class LmEvalEvaluator:
    """An lm-eval task, ready to score one live model after another.

    An item's score is the task's own aggregation of that item alone: for the usual metrics, which are means, the item's
    value. A perplexity is scored as its logarithm and named so (``log_perplexity``), because a mean over items of the
    perplexities themselves would be ruled by the least likely item.

    Attributes:
        name: the task's name.
        version: hash of lm-eval's version, of how the task grades, of every item and prompt, and of the settings.
        metrics: each metric, and whether higher is better: ``acc``, or ``exact_match,strict-match`` where the task
            names its filters. Metrics that say nothing of one item, such as F1, are left out.
    """

    def __init__(self, settings: LmEvalSettings) -> None:
        from evaluators.lm_eval_grading import find_measures, fingerprint
        from evaluators.lm_eval_items import build_requests, read_splits
        from evaluators.lm_eval_quiet import quiet, undisturbed
        from evaluators.lm_eval_tasks import load_task

        self.name = settings.task
        self._settings = settings
        with quiet(), undisturbed(), contextlib.redirect_stdout(sys.stderr):  # some task files print
            self._task, public = load_task(settings)
            config = self._task.config  # of a task that comes with lm-eval, the split that lm-eval itself scores
            self._benchmark_split = (config.test_split or config.validation_split) if public else None
            self._items = read_splits(self._task, settings)
            self._requests = {
                split: build_requests(self._task, items, settings) for split, items in self._items.items()
            }
            found = [
                find_measures(self._task, items, self._requests[split], f"task {self.name}: {split}")
                for split, items in self._items.items()
            ]
        self._measures = {key: measure for key, measure in found[0].items() if key in found[1]}
        self.metrics: Mapping[str, bool] = {key: measure.higher_is_better for key, measure in self._measures.items()}
        parts = [(items, self._requests[split]) for split, items in self._items.items()]
        self.version = fingerprint(self._task, settings, parts)
        self._lm: ResidentLM | None = None
        self._checked: set[tuple[Split, int]] = set()
        self._rendered_for: object = None
        self.measured: frozenset[str] = frozenset()
        self.seconds: Mapping[str, float] = {}
        self.answers: Mapping[int, str] = {}

    def items(self, split: Split) -> Sequence[str]:
        """A hash of each item's question, choices and answer, in order."""
        return self._items[split].hashes

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """Each item's question and right answer."""
        return list(self._items[split].texts)

    def asked(self, reader: Reader, split: Split, index: int) -> list[Asked]:
        """The item's requests."""
        from evaluators.lm_eval_model import asked

        self._render(reader.tokenizer)
        items = self._items[split]
        place = f"task {self.name}, row {items.rows[index]} of {items.source!r}"
        return [asked(request, reader, self._settings, place) for request in self._requests[split][index]]

    def test_items(self, split: Split) -> dict[str, int]:
        """All items of the split that lm-eval scores, where the task comes with it; else those known by content."""
        items = self._items[split]
        if items.source == self._benchmark_split:
            return {self.name: len(items.docs)}
        return count(benchmark_of(doc) for doc in items.docs)

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Score the items at these positions of the split: float32 [len(indices)] for each metric.

        Raises:
            InputError: the model's context, vocabulary or chat template does not fit the task.
        """
        from evaluators.lm_eval_grading import grade, written
        from evaluators.lm_eval_model import ask
        from evaluators.lm_eval_quiet import quiet, undisturbed

        docs = self._items[split].docs
        if outside := [index for index in indices if not 0 <= index < len(docs)]:
            raise IndexError(f"{self.name} has {len(docs)} items in its {split} split; there is no item {outside[0]}")
        distinct = list(dict.fromkeys(indices))
        self.answers = {}
        if not distinct:
            return {key: np.empty(0, dtype=np.float32) for key in self._measures}
        with quiet(), undisturbed():
            lm = self._resident(model)
            requests = self._checked_requests(model, split, distinct)
            started = time.perf_counter()
            ask(lm, requests)
            answered = time.perf_counter()
            texts = {i: written(self._task, docs[i], group) for i, group in zip(distinct, requests, strict=True)}
            self.answers = {i: text for i, text in texts.items() if text is not None}
            graded = dict(zip(distinct, grade(self._task, [docs[index] for index in distinct], requests), strict=True))
            values = {
                key: np.array([measure.of(graded[index]) for index in indices], dtype=np.float32)
                for key, measure in self._measures.items()
            }
            self.seconds = {"generate": answered - started, "score": time.perf_counter() - answered}
            return values

    def _resident(self, model: LiveModel) -> ResidentLM:
        """lm-eval's view of the model, made when the model is first seen."""
        from evaluators.lm_eval_model import ResidentLM

        if self._lm is None or self._lm.model is not model.model or self._lm.tokenizer is not model.tokenizer:
            settings = self._settings
            self._lm = ResidentLM(model.model, model.tokenizer, settings.batch_size, settings.max_length, model.engine)
            self._checked.clear()
        return self._lm

    def _checked_requests(self, model: LiveModel, split: Split, indices: Sequence[int]) -> list[list[Instance]]:
        """The requests of items, each seen once to be such as this model can answer."""
        self._render(model.tokenizer)
        reader = Reader(model.tokenizer, self._resident(model).max_length, Reader.of(model).embeddings)
        for index in indices:
            if (split, index) not in self._checked:
                self.asked(reader, split, index)
                self._checked.add((split, index))
        return [self._requests[split][index] for index in indices]

    def _render(self, tokenizer: Any) -> None:
        """Put the prompts into the tokenizer's chat template, where that is wanted, when it is first seen."""
        from evaluators.lm_eval_items import build_requests
        from evaluators.lm_eval_model import chat
        from evaluators.lm_eval_quiet import quiet, undisturbed

        if not self._settings.apply_chat_template or self._rendered_for is tokenizer:
            return
        with quiet(), undisturbed():
            for split, items in self._items.items():
                self._requests[split] = build_requests(
                    self._task, items, self._settings, chat(tokenizer, self._settings)
                )
        self._rendered_for = tokenizer
