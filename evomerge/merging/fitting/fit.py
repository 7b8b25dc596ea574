"""What numbers of a model are fitted to: a loss of right answers, on items of neither search nor held-out split."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from evomerge.checkpoints.backward import Listening, no_listener

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


class Fit(Protocol):
    """Items with right answers, and the number and rate of the steps of a fit.

    Attributes:
        steps: of the fit.
        rate: the learning rate of its first step, for a number of about 1; it decays to 0 along a cosine.
        kinds: the group of each row of the part that was asked for last, in the order of its batch: its number among
            all groups of the items, by name. None where items have no groups.
    """

    steps: int
    rate: float
    kinds: tuple[int, ...] | None

    @property
    def digest(self) -> str:
        """The digest of the items and of all numbers here, which recipes name. Raises InputError: unreadable items."""
        ...

    def passes(self, live: LiveModel, step: int, listening: Listening = no_listener) -> Generator[Tensor]:
        """The loss of one step, in parts: each a scalar with a graph, to be run backward before the next one.

        The items of a step depend on its number alone. ``listening`` is open around each part.
        """
        ...
