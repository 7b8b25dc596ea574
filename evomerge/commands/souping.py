"""Before a search with calibration texts: two mixes of its sources by their losses on the texts, as baselines.

LM-Cocktail (arXiv 2311.13534) weights the sources by the softmax of their losses; the greedy soup (arXiv 2203.05482)
adds one source after the other as long as the loss of the mean does not rise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy import special

from evomerge.commands.outside import OutsideJobs
from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Observation
from evomerge.optimizers.soups import GreedySoup
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.screen import duration
from evomerge.search.driving.dispatch import Pending
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.measured import plans_soups
from evomerge.search.preparing.prepare import Prepared, build_space
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured, TextLosses
from evomerge.store import Store
from evomerge.store.events import TextLoss
from search_spaces.base import Soup

TEMPERATURE = 5.0
"""The temperature of the softmax: the default in the method's code, research/LM_Cocktail in FlagOpen/FlagEmbedding."""

COCKTAIL, GREEDY = "LM-Cocktail", "greedy soup"


def with_soups(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> Prepared | None:
    """The search with the mixes by losses added to its baselines; the caller holds the lease.

    A search that began without them continues without them, because its recorded asks are replayed.

    Returns:
        The unchanged search if there are no texts; None if it was stopped first.

    Raises:
        InputError: a source cannot be run over the texts.
    """
    begun = [row.label for row in store.candidates(step=0)]
    if not plans_soups(prepared) or (begun and COCKTAIL not in begun):
        return prepared
    started, soups = time.monotonic(), _Soups(folder, prepared, store)
    if soups.is_new:
        console.print("mixing sources by how unlikely they find the calibration texts", style="dim")
    found = soups.run_all(pool)
    if found is None:
        return None
    if soups.is_new:
        console.print(f"mixed in {duration(time.monotonic() - started)}", style="dim")
    measures = replace(prepared.setup.space_measures, soups=found)
    space = build_space(prepared.file, prepared.sources, measures)
    return replace(prepared, setup=replace(prepared.setup, space=space, space_measures=measures))


def _mixed(prepared: Prepared) -> list[str]:
    return [name for name in prepared.file.sources if name != prepared.file.base]


class _Soups(OutsideJobs):
    """The losses of sources and of their means, each measured once per search.

    Attributes:
        is_new: whether nothing is known yet.
    """

    log_prefix = "soup"

    def __init__(self, folder: Path, prepared: Prepared, store: Store) -> None:
        super().__init__(folder, prepared, store)
        self._sources = _mixed(prepared)
        self._losses = {
            tuple(said.sources): said.loss
            for said in (event.read(TextLoss) for event in store.events(kinds=(TextLoss.kind,)))
        }
        self.is_new = not self._losses
        self._asked: list[tuple[str, ...]] = []

    def run_all(self, pool: Pool) -> tuple[Soup, ...] | None:
        """The softmax of the sources' losses, and the greedy soup if it has several; None if stopped first."""
        parameters = [Parameter(name, 0.0, 1.0, 1.0, group="model", share_of=name) for name in self._sources]
        soup = GreedySoup(parameters)
        while soup.stopped is None:
            genomes = soup.ask(soup.population)
            if not self._measure([self._members(genome) for genome in genomes], pool):
                return None
            soup.tell([Observation(genome, [self._losses[self._members(genome)]]) for genome in genomes])
        members, losses = self._members(soup.ask(1)[0]), np.array([self._losses[(name,)] for name in self._sources])
        cocktail = Soup(COCKTAIL, tuple(zip(self._sources, softmax_weights(losses), strict=True)))
        greedy = Soup(GREEDY, tuple((name, 1.0 / len(members)) for name in members))
        return (cocktail, greedy) if len(members) > 1 else (cocktail,)

    def _members(self, genome: Genome) -> tuple[str, ...]:
        return tuple(self._sources[place] for place in np.flatnonzero(genome).tolist())

    def _measure(self, means: Sequence[tuple[str, ...]], pool: Pool) -> bool:
        """Measure the unknown losses of means of sources; returns False if the search was stopped first."""
        self._asked, file = [members for members in means if members not in self._losses], self.prepared.file
        layers = self.prepared.sources[file.tokenizer_source].layers
        jobs = []
        for number, members in enumerate(self._asked):
            blend = Blend.weighted_sum({name: 1.0 / len(members) for name in members})
            recipe = StackRecipe.uniform(
                blend, sources=file.sources, tokenizer=file.tokenizer_source, layers=layers,
                vocabulary=file.merged_vocabulary, seed=file.seed, dtype=file.dtype,
            )  # fmt: skip
            jobs.append(Pending(-1 - number, 1, recipe, f"texts of {' '.join(members)}", (), instead=TextLosses()))
        return self.run(pool, jobs)

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        assert isinstance(result, Measured)  # no job here is a descent
        members = self._asked[-1 - finished.candidate]
        loss = float(np.mean(result.scores[0]["loss"], dtype=np.float64))
        self.store.record_event(TextLoss(sources=list(members), loss=loss))
        self._losses[members] = loss

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        names = " and ".join(self._asked[-1 - finished.candidate])
        hint = f"See {log} in the search's folder." if log else "Or say `baselines: {soups: false}`."
        return InputError("calibration", f"{names} cannot be run over the texts: {failure.message}", hint)


def softmax_weights(losses: NDArray[np.float64]) -> list[float]:
    """softmax(-loss / TEMPERATURE): float64 [sources]."""
    weights: list[float] = special.softmax(-losses / TEMPERATURE).tolist()
    return weights
