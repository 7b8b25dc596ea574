"""Candidates that are being scored, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from evomerge.genome import Genome
from evomerge.optimizers import Grid, Optimizer
from evomerge.recipes.base import Recipe
from evomerge.search.estimation.scores import ScoreTable
from evomerge.store import Estimate
from evomerge.store.rows import Status

FAVOURITE = "favourite"
"""The origin of a candidate that the optimizer considers best but did not ask for."""

PROXY = "proxy"
"""The origin of a candidate found by following the gradient of a proxy."""

START = "start"
"""The origin of a candidate taken from an earlier search."""

REFIT = "refit"
"""The origin of a candidate that is one of the best, fitted again."""


@dataclass
class Candidate:
    """A candidate that is being scored. ``step`` is the ask it belongs to; ``origin`` is a baseline's kind, the name
    of the optimizer, FAVOURITE, PROXY, START or REFIT.

    ``reached`` is the last rung it was scored at; ``out`` says why it left the race, if it did. ``same_as`` is an
    earlier candidate with the same recipe, whose scores it shares.
    """

    number: int
    genome: Genome | None
    recipe: Recipe
    recipe_hash: str
    text: str = ""
    step: int = 0
    origin: str = ""
    attempts: int = 0
    faults: int = 0
    status: Status = "asked"
    same_as: int | None = None
    table: ScoreTable = field(default_factory=ScoreTable)
    timings: dict[str, float] = field(default_factory=dict)
    reached: int = -1
    out: str = ""
    objectives: Mapping[str, Estimate] = field(default_factory=dict)
    eligible: bool = False
    losses: list[float] | None = None

    @property
    def is_eliminated(self) -> bool:
        """Whether it left the race early because it was too poor."""
        return self.out in ("eliminated", "screened")

    @property
    def finished(self) -> bool:
        """Whether nothing more of it will be scored, as recorded in the store."""
        return self.status in ("done", "cached", "failed")


class Proposals(Protocol):
    """The source and destination of candidates: the driver, as seen by a way of scoring.

    Attributes:
        optimizer: proposes candidates; a way of scoring reads how many it wants and what it keeps.
        asked_after: the seq of an event before the asks of all candidates that were open when this driver began.
    """

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def asked_after(self) -> int: ...

    @property
    def waiting(self) -> list[Candidate]:
        """The candidates that were asked for and not told yet, in the order asked."""
        ...

    @property
    def rivals(self) -> Grid:
        """What a new candidate must beat to be kept: the front, or the elites of each niche."""
        ...

    @property
    def is_spent(self) -> bool:
        """Whether no more candidates are to be asked for."""
        ...

    @property
    def is_starting(self) -> bool:
        """Whether candidates of an earlier search must be told before anything is asked for."""
        ...

    def prepare(self) -> bool:
        """Compute what the next ask needs from workers; False if a stop came first."""
        ...

    def ask(self, count: int) -> list[Candidate]:
        """This many new candidates, or as many as the budget has left; possibly also the optimizer's favourite."""
        ...

    def tell(self, candidates: Sequence[Candidate]) -> None:
        """Candidates are scored as far as needed: rank them, record it, and let the optimizer learn."""
        ...
