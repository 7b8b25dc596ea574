"""The contract of an evaluator: it scores a live model on items and returns one score per item."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # settings are read where no model is, and torch takes seconds to import
    from evaluators.prompts import Asked, Reader
    from evomerge.checkpoints.live import LiveModel

Split = Literal["search", "held_out"]

MODEL = "a model"
ModelReference = Annotated[str, MODEL]
"""A setting that names a model: its folder, which the search file may give relative to itself, or an id on the hub."""

FOLDER = "a folder"
"""Marks a setting whose path is that of a folder, not of a file."""

ItemScores = Mapping[str, NDArray[np.float32]]
"""For each metric, float32 of shape [n_items]: the score of every item asked for, in the order asked."""


class Evaluator(Protocol):
    """Scores live models on the items of two splits.

    An evaluator is built once and kept for the life of its worker: whatever costs time (reading data, building
    prompts) happens in its construction, not in ``score``.
    """

    @property
    def name(self) -> str:
        """Short name for people, such as the task's."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same model could get another score: part of the cache key of every score."""
        ...

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Each metric that ``score`` returns, and whether higher is better."""
        ...

    @property
    def measured(self) -> frozenset[str]:
        """Metrics that are measured rather than computed, such as speed: the next time they are other numbers."""
        ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """How long the last ``score`` took, by phase: "generate" is the model's part, "score" the grading's."""
        ...

    @property
    def answers(self) -> Mapping[int, str]:
        """What the model wrote, or chose, in the last ``score``, by the item's position; empty where it does neither.

        For people to read beside the scores.
        """
        ...

    def texts(self, split: Split) -> Sequence[tuple[str, str]]:
        """What each item asks and its right answer, for people, in order; "" where there is none."""
        ...

    def items(self, split: Split) -> Sequence[str]:
        """A content hash for each item of the split, in order. Equal hashes mean equal items, in whichever split."""
        ...

    def asked(self, reader: Reader, split: Split, index: int) -> Sequence[Asked]:
        """What a model is given for the item at a position, once for each time that it is asked.

        Empty for what asks nothing, or nothing that is known before a model is there. For people to read, and to see
        before a search whether items fit.

        Raises:
            InputError: the item cannot be scored with such a model.
        """
        ...

    def test_items(self, split: Split) -> Mapping[str, int]:
        """How many items of the split are test items of a public benchmark, by the benchmark's name.

        Told by content, as ``evaluators.benchmarks`` does it. A search on such items needs a person's consent.
        """
        ...

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> ItemScores:
        """Score the items at these positions of the split.

        Deterministic but for what is ``measured``: the same model and indices give the same numbers. An item's score
        does not depend on the other items asked for, beyond the last bits that batching moves.
        """
        ...


class EvaluatorSettings(BaseModel):
    """What the search file says of an evaluator; each evaluator's file has its own subclass.

    Two objectives whose settings are equal share one evaluator.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def known_metrics(self) -> Collection[str] | None:
        """The evaluator's metrics, where they are known before it is built; None where only its data or code has them.

        It imports nothing heavy: a metric that is wrong is to be said at once.

        Raises:
            InputError: what the settings name is nowhere.
        """
        return None

    def check(self) -> None:
        """Refuse what the settings alone show to be wrong, such as code that nobody has consented to.

        It imports nothing heavy, reads no data and runs no code of a person's. ``build`` refuses the same.

        Raises:
            InputError: names the setting.
        """

    def build(self) -> Evaluator:
        """Read the data and make the evaluator.

        Raises:
            InputError: an unknown task or metric, an empty or overlapping split, data that cannot be read.
        """
        raise NotImplementedError

    def build_and_try(self) -> Evaluator:
        """``build`` where a search begins: what can be tried without a model is tried, and soon given up.

        Raises:
            InputError: as ``build`` does, or what was tried fails whatever the model, or comes to no end.
        """
        return self.build()
