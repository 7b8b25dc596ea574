"""Passes run on a GPU: where the sources lie, and the plain definitions of ``passes`` compiled for the device.

Sources are read for every candidate, so where they lie decides what a merge costs: in the device's memory that is its
bandwidth, in pinned host memory that of the bus, in mapped files that of the bus with a copy by the processor before
it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from evomerge.merging.arithmetic.jobs import in_grain
from evomerge.merging.arithmetic.passes import Compute, Pass, call
from evomerge.merging.site import Ref

log = logging.getLogger(__name__)

Residency = Literal["device", "pinned", "mapped"]

_PIECE = 1 << 24  # elements: intermediate results of a definition that is not compiled take a few hundred MB
_COMPILED_PIECE = 1 << 30  # elements: there are none, and 32 bits count what a kernel is given
_MAX_COMPILED = 128  # variants of all definitions together
# What is used twice is computed twice. torch would write long expressions down in float32 and read them again, which
# takes longer than anything that a definition computes.
_ONE_KERNEL = {"realize_opcount_threshold": 100_000, "realize_reads_threshold": 1_000}
_SPARE = 0.25  # share of the device's memory that is left to scoring: activations, cache, evaluators
_HOST_SHARE = 0.5  # of the free memory of the host, which other workers want as well


@dataclass(frozen=True)
class Place:
    """Where sources lie for a worker, and why."""

    residency: Residency
    reason: str


def choose_place(sources: int, device_free: int, device_total: int, host_free: int) -> Place:
    """Where sources are best kept.

    Args:
        sources: bytes of all of them.
        device_free, device_total: bytes of the device's memory, with the live model there already.
        host_free: bytes of the host's memory that are available.
    """
    room = device_free - int(_SPARE * device_total)
    if sources <= room:
        return Place("device", f"the sources ({_gb(sources)}) fit beside the model ({_gb(room)} to spare)")
    why = f"the sources ({_gb(sources)}) do not fit beside the model ({_gb(max(room, 0))} to spare)"
    if sources <= _HOST_SHARE * host_free:
        return Place("pinned", f"{why}; host memory takes them ({_gb(host_free)} free)")
    return Place("mapped", f"{why}, nor into half of the host's free memory ({_gb(host_free)})")


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


class DeviceRunner:
    """Makes the tensors of a live model on its device.

    Args:
        device: of the live model.
        read: gives a tensor of a source on the CPU.
        refs: every tensor of every source that is kept for this device, for counting bytes.
        residency: where sources are kept; chosen by what fits when None.
        devices: how many devices of this worker share the host's memory.
    """

    def __init__(
        self,
        device: torch.device,
        read: Callable[[Ref], Tensor],
        refs: Iterable[Ref],
        residency: Residency | None = None,
        devices: int = 1,
    ) -> None:
        self._devices = devices
        self._device = device
        self._read = read
        self._kept: dict[Ref, Tensor] = {}
        self.place = Place(residency, "asked for") if residency else self._choose(refs)
        log.info("sources are kept in %s memory: %s", self.place.residency, self.place.reason)

    def _choose(self, refs: Iterable[Ref]) -> Place:
        if self._device.type != "cuda":
            return Place("mapped", f"a {self._device.type} device reads the mapped files")
        free, total = torch.cuda.mem_get_info(self._device)
        size = sum(self._read(ref).nbytes for ref in refs)
        return choose_place(size, free, total, psutil.virtual_memory().available // self._devices)

    def tensor(self, ref: Ref, device: torch.device | None = None) -> Tensor:
        """A tensor of a source on the device, or on another one."""
        device = device or self._device
        if self.place.residency == "mapped":
            return self._read(ref).to(device)
        if ref not in self._kept:
            read = self._read(ref)
            self._kept[ref] = read.to(self._device) if self.place.residency == "device" else read.pin_memory()
        # The device waits for the copy before it computes: both stand in one stream.
        return self._kept[ref].to(device, non_blocking=True)

    def run(self, plan: Pass, refs: Sequence[Ref], out: Tensor) -> None:
        """Make one tensor in place.

        Args:
            refs: what ``plan.inputs`` names.
            out: contiguous, on the device.
        """
        compute_on(self._device, plan, [self.tensor(ref) for ref in refs], out)


@torch.no_grad()
def compute_on(device: torch.device, plan: Pass, tensors: Sequence[Tensor], out: Tensor) -> None:
    """Make one tensor in place, from tensors on the device where it is."""
    row, total, grain = out.shape[-1] if out.shape else 1, out.numel(), plan.grain
    # What has no compiled form on the CPU has none here: it is run as it stands, with all its intermediate results.
    most = _COMPILED_PIECE if is_compiled(device) and plan.kernel() is not None else _PIECE
    flat, whole = [tensor.reshape(-1) for tensor in tensors], out.view(-1)
    step = {"element": most, "row": max(1, most // max(row, 1)) * row, "tensor": total}[grain] or 1
    for begin in range(0, total, step):
        *pieces, target = (in_grain(grain, tensor[begin : begin + step], out.shape) for tensor in (*flat, whole))
        made = plan.run(pieces, begin, computer(device, target))
        if made is not target:
            target.copy_(made.reshape(target.shape))


class DeviceRunners:
    """Makes the tensors of a live model whose layers several devices share out, each on the device where it lies.

    Args:
        homes: every tensor of every source, with the device for which it is kept: that of the layer with its number.
            A path that has the layer elsewhere brings it there.
        read, residency: as of ``DeviceRunner``; where sources are kept is chosen for each device.
    """

    def __init__(
        self, homes: Mapping[Ref, torch.device], read: Callable[[Ref], Tensor], residency: Residency | None = None
    ) -> None:
        kept: dict[torch.device, list[Ref]] = {}
        for ref, device in homes.items():
            kept.setdefault(device, []).append(ref)
        self._homes = homes
        self.of_device = {
            device: DeviceRunner(device, read, refs, residency, len(kept)) for device, refs in kept.items()
        }

    def tensor(self, ref: Ref, device: torch.device) -> Tensor:
        """A tensor of a source on a device, from where it is kept."""
        return self.of_device[self._homes[ref]].tensor(ref, device)

    def run(self, plan: Pass, refs: Sequence[Ref], out: Tensor, device: torch.device) -> None:
        """Make one tensor in place, which is contiguous and on ``device``; ``refs`` are what ``plan.inputs`` names."""
        compute_on(device, plan, [self.tensor(ref, device) for ref in refs], out)


def is_compiled(device: torch.device) -> bool:
    """Whether plain definitions are compiled for a device: on CUDA, where torch brings Triton."""
    return device.type == "cuda" and find_spec("triton") is not None


def computer(device: torch.device, target: Tensor) -> Compute:
    """How plain definitions are run on a device: compiled, or as they stand.

    Compiled, one kernel reads the sources and writes ``target`` in its dtype, which is then the result: what a
    definition gives in float32 is never in memory. Compiling takes some ten seconds for each method and number of
    sources; torch keeps the result on disk.
    """
    if not is_compiled(device):
        return call

    def compute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        compiled(function)(target, *arguments)
        return target

    return compute


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., None]:
    """(where to, the function's arguments) -> nothing: a plain definition whose result is written in place."""

    def write(target: Tensor, *arguments: Any) -> None:
        target.copy_(function(*arguments))

    # A worker meets another number of sources, dtype or setting now and then; beyond so many, and that is 8 unless one
    # says otherwise, torch runs all others as they stand.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MAX_COMPILED)
    return torch.compile(write, dynamic=True, options=dict(_ONE_KERNEL))
