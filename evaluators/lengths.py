"""How long answers are, in tokens: a metric of evaluators of written answers, beside their own where it is wanted.

Accuracy against length is what merges of terse and of explicit models are searched for. Tokens are counted of the
answer as it is graded, by the tokenizer of the merged model, so that every engine counts the same.
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
    """Of evaluators whose models write answers.

    Attributes:
        count_tokens: whether they have the metric ``answer_tokens``. A search says it for all measures that share an
            evaluator with one by that metric.
    """

    count_tokens: bool = False


def counts_tokens(settings: EvaluatorSettings, metric: str) -> bool:
    """Whether an evaluator has a metric because it counts tokens."""
    return metric == ANSWER_TOKENS and isinstance(settings, CountedSettings)


def counted(settings: EvaluatorSettings, evaluator: Evaluator) -> Evaluator:
    """The evaluator of these settings, with the metric where they want it."""
    wanted = isinstance(settings, CountedSettings) and settings.count_tokens
    return CountedEvaluator(evaluator) if wanted else evaluator


class CountedEvaluator(Evaluator):
    """Another evaluator, which also counts the tokens of answers."""

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
        """Those of the other.

        Raises:
            InputError: nothing is written.
        """
        self._tokenizer = reader.tokenizer
        asked = self._evaluator.requests(reader, split, indices)
        if any(isinstance(request, Likelihood) for request in asked):
            problem = "asks how likely answers are: nothing is written whose tokens could be counted"
            raise InputError(f"{self.name}: {ANSWER_TOKENS}", problem, "Take a task whose answers are generated.")
        return asked

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """The other's grades, and the tokens of what was written; none where nothing was."""
        graded = self._evaluator.grade(split, indices, responses)
        written = [graded.answers.get(index, "") for index in indices]
        counts = np.array([len(encode_plain(self._tokenizer, text)) if text else 0 for text in written], np.float32)
        return replace(graded, scores={**graded.scores, ANSWER_TOKENS: counts})
