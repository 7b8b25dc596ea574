"""A search over the synthetic models: its search file, and a driver with a given worker."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from kit import Setting

from evomerge.merging.building.builders import Builder, Builders
from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.base import Recipe
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.opening.session import create_search, fingerprints_of
from evomerge.search.pools.in_process import InProcessPool
from evomerge.search.preparing.prepare import Prepared, prepare
from evomerge.search.settings.search_file import load_search_file
from evomerge.search.work.jobs import Finished, Job
from evomerge.search.workers.building import build_context
from evomerge.search.workers.worker import Worker
from evomerge.store import Store, acquire
from evomerge.yaml import dump_yaml

CANDIDATES = 14
_POPULATION = 4


def fresh(setting: Setting, name: str) -> Path:
    """An empty folder of this name."""
    folder = setting.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def search_file(setting: Setting, folder: Path) -> Path:
    """A generational search over the models by the likelihood of sums, in this process, on the device to check."""
    content = {
        "name": "gpu-check",
        "sources": models.references(setting),
        "base": "base",
        "space": {"method": "dare_ties"},
        "objectives": {
            "sums": {"evaluator": "likelihood", "metric": "log_likelihood", "file": str(models.items(setting))}
        },
        "optimizer": {"name": "cma", "population": _POPULATION},
        "budget": {"candidates": CANDIDATES},
        "confirm": {"top": 1},
        "device": str(setting.device),
    }
    file = folder / "search.yaml"
    file.write_text(dump_yaml(content))
    return file


@dataclass
class OpenedDrive:
    """A search with everything opened that its driver needs, until it is closed."""

    drive: Drive
    store: Store
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


def open_drive(setting: Setting, folder: Path, doomed: int) -> OpenedDrive:
    """A new search in a folder, with a worker that runs out of memory at the candidate ``doomed``."""
    prepared = prepare(load_search_file(search_file(setting, folder)))
    with ExitStack() as stack:
        store = stack.enter_context(create_search(folder / "search", prepared, fingerprints_of(prepared)))
        stack.enter_context(acquire(store))
        pool = InProcessPool(lambda: HungryWorker(prepared, setting, doomed))
        control = Control(store.take_commands, interval_s=0.0)
        drive = Drive(prepared.setup, store, pool, control, logs=folder / "logs")
        return OpenedDrive(drive, store, stack.pop_all())


class HungryBuilders(Builders):
    """Builders that allocate more memory than there is before they build, while ``is_hungry``."""

    def __init__(self, prepared: Prepared, setting: Setting) -> None:
        space = prepared.setup.space
        super().__init__(build_context(prepared.file, prepared.sources, Evidence(), space.layer_buffers))
        self._setting = setting
        self.is_hungry = False

    def of(self, recipe: Recipe) -> Builder[Recipe]:
        if self.is_hungry:
            take_too_much(self._setting)
        return super().of(recipe)


class HungryWorker:
    """A worker that runs out of memory at one candidate, whenever it is tried."""

    def __init__(self, prepared: Prepared, setting: Setting, doomed: int) -> None:
        self._builders = HungryBuilders(prepared, setting)
        self._worker = Worker("hungry", self._builders, prepared.evaluators)
        self._doomed = doomed

    def run(self, job: Job) -> Finished:
        self._builders.is_hungry = job.candidate == self._doomed
        return self._worker.run(job)

    def run_together(self, jobs: Sequence[Job]) -> list[Finished]:
        return [self.run(job) for job in jobs]


def take_too_much(setting: Setting) -> None:
    """Allocate twice the device's memory; on the CPU, raise the error that this would cause.

    Raises:
        torch.OutOfMemoryError: always.
    """
    if setting.device.type != "cuda":
        raise torch.OutOfMemoryError("twice the device's memory was asked for")
    total = torch.cuda.mem_get_info(setting.device)[1]
    kept = [torch.empty(total // 4, dtype=torch.uint8, device=setting.device) for _ in range(8)]
    raise AssertionError(f"the device gave {len(kept)} quarters of its memory")
