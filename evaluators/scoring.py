"""Scores one evaluator's items on one model, from requests to scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from evaluators.base import Direct, Evaluator, Graded, Outcome, Split

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel
    from evomerge.inference.reading import Reader
    from evomerge.inference.requests import Engine, Request, Response


class Scoring:
    """Items of an evaluator that are being scored.

    Attributes:
        evaluator: the evaluator.
        requests: the requests for an engine, in order; empty for no items, and if the model itself is needed.
        needs_model: whether ``finish`` will use the model.

    Raises:
        IndexError: there is no such item.
        InputError: an item cannot be scored with such a model.
    """

    def __init__(self, evaluator: Evaluator, reader: Reader, split: Split, indices: Sequence[int]) -> None:
        count = len(evaluator.items(split))
        if outside := [index for index in indices if not 0 <= index < count]:
            raise IndexError(f"{evaluator.name} has {count} items in its {split} split; there is no item {outside[0]}")
        self.evaluator, self._split, self._indices = evaluator, split, indices
        self._distinct = list(dict.fromkeys(indices))
        self._all = list(evaluator.requests(reader, split, self._distinct)) if self._distinct else []
        self.requests: list[Request] = [request for request in self._all if not isinstance(request, Direct)]
        self.needs_model = len(self.requests) < len(self._all)

    def finish(self, responses: Sequence[Response], live: LiveModel, engine: Engine) -> Graded:
        """The scores, float32 [len(indices)] for each metric, from the responses to ``requests``.

        Seconds are those of this call by phase, without the engine's own.
        """
        if not self._distinct:
            return Graded({metric: np.empty(0, dtype=np.float32) for metric in self.evaluator.metrics})
        started, given = time.perf_counter(), iter(responses)
        outcomes = [Outcome(r.run(live, engine)) if isinstance(r, Direct) else next(given) for r in self._all]
        answered = time.perf_counter()
        graded = self.evaluator.grade(self._split, self._distinct, outcomes)
        seconds = {"score": time.perf_counter() - answered}
        if self.needs_model:
            seconds["generate"] = answered - started
        if len(self._distinct) < len(self._indices):
            places = {index: place for place, index in enumerate(self._distinct)}
            order = [places[index] for index in self._indices]
            graded = replace(graded, scores={metric: values[order] for metric, values in graded.scores.items()})
        return replace(graded, seconds=graded.seconds or seconds)


def score(
    evaluator: Evaluator, live: LiveModel, split: Split, indices: Sequence[int], engine: Engine | None = None
) -> Graded:
    """Score items of one evaluator on a live model.

    Args:
        engine: answers with the model; the model's own engine if None.

    Raises:
        IndexError: there is no such item.
        InputError: an item cannot be scored with such a model.
    """
    from evomerge.inference.reading import Reader
    from evomerge.inference.requests import respond_to
    from evomerge.inference.transformers_engine import engine_of

    engine = engine or engine_of(live)
    scoring = Scoring(evaluator, Reader.of(live), split, indices)
    started = time.perf_counter()
    responses = respond_to(engine, scoring.requests) if scoring.requests else []
    generate = time.perf_counter() - started
    graded = scoring.finish(responses, live, engine)
    if not scoring.requests:
        return graded
    return replace(graded, seconds={**graded.seconds, "generate": graded.seconds.get("generate", 0.0) + generate})
