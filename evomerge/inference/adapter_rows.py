"""Answers of several candidates in one batch: weighted sums of low-rank adapters, each using some rows of one model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from evomerge.checkpoints.live import LiveModel, finite_rows
from evomerge.checkpoints.low_rank_rows import Rows
from evomerge.inference.image_tokens import Kept
from evomerge.inference.requests import Batch, Response
from evomerge.inference.transformers_engine import TransformersEngine


class AdapterRowsEngine:
    """An engine whose models are mixtures of adapters on the live model of their base.

    Likelihoods are computed for one model after another, so that each is what it would be alone; answers of all models
    are decoded together.

    Args:
        live: the live model, with the weights of the base.
        rows: what is added to it.
        kept: as for ``TransformersEngine``.
    """

    greedy_only = False

    def __init__(self, live: LiveModel, rows: Rows, kept: Kept | None = None) -> None:
        self._live, self._rows = live, rows
        self._engine = TransformersEngine(live, rows.choose, kept)

    @contextlib.contextmanager
    def mixed(self, shares: Sequence[Tensor]) -> Iterator[None]:
        """Within the context, the models of batches, counted from 0, have these shares (``Rows.shares``)."""
        with self._rows.mixed(shares):
            yield

    def choose(self, model: int) -> None:
        """Select the model for direct forward passes of the live model."""
        self._rows.choose(model)

    def finite(self, models: Sequence[int]) -> list[bool]:
        """Whether the logits of each model are free of NaN and Inf; all are probed in one forward pass."""
        self._rows.choose(models)
        together = finite_rows(self._live, len(models))
        self._rows.check_reached()
        if all(together):
            return [True] * len(models)
        finite = []
        for model in models:  # some architectures mix the rows of a batch: probe each model alone
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
        """See ``Engine``; the model number of a batch is ignored."""
        return self._engine.respond([Batch(batch.requests, batch.objective, self._model) for batch in batches])
