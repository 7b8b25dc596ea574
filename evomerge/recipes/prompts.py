"""The recipe of a model with a soft prompt or a prefix before every text, put together from those of sources.

A soft prompt is rows of the embedding that no token has (Lester et al., "Prompt tuning", arXiv 2104.08691); a prefix is
keys and values of every layer (Li and Liang, "Prefix-tuning", arXiv 2101.00190; in every layer it is P-tuning v2, Liu
et al., arXiv 2110.07602). The weights of the model are the base's own.

Rows of a source's prompt are taken as they are, one run after another, which is concatenation; or a row of several is

    p0 + sum_k w_k (p_k - p0)

for the rows p_k of prompts that began as the same row p0 (Belanec et al., "Task Prompt Vectors", arXiv 2408.01119,
equations 2 and 3); with weights that sum to 1 it is their mean. Prompts that began otherwise have nothing to do with
each other row by row, and a prefix is a set of keys: for these there is concatenation alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from evomerge.recipes.base import Frozen, Recipe
from evomerge.recipes.stack import Number

PromptForm = Literal["tokens", "prefix"]
"""Rows before the embeddings of a text, or keys and values before those of every layer."""


@dataclass(frozen=True)
class PromptFacts:
    """What is known of a source's prompt without its numbers.

    Attributes:
        form: a soft prompt or a prefix.
        kind: peft's name of how it was trained.
        rows: how many tokens it stands for.
        start: the text whose embedding it was at first; None where nobody knows what it was.
    """

    form: PromptForm
    kind: str
    rows: int
    start: str | None = None

    @property
    def text(self) -> str:
        """In words: "a soft prompt of 16 tokens (PROMPT_TUNING)"."""
        what = "a soft prompt of" if self.form == "tokens" else "a prefix of keys and values for"
        return f"{what} {self.rows} token{'s' * (self.rows != 1)} ({self.kind})"


class PromptRun(Frozen):
    """Rows that follow each other, from the same place of one prompt or of several.

    Attributes:
        weights: of each source's prompt; that of one alone is 1.
        first: the first row.
        rows: how many.
    """

    weights: dict[str, Number] = Field(min_length=1)
    first: int = Field(ge=0)
    rows: int = Field(ge=1)

    @property
    def single(self) -> str | None:
        """The one source whose rows are taken as they are; None where rows are mixed."""
        name, weight = next(iter(self.weights.items()))
        return name if len(self.weights) == 1 and weight == 1.0 else None

    @property
    def text(self) -> str:
        """In words, rows counted from 0."""
        rows = f"row {self.first}" if self.rows == 1 else f"rows {self.first} to {self.first + self.rows - 1}"
        if self.single is not None:
            return f"{rows} of {self.single}"
        mixed = ", ".join(f"{weight:.3g} {name}" for name, weight in self.weights.items())
        return f"{rows} of their start and {mixed}"


class PromptsRecipe(Recipe):
    """A model as it is, and the runs of rows that stand before every text; without any it is the model alone.

    Runs of one source that go on where the one before ended are one run, so that equal prompts have equal texts.
    """

    kind: ClassVar[str] = "prompts"
    takes_prompts: ClassVar[bool] = True

    base: str
    form: PromptForm
    runs: tuple[PromptRun, ...] = ()

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> PromptsRecipe:
        self.refuse_unknown_sources()
        if self.tokenizer != self.base:
            raise ValueError(f"has the tokenizer of {self.tokenizer!r}, and prompts stand before texts of its base")
        for number, run in enumerate(self.runs):
            if self.form == "prefix" and run.single is None:
                raise ValueError(f"run {number} mixes rows of prefixes, which are sets of keys without an order")
        return self

    @classmethod
    def joined(cls, runs: tuple[PromptRun, ...]) -> tuple[PromptRun, ...]:
        """Runs in which those that go on where the one before ended are one."""
        made: list[PromptRun] = []
        for run in runs:
            last = made[-1] if made else None
            if last is not None and last.weights == run.weights and last.first + last.rows == run.first:
                made[-1] = last.model_copy(update={"rows": last.rows + run.rows})
            else:
                made.append(run)
        return tuple(made)

    @property
    def rows(self) -> int:
        """How many tokens stand before a text."""
        return sum(run.rows for run in self.runs)

    @property
    def rounds_on_export(self) -> bool:
        # peft puts a prefix before other batches than a search does, with no room for it in their tokens.
        return self.form == "prefix" and bool(self.runs)

    def used_sources(self) -> set[str]:
        return {self.base, *(name for run in self.runs for name in run.weights)}

    def lines(self) -> list[str]:
        if not self.runs:
            return [f"{self.base}, with nothing before a text"]
        what = "soft prompt" if self.form == "tokens" else "prefix"
        return [f"{self.base} behind a {what} of {self.rows} tokens", *(run.text for run in self.runs)]
