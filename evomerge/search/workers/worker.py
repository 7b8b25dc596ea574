"""A worker: it keeps sources, one live model and the evaluators for its lifetime, and turns jobs into scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from evaluators.base import Evaluator
from evaluators.lengths import counted
from evomerge.calibration import Calibration
from evomerge.checkpoints.fingerprints import content_digest, fingerprint
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.genome import SearchSpace
from evomerge.inference.transformers_engine import engine_of
from evomerge.merging.building.builders import Builders
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.measured.evidence import Evidence
from evomerge.objects import is_url
from evomerge.recipes.base import STACK
from evomerge.search.preparing.evaluators import distinct
from evomerge.search.preparing.prepare import Prepared, build_space, open_sources, space_of
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.work.jobs import (
    Calibrate,
    Descend,
    Descended,
    Finished,
    FitNumbers,
    Job,
    Measured,
    Result,
    TextLosses,
)
from evomerge.search.workers.building import build_context
from evomerge.search.workers.descent import Descents
from evomerge.search.workers.measuring import Attempt, failure, score
from evomerge.search.workers.text_losses import text_losses
from evomerge.search.workers.together import Together
from search_spaces.base import Measures


class Worker:
    """Materialises candidates in place and scores them.

    Args:
        name: shown with every candidate that it scored.
        builders: make its models.
        evaluators: in the order that jobs refer to them.
        build_space: (measurements of the sources) -> the search's space; None for a worker without descents.
        texts: the calibration texts, if any.
    """

    def __init__(
        self,
        name: str,
        builders: Builders,
        evaluators: Sequence[Evaluator],
        build_space: Callable[[Measures], SearchSpace] | None = None,
        texts: Calibration | None = None,
    ) -> None:
        self._name = name
        self._build_space = build_space
        self._texts = texts
        self._builders = builders
        self._evaluators = evaluators
        self._together: Together | None = None

    @classmethod
    def start(cls, name: str, file: SearchFile, evidence: Evidence) -> Worker:
        """Open everything that a search file names. ``evidence`` is the evidence about its sources."""
        evaluators = [counted(settings, settings.build()) for settings in distinct(file.evaluators())]
        sources = open_sources(file)
        for source in sources.values():
            if is_url(source.reference):  # copied by this node, perhaps after it was rewritten there
                _check_content(source, evidence.content_of(source.name))
        return cls._on(name, file, sources, evaluators, evidence, space_of(file, sources))

    @classmethod
    def of(cls, name: str, prepared: Prepared, evidence: Evidence) -> Worker:
        """A worker that uses what this process has already opened."""
        space = prepared.setup.space
        return cls._on(name, prepared.file, prepared.sources, prepared.evaluators, evidence, space)

    @classmethod
    def _on(
        cls,
        name: str,
        file: SearchFile,
        sources: Mapping[str, Source],
        evaluators: Sequence[Evaluator],
        evidence: Evidence,
        space: SearchSpace,
    ) -> Worker:
        builders = Builders(build_context(file, sources, evidence, space.layer_buffers, hops=space.hops))
        builders.start({baseline.recipe.kind for baseline in space.baselines()})
        texts = None if file.calibration is None else file.calibration.texts
        return cls(name, builders, evaluators, partial(build_space, file, sources), texts)

    def run(self, job: Job) -> Finished:
        """Score one candidate. Every error is returned as ``Failed``, except the death of the process."""
        try:
            result: Result = self._result(job)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as a task's SystemExit, and the panic of a tokenizer
            result = failure(error)
        return self._finished(job, result)

    def run_together(self, jobs: Sequence[Job]) -> list[Finished]:
        """Score several candidates at once, each a weighted sum of low-rank adapters; their results, in order.

        Errors are returned as ``Failed`` for the candidates that they concern, and so are recipes of other kinds.
        Scores equal those of ``run`` up to rounding: nothing is added up in the weights' own dtype here.
        """
        if any(job.instead is not None for job in jobs):
            return [self.run(job) for job in jobs]
        try:
            if self._together is None:  # its adapters take memory, so they are loaded only when needed
                stack = self._stack()
                self._together = Together(
                    stack.sources, stack.materialiser, stack.live, self._evaluators, stack.base, self._builders.evidence
                )
            results = self._together.run(jobs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            results = [failure(error)] * len(jobs)
        return [self._finished(job, result) for job, result in zip(jobs, results, strict=True)]

    def _finished(self, job: Job, result: Result) -> Finished:
        return Finished(job.candidate, job.attempt, self._name, result)

    def _result(self, job: Job) -> Measured | Descended:
        if isinstance(job.instead, Calibrate):
            return self._calibrate(job, job.instead.source)
        if isinstance(job.instead, FitNumbers):
            return self._fit(job)
        if isinstance(job.instead, TextLosses):
            return self._text_losses(job)
        if isinstance(job.instead, Descend):
            return self._descend(job.instead)
        return self._measure(job)

    def _calibrate(self, job: Job, source: str) -> Measured:
        started = time.perf_counter()
        self._builders.of(job.recipe).calibrate(job.recipe, source)
        return Measured([], {"calibrate": time.perf_counter() - started})

    def _fit(self, job: Job) -> Measured:
        started = time.perf_counter()
        self._builders.of(job.recipe).fit(job.recipe)
        return Measured([], {"fit": time.perf_counter() - started})

    def _text_losses(self, job: Job) -> Measured:
        if self._texts is None:
            raise ValueError("this worker has no texts")
        started = time.perf_counter()
        live = self._builders.of(job.recipe).write(job.recipe)
        losses = text_losses(live, engine_of(live), self._texts)
        return Measured([{"loss": losses}], {"texts": time.perf_counter() - started})

    def _descend(self, descend: Descend) -> Descended:
        stack = self._stack()
        if stack.live.engine is not None:
            raise InputError("engine", "has no gradients", "Take `engine: transformers`.")
        if self._build_space is None:
            raise ValueError("this worker has no search space")
        return Descents(stack, self._build_space(descend.measures), self._evaluators).run(descend)

    def _stack(self) -> StackBuilder:
        stack = self._builders.of_kind(STACK)
        assert isinstance(stack, StackBuilder)  # which no plug-in replaces
        return stack

    def _measure(self, job: Job) -> Measured:
        started = time.perf_counter()
        live = self._builders.of(job.recipe).write(job.recipe)
        merged, engine = time.perf_counter() - started, engine_of(live, self._builders.evidence)
        attempt = Attempt(self._evaluators, live, engine, job.tasks)
        attempt.took("merge", merged)
        score(engine, attempt, live.device)
        return attempt.measured()


def _check_content(source: Source, digest: str) -> None:
    """Refuse a source whose content has changed since the search began (InputError)."""
    if content_digest(fingerprint(source)) != digest:
        problem = f"{source.reference} has changed since the search began"
        raise InputError(source.place, problem, "Put the old files back there, or start a new search.")
