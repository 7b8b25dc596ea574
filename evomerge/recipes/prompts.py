"""The recipe of a model with a soft prompt or a prefix before every text, assembled from those of sources.

A soft prompt consists of embedding rows without tokens (Lester et al., "Prompt tuning", arXiv 2104.08691); a prefix of
keys and values for every layer (Li and Liang, "Prefix-tuning", arXiv 2101.00190; known as P-tuning v2 in every layer,
Liu et al., arXiv 2110.07602). The model's weights are those of the base.

Rows of a source's prompt are used unchanged, one run after another, which is concatenation; or rows are combined as

    p0 + sum_k w_k (p_k - p0)

for the rows p_k of prompts that were initialised with the same row p0 (Belanec et al., "Task Prompt Vectors", arXiv
2408.01119, equations 2 and 3); with weights that sum to 1 this is their weighted mean. Rows of prompts with different
initialisations are unrelated, and a prefix is an unordered set of keys: these can only be concatenated.
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
    """What is known about a source's prompt without its numbers.

    Attributes:
        form: a soft prompt or a prefix.
        kind: peft's name for how it was trained.
        rows: how many tokens it stands for.
        start: the text whose embedding initialised it; None if unknown.
    """

    form: PromptForm
    kind: str
    rows: int
    start: str | None = None

    @property
    def text(self) -> str:
        """A description: "a soft prompt of 16 tokens (PROMPT_TUNING)"."""
        what = "a soft prompt of" if self.form == "tokens" else "a prefix of keys and values for"
        return f"{what} {self.rows} token{'s' * (self.rows != 1)} ({self.kind})"


class PromptRun(Frozen):
    """Consecutive rows, from the same position of one or more prompts.

    Attributes:
        weights: the weight of each source's prompt; 1 for a single source.
        first: the first row.
        rows: how many.
    """

    weights: dict[str, Number] = Field(min_length=1)
    first: int = Field(ge=0)
    rows: int = Field(ge=1)

    @property
    def single(self) -> str | None:
        """The only source, whose rows are used unchanged; None if rows are combined."""
        name, weight = next(iter(self.weights.items()))
        return name if len(self.weights) == 1 and weight == 1.0 else None

    @property
    def text(self) -> str:
        """A description, with rows counted from 0."""
        rows = f"row {self.first}" if self.rows == 1 else f"rows {self.first} to {self.first + self.rows - 1}"
        if self.single is not None:
            return f"{rows} of {self.single}"
        mixed = ", ".join(f"{weight:.3g} {name}" for name, weight in self.weights.items())
        return f"{rows} of their start and {mixed}"


class PromptsRecipe(Recipe):
    """A base and the runs of rows before every text; without any it is the base alone.

    Consecutive runs of one source without a gap are joined to one run, so that equal prompts have equal texts.
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
        """Join runs that continue where the previous one ended."""
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
        """How many tokens precede a text."""
        return sum(run.rows for run in self.runs)

    @property
    def rounds_on_export(self) -> bool:
        # peft forms other batches than a search, because its batches have no tokens for the prefix.
        return self.form == "prefix" and bool(self.runs)

    def used_sources(self) -> set[str]:
        return {self.base, *(name for run in self.runs for name in run.weights)}

    def lines(self) -> list[str]:
        if not self.runs:
            return [f"{self.base}, with nothing before a text"]
        what = "soft prompt" if self.form == "tokens" else "prefix"
        return [f"{self.base} behind a {what} of {self.rows} tokens", *(run.text for run in self.runs)]
