"""Questions with choices: which of them a model finds likeliest, and by how much. Nothing is decoded.

The numbers are lm-eval's own for such tasks, and a test holds them equal; ``margin`` is beside them because it moves
with every change of the model, where a right answer stays right.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from evaluators.base import Split
from evaluators.benchmarks import benchmark_of, count
from evaluators.item_files import Line, check_template, digest, fill, read_lines, split_items
from evaluators.prefill import Prefill
from evaluators.prompts import Asked, Example, Examples, FewshotSettings, Reader, asked_pair
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


METRICS = {"acc": True, "acc_norm": True, "acc_bytes": True, "margin": True}
"""Each metric, and whether higher is better."""


class MultipleChoiceSettings(FewshotSettings):
    """What the search file says of questions and choices.

    An item has ``choices``, a list of texts, and ``answer``: the right one's text, or its number; the first is 0.

    Attributes:
        file: the items, a JSON object on each line.
        held_out_file: items to confirm on, where they are apart.
        held_out: without such a file, the share of items to confirm on. A hash of the prompt decides of each.
        prompt: what the model is given, a template: ``{question}`` stands for that field of the item.
        choice: how a choice is written behind it, a template with ``{choice}``.
        batch_tokens: most tokens in one forward pass, padding counted, unless a single choice has more.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    file: Path
    held_out_file: Path | None = None
    held_out: float = Field(default=0.5, gt=0, lt=1)
    prompt: str = "{question}"
    choice: str = " {choice}"
    batch_tokens: int = Field(default=8192, ge=1)

    @field_validator("prompt", "choice")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        return check_template(text)

    @field_validator("choice")
    @classmethod
    def _has_the_choice(cls, text: str) -> str:
        if "{choice}" not in text:
            raise ValueError("it has no {choice}")
        return text

    def known_metrics(self) -> Collection[str]:
        return METRICS

    def build(self) -> MultipleChoiceEvaluator:
        """Read the items and fill the templates.

        Raises:
            InputError: a file or a line that cannot be read, a missing field, an item without several choices or whose
                answer is none of them, an empty split, or an item that is in both.
        """
        return MultipleChoiceEvaluator(self)


@dataclass(frozen=True)
class _Item:
    """``written`` are the choices as they follow the prompt; ``right`` is the place of the right one."""

    prompt: str
    choices: tuple[str, ...]
    written: tuple[str, ...]
    right: int
    place: str
    benchmark: str | None

    @property
    def hash(self) -> str:
        return digest([self.prompt, self.written, self.right])

    @property
    def asks(self) -> str:
        return self.prompt


