"""The plain definitions in torch of the passes that are compiled for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from evomerge.merging.arithmetic.drops import element_bits, turns

RANKED = 256  # ``passes.RANKED``


def combine(tensors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """sum_k c_k x_k in float32."""
    total = coefficients[0] * tensors[0].float()
    for k, tensor in enumerate(tensors[1:], start=1):
        total = total + coefficients[k] * tensor.float()
    return total


def _kept(
    tensors: Sequence[Tensor], k: int, delta: Tensor, numbers: Tensor, draws: Tensor | None, meet: bool
) -> Tensor:
    """The mask of a part of ``sparsify``, ``delta`` being its task vector."""
    if draws is None:
        return (delta.abs() >= numbers[k, 1]) & (delta.abs() < numbers[k, 2])
    return drawn(tensors[0], tensors[k + 1], draws[k], meet)


def sparsify(
    tensors: Sequence[Tensor],
    numbers: Tensor,
    draws: Tensor | None,
    elect: bool,
    divide: bool,
    meet: bool,
) -> Tensor:
    """What ``Sparsify`` says, in float32.

    Args:
        tensors: the base and the sources.
        numbers: float32 [parts, 5]: weight, low, high, share, scale.
        draws: int64 [parts, 5], see ``drawn``; None for masks by magnitude.
        meet: elements of a row meet; ``tensors`` are then whole rows.
    """
    base = tensors[0].float()
    total, above, below = torch.zeros_like(base), torch.zeros_like(base), torch.zeros_like(base)
    shares_above, shares_below = torch.zeros_like(base), torch.zeros_like(base)
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        weight, _, _, share, _ = numbers[k]
        part = (weight * delta).where(_kept(tensors, k, delta, numbers, draws, meet), 0.0)
        total = total + part
        above, below = above + part.clamp(min=0), below + part.clamp(max=0)
        shares_above, shares_below = shares_above + share * (part > 0), shares_below + share * (part < 0)
    if not elect:
        return base + total
    positive = above + below >= 0  # a sum of zero counts as positive
    elected, agreeing = torch.where(positive, above, below), torch.where(positive, shares_above, shares_below)
    return base + (numbers[0, 4] * (elected / agreeing.where(agreeing != 0, 1.0)) if divide else elected)


def drawn(base: Tensor, source: Tensor, draw: Tensor, meet: bool) -> Tensor:
    """Which elements of a task vector are kept at random: a mask of its shape. See ``Part``.

    Args:
        draw: int64 [5]: the two halves of the stream's key, signed; the largest bits that are kept, of an element that
            is not larger than the one it meets and of one that is; the number of the first element in the whole.
    """
    key, device = (draw[0].to(torch.int32), draw[1].to(torch.int32)), base.device
    bits = element_bits(draw[4] + torch.arange(base.numel(), device=device).view(base.shape), key)
    if not meet:
        return bits <= draw[2]
    rows, length = base.shape
    turned = turns(draw[4] // length + torch.arange(rows, device=device), length, key)
    met = (torch.arange(length, device=device) + turned[:, None]) % length
    # Computed again of what is met, not looked up in what was computed: that would have to be written down first.
    size, met_size = _upper_bits(base, source), _upper_bits(base.gather(1, met), source.gather(1, met))
    coin = (bits >> 16) & 1
    return bits <= torch.where(size > met_size - coin, draw[3], draw[2])


def _upper_bits(base: Tensor, source: Tensor) -> Tensor:
    """The upper 16 bits of the magnitudes of a task vector, as int32."""
    return (source.float() - base.float()).abs().view(torch.int32) >> 16


def constants(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor on a device, without waiting for what the device is at: pinned memory is copied in its turn."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def select(tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """What ``Select`` says, in float32; ``numbers`` are the shares and then the least variance."""
    base = tensors[0].float()
    deltas = [tensor.float() - base for tensor in tensors[1:]]
    total, mean = torch.zeros_like(base), torch.zeros_like(base).double()
    for delta in deltas:
        total, mean = total + delta, mean + delta.double() / len(deltas)
    squares = torch.zeros_like(mean)
    kept, agreeing = torch.zeros_like(base), torch.zeros_like(base)
    for k, delta in enumerate(deltas):
        squares = squares + (delta.double() - mean) ** 2
        agrees = torch.where(total >= 0, delta > 0, delta < 0)  # a sum of zero counts as positive
        kept, agreeing = kept + (numbers[k] * delta).where(agrees, 0.0), agreeing + numbers[k] * agrees
    varies = (squares / len(deltas)).float()
    return base + (kept / agreeing.clamp(min=1e-6)).where(varies >= numbers[-1], 0.0)


def masked_mean(tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """What ``MaskedMean`` says, in float32; ``numbers`` are [sources, 3]: share, low, scale."""
    base = tensors[0].float()
    total, shares = torch.zeros_like(base), torch.zeros_like(base)
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        share = numbers[k, 0] * (delta.abs() >= numbers[k, 1])
        total, shares = total + share * delta, shares + share
    return base + numbers[0, 2] * (total / shares.where(shares != 0, 1.0))


def largest(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """What ``Largest`` says, in float32."""
    base = tensors[0].float()
    high = low = weights[0] * (tensors[1].float() - base)
    for k, tensor in enumerate(tensors[2:], start=1):
        part = weights[k] * (tensor.float() - base)
        high, low = torch.maximum(high, part), torch.minimum(low, part)
    return base + torch.where(high >= -low, high, low)


def disjoint(tensors: Sequence[Tensor], weights: Tensor, kept: Tensor) -> Tensor:
    """What ``Disjoint`` says, in float32.

    Elements of a block are ordered by a number of 23 bits: the upper bits of the magnitude, then how early the element
    comes. The least number that is taken is found bit by bit, without sorting.

    Args:
        tensors: whole rows of the base and the sources, in the order in which these take.
        kept: int64 [sources].
    """
    base = tensors[0].float()
    rows, length = base.shape
    blocks = -(-length // RANKED)
    beyond = blocks * RANKED - length
    total, place = base, torch.arange(RANKED, device=base.device)
    ends = torch.arange(1, blocks + 1, device=base.device) * RANKED
    sizes = (RANKED - (ends - length).clamp(min=0))[:, None]
    free = pad(torch.ones_like(base, dtype=torch.bool), (0, beyond)).view(rows, blocks, RANKED)
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        order = pad(_upper_bits(base, tensor), (0, beyond)).view(rows, blocks, RANKED) * RANKED + (RANKED - 1 - place)
        order = order.where(free, -1)
        wanted = (kept[k] * sizes + RANKED - 1) // RANKED
        least = torch.zeros_like(order[..., :1])
        for bit in reversed(range(15 + RANKED.bit_length() - 1)):
            higher = least + (1 << bit)
            least = torch.where((order >= higher).sum(dim=-1, keepdim=True) >= wanted, higher, least)
        taken = order >= least
        free = free & ~taken
        total = total + (weights[k] * delta).where(taken.view(rows, -1)[:, :length], 0.0)
    return total


def outer(tensors: Sequence[Tensor], factors: Tensor, left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    """What ``Outer`` says, in float32.

    Args:
        tensors: whole rows.
        factors: float32 [rows, sources], of each row its matrix's.
        left: float32 [rows, rank], of these rows.
        right: float32 [matrices, rank, columns].
        matrix: int64 [rows], the matrix of each row.
    """
    base = tensors[0].float()
    total = torch.zeros_like(base)
    for rank in range(left.shape[1]):
        total = total + left[:, rank, None] * right[matrix, rank]
    for k, tensor in enumerate(tensors[1:]):
        total = total + factors[:, k, None] * (tensor.float() - base)
    return base + total


def agreed(tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """What ``Agreed`` says, in float32; ``numbers`` are [sources, 4]: weight, ratio, votes, scale."""
    base = tensors[0].float()
    parts = [numbers[k, 0] * (tensor.float() - base) for k, tensor in enumerate(tensors[1:])]
    total, votes = torch.zeros_like(base), torch.zeros_like(base)
    for part in parts:
        total = total + part
    for k, part in enumerate(parts):
        votes = votes + (part.abs() > numbers[k, 1] * (total - part).abs())
    return base + (numbers[0, 3] * total).where(votes >= numbers[0, 2], 0.0)


def rescale(base: Tensor, factor: Tensor, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """b + f (m - b) in float32, where m is what the plain definition of another pass gives.

    Args:
        factor: float32, which broadcasts to the base.
        function, arguments: give m, flat or in the shape of the base.
    """
    wide = base.float()
    return wide + factor * (function(*arguments).view(base.shape) - wide)


# ---- derivatives by their numbers ------------------------------------------------------------------------------------


def inner_products(gradient: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """<g, x_k> of every tensor: float64 [tensors].

    Sources are close to each other, and what counts is how their products differ: so all but the first are computed as
    <g, x_1> + <g, x_k - x_1>, the sum in float64.
    """
    first = tensors[0].float()
    own = (gradient * first).sum().double()
    return torch.stack([own, *(own + (gradient * (tensor.float() - first)).sum().double() for tensor in tensors[1:])])


def sparsify_derivatives(
    gradient: Tensor,
    tensors: Sequence[Tensor],
    numbers: Tensor,
    draws: Tensor | None,
    elect: bool,
    divide: bool,
    meet: bool,
) -> Tensor:
    """The derivatives of ``sparsify`` by the weights, the shares and the scale, float64 [2 parts + 1], by formula.

    With e_k d_k what counts of a part, N = sum_k w_k e_k d_k and S = sum_k s_k e_k: of N, <g, e_k d_k>; of c N / S,
    <g, c e_k d_k / S> by w_k, -<g, c e_k N / S^2> by s_k, and <g, N / S> by c. Autograd, which gives the same, takes
    more than twice as long, and of a gradient that would be most beside the passes over the model.
    """
    base, weights = tensors[0].float(), numbers[:, 0]
    counted: list[Tensor] = []  # e_k d_k
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        counted.append(delta.where(_kept(tensors, k, delta, numbers, draws, meet), 0.0))
    agreeing: list[Tensor] = []  # e_k
    if elect:
        positive = _weighted(weights, counted) >= 0
        agreeing = [torch.where(positive, w * d > 0, w * d < 0) for w, d in zip(weights, counted, strict=True)]
        counted = [d.where(agrees, 0.0) for d, agrees in zip(counted, agreeing, strict=True)]
    if not (elect and divide):
        own = torch.stack([(gradient * d).sum() for d in counted])
        return torch.cat([own, own.new_zeros(len(own) + 1)]).double()
    shares = _weighted(numbers[:, 3], agreeing)
    shares = shares.where(shares != 0, 1.0)
    scale, mean, passed = numbers[0, 4], _weighted(weights, counted) / shares, gradient / shares
    own = torch.stack([(passed * d).sum() for d in counted])
    pulled = torch.stack([-(passed * mean * agrees).sum() for agrees in agreeing])
    return torch.cat([scale * own, scale * pulled, (gradient * mean).sum()[None]]).double()


def _weighted(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """sum_k w_k x_k."""
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part
    return total


def by_numbers(run: Callable[..., Tensor], tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
    """The derivative by each element of the numbers that a plain definition takes, in float64 and their shape.

    Args:
        run: ``Pass.run``. The definition is the one that it has computed; its second argument is the numbers.
        tensors, first: as of ``run``.
        gradient: of the loss by the elements of the piece, float32.
    """
    taken: list[Tensor] = []

    def compute(function: Callable[..., Tensor], tensors: Sequence[Tensor], numbers: Tensor, *others: Any) -> Tensor:
        taken.append(numbers.requires_grad_())
        return function(tensors, numbers, *others)

    with torch.enable_grad():
        made = run(tensors, first, compute)
    (found,) = torch.autograd.grad(made, taken, gradient.reshape(made.shape))
    return found.double()
