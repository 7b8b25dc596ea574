"""The loss that numbers of a search's models are fitted with: on right answers to the items of its ``fit`` section.

It is the proxy's loss, the mean of log(1 - log p) over items whose right answers have probability p. Cross entropy, the
mean of -log p, is dominated by the items that are furthest from right: with it, one number for each tensor of four
adapters of the zoo (120 steps on 16 of 600 items) scored 0.549 and 0.571 on 800 held-out items, with this loss 0.609
and 0.610 (two seeds; a score's standard error is 0.017). Starting at 1/n or at 0.6 made no difference (0.611).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from evomerge.checkpoints.backward import Listening, no_listener
from evomerge.inference.proxy import loss_parts
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Likelihood
from evomerge.optimizers.base import random_state
from evomerge.search.settings.fitting import FitSplit

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel


class AnswersFit:
    """How unlikely right answers are; see ``merging.fitting.Fit``.

    Args:
        split: the items.
    """

    def __init__(self, split: FitSplit) -> None:
        self._split = split
        self.steps, self.rate = split.section.steps, split.section.rate
        self.kinds: tuple[int, ...] | None = None

    @property
    def digest(self) -> str:
        return self._split.digest

    def passes(self, live: LiveModel, step: int, listening: Listening = no_listener) -> Generator[Tensor]:
        """The loss of one step, the mean over its items, in parts; see ``Fit``."""
        reader = Reader.of(live)
        drawn, groups = self.drawn(step), self._split.groups
        asked = self._split.evaluator.requests(reader, "search", drawn)
        prompts = [request.prompt for request in asked if isinstance(request, Likelihood)]

        def told(rows: Sequence[int]) -> None:
            self.kinds = tuple(groups[drawn[row]] for row in rows) if groups else None

        return loss_parts(live, prompts, [1.0] * len(prompts), listening, told=told)

    def drawn(self, step: int) -> list[int]:
        """The positions of a step's items: all are shuffled again once all have been drawn."""
        count = self._split.count
        size = min(self._split.section.drawn, count)
        rounds = {number // count: None for number in range(step * size, (step + 1) * size)}
        orders = {one: random_state(self._split.seed, one).permutation(count) for one in rounds}
        return [int(orders[number // count][number % count]) for number in range(step * size, (step + 1) * size)]