class MultipleChoiceEvaluator:
    """Questions with choices, ready to be scored by one live model after another.

    Attributes:
        name: that of the file.
        version: hash of every prompt, choice and right answer.
        metrics: with log p of a choice after the prompt: ``acc``, 1 where the right choice's is the highest, else 0;
            ``acc_norm``, the same by the choice's characters, and ``acc_bytes``, by its bytes in UTF-8 (both as lm-eval
            names them); ``margin``, the right choice's less the highest of the others, natural logarithm.
    """

    def __init__(self, settings: MultipleChoiceSettings) -> None:
        self.name = settings.file.stem
        self.metrics: Mapping[str, bool] = METRICS
        self.measured: frozenset[str] = frozenset()
        self.seconds: Mapping[str, float] = {}
        self.answers: Mapping[int, str] = {}
        self._items = split_items(
            lambda file: list(_read(settings, file)), settings.file, settings.held_out_file, settings.held_out
        )
        self._hashes = {split: [item.hash for item in items] for split, items in self._items.items()}
        self._settings = settings
        self._examples = Examples(
            settings.num_fewshot,
            [Example(item.prompt, item.written[item.right], item.hash) for item in self._items["search"]],
            self.name,
        )
        self.version = digest(["multiple_choice 1", self._hashes, settings.shaping])
        self._prefill = Prefill(self._pairs, settings.batch_tokens)
        self._starts = {
            split: np.cumsum([0, *(len(item.choices) for item in items)]).tolist()
            for split, items in self._items.items()
        }  # where the pairs of each item begin

    def items(self, split: Split) -> Sequence[str]:
        """A hash of each item's prompt, choices and right answer, in the order of the file."""
        return self._hashes[split]

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """Each item's prompt and right choice."""
        return [(item.prompt, item.choices[item.right]) for item in self._items[split]]

    def asked(self, reader: Reader, split: Split, index: int) -> list[Asked]:
        """The item's prompt with each of its choices."""
        item = self._items[split][index]
        examples = self._examples.of(item.hash)
        return [asked_pair(reader, self._settings, item.prompt, text, item.place, examples) for text in item.written]

    def _pairs(self, reader: Reader, split: Split) -> list[Asked]:
        return [pair for index in range(len(self._items[split])) for pair in self.asked(reader, split, index)]

    def test_items(self, split: Split) -> dict[str, int]:
        """How many items are a public benchmark's test items."""
        return count(item.benchmark for item in self._items[split])

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Score the items at these positions of the split: float32 [len(indices)] for each metric.

        Raises:
            InputError: a choice does not fit the model's vocabulary, or alone not its context.
        """
        items, starts = self._items[split], self._starts[split]
        if outside := [index for index in indices if not 0 <= index < len(items)]:
            raise IndexError(f"{self.name} has {len(items)} items in its {split} split; there is no item {outside[0]}")
        started = time.perf_counter()
        asked = {index: range(starts[index], starts[index + 1]) for index in indices}
        found = self._prefill.score(model, split, [pair for pairs in asked.values() for pair in pairs])
        self.seconds = {"generate": time.perf_counter() - started}
        logs = {index: [found[pair].log for pair in pairs] for index, pairs in asked.items()}
        self.answers = {index: items[index].choices[int(np.argmax(found))] for index, found in logs.items()}
        grades = {index: _grade(items[index], found) for index, found in logs.items()}
        values = np.array([grades[index] for index in indices], dtype=np.float32).reshape(-1, len(self.metrics))
        return dict(zip(self.metrics, values.T.copy(), strict=True))


def _grade(item: _Item, logs: Sequence[float]) -> tuple[float, float, float, float]:
    """The metrics of an item, in their order, from log p of its choices. Of equal ones the first is chosen."""
    log = np.array(logs)
    characters = np.array([len(choice) for choice in item.choices])
    size = np.array([len(choice.encode("utf-8", "surrogatepass")) for choice in item.choices])
    chosen = [int(np.argmax(values)) == item.right for values in (log, log / characters, log / size)]
    margin = log[item.right] - np.delete(log, item.right).max()
    return float(chosen[0]), float(chosen[1]), float(chosen[2]), float(margin)


# ---- items -----------------------------------------------------------------------------------------------------------

_EXAMPLE = 'Write a line such as {"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}.'


def _read(settings: MultipleChoiceSettings, file: Path) -> Iterator[_Item]:
    for line in read_lines(file):
        choices = _choices(line)
        prompt = fill("prompt", settings.prompt, line)
        written = tuple(
            fill("choice", settings.choice, Line({**line.fields, "choice": choice}, line.place)) for choice in choices
        )
        yield _Item(prompt, choices, written, _right(line, choices), line.place, benchmark_of(line.fields))


def _choices(line: Line) -> tuple[str, ...]:
    found: Any = line.fields.get("choices")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(c, str) and c.strip() for c in found):
        raise InputError(line.place, f"its choices are no list of several texts: {str(found)[:100]}", _EXAMPLE)
    return tuple(found)


def _right(line: Line, choices: Sequence[str]) -> int:
    answer: Any = line.fields.get("answer")
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    problem = f"its answer {answer!r} is neither one of its {len(choices)} choices nor its number; the first is 0"
    raise InputError(line.place, problem, "Mend the item or leave it out.")
