"""A worker: it holds sources, one live model and the evaluators for life, and turns jobs into scores."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.base import Evaluator
from evomerge.checkpoints.live import LiveModel, NotFiniteError, check_live, live_model
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.materialise import Materialiser
from evomerge.recipe import DType
from evomerge.search.jobs import Failed, Finished, Job, Measured
from evomerge.search.prepare import Prepared, build_space, distinct_evaluators, open_sources
from evomerge.search.search_file import SearchFile

log = logging.getLogger(__name__)


def choose_device(wanted: str | None) -> torch.device:
    """The device asked for, else the first GPU, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
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
        materialiser: the opened sources, ready to write a recipe.
        live: the one model that every candidate is written into.
        evaluators: in the order that jobs refer to them.
    """

    def __init__(self, name: str, materialiser: Materialiser, live: LiveModel, evaluators: Sequence[Evaluator]) -> None:
        self._name = name
        self._materialiser = materialiser
        self._live = live
        self._evaluators = evaluators

    @classmethod
    def start(cls, name: str, file: SearchFile, statistics: Path) -> Worker:
        """Open everything that a search file names. ``statistics`` is the file that keeps those of its sources."""
        evaluators = [settings.build() for settings in distinct_evaluators(file)]
        sources = open_sources(file)
        return cls._on(name, file, sources, evaluators, statistics, build_space(file, sources).shelves)

    @classmethod
    def of(cls, name: str, prepared: Prepared, statistics: Path) -> Worker:
        """A worker on what this process has opened already."""
        shelves = prepared.setup.space.shelves
        return cls._on(name, prepared.file, prepared.sources, prepared.evaluators, statistics, shelves)

    @classmethod
    def _on(
        cls,
        name: str,
        file: SearchFile,
        sources: Mapping[str, Source],
        evaluators: Sequence[Evaluator],
        statistics: Path,
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
        return cls(name, Materialiser(sources, statistics=statistics, residency=residency), live, evaluators)

    def run(self, job: Job) -> Finished:
        """Score one candidate. Whatever goes wrong comes back as ``Failed``; only the death of the process does not."""
        try:
            result: Measured | Failed = self._measure(job)
        except NotFiniteError as error:
            result = Failed("not_finite", str(error))
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            result = Failed("out_of_memory", str(error), traceback.format_exc())
        except Exception as error:
            if type(error).__name__ == "AcceleratorError":  # after one, CUDA fails every later call of this process
                return Finished(job.candidate, job.attempt, self._name, Failed("worker_died", str(error)))
            result = Failed("error", f"{type(error).__name__}: {error}", traceback.format_exc())
        return Finished(job.candidate, job.attempt, self._name, result)

    @staticmethod
    def _check(evaluator: Evaluator, found: Mapping[str, NDArray[np.float32]], items: int) -> None:
        """An evaluator is somebody's plug-in: what it gives is checked before it is recorded."""
        for metric in evaluator.metrics:
            if metric not in found or found[metric].shape != (items,):
                shape = found[metric].shape if metric in found else "nothing"
                raise ValueError(f"{evaluator.name} gave {shape} for {metric} of {items} items")

    def _measure(self, job: Job) -> Measured:
        started = time.perf_counter()
        self._materialiser.write(job.recipe, self._live)
        check_live(self._live)
        if self._live.engine is not None:
            self._live.engine.load(self._live)
        timings = {"merge": time.perf_counter() - started}
        scores: list[Mapping[str, NDArray[np.float32]]] = []
        for task in job.tasks:
            evaluator = self._evaluators[task.evaluator]
            found = evaluator.score(self._live, task.split, task.indices)
            self._check(evaluator, found, len(task.indices))
            for metric, values in found.items():
                if not np.isfinite(values).all():
                    raise NotFiniteError(f"{evaluator.name}: {metric} of {int((~np.isfinite(values)).sum())} items")
            scores.append(found)
            for phase, seconds in evaluator.seconds.items():
                timings[phase] = timings.get(phase, 0.0) + seconds
        return Measured(scores, timings)
