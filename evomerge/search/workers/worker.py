"""A worker: it holds sources, one live model and the evaluators for life, and turns jobs into scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch

from evaluators.base import Evaluator
from evomerge.checkpoints.live import LiveModel, check_live, configured, live_model
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.evidence import Evidence
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import configured_by
from evomerge.recipe import DType, Recipe
from evomerge.search.preparing.prepare import Prepared, build_space, distinct_evaluators, open_sources
from evomerge.search.settings.search_file import SearchFile
from evomerge.search.work.jobs import Failed, Finished, Job, Measured
from evomerge.search.workers.measuring import failure, measured, score_task
from evomerge.search.workers.together import Together

log = logging.getLogger(__name__)


def choose_device(wanted: str | None) -> torch.device:
    """The device asked for, else the first GPU, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # of a device without memory there is nothing to read
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise InputError("device", f"{wanted!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def torch_dtype(name: DType | None) -> torch.dtype | None:
    """The dtype of this name; None, which stands for that of the source, stays None."""
    return None if name is None else getattr(torch, name)


class Worker:
    """Materialises candidates in place and scores them.

    Args:
        name: shown beside every candidate it scored.
        sources: by the names that recipes use.
        materialiser: of these sources, ready to write a recipe.
        live: the one model that every candidate is written into.
        evaluators: in the order that jobs refer to them.
    """

    def __init__(
        self,
        name: str,
        sources: Mapping[str, Source],
        materialiser: Materialiser,
        live: LiveModel,
        evaluators: Sequence[Evaluator],
    ) -> None:
        self._name = name
        self._sources = sources
        self._materialiser = materialiser
        self._live = live
        self._evaluators = evaluators
        self._together: Together | None = None

    @classmethod
    def start(cls, name: str, file: SearchFile, evidence: Evidence) -> Worker:
        """Open everything that a search file names. ``evidence`` is what is known of its sources."""
        evaluators = [settings.build() for settings in distinct_evaluators(file)]
        sources = open_sources(file)
        return cls._on(name, file, sources, evaluators, evidence, build_space(file, sources).shelves)

    @classmethod
    def of(cls, name: str, prepared: Prepared, evidence: Evidence) -> Worker:
        """A worker on what this process has opened already."""
        shelves = prepared.setup.space.shelves
        return cls._on(name, prepared.file, prepared.sources, prepared.evaluators, evidence, shelves)

    @classmethod
    def _on(
        cls,
        name: str,
        file: SearchFile,
        sources: Mapping[str, Source],
        evaluators: Sequence[Evaluator],
        evidence: Evidence,
        shelves: int,
    ) -> Worker:
        # The same number in every pool and at export: another number adds in another order, and rounds otherwise.
        torch.set_num_threads(file.cluster.cpus_per_worker)
        model, dtype = sources[file.tokenizer_source], torch_dtype(file.dtype)
        live = live_model(model, choose_device(file.device), dtype, shelves)
        if file.engine == "vllm":
            from evaluators.vllm_engine import VllmEngine

            live.engine = VllmEngine(model, live)
        residency = None if file.cluster.residency == "auto" else file.cluster.residency
        materialiser = Materialiser(sources, evidence=evidence, residency=residency)
        return cls(name, sources, materialiser, live, evaluators)

    def run(self, job: Job) -> Finished:
        """Score one candidate. Whatever goes wrong comes back as ``Failed``; only the death of the process does not."""
        try:
            result: Measured | Failed = self._measure(job)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as a task's SystemExit, and the panic of a tokenizer
            result = failure(error)
        return self._finished(job, result)

    def run_together(self, jobs: Sequence[Job]) -> list[Finished]:
        """Score several candidates at once, each a weighted sum of low-rank adapters; their ends, in order.

        What goes wrong comes back as ``Failed``, of the candidates that it concerns, as do recipes that are something
        else. Scores are those of ``run`` but for rounding: nothing is added up in the weights' own dtype here.
        """
        try:
            if self._together is None:  # its adapters take memory, which a worker that never comes here keeps
                self._together = Together(self._sources, self._materialiser, self._live, self._evaluators)
            results = self._together.run(jobs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            results = [failure(error)] * len(jobs)
        return [self._finished(job, result) for job, result in zip(jobs, results, strict=True)]

    def _finished(self, job: Job, result: Measured | Failed) -> Finished:
        return Finished(job.candidate, job.attempt, self._name, result)

    def _measure(self, job: Job) -> Measured:
        started = time.perf_counter()
        self._materialiser.write(job.recipe, self._live)
        live = self._configured(job.recipe)
        check_live(live)
        if live.engine is not None:
            live.engine.load(live)
        timings = {"merge": time.perf_counter() - started}
        return measured([score_task(self._evaluators[task.evaluator], live, task) for task in job.tasks], timings)

    def _configured(self, recipe: Recipe) -> LiveModel:
        """The live model, which a recipe was written into; a copy of a source with settings of its own runs by them."""
        name = configured_by(recipe, self._sources)
        return self._live if name == recipe.tokenizer else configured(self._live, self._sources[name])
