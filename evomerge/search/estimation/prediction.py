"""Predictions of a candidate's scores on all items from a few: the scores of the best baseline, or item response.

The best baseline is used, not the best candidate. The latter was chosen by the items that come first and does better on
these than on the others, so everything estimated from its scores would look worse than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from evomerge.search.estimation.item_response import HeldOutError, ItemModel, fit, held_out_error
from evomerge.search.estimation.items import ItemOrder
from evomerge.search.estimation.scores import Prediction, ScoreTable
from evomerge.search.preparing.setup import MeasureInfo, Setup

GROWTH = 1.25
"""The growth in the number of models scored on every item that triggers a new fit, which costs a cross-validation."""


class Predictions:
    """The prediction for each measure; item response is fitted to the models that were scored on all items."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._reference: ScoreTable | None = None
        self._scored: list[ScoreTable] = []
        self._fitted = 0
        self._models: dict[str, ItemModel] = {}
        self.errors: dict[str, HeldOutError] = {}

    @property
    def learns(self) -> bool:
        """Whether models scored on every item are used: only with ``estimate: item_response``."""
        return self._setup.racing is not None and self._setup.racing.estimate == "item_response"

    def of(self, measure: MeasureInfo) -> Prediction | None:
        """The prediction of a measure's scores; None before the baselines are known."""
        if self._reference is None:
            return None
        known = self._reference.values(measure).astype(np.float64)
        if (model := self._models.get(measure.name)) is not None:
            return model.predict

        def by_reference(items: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
            return known

        return by_reference

    def take_baselines(self, baselines: Sequence[ScoreTable], best: ScoreTable, orders: Sequence[ItemOrder]) -> None:
        """Add the scored baselines, and use the best of them as the reference; one order of items per evaluator."""
        self._reference = best
        self.take(baselines, orders)

    def take(self, scored: Sequence[ScoreTable], orders: Sequence[ItemOrder]) -> None:
        """Add models that were scored on every item, and fit again if there are enough new ones."""
        if not self.learns:
            return
        self._scored.extend(scored)
        if len(self._scored) >= max(3, GROWTH * self._fitted):
            self._fitted = len(self._scored)
            for measure in self._setup.measures:
                self._fit(measure, orders[measure.evaluator])

    def _fit(self, measure: MeasureInfo, order: ItemOrder) -> None:
        assert self._reference is not None  # baselines come before any other candidate
        responses = np.array([table.values(measure) for table in self._scored], dtype=np.float64)
        items = order.positions[: self._setup.rungs[0][measure.evaluator]].astype(np.int64)
        subset = np.sort(items[items < measure.items])
        if len(subset) == measure.items:  # always scored on every item
            return
        reference = self._reference.values(measure).astype(np.float64)
        error = held_out_error(responses, [subset], order, reference)
        self.errors[measure.name] = error
        self._models.pop(measure.name, None)
        if error.item_response < error.reference:
            self._models[measure.name] = fit(responses)

    def summary(self) -> Mapping[str, object]:
        """The state of the item models, to be recorded."""
        return {name: asdict(error) | {"used": name in self._models} for name, error in self.errors.items()}
