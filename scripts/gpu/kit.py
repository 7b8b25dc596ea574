"""Rows (the checks of the kit), where they run, and comparisons of tensors on the device with those on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")
_BLOCK = 1 << 26  # elements that are compared at a time, so that a comparison needs little memory


class WrongError(Exception):
    """A check of a row has failed; the message says which."""


@dataclass(frozen=True)
class Setting:
    """Where rows run.

    Attributes:
        device: the device to check.
        small: the CPU form: the same checks with sizes that take moments on a CPU. ``device`` is then the CPU, and the
            code for devices is compared with the code for the CPU.
        folder: for files; it is shared by all rows.
    """

    device: torch.device
    small: bool
    folder: Path

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Row:
    """A check.

    Attributes:
        name: as shown, and as selected with ``--row``.
        run: performs the check and returns what it measured, as a short text. Raises ``WrongError`` or any other error
            if it fails.
    """

    name: str
    run: Callable[[Setting], str]


def check(holds: bool, what: str) -> None:
    """Raise WrongError with the message ``what`` unless the condition holds."""
    if not holds:
        raise WrongError(what)


def same_bits(made: Tensor, expected: Tensor, what: str) -> None:
    """Refuse a tensor that differs from the expected one in any bit except the sign of a zero.

    Args:
        made, expected: of one shape and dtype, on any devices.
        what: describes the tensor in the error.

    Raises:
        WrongError: says how many elements differ, and which is the first.
    """
    for begin, ours, theirs in _blocks(made, expected):
        differs = (ours != theirs).nonzero().view(-1)
        if len(differs):
            first = int(differs[0])
            pair = f"{ours[first].item():.9g} for {theirs[first].item():.9g}"
            raise WrongError(f"{what}: {len(differs)} elements differ, the first at {begin + first}, {pair}")


def close_share(made: Tensor, expected: Tensor, scale: float, what: str) -> float:
    """Refuse a tensor that differs from the expected one by more than rounding.

    The last digit of the dtype may differ, and sums of numbers of the size ``scale`` may have lost some digits of
    float32. One element in a hundred thousand may be completely different: the sign of a sum that is nearly zero
    depends on rounding, and if signs are elected, so does the choice of sources.

    Returns:
        The share of elements that are equal.

    Raises:
        WrongError: says how large the difference is.
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
    """Flat blocks of both tensors on the device of ``made``, and the positions at which they begin."""
    check(made.shape == expected.shape and made.dtype == expected.dtype, "shapes or dtypes differ")
    ours, theirs = made.reshape(-1), expected.reshape(-1)
    for begin in range(0, len(ours), _BLOCK):
        end = begin + _BLOCK
        yield begin, ours[begin:end], theirs[begin:end].to(made.device)
