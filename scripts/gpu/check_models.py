"""Whole models on the device: residency of sources, exports, a search, lack of memory, two workers at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import models
import searching
import torch
from kit import Row, Setting, check, same_bits
from torch import Tensor

from evomerge.checkpoints.live import LiveModel, live_model
from evomerge.checkpoints.stack import Stack
from evomerge.merging.arithmetic.device import DeviceRunner, Residency
from evomerge.merging.materialise import Materialiser
from evomerge.method import default_parameters, find_method
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.search.driving.driver import Driver
from evomerge.store import Store
from evomerge.store.events import Failure

_RESIDENCIES: tuple[Residency, ...] = ("device", "pinned", "mapped")
_EXPORTED = ("linear", "ties", "dare_ties", "della", "sce")
"""One method for each kind of pass."""


def rows() -> list[Row]:
    return [
        *(Row(f"residency {residency}", partial(_residency, residency)) for residency in _RESIDENCIES),
        Row("live equals export", _live_equals_export),
        Row("search of a synthetic model", _search),
        Row("out of memory", _out_of_memory),
        Row("two workers on one device", _two_workers),
    ]


# ---- tensors ---------------------------------------------------------------------------------------------------------


class OnDevice(Materialiser):
    """Computes tensors as on a GPU, whatever the device of the live model."""

    def _stack(self, live: LiveModel) -> Stack:
        stack = super()._stack(live)
        if self._runner is None:
            self._runner = self._on(live.device)
        return stack

    @cached_property
    def _exporter(self) -> DeviceRunner:
        return DeviceRunner(self._device, self.read, [], "mapped")


def recipe(method: str, setting: Setting) -> StackRecipe:
    """A merge with the method's defaults."""
    spec = find_method(method, "row")
    names = models.NAMES[1:][: spec.max_sources]
    blend = Blend(
        method=method,
        sources=names,
        base="base" if spec.needs_base else None,
        parameters=default_parameters(spec, names),
    )
    layers = models.config(setting).num_hidden_layers
    return StackRecipe.uniform(blend, sources=models.references(setting), tokenizer="base", layers=layers, seed=5)


def _residency(residency: Residency, setting: Setting) -> str:
    """The same bits as with another residency, and the time of a merge."""
    sources = models.sources(setting)
    other: Residency = "device" if residency == "mapped" else "mapped"
    live, written, seconds = live_model(sources["base"], setting.device), {}, 0.0
    for where in (other, residency):
        materialiser = OnDevice(sources, residency=where)
        if where == "pinned" and setting.small:
            _pin_by_copying()
        for method in ("linear", "dare_ties", "dare_linear"):  # the last is timed: all is compiled by then
            setting.wait()
            started = time.perf_counter()
            materialiser.write(recipe(method, setting), live)
            setting.wait()
            seconds = time.perf_counter() - started
        written[where] = {name: tensor.clone() for name, tensor in live.tensors.items()}
    for name, tensor in written[residency].items():
        same_bits(tensor, written[other][name], f"{name} from {other} memory")
    moved = sum(tensor.nbytes for tensor in live.tensors.values()) * 4
    return f"as from {other} memory bit for bit; a merge in {seconds:.3f} s, {moved / seconds / 1e9:.1f} GB/s"


def _pin_by_copying() -> None:
    """Replace pinning by copying, in this process: without a GPU memory cannot be pinned."""
    torch.Tensor.pin_memory = torch.Tensor.clone  # type: ignore[method-assign,assignment]


def _live_equals_export(setting: Setting) -> str:
    sources = models.sources(setting)
    for kind in (Materialiser, OnDevice) if setting.small else (Materialiser,):
        live, materialiser = live_model(sources["base"], setting.device), kind(sources, device=setting.device)
        for method in _EXPORTED:
            made = recipe(method, setting)
            materialiser.write(made, live)
            _compare(live.tensors, materialiser.tensors(made), method)
    return f"{len(_EXPORTED)} methods bit for bit"


def _compare(live: dict[str, Tensor], exported: Iterable[tuple[str, Tensor]], method: str) -> None:
    count = 0
    for name, tensor in exported:
        same_bits(live[name], tensor, f"{method}: {name}")
        count += 1
    check(count == len(live), f"{method}: {count} tensors are exported of {len(live)}")


# ---- searches --------------------------------------------------------------------------------------------------------


def _search(setting: Setting) -> str:
    """Run the commands of a user: a generational search, and an export that must score as recorded."""
    from evomerge.commands.models import export
    from evomerge.commands.run import search

    started = time.perf_counter()
    folder = searching.fresh(setting, "search")
    file = searching.search_file(setting, folder)
    code = search(file, folder / "search", [])
    check(code == 0, f"the search ended with exit code {code}")
    with Store.open(folder / "search" / "search.db") as store:
        counts = store.counts()
        done = [row for row in store.candidates() if row.status == "done"]
        merges = [row.timings["merge"] for row in done if row.timings]
    check(counts["failed"] == 0, f"{counts['failed']} candidates failed")
    check(len(done) >= searching.CANDIDATES - 2, f"only {len(done)} candidates were scored")
    export(folder / "search", folder / "out", f"c{done[-1].number:04d}", verify=True)
    seconds = time.perf_counter() - started
    return f"{len(done)} candidates, {sorted(merges)[len(merges) // 2]:.3f} s a merge, {seconds:.0f} s with the export"


def _out_of_memory(setting: Setting) -> str:
    folder, doomed = searching.fresh(setting, "memory"), 6
    tiny = replace(setting, small=True)  # memory that does not exist is allocated in addition to the model
    with closing(searching.open_drive(tiny, folder, doomed)) as opened:
        Driver(opened.drive).run()
        store = opened.store
        status = {row.number: row.status for row in store.candidates()}
        failures = [event for event in store.events(kinds=("failure",)) if event.candidate == doomed]
        reasons = {event.read(Failure).reason for event in failures}
    check(status[doomed] == "failed", f"the candidate that had no memory is {status[doomed]}")
    check(reasons == {"out_of_memory"}, f"it is recorded as {', '.join(sorted(reasons))}")
    others = {state for number, state in status.items() if number != doomed}
    check(others <= {"done", "cached"}, f"others are {', '.join(sorted(others))}")
    return f"recorded after {len(failures)} attempts; the {len(status) - 1} other candidates are scored"


def _two_workers(setting: Setting) -> str:
    """Two processes, each with a share of the device's memory, score the same candidates at the same time."""
    folder = searching.fresh(setting, "sharing")
    file = searching.search_file(setting, folder)
    script = Path(__file__).with_name("one_worker.py")
    command = [sys.executable, str(script), str(file), "0.45", "--small" if setting.small else "--cuda"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [worker.communicate()[0] for worker in workers]
    for worker in workers:
        check(worker.returncode == 0, f"a worker ended with exit code {worker.returncode}")
    first, second = (json.loads(text.splitlines()[-1]) for text in printed)
    check(first["scores"] == second["scores"], "they score the same candidates otherwise")
    return f"{len(first['scores'])} candidates scored alike, {first['peak_gb']:.1f} and {second['peak_gb']:.1f} GB"
