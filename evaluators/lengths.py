"""The length of answers in tokens: an optional metric of evaluators of generated answers, in addition to their own.

Accuracy against length is what searches over merges of terse and verbose models look at. Tokens are counted in the
answer as graded, with the tokenizer of the merged model, so that all engines count the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evaluators.base import Direct, Evaluator, EvaluatorSettings, Graded, Outcome, Split
from evaluators.item_files import digest
from evaluators.prompts import PromptSettings
from evomerge.errors import InputError
from evomerge.inference.reading import Prompt, Reader, encode_plain
from evomerge.inference.requests import Likelihood, Request, Response

ANSWER_TOKENS = "answer_tokens"


class CountedSettings(PromptSettings):
    """Settings of evaluators whose models generate answers.

    Attributes:
        count_tokens: whether they have the metric ``answer_tokens``. A search sets this for all measures that share an
            evaluator if one of them uses the metric.
    """

    count_tokens: bool = False


def counts_tokens(settings: EvaluatorSettings, metric: str) -> bool:
    """Whether an evaluator has this metric because it counts tokens."""
    return metric == ANSWER_TOKENS and isinstance(settings, CountedSettings)


def counted(settings: EvaluatorSettings, evaluator: Evaluator) -> Evaluator:
    """The evaluator of these settings, extended by the metric if they ask for it."""
    wanted = isinstance(settings, CountedSettings) and settings.count_tokens
    return CountedEvaluator(evaluator) if wanted else evaluator


class CountedEvaluator(Evaluator):
    """Wraps another evaluator, and also counts the tokens of answers."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._tokenizer: Any = None
        self.name, self.measured, self.splits = evaluator.name, evaluator.measured, evaluator.splits
        self.version = digest([evaluator.version, f"{ANSWER_TOKENS} 1"])
        self.metrics: Mapping[str, bool] = {**evaluator.metrics, ANSWER_TOKENS: False}

    def name_of(self, split: Split, index: int) -> str:
        return self._evaluator.name_of(split, index)

    def first_prompts(self, reader: Reader) -> Sequence[Prompt]:
        return self._evaluator.first_prompts(reader)

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request | Direct]:
        """The requests of the wrapped evaluator.

        Raises:
            InputError: none of them generates text.
        """
        self._tokenizer = reader.tokenizer
        asked = self._evaluator.requests(reader, split, indices)
        if any(isinstance(request, Likelihood) for request in asked):
            problem = "asks how likely answers are: nothing is written whose tokens could be counted"
            raise InputError(f"{self.name}: {ANSWER_TOKENS}", problem, "Take a task whose answers are generated.")
        return asked

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """The wrapped evaluator's grades, and the number of generated tokens; 0 for an empty answer."""
        graded = self._evaluator.grade(split, indices, responses)
        written = [graded.answers.get(index, "") for index in indices]
        counts = np.array([len(encode_plain(self._tokenizer, text)) if text else 0 for text in written], np.float32)
        return replace(graded, scores={**graded.scores, ANSWER_TOKENS: counts})
