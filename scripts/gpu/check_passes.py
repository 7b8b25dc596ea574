"""Every kind of pass, on the device and on the CPU, from one element to 2^31.

With numbers that are never rounded, results must have the same bits; errors could then only come from masks, from
reading the wrong source or from the beginnings of pieces. With other numbers, results may differ by rounding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import cache, partial

import torch
from kit import CPU, Row, Setting, WrongError, check, close_share, same_bits
from torch import Tensor

from evomerge.merging.arithmetic import changes, passes
from evomerge.merging.arithmetic.changes import ChangeFunction, Rescale
from evomerge.merging.arithmetic.device import DeviceRunner
from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads
from evomerge.merging.arithmetic.passes import (
    Agreed,
    Combine,
    Differentiable,
    Disjoint,
    Largest,
    MaskedMean,
    Pass,
    RowFunction,
    Select,
    SparsePart,
    Sparsify,
    TensorFunction,
)

NAMES = ("base", "one", "two")
LARGEST = 1 << 31
_KEYS = ((0x9E3779B9, 0x7F4A7C15), (0xBF58476D, 0x1CE4E5B9))
_ROW = 4096


def rows() -> list[Row]:
    """One row for each example, and a failing one for each kind of pass without an example."""
    labelled = examples(exact=True)
    without = sorted(set(kinds()) - {type(plan).__name__ for plan in labelled.values()})
    return [
        *(Row(f"pass {label}", partial(_compare, label)) for label in labelled),
        *(Row(f"pass Rescale by {along}", partial(_compare_channels, along)) for along in ("column", "row")),
        *(Row(f"pass {kind}", partial(_has_no_example, kind)) for kind in without),
    ]


def kinds() -> list[str]:
    """The names of all kinds of pass."""
    members = ("inputs", "grain", "run", "kernel")
    classes = {
        **dict(inspect.getmembers(changes, inspect.isclass)),
        **dict(inspect.getmembers(passes, inspect.isclass)),
    }
    return [
        name
        for name, kind in classes.items()
        if kind not in (Pass, Differentiable) and all(member in _names(kind) for member in members)
    ]


def _names(kind: type) -> set[str]:
    return {*dir(kind), *getattr(kind, "__dataclass_fields__", ())}


def examples(*, exact: bool) -> dict[str, Pass]:
    """Passes of every kind, by a label that begins with the kind.

    Args:
        exact: with numbers for which no step rounds on the data of ``weights(exact=True)``.
    """
    w, v = (0.5, 0.25) if exact else (0.37, 0.81)
    s, t = (1.0, 1.0) if exact else (0.6, 0.4)
    unit = 1.0 if exact else 0.001
    sizes = SparsePart("one", w, low=2 * unit, high=7 * unit, share=s), SparsePart("two", v, low=3 * unit, share=t)
    one, two = _KEYS
    drawn = SparsePart("one", w, key=one, levels=20_000, share=s), SparsePart("two", v, key=two, levels=50_000, share=t)
    met = (
        SparsePart("one", w, key=one, levels=20_000, rise=20_000, share=s),
        SparsePart("two", v, key=two, levels=9_000, rise=40_000, share=t),
    )
    scale = 0.5 if exact else 0.7
    return {
        "Combine": Combine({"base": w, "one": v, "two": v}),
        "Sparsify by size": Sparsify("base", sizes),
        "Sparsify by size, elected": Sparsify("base", sizes, elect=True),
        "Sparsify by size, divided": Sparsify("base", sizes, elect=True, divide=True, scale=scale),
        "Sparsify at random": Sparsify("base", drawn),
        "Sparsify at random, divided": Sparsify("base", drawn, elect=True, divide=True, scale=scale),
        "Sparsify at random by rank": Sparsify("base", met, elect=True),
        "Select": Select("base", {"one": s, "two": t}, least=4 * unit * unit),
        "MaskedMean": MaskedMean("base", {"one": s, "two": t}, {"one": 2 * unit, "two": 3 * unit}, scale),
        "Disjoint": Disjoint("base", {"two": v, "one": w}, {"two": 100, "one": 60}),
        "Largest": Largest("base", {"one": w, "two": v}),
        "Agreed": Agreed("base", {"one": w, "two": v}, {"one": 0.5 * s, "two": t}, votes=2, scale=scale),
        "RowFunction": RowFunction(NAMES, _every_other_row),
        "TensorFunction": TensorFunction(("base", "one"), _between_extremes),
        "Rescale of Select": Rescale("base", Select("base", {"one": s, "two": t}, least=4 * unit * unit), w),
        "Rescale of TensorFunction": Rescale("base", TensorFunction(("base", "one"), _between_extremes), w),
        "ChangeFunction": ChangeFunction("base", Sparsify("base", sizes, elect=True), _less_of_the_largest),
    }


def _every_other_row(tensors: Sequence[Tensor], first_row: int) -> Tensor:
    base, one, two = tensors
    numbers = torch.arange(first_row, first_row + len(base), device=base.device)[:, None]
    return base + torch.where(numbers % 2 == 0, one - base, 0.5 * (two - base))


def _between_extremes(tensors: Sequence[Tensor]) -> Tensor:
    """All changes except the largest and the smallest of the tensor, with little memory in addition to the result."""
    base, one = tensors
    change = one - base
    least, most = change.aminmax()
    return change.mul_((change > least) & (change < most)).add_(base)


def _less_of_the_largest(change: Tensor) -> Tensor:
    """The change with its largest elements halved."""
    return torch.where(change.abs() < change.abs().max(), change, 0.5 * change)


def _has_no_example(kind: str, setting: Setting) -> str:
    raise WrongError(f"{kind} has no example: add one to scripts/gpu/check_passes.py")


def _compare(label: str, setting: Setting) -> str:
    exact, rounded = examples(exact=True)[label], examples(exact=False)[label]
    largest = 1 << 20 if setting.small else LARGEST
    for count in (1, 2, 3, 3 * 1001, 1 << 20, (1 << 25) + 2, LARGEST):
        if count <= largest:
            expected, made = both(exact, setting, count, torch.bfloat16, exact=True)
            same_bits(made, expected, f"{count} exact elements")
    shares = []
    for count, dtype in ((3 * 1001, torch.float16), (1 << 20, torch.float32), (1 << 20, torch.bfloat16)):
        expected, made = both(rounded, setting, count, dtype, exact=False)
        shares.append(close_share(made, expected, scale=0.2, what=f"{count} elements of {dtype}"))
    if setting.device.type == "cuda":
        breaks = torch._dynamo.utils.counters["graph_break"]
        check(not breaks, f"is not compiled as one graph: {', '.join(breaks)}")
    return f"bit for bit where exact, to 2^{math.log2(largest):.0f}; of others {min(shares):.2%} the same"


def _compare_channels(along: str, setting: Setting) -> str:
    """Factors by column or row, which depend on the tensor's shape, applied to the result of another kernel."""
    shares = []
    for count, dtype, exact in ((3 * 1001, torch.bfloat16, True), (1 << 20, torch.bfloat16, True),
                                (1 << 20, torch.bfloat16, False), (1 << 20, torch.float32, False)):  # fmt: skip
        rows, columns = (3, 1001) if count == 3 * 1001 else (count // _ROW, _ROW)
        factors = torch.arange(columns if along == "column" else rows) % 4 * 0.25
        made = examples(exact=exact)["Sparsify by size, elected"]
        plan = Rescale("base", made, factors if along == "column" else factors[:, None])
        expected, found = both(plan, setting, count, dtype, exact=exact)
        if exact:
            same_bits(found, expected, f"{count} exact elements")
        else:
            shares.append(close_share(found, expected, scale=0.2, what=f"{count} elements of {dtype}"))
    return f"bit for bit where exact; of others {min(shares):.2%} the same"


def both(plan: Pass, setting: Setting, count: int, dtype: torch.dtype, *, exact: bool) -> tuple[Tensor, Tensor]:
    """The results of the CPU's compiled passes and of the device for ``count`` elements, each where it was computed."""
    draw = _largest_weights if count == LARGEST else weights
    on_cpu, on_device = draw(setting, count, dtype, exact)
    return by_cpu(plan, on_cpu), by_device(plan, on_device, setting)


def by_cpu(plan: Pass, tensors: dict[str, Tensor]) -> Tensor:
    """The result of the CPU's compiled passes for tensors by name, which are on the CPU."""
    inputs = [tensors[name] for name in plan.inputs]
    out = torch.empty_like(inputs[0])
    WorkerThreads().run([TensorJob(plan, inputs, out)])
    return out


def by_device(plan: Pass, tensors: dict[str, Tensor], setting: Setting) -> Tensor:
    """The device's result for tensors by name, which may already be there."""
    runner = DeviceRunner(setting.device, lambda ref: tensors[ref[0]], [], "mapped")
    out = torch.empty_like(tensors[plan.inputs[0]], device=setting.device)
    runner.run(plan, [(name, "") for name in plan.inputs], out)
    return out


Weights = dict[str, Tensor]
"""A base and two fine-tunes of it by name."""


def weights(setting: Setting, count: int, dtype: torch.dtype, exact: bool) -> tuple[Weights, Weights]:
    """Equal weights on the CPU and on the device.

    Args:
        exact: small whole numbers, for which exact examples never round; otherwise numbers like those of weights.
    """
    shape = (count // _ROW, _ROW) if count % _ROW == 0 else (count // 1001, 1001) if count % 1001 == 0 else (1, count)
    drawn = exact_weights(shape, dtype, setting) if exact else fine_tunes(shape, dtype, setting.device)
    on_cpu = drawn if setting.device == CPU else {name: tensor.to(CPU) for name, tensor in drawn.items()}
    return on_cpu, drawn


@cache
def _largest_weights(setting: Setting, count: int, dtype: torch.dtype, exact: bool) -> tuple[Weights, Weights]:
    """``weights``, cached for all rows because they are gigabytes."""
    return weights(setting, count, dtype, exact)


def exact_weights(shape: tuple[int, ...], dtype: torch.dtype, setting: Setting) -> Weights:
    """A base and two fine-tunes with whole numbers, on the device."""
    random = torch.Generator(setting.device).manual_seed(shape[0])

    def draw(most: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=setting.device).random_(-most, most + 1, generator=random)

    return dict(zip(NAMES, (draw(4), draw(8), draw(8)), strict=True))


def fine_tunes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Weights:
    """A base and two fine-tunes with numbers like those of weights, on a device."""
    random = torch.Generator(device).manual_seed(shape[0])

    def draw(size: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, size, generator=random)

    base = draw(0.02)
    return dict(zip(NAMES, (base, base + draw(0.003), base + draw(0.003)), strict=True))
