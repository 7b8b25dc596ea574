"""The greedy soup: sources join the mean one at a time, the best first, and stay if the score does not drop.

Wortsman et al., "Model soups" (arXiv 2203.05482), recipe 1. The search is not random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers.base import Keeps, Observation, Refinement, Settings
from evomerge.optimizers.elites import Feature


class SoupSettings(Settings):
    """The greedy soup, for a space with one weight per source, such as ``method: linear`` on the whole model.

    It stops by itself, after at most two candidates per source.
    """

    name: Literal["greedy_soup"]

    def check(
        self, parameters: Sequence[Parameter], objectives: int, place: str, features: Sequence[Feature] = ()
    ) -> None:
        if objectives > 1:
            raise InputError(
                place,
                f"greedy_soup takes one objective, and the search has {objectives}",
                "Use an optimizer for several: nsga2, nsga3, tpe, gp, random or qmc.",
            )
        hint = "Use a parameter_space of `granularity: model` and a weighted sum, such as `method: linear`."
        for p in parameters:
            if p.kind != "real" or p.group != parameters[0].group or not p.share_of:
                raise InputError(
                    place, f"greedy_soup takes one weight for each source, and {p.name} is something else", hint
                )
            if p.low > 0 or p.high < 1:
                raise InputError(
                    place,
                    f"greedy_soup needs weights from 0 to 1, and {p.name} goes from {p.low:g} to {p.high:g}",
                    "Widen `space.bounds.weight`.",
                )
        if len(parameters) < 2:
            raise InputError(place, "greedy_soup needs two sources to mix, and the space has one weight", hint)

    def build(
        self, parameters: Sequence[Parameter], objectives: int, seed: int, features: Sequence[Feature] = ()
    ) -> GreedySoup:
        return GreedySoup(parameters)


class GreedySoup:
    """One search for the greedy soup.

    What it asks for depends only on the losses it was told, whoever asked for them: baselines that are a single source,
    or a soup, are not asked for again. If a genome is told twice, its first loss counts.
    """

    favourite: Genome | None = None
    wants_items = False
    refined: Sequence[Refinement] = ()
    keeps: Keeps = "all"  # sources are tried in the order of their losses, and trials are pending one at a time

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._names = [p.share_of for p in parameters]
        self._losses: dict[bytes, float] = {}
        self._out: set[bytes] = set()

    @property
    def population(self) -> int:
        """Every single source that was not asked for yet; after that 1, since each trial depends on the one before."""
        waiting = [genome for genome in self._alone() if self._is_new(genome)]
        return max(1, len(waiting))

    @property
    def stopped(self) -> str | None:
        soup, left = self._progress()
        if left is None or left:
            return None
        if not soup:
            return "greedy_soup has no source that could be scored"
        members = ", ".join(self._names[i] for i in soup)
        return f"greedy_soup has tried every source; in the soup, in this order: {members}"

    def ask(self, n: int) -> list[Genome]:
        """The next genomes to score; if more are wanted, later trials as if those before had failed, then the soup."""
        soup, _ = self._progress()
        new = [genome for genome in self._trials() if self._is_new(genome)]
        rest = [self._mean(soup or range(len(self._names))) for _ in range(n - len(new))]
        genomes = [*new, *rest][:n]
        self._out.update(genome.tobytes() for genome in genomes)
        return genomes

    def replay(self, genomes: Sequence[Genome]) -> list[Genome]:
        return self.ask(len(genomes))

    def tell(self, observations: Sequence[Observation]) -> None:
        for observation in observations:
            (loss,) = observation.losses
            self._losses.setdefault(observation.genome.tobytes(), float(loss) if np.isfinite(loss) else np.inf)

    def _trials(self) -> Iterator[Genome]:
        soup, left = self._progress()
        if left is None:
            yield from self._alone()
        else:
            yield from (self._mean([*soup, i]) for i in left)

    def _progress(self) -> tuple[list[int], list[int] | None]:
        """The soup so far and the sources still to try, in order; None while the order is unknown."""
        losses = [self._loss(genome) for genome in self._alone()]
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses):
            return [], None
        ranked = [i for i in np.argsort(known, kind="stable").tolist() if known[i] < np.inf]
        soup, best = ranked[:1], min(known)
        for position, i in enumerate(ranked[1:], 1):
            loss = self._loss(self._mean([*soup, i]))
            if loss is None:
                return soup, ranked[position:]
            if loss <= best:
                soup, best = [*soup, i], loss
        return soup, []

    def _alone(self) -> Iterator[Genome]:
        return (self._mean([i]) for i in range(len(self._names)))

    def _mean(self, members: Sequence[int]) -> Genome:
        genome = np.zeros(len(self._names))
        genome[list(members)] = 1.0 / len(members)
        return genome

    def _loss(self, genome: Genome) -> float | None:
        return self._losses.get(genome.tobytes())

    def _is_new(self, genome: Genome) -> bool:
        return genome.tobytes() not in self._losses and genome.tobytes() not in self._out
