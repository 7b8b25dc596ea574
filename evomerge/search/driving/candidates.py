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
"""Where a candidate comes from that the optimizer believes in and did not ask for."""

PROXY = "proxy"
"""Where a candidate comes from that the gradient of a proxy led to."""

START = "start"
"""Where a candidate comes from that an earlier search found good."""

REFIT = "refit"
"""Where a candidate comes from that is one of the best, fitted anew."""


@dataclass
class Candidate:
    """A candidate that is being scored. ``step`` is the ask that it came in; ``origin`` is a baseline's kind, the name
    of the optimizer, FAVOURITE, PROXY, START or REFIT.

    ``reached`` is the last rung that it was scored at; ``out`` says why it left the race, if it did. ``same_as`` is an
    earlier candidate of the same recipe, whose scores are its own.
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
        """Too poor for the optimizer to learn more of it than that."""
        return self.out in ("eliminated", "screened")

    @property
    def finished(self) -> bool:
        """No more of it will be scored, and the store says so already."""
        return self.status in ("done", "cached", "failed")


class Proposals(Protocol):
    """Where candidates come from and go back to: the driver, as a way of scoring sees it.

    Attributes:
        optimizer: what candidates are proposed by; a way of scoring reads how many it wants and what it keeps.
        asked_after: the seq of an event before the asks of all that waited when this driver began.
    """

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def asked_after(self) -> int: ...

    @property
    def waiting(self) -> list[Candidate]:
        """The candidates that were asked for and are not told yet, in the order asked."""
        ...

    @property
    def rivals(self) -> Grid:
        """What a new candidate must better to be kept: the front, or the elites of each niche."""
        ...

    @property
    def is_spent(self) -> bool:
        """Whether no more candidates are to be asked for."""
        ...

    @property
    def is_starting(self) -> bool:
        """Whether candidates of an earlier search are to be told before anything is asked for."""
        ...

    def prepare(self) -> bool:
        """Work out what the next ask needs of workers; False when a stop came first."""
        ...

    def ask(self, count: int) -> list[Candidate]:
        """So many new candidates, or what is left of the budget; perhaps the optimizer's favourite beside them."""
        ...

    def tell(self, candidates: Sequence[Candidate]) -> None:
        """Candidates are known as well as they need to be: rank them, write it down, and learn from it."""
        ...
