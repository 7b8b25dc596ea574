"""Checks that a worker with several GPUs fits on them, before anything is spent."""

from __future__ import annotations

import torch

from evomerge.errors import InputError
from evomerge.report.hardware import GPUS, ModelShape, Need, Work, layouts, needs, worker_bytes
from evomerge.report.plan import shape_and_works
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.settings.layouts import PLACE, is_here
from evomerge.search.settings.search_file import SearchFile


def check_fit(prepared: Prepared) -> None:
    """Refuse a worker with several GPUs that is too large for them.

    The GPUs are those of this machine if the workers run here, otherwise the largest known ones.

    Raises:
        InputError: the worker does not fit; the message has the arithmetic.
    """
    file = prepared.file
    if file.cluster.devices > 1:
        memory, owner = _memory(file)
        check_memory(file, *shape_and_works(prepared), memory, owner)


def check_memory(file: SearchFile, shape: ModelShape, works: list[Work], memory: int, owner: str) -> None:
    """Raise InputError if the fullest GPU of a worker needs more than the ``memory`` bytes that ``owner`` has."""
    devices = file.cluster.devices
    fullest = max(needs(shape, works, file.engine, devices), key=lambda need: need.total)
    sources = shape.sources * fullest.weights // shape.weights if file.cluster.residency == "device" else 0
    if (needed := fullest.total + sources) <= memory:
        return
    missing = f"{owner} has {_gb(memory)}: {_gb(needed - memory)} too little"
    problem = f"is {devices}, and the fullest GPU of a worker needs {_sum_of(fullest, sources)}; {missing}"
    fitting = [str(n) for n in layouts(shape, file.engine) if worker_bytes(shape, works, file.engine, n) <= memory]
    hint = (
        f"It fits on {' or '.join(fitting)} GPUs a worker." if fitting else "It fits on no usual number of such GPUs."
    )
    if sources and fullest.total <= memory:
        hint = "Leave the sources in the host's memory: `residency: auto`."
    raise InputError(PLACE, problem, hint)


def _memory(file: SearchFile) -> tuple[int, str]:
    """The memory of each GPU of a worker in bytes, and what has it."""
    if is_here(file):
        here = [torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())]
        return min(here), "the smallest GPU of this machine"
    largest = max(GPUS, key=lambda gpu: gpu.memory)
    return largest.memory, f"the largest that is known, {largest.name},"


def _sum_of(need: Need, sources: int) -> str:
    """20.1 GB (weights 15.0 GB + keys, values and logits 4.0 GB + CUDA 1.1 GB)."""
    parts = {
        "weights": need.weights, "keys, values and logits": need.scratch, "vLLM's weights and cache": need.served,
        "sources": sources, "CUDA": need.context,
    }  # fmt: skip
    summands = " + ".join(f"{name} {_gb(count)}" for name, count in parts.items() if count)
    return f"{_gb(need.total + sources)} ({summands})"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
