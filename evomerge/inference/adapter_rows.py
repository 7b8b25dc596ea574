"""Answers of several candidates at once: weighted sums of low-rank adapters, each a few rows of one live model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from evomerge.checkpoints.live import LiveModel, finite_rows
from evomerge.checkpoints.low_rank_rows import LowRankRows
from evomerge.checkpoints.source import Source
from evomerge.inference.requests import Batch, Response
from evomerge.inference.transformers_engine import TransformersEngine


class AdapterRowsEngine:
    """An engine whose models are mixtures of adapters on the live model of their base.

    The adapters are held once on the live model's device, as long as this object lives. Likelihoods are of one model
    after another, so that each is what it would be alone; answers of all models are decoded together.

    Args:
        live: on it the base is written.
        adapted: the sources that are the base with an adapter.
        weights: names of the base's weights that adapters change.

    Raises:
        NotLowRankError: the sources are something else.
    """

    greedy_only = False

    def __init__(self, live: LiveModel, adapted: Sequence[Source], weights: Sequence[str]) -> None:
        self._live, self._rows = live, LowRankRows(live, adapted, weights)
        self._engine = TransformersEngine(live, self._rows.choose)

    def shares(self, coefficients: Tensor) -> Tensor:
        """What ``mixed`` takes of a model: from its coefficients, float32 [adapters, weights]."""
        return self._rows.shares(coefficients)

    @contextlib.contextmanager
    def mixed(self, shares: Sequence[Tensor]) -> Iterator[None]:
        """Within, the models of batches, counted from 0, are those with these shares."""
        with self._rows.mixed(shares):
            yield

    def choose(self, model: int) -> None:
        """Have forward passes that are made on the live model itself be of one model."""
        self._rows.choose(model)

    def finite(self, models: Sequence[int]) -> list[bool]:
        """Whether the logits of each model are free of NaN and Inf; all are probed in one forward pass."""
        self._rows.choose(models)
        together = finite_rows(self._live, len(models))
        self._rows.check_reached()
        if all(together):
            return [True] * len(models)
        finite = []
        for model in models:  # some architectures mix rows of a batch: ask each alone
            self._rows.choose(model)
            finite.append(all(finite_rows(self._live, 1)))
        return finite

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        """See ``Engine``."""
        return self._engine.respond(batches)


class OneModel:
    """One of the models of an ``AdapterRowsEngine``, as an engine of its own."""

    greedy_only = False

    def __init__(self, engine: AdapterRowsEngine, model: int) -> None:
        self._engine, self._model = engine, model

    def respond(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Response]]]:
        """See ``Engine``; the number of a batch's model is passed over."""
        return self._engine.respond([Batch(batch.requests, batch.objective, self._model) for batch in batches])
