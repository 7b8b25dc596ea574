"""Every registered merge method, and methods on whole matrices: planned once, computed on the CPU and on the device.

A new method gets a row here when it is registered in ``evomerge.plugins``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from check_passes import NAMES, by_cpu, by_device, fine_tunes
from kit import CPU, Row, Setting, check, close_share
from torch import Tensor

from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.merging.arithmetic.passes import Pass
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.measured.inputs import LayerInput
from evomerge.merging.site import Ref, Site
from evomerge.method import Method, default_parameters, find_method
from evomerge.plugins import OWN
from evomerge.recipes.stack import Blend, Role

METHODS = tuple(OWN["evomerge.merge_methods"])
MATRIX_METHODS = ("tsv", "gram", "wudi", "actmat", "swudi", "ace", "regmean", "regmean_plus_plus")
"""Methods on whole matrices. Planning them takes minutes for the largest shape, so they have separate rows."""


def rows() -> list[Row]:
    return [
        *(Row(f"method {name}", partial(_compare, name)) for name in METHODS),
        *(Row(f"matrix {name}", partial(_compare_matrix, find_method(name, "row"))) for name in MATRIX_METHODS),
    ]


class SampledInputs:
    """Random inputs of layers, different for each source."""

    def __init__(self, width: int) -> None:
        self._width = width

    def of(self, ref: Ref) -> LayerInput:
        random = torch.Generator(CPU).manual_seed(len(ref[0]))
        tokens = torch.empty(4 * self._width, self._width).normal_(0, 1, generator=random)
        tokens[:, 1:] += 0.5 * tokens[:, :-1]  # correlated channels, as in a model
        return LayerInput(tokens.T @ tokens / len(tokens), tokens.abs().mean(dim=0), 1)


class SomeCoefficients:
    """Made-up coefficients of a fit, different for each source."""

    def of(self, base: str, sources: Sequence[str], tensor: str) -> list[float]:
        return [0.75 + 0.25 * number for number in range(len(sources))]


def planned(method: Method, tensors: Mapping[str, Tensor]) -> Pass:
    """The plan of a method with its defaults, for a base and sources by name, which are on the CPU."""
    sources = NAMES[1:][: method.max_sources]
    blend = Blend(
        method=method.name,
        sources=sources,
        base="base" if method.needs_base else None,
        parameters=default_parameters(method, sources),
    )
    shape = tuple(tensors["base"].shape)
    site = Site("model.layers.0.mlp.up_proj.weight", Role("mlp", 0), shape, {name: (name, "") for name in tensors})
    weights = Weights(lambda ref: tensors[ref[0]], WorkerThreads(), lambda source: [""])
    inputs = SampledInputs(shape[-1])
    return method.plan(Facts(site, weights, Evidence(), 3, inputs, inputs, SomeCoefficients()), blend)


def _compare(name: str, setting: Setting) -> str:
    method, shares = find_method(name, "row"), []
    shapes: list[tuple[int, ...]] = [(192,), (33, 65), (96, 256)]
    if not setting.small and name not in MATRIX_METHODS:
        shapes.append((4096, 4096))
    for shape in shapes:
        tensors = fine_tunes(shape, torch.bfloat16, CPU)
        plan = planned(method, tensors)
        expected, made = by_cpu(plan, tensors), by_device(plan, tensors, setting)
        shares.append(close_share(made, expected, scale=0.2, what=f"a tensor of {shape}"))
    return f"{type(plan).__name__}, {min(shares):.2%} of elements the same"


def _compare_matrix(method: Method, setting: Setting) -> str:
    width = 256 if setting.small else 4096
    tensors = fine_tunes((width, width), torch.float32, CPU)
    plan, planning = _timed(lambda: planned(method, tensors))
    check(plan.grain != "element", f"its pass has the grain {plan.grain}")
    expected, on_cpu = _timed(lambda: by_cpu(plan, tensors))
    placed = {name: tensor.to(setting.device) for name, tensor in tensors.items()}

    def make() -> Tensor:
        made = by_device(plan, placed, setting)
        setting.wait()
        return made

    make()  # the first call initialises libraries
    made, on_device = _timed(make)
    change = (expected - tensors["base"]).norm().item()
    off = (made.to(CPU) - expected).norm().item() / change
    check(off < 1e-3, f"is off by {off:.2g} of the change to the base")
    seconds = f"planned in {planning:.2f} s, made in {on_device:.3f} s, by the CPU in {on_cpu:.3f} s"
    return f"{width} wide: off by {off:.1g} of the change; {seconds}"


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    made = work()
    return made, time.perf_counter() - started
