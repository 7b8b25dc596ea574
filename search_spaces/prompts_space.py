"""Prompts: soft tokens before every text, assembled block by block from the prompts of the sources.

The budget of tokens is divided into blocks. Each is taken from one source's prompt, or empty. If a source is chosen
again, its prompt continues after the last row used: A, A, B, A means the first two blocks of A, the first of B and the
third of A. A prompt that is used up adds nothing more.

For soft prompts that were initialised with the same text's embedding there is one more choice: p0 + sum_k w_k (p_k -
p0), row by row, with a weight for each source (Belanec et al., "Task Prompt Vectors", arXiv 2408.01119).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome, Parameter
from evomerge.recipes.base import Recipe
from evomerge.recipes.prompts import PromptFacts, PromptRun, PromptsRecipe
from search_spaces.base import SpaceContext, SpaceSettings

NONE, MIXED = "none", "mixed"
"""What a block may be besides a source: empty, or a mixture of the rows of all prompts."""

_MAX_WEIGHT = 1.5


class PromptsSpaceSettings(SpaceSettings):
    """The ``space:`` section of a search file.

    Args:
        tokens: the maximum number of tokens before a text; by default the total of all prompts.
        block: how many rows are chosen at once; the fewer, the larger the search space.
        arithmetic: also mix rows of several prompts, with a weight for each; only for soft prompts that were
            initialised with the embedding of the same text.
    """

    mixes_tensors: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...]] = ("transformers",)
    takes_prompts: ClassVar[bool] = True

    kind: Literal["prompts"]
    tokens: int | None = Field(default=None, ge=1, le=4096)
    block: int = Field(default=4, ge=1, le=1024)
    arithmetic: bool = False

    def build(self, context: SpaceContext) -> PromptsSpace:
        if context.base is None or context.tokenizer != context.base:
            hint = "Name the model that all prompts are of: `base: NAME`, and no other `tokenizer`."
            raise InputError("space", "puts prompts before the texts of a base, and there is none", hint)
        prompts = dict(context.prompts)
        for name in context.mixed:
            if name not in prompts:
                hint = "Leave it out, or name a prompt with the base: `BASE+PROMPT`."
                raise InputError(f"sources.{name}", "has no prompt, and this space chooses among prompts", hint)
        if context.base in prompts:
            raise InputError(f"sources.{context.base}", "is the base, and has a prompt", "Name the model alone.")
        if not prompts:
            raise InputError("sources", "are no prompts", "Name them with the base: `BASE+PROMPT`.")
        _check_names(prompts)
        if len({facts.form for facts in prompts.values()}) > 1:
            some = "; ".join(f"{name} is {facts.text}" for name, facts in prompts.items())
            problem = f"takes soft prompts, or prefixes, and there are both: {some}"
            raise InputError("space", problem, "Search over one kind at a time.")
        if self.arithmetic:
            _check_starts(prompts)
        if self.tokens is not None and self.tokens < self.block:
            raise InputError("space.tokens", f"is {self.tokens}, less than a block of {self.block}", "Lower `block`.")
        return PromptsSpace(self, context, prompts)


def _check_names(prompts: Mapping[str, PromptFacts]) -> None:
    for name in (NONE, MIXED):
        if name in prompts:
            raise InputError(f"sources.{name}", f"is called {name}, which has another meaning here", "Rename it.")


def _check_starts(prompts: Mapping[str, PromptFacts]) -> None:
    """Reject mixing rows of prompts that were initialised differently, since they are unrelated."""
    place, hint = "space.arithmetic", "Leave it out: prompts are then put one after another."
    for name, facts in prompts.items():
        if facts.form == "prefix":
            problem = f"mixes rows, and {name} is {facts.text}: keys and values whose rows do not correspond"
            raise InputError(place, problem, hint)
        if facts.start is None:
            problem = f"needs prompts with the same initial text, and that of {name} is not known: it is {facts.text}"
            raise InputError(place, f"{problem} without an initial text (`prompt_tuning_init: TEXT`)", hint)
    starts = {facts.start for facts in prompts.values()}
    if len(starts) > 1 or len(prompts) < 2:
        texts = "; ".join(f"{name} as {facts.start!r}" for name, facts in prompts.items())
        raise InputError(place, f"needs several prompts with the same initial text, and these began {texts}", hint)


class PromptsSpace:
    """See the module docstring, and ``evomerge.genome.SearchSpace``."""

    def __init__(
        self, settings: PromptsSpaceSettings, context: SpaceContext, prompts: Mapping[str, PromptFacts]
    ) -> None:
        self._settings, self._context, self._prompts = settings, context, prompts
        self._block = settings.block
        (self._form,) = {facts.form for facts in prompts.values()}
        self._mixed_rows = min(facts.rows for facts in prompts.values()) if settings.arithmetic else 0
        self._choices = (NONE, *prompts, *((MIXED,) if settings.arithmetic else ()))
        every = sum(math.ceil(facts.rows / self._block) for facts in prompts.values())
        self._blocks = every if settings.tokens is None else settings.tokens // self._block
        self.layer_buffers = self.hops = context.layers
        last = float(len(self._choices) - 1)
        self.parameters = (
            *(
                Parameter(f"block.{n}", 0.0, last, 0.0, "choice", group="blocks", choices=self._choices)
                for n in range(self._blocks)
            ),
            *(
                Parameter(f"weight.{name}", 0.0, _MAX_WEIGHT, 1.0 / len(prompts), group="weights")
                for name in (prompts if settings.arithmetic else ())
            ),
        )

    @property
    def tokens(self) -> int:
        """The maximum number of tokens before a text, over candidates and baselines."""
        return max(self._blocks * self._block, sum(facts.rows for facts in self._prompts.values()))

    def decode(self, genome: Genome) -> PromptsRecipe:
        numbers = genome.tolist()
        weights = dict(zip(self._prompts, numbers[self._blocks :], strict=False))
        return self._recipe([self._choices[int(number)] for number in numbers[: self._blocks]], weights)

    def genome_of(self, recipe: Recipe) -> Genome | None:
        return None  # many genomes represent one prompt

    def baselines(self) -> Iterator[Baseline]:
        """The base alone, each prompt, all of them one after another, and their mean if rows correspond."""
        yield self._baseline(str(self._context.base), "source", [])
        for name, facts in self._prompts.items():
            yield self._baseline(name, "source", self._all_of(name, facts.rows))
        if len(self._prompts) > 1:
            every = [block for name, facts in self._prompts.items() for block in self._all_of(name, facts.rows)]
            yield self._baseline("all prompts", "default", every)
        if self._settings.arithmetic:
            yield self._baseline("mean of the prompts", "average", self._all_of(MIXED, self._mixed_rows))

    def _all_of(self, name: str, rows: int) -> list[str]:
        return [name] * math.ceil(rows / self._block)

    def _baseline(self, label: str, kind: Literal["source", "average", "default"], choices: Sequence[str]) -> Baseline:
        even = dict.fromkeys(self._prompts, 1.0 / len(self._prompts))
        return Baseline(label, kind, self._recipe(choices, even), self._point(choices))

    def _point(self, choices: Sequence[str]) -> Genome | None:
        """The genome of these blocks with equal weights; None if they exceed the budget."""
        if len(choices) > self._blocks:
            return None
        blocks = [*choices, *[NONE] * (self._blocks - len(choices))]
        weights = [parameter.default for parameter in self.parameters[self._blocks :]]
        return np.array([*(float(self._choices.index(block)) for block in blocks), *weights])

    def _recipe(self, choices: Sequence[str], weights: Mapping[str, float]) -> PromptsRecipe:
        context, used, runs = self._context, dict.fromkeys(self._choices, 0), list[PromptRun]()
        for choice in choices:
            rows = min(self._block, self._rows_of(choice) - used[choice])
            if rows > 0:
                of = dict(weights) if choice == MIXED else {choice: 1.0}
                runs.append(PromptRun(weights=of, first=used[choice], rows=rows))
                used[choice] += rows
        return PromptsRecipe(
            sources=dict(context.sources),
            tokenizer=context.tokenizer,
            seed=context.recipe_seed,
            dtype=context.dtype,
            base=context.tokenizer,
            form=self._form,
            runs=PromptsRecipe.joined(tuple(runs)),
        )

    def _rows_of(self, choice: str) -> int:
        if choice == MIXED:
            return self._mixed_rows
        return 0 if choice == NONE else self._prompts[choice].rows
