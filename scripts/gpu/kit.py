"""What a row is, where it runs, and how tensors of the device are compared with those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")
_BLOCK = 1 << 26  # elements that are compared at a time: what a comparison takes is not to decide what fits


class WrongError(Exception):
    """Something that a row checks does not hold; the message says what."""


@dataclass(frozen=True)
class Setting:
    """Where rows run.

    Attributes:
        device: the one that is checked.
        small: the CPU form: the same checks on sizes that a CPU makes in a moment. ``device`` is then the CPU, and what
            a device's own code does is compared with what the CPU's does.
        folder: for files; rows may find there what others made.
    """

    device: torch.device
    small: bool
    folder: Path

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Row:
    """A check.

    Attributes:
        name: of it, for people and for ``--row``.
        run: does it, and gives what it measured, in a few words. Raises whatever is wrong, such as a ``WrongError``.
    """

    name: str
    run: Callable[[Setting], str]


def check(holds: bool, what: str) -> None:
    """Raise WrongError with ``what`` unless it holds."""
    if not holds:
        raise WrongError(what)


def same_bits(made: Tensor, expected: Tensor, what: str) -> None:
    """Refuse a tensor that differs from what it should be, in whatever bit but the sign of a zero.

    Args:
        made, expected: of one shape and dtype, on any devices.
        what: said of the tensor where it differs.

    Raises:
        WrongError: says how many elements differ, and where the first does.
    """
    for begin, ours, theirs in _blocks(made, expected):
        differs = (ours != theirs).nonzero().view(-1)
        if len(differs):
            first = int(differs[0])
            pair = f"{ours[first].item():.9g} for {theirs[first].item():.9g}"
            raise WrongError(f"{what}: {len(differs)} elements differ, the first at {begin + first}, {pair}")


def close_share(made: Tensor, expected: Tensor, scale: float, what: str) -> float:
    """Refuse a tensor that is further from what it should be than rounding explains.

    The last digit of the dtype may differ, and sums may have lost some digits of float32 beside numbers of the size
    ``scale``. One element in a hundred thousand may be another altogether: the sign of a sum that is all but zero hangs
    on rounding, and with it, where signs are elected, which sources count.

    Returns:
        The share of the elements that are the same.

    Raises:
        WrongError: says by how much it is off.
    """
    relative, absolute = 2 * torch.finfo(made.dtype).eps, 16 * torch.finfo(torch.float32).eps * scale
    beyond, equal, worst = 0, 0, 0.0
    for _, ours, theirs in _blocks(made, expected):
        off = (ours.float() - theirs.float()).abs()
        far = ~(off <= relative * theirs.float().abs() + absolute)  # true of NaN
        beyond, equal = beyond + int(far.sum()), equal + int((ours == theirs).sum())
        if far.any():
            worst = max(worst, off[far].max().item())
    count = made.numel()
    check(beyond <= count * 1e-5, f"{what}: {beyond} of {count} elements are off, by up to {worst:.3g}")
    return equal / max(count, 1)


def _blocks(made: Tensor, expected: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of both on the device of ``made``, flat, and where they begin."""
    check(made.shape == expected.shape and made.dtype == expected.dtype, "shapes or dtypes differ")
    ours, theirs = made.reshape(-1), expected.reshape(-1)
    for begin in range(0, len(ours), _BLOCK):
        end = begin + _BLOCK
        yield begin, ours[begin:end], theirs[begin:end].to(made.device)
