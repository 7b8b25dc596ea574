"""Computes the rows of a recipe's prompt from those of its sources."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from evomerge.checkpoints.source import Source
from evomerge.recipes.prompts import PromptRun, PromptsRecipe

Started = Callable[[str, int], Tensor]
"""(a text, number of rows) -> the rows [rows, width] of a prompt initialised with this text: float32."""


def prompt_rows(recipe: PromptsRecipe, sources: Mapping[str, Source], started: Started) -> Tensor:
    """The prompt [rows, columns], float32; a soft prompt in the scale of the layers' inputs.

    Rows are summed in the order of the sources, so that equal recipes give equal bits.
    """
    prompts = {name: _rows(sources[name]) for name in sorted({name for run in recipe.runs for name in run.weights})}
    return torch.cat([_run(run, prompts, sources, started) for run in recipe.runs])


def _run(run: PromptRun, prompts: Mapping[str, Tensor], sources: Mapping[str, Source], started: Started) -> Tensor:
    rows = slice(run.first, run.first + run.rows)
    if run.single is not None:
        return prompts[run.single][rows]
    text = common_start(run, sources)
    assert text is not None  # checked by the builder
    start = started(text, rows.stop)[rows]
    made = start.clone()
    for name, weight in sorted(run.weights.items()):
        made.add_(prompts[name][rows] - start, alpha=weight)
    return made


def common_start(run: PromptRun, sources: Mapping[str, Source]) -> str | None:
    """The text with which all prompts of a run were initialised; None if they differ, or if it is unknown."""
    starts = {prompt.facts.start for name in run.weights if (prompt := sources[name].prompt) is not None}
    return starts.pop() if len(starts) == 1 else None


def repeated(ids: list[int], rows: int) -> list[int]:
    """The tokens of a text, repeated to fill this many rows, as peft initialises a prompt."""
    return list(itertools.islice(itertools.cycle(ids), rows))


def _rows(source: Source) -> Tensor:
    assert source.prompt is not None  # checked by the builder
    source.prompt.check_finite()
    return source.prompt.read()
