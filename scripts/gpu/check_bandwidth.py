"""The bandwidth of a merge compared with that of a plain copy, for every method that is limited by bandwidth.

A merge of n tensors into one moves n + 1 tensors, and a copy two. They run in turns and are compared in pairs, so that
changes of the device's speed affect both; the result is the median of the ratios. Planning is not timed, and tensors
are so large that the launch of a kernel does not matter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from check_methods import MATRIX_METHODS, METHODS, planned
from check_passes import fine_tunes
from kit import CPU, Row, Setting, check
from torch import Tensor

from evomerge.merging.arithmetic.device import DeviceRunner
from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads
from evomerge.merging.arithmetic.passes import Pass
from evomerge.method import find_method

GOALS = {"Combine": 0.8, "Sparsify": 0.5}
"""The required share of a copy's bandwidth on a GPU: passes in the span of the sources, and those with masks."""
_PAIRS = 7
_CALLS = 4  # in a row: a single one would be timed with its launch


def rows() -> list[Row]:
    return [Row(f"bandwidth {name}", partial(_measure, name)) for name in METHODS if name not in MATRIX_METHODS]


def _measure(name: str, setting: Setting) -> str:
    tensors = _tensors(setting)
    # Inputs of only some rows: the bytes that a pass moves do not depend on them.
    plan = planned(find_method(name, "row"), {name: tensor[:64].to(CPU) for name, tensor in tensors.items()})
    out = torch.empty_like(tensors["base"])
    merge, copy = _merge(plan, tensors, out, setting), partial(out.copy_, tensors["one"])
    merge(), copy()  # the first ones compile
    pairs = [(_seconds(copy, setting), _seconds(merge, setting)) for _ in range(_PAIRS)]
    moved, copied = (len(plan.inputs) + 1) * out.nbytes, 2 * out.nbytes
    share = statistics.median((moved / merge_s) / (copied / copy_s) for copy_s, merge_s in pairs)
    speed = _CALLS * moved / statistics.median(merge_s for _, merge_s in pairs) / 1e9
    kind, figure = type(plan).__name__, f"{share:.0%} of a copy's bandwidth, {speed:.1f} GB/s"
    goal = None if setting.small else GOALS.get(kind)
    if goal is not None:
        figure += f", goal {goal:.0%}"
        check(share >= goal, figure)
    return f"{figure} ({kind})"


@cache
def _tensors(setting: Setting) -> dict[str, Tensor]:
    """Tensors as large as the largest in a layer of a model of 70 billion parameters; a megabyte each if small."""
    return fine_tunes((512, 2048) if setting.small else (8192, 28672), torch.bfloat16, setting.device)


def _merge(plan: Pass, tensors: dict[str, Tensor], out: Tensor, setting: Setting) -> Callable[[], None]:
    """One merge as in a search: with the device's runner on a GPU, with compiled passes on the CPU."""
    if setting.device.type == "cuda":
        runner = DeviceRunner(setting.device, lambda ref: tensors[ref[0]], [], "mapped")
        return partial(runner.run, plan, [(name, "") for name in plan.inputs], out)
    threads, inputs = WorkerThreads(), [tensors[name] for name in plan.inputs]
    return lambda: threads.run([TensorJob(plan, inputs, out)])


def _seconds(work: Callable[[], object], setting: Setting) -> float:
    setting.wait()
    started = time.perf_counter()
    for _ in range(_CALLS):
        work()
    setting.wait()
    return time.perf_counter() - started
