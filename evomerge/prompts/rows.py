"""The rows of a recipe's prompt, from those of its sources."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from evomerge.checkpoints.source import Source
from evomerge.recipes.prompts import PromptRun, PromptsRecipe

Started = Callable[[str, int], Tensor]
"""(a text, how many rows) -> the rows [rows, width] that a prompt which began as the text was at first: float32."""


def prompt_rows(recipe: PromptsRecipe, sources: Mapping[str, Source], started: Started) -> Tensor:
    """The prompt [rows, columns], float32: of a soft prompt in the size in which layers are given embeddings.

    Rows are added up in the order of the sources, so that equal recipes have equal bits.
    """
    prompts = {name: _rows(sources[name]) for name in sorted({name for run in recipe.runs for name in run.weights})}
    return torch.cat([_run(run, prompts, sources, started) for run in recipe.runs])


def _run(run: PromptRun, prompts: Mapping[str, Tensor], sources: Mapping[str, Source], started: Started) -> Tensor:
    rows = slice(run.first, run.first + run.rows)
    if run.single is not None:
        return prompts[run.single][rows]
    text = common_start(run, sources)
    assert text is not None  # the builder has looked at that
    start = started(text, rows.stop)[rows]
    made = start.clone()
    for name, weight in sorted(run.weights.items()):
        made.add_(prompts[name][rows] - start, alpha=weight)
    return made


def common_start(run: PromptRun, sources: Mapping[str, Source]) -> str | None:
    """The text as which all prompts of a run began; None where they began otherwise, or nobody knows."""
    starts = {prompt.facts.start for name in run.weights if (prompt := sources[name].prompt) is not None}
    return starts.pop() if len(starts) == 1 else None


def repeated(ids: list[int], rows: int) -> list[int]:
    """The tokens of a text as often as it takes for so many rows, as peft begins a prompt."""
    return list(itertools.islice(itertools.cycle(ids), rows))


def _rows(source: Source) -> Tensor:
    assert source.prompt is not None  # the builder has looked at that
    source.prompt.check_finite()
    return source.prompt.read()
