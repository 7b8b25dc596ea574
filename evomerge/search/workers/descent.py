"""Descents: steps down the gradient of a proxy, starting at a genome."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Evaluator
from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter, SearchSpace
from evomerge.inference.proxy import differentiate_proxy
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Batch, Likelihood, refuse_media
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.fitting.adam import Adam
from evomerge.merging.fitting.gradient import GenomeGradients
from evomerge.optimizers.base import random_state
from evomerge.search.work.jobs import Descend, Descended

Vector = NDArray[np.float64]


class Descents:
    """Follows the gradients of proxies in one search space.

    Args:
        builder: of the models; it keeps one live model.
        space: of the genomes.
        evaluators: in the order that jobs refer to them.
    """

    def __init__(self, builder: StackBuilder, space: SearchSpace, evaluators: Sequence[Evaluator]) -> None:
        self._builder, self._space, self._evaluators = builder, space, evaluators

    def run(self, job: Descend) -> Descended:
        """Take the steps of a job.

        Raises:
            InputError: no gradient, or an evaluator that asks for anything but one likelihood per item.
            NotFiniteError: the proxy or its gradient is NaN or Inf.
        """
        parameters = self._space.parameters
        gradients, adam = GenomeGradients(self._builder.materialiser, self._space), Adam(parameters, job.rate)
        genome, points = np.asarray(job.start, np.float64), list[Genome]()
        losses, slopes, seconds = list[float](), list[Vector](), {"merge": 0.0, "gradient": 0.0}
        for step in range(max([1, *job.keep])):
            started = time.perf_counter()
            point = gradients.at(genome)
            live = self._builder.write(point.recipe)
            merged = time.perf_counter()
            asked, weights = self._drawn(job, step, live)
            prompts = [request.prompt for request in asked]
            losses.append(differentiate_proxy(live, prompts, weights, partial(point.listening, live)))
            _check(losses[-1], point.gradient, parameters)
            slopes.append(point.gradient)
            seconds["merge"] += merged - started
            seconds["gradient"] += time.perf_counter() - merged
            if job.keep:
                genome = adam.step(genome, point.gradient)
            if step + 1 in job.keep:
                points.append(genome)
        return Descended(points, np.array(losses), slopes[0], seconds)

    def _drawn(self, job: Descend, step: int, live: LiveModel) -> tuple[list[Likelihood], list[float]]:
        """The requests of a step's proxy, and their weights."""
        count = min(job.items, len(job.indices))
        drawn = sorted(random_state(job.seed, step).permutation(len(job.indices))[:count].tolist())
        evaluator = self._evaluators[job.evaluator]
        requests = evaluator.requests(Reader.of(live), "search", [job.indices[place] for place in drawn])
        asked = [request for request in requests if isinstance(request, Likelihood)]
        if len(requests) != count or len(asked) != count:
            problem = "asks for more than the likelihood of each item's answer, and only that has a gradient"
            raise InputError(evaluator.name, problem, "Take an evaluator of the kind likelihood.")
        refuse_media([Batch(asked)], "gradients are taken of")
        return asked, [job.weights[place] if job.weights else 1.0 for place in drawn]


def _check(proxy: float, gradient: Vector, parameters: Sequence[Parameter]) -> None:
    """Refuse a value or gradient that is not finite. Raises NotFiniteError."""
    if not np.isfinite(proxy):
        raise NotFiniteError("the proxy")
    for parameter, slope in zip(parameters, gradient.tolist(), strict=True):
        if parameter.differentiable and not np.isfinite(slope):
            raise NotFiniteError(f"the proxy's derivative by {parameter.name}")
