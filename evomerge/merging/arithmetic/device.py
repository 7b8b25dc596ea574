"""How passes run on a GPU: where sources are kept, and plain definitions compiled for the device.

Sources are read for every candidate, so where they are kept determines the speed of a merge. It is limited by the
memory bandwidth of the device, or by that of the bus if they are in pinned host memory. If they are mapped files, the
processor must also copy them first.
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
_COMPILED_PIECE = 1 << 30  # elements: a compiled one has no intermediate results, and counts elements in 32 bits
_MAX_COMPILED = 128  # variants of all definitions together
# One kernel for each definition, even if it computes some expressions twice. By default torch would write long ones to
# memory in float32 and read them again, which takes longer than anything that a definition computes.
_ONE_KERNEL = {"realize_opcount_threshold": 100_000, "realize_reads_threshold": 1_000}
_SCORING_SHARE = 0.25  # share of the device's memory that is left to scoring: activations, cache, evaluators
_HOST_SHARE = 0.5  # share of the host's free memory that one worker may pin; other workers need some as well


@dataclass(frozen=True)
class ResidencyChoice:
    """Where a worker keeps the sources, and why, as shown in logs."""

    residency: Residency
    reason: str


def choose_residency(sources: int, device_free: int, device_total: int, host_free: int) -> ResidencyChoice:
    """Where to keep sources: in the fastest memory that has enough space.

    Args:
        sources: bytes of all of them.
        device_free, device_total: bytes of the device's memory, with the live model already in it.
        host_free: available bytes of the host's memory.
    """
    room = device_free - int(_SCORING_SHARE * device_total)
    if sources <= room:
        return ResidencyChoice("device", f"the sources ({_gb(sources)}) fit beside the model ({_gb(room)} to spare)")
    why = f"the sources ({_gb(sources)}) do not fit beside the model ({_gb(max(room, 0))} to spare)"
    if sources <= _HOST_SHARE * host_free:
        return ResidencyChoice("pinned", f"{why}; host memory takes them ({_gb(host_free)} free)")
    return ResidencyChoice("mapped", f"{why}, nor into half of the host's free memory ({_gb(host_free)})")


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


class DeviceRunner:
    """Makes the tensors of a live model on its device.

    Args:
        device: where the live model is.
        read: reads a tensor of a source to the CPU.
        refs: every tensor of every source that is kept for this device, to count their bytes.
        residency: where to keep sources; None chooses the fastest memory in which they fit.
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
        self.choice = ResidencyChoice(residency, "asked for") if residency else self._choose(refs)
        log.info("sources are kept in %s memory: %s", self.choice.residency, self.choice.reason)

    def _choose(self, refs: Iterable[Ref]) -> ResidencyChoice:
        if self._device.type != "cuda":
            return ResidencyChoice("mapped", f"a {self._device.type} device reads the mapped files")
        free, total = torch.cuda.mem_get_info(self._device)
        size = sum(self._read(ref).nbytes for ref in refs)
        return choose_residency(size, free, total, psutil.virtual_memory().available // self._devices)

    def tensor(self, ref: Ref, device: torch.device | None = None) -> Tensor:
        """A tensor of a source on the device, or on another one."""
        device = device or self._device
        if self.choice.residency == "mapped":
            return self._read(ref).to(device)
        if ref not in self._kept:
            read = self._read(ref)
            self._kept[ref] = read.to(self._device) if self.choice.residency == "device" else read.pin_memory()
        # Without blocking: copy and computation are in one stream of the device, so they run in order.
        return self._kept[ref].to(device, non_blocking=True)

    def run(self, plan: Pass, refs: Sequence[Ref], out: Tensor) -> None:
        """Compute one tensor in place.

        Args:
            refs: what ``plan.inputs`` names.
            out: contiguous, on the device.
        """
        compute_on(self._device, plan, [self.tensor(ref) for ref in refs], out)


@torch.no_grad()
def compute_on(device: torch.device, plan: Pass, tensors: Sequence[Tensor], out: Tensor) -> None:
    """Compute one tensor in place.

    Args:
        tensors: what ``plan.inputs`` names, contiguous, on ``device``.
        out: contiguous, on ``device``, of their shape and any float dtype.
    """
    row, total, grain = out.shape[-1] if out.shape else 1, out.numel(), plan.grain
    # A pass without a kernel for the CPU is not compiled here either, and has large intermediate results.
    most = _COMPILED_PIECE if is_compiled(device) and plan.kernel() is not None else _PIECE
    flat, whole = [tensor.reshape(-1) for tensor in tensors], out.view(-1)
    step = {"element": most, "row": max(1, most // max(row, 1)) * row, "tensor": total}[grain] or 1
    for begin in range(0, total, step):
        *pieces, target = (in_grain(grain, tensor[begin : begin + step], out.shape) for tensor in (*flat, whole))
        made = plan.run(pieces, begin, compute_function(device, target))
        if made is not target:
            target.copy_(made.reshape(target.shape))


class DeviceRunners:
    """Makes the tensors of a live model whose layers are divided among several devices, each tensor on its own device.

    Args:
        device_of: for every tensor of every source, the device for which it is kept: that of the layer with the same
            number. If a path has the layer elsewhere, the tensor is copied there.
        read, residency: as for ``DeviceRunner``; a residency of None is chosen for each device.
    """

    def __init__(
        self, device_of: Mapping[Ref, torch.device], read: Callable[[Ref], Tensor], residency: Residency | None = None
    ) -> None:
        kept: dict[torch.device, list[Ref]] = {}
        for ref, device in device_of.items():
            kept.setdefault(device, []).append(ref)
        self._device_of = device_of
        self.by_device = {
            device: DeviceRunner(device, read, refs, residency, len(kept)) for device, refs in kept.items()
        }

    def tensor(self, ref: Ref, device: torch.device) -> Tensor:
        """A tensor of a source on any of the devices, copied there if it is kept for another one."""
        return self.by_device[self._device_of[ref]].tensor(ref, device)

    def run(self, plan: Pass, refs: Sequence[Ref], out: Tensor, device: torch.device) -> None:
        """Compute ``out`` in place, which is contiguous and on ``device``; ``refs`` are what ``plan.inputs`` names."""
        compute_on(device, plan, [self.tensor(ref, device) for ref in refs], out)


def is_compiled(device: torch.device) -> bool:
    """Whether plain definitions are compiled for a device: on CUDA, if Triton is installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def compute_function(device: torch.device, target: Tensor) -> Compute:
    """How plain definitions run on a device: compiled, or as plain torch.

    If compiled, one kernel reads the sources and writes ``target`` in its dtype, and ``target`` is the result; the
    definition's result in float32 is never in memory. Compiling takes about ten seconds for each method and number of
    sources; torch caches it on disk.
    """
    if not is_compiled(device):
        return call

    def compute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        compiled(function)(target, *arguments)
        return target

    return compute


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., None]:
    """(target, the function's arguments) -> None: a compiled plain definition that writes its result to the target."""

    def write(target: Tensor, *arguments: Any) -> None:
        target.copy_(function(*arguments))

    # Another number of sources, dtype or setting is compiled again. Beyond this limit, which is 8 by default, torch
    # would run all further variants without compiling them.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MAX_COMPILED)
    return torch.compile(write, dynamic=True, options=dict(_ONE_KERNEL))
