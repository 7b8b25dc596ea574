"""What a search keeps of the candidates that were told: the Pareto front, and the elites of its niches."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.optimizers import Grid, Keeps
from evomerge.optimizers.elites import Point
from evomerge.search.driving.candidates import Candidate
from evomerge.search.preparing.setup import Setup
from evomerge.store import Niches


class Kept:
    """The front and the elites; they are the same if the search has no features.

    Attributes:
        front: the Pareto front.
        elites: the best of every niche.
        changed: whether the last told candidates changed either.
        niches: the changes in the grid; None without features.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.front = Grid()
        self.elites = Grid(setup.axes)
        self.changed = False
        self.niches: Niches | None = None

    def rivals(self, keeps: Keeps) -> Grid:
        """What a new candidate must beat to be kept: the front, or the elites if the optimizer keeps niches."""
        return self.elites if keeps == "niches" else self.front

    def take(self, candidates: Sequence[Candidate]) -> None:
        """Add told candidates; only those that are eligible for the front can be elites."""
        front, elites = self.front.niches.keys(), self.elites.niches.keys()
        eligible = {
            c.number: Point(c.losses, self._setup.feature_values(c.objectives))
            for c in candidates
            if c.eligible and c.losses is not None
        }
        self.front = self.front.extend({number: Point(point.losses) for number, point in eligible.items()})
        self.elites = self.elites.extend(eligible) if self._setup.features else self.front
        now = self.elites.niches.keys()
        self.changed = (self.front.niches.keys(), now) != (front, elites)
        if self._setup.features:
            by_number = {c.number: self.elites.niche(self._setup.feature_values(c.objectives)) for c in candidates}
            changes = {number: number in now for number in sorted(elites ^ now)}
            self.niches = Niches({number: niche for number, niche in by_number.items() if niche is not None}, changes)
