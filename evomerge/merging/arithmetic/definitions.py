"""Plain definitions in torch of the passes that ``kernels`` compiles for the CPU.

All compute in float32, whatever the float dtypes of their inputs. ``tensors`` are always the inputs of the pass in
order, of one shape (flat or whole rows, see ``passes.Grain``), and where there is a base it is the first. Results have
that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from evomerge.merging.arithmetic.drops import element_bits, partner_offsets

RANK_BLOCK = 256  # ``passes.RANK_BLOCK``


def combine(tensors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``Combine``: sum_k c_k x_k. ``coefficients`` are float32 [tensors]."""
    total = coefficients[0] * tensors[0].float()
    for k, tensor in enumerate(tensors[1:], start=1):
        total = total + coefficients[k] * tensor.float()
    return total


def _kept(
    tensors: Sequence[Tensor], k: int, delta: Tensor, numbers: Tensor, draws: Tensor | None, ranked: bool
) -> Tensor:
    """The mask of part ``k`` of ``sparsify``, whose task vector is ``delta``: bool, of its shape."""
    if draws is None:
        return (delta.abs() >= numbers[k, 1]) & (delta.abs() < numbers[k, 2])
    return random_mask(tensors[0], tensors[k + 1], draws[k], ranked)


def sparsify(
    tensors: Sequence[Tensor],
    numbers: Tensor,
    draws: Tensor | None,
    elect: bool,
    divide: bool,
    ranked: bool,
) -> Tensor:
    """``Sparsify``.

    Args:
        tensors: the base and the sources.
        numbers: float32 [parts, 5]: weight, low, high, share, scale.
        draws: int64 [parts, 5], see ``random_mask``; None for masks by magnitude.
        elect, divide: as in ``Sparsify``.
        ranked: the chance to be kept rises with the rank in the row; ``tensors`` are then whole rows.
    """
    base = tensors[0].float()
    total, above, below = torch.zeros_like(base), torch.zeros_like(base), torch.zeros_like(base)
    shares_above, shares_below = torch.zeros_like(base), torch.zeros_like(base)
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        weight, _, _, share, _ = numbers[k]
        part = (weight * delta).where(_kept(tensors, k, delta, numbers, draws, ranked), 0.0)
        total = total + part
        above, below = above + part.clamp(min=0), below + part.clamp(max=0)
        shares_above, shares_below = shares_above + share * (part > 0), shares_below + share * (part < 0)
    if not elect:
        return base + total
    positive = above + below >= 0  # a sum of zero counts as positive
    elected, agreeing = torch.where(positive, above, below), torch.where(positive, shares_above, shares_below)
    return base + (numbers[0, 4] * (elected / agreeing.where(agreeing != 0, 1.0)) if divide else elected)


def random_mask(base: Tensor, source: Tensor, draw: Tensor, ranked: bool) -> Tensor:
    """Which elements of a task vector are kept at random: bool, of its shape. See ``SparsePart``.

    Args:
        base, source: flat [elements], or whole rows [rows, length] if ``ranked``.
        draw: int64 [5]: the two halves of the stream's key, signed; the largest bits with which an element is kept, if
            it is not larger than its partner and if it is; the position of the first element in the whole tensor.
        ranked: compare each element with its partner (``drops.partner_offsets``).
    """
    key, device = (draw[0].to(torch.int32), draw[1].to(torch.int32)), base.device
    bits = element_bits(draw[4] + torch.arange(base.numel(), device=device).view(base.shape), key)
    if not ranked:
        return bits <= draw[2]
    rows, length = base.shape
    offsets = partner_offsets(draw[4] // length + torch.arange(rows, device=device), length, key)
    partner = (torch.arange(length, device=device) + offsets[:, None]) % length
    # The partner's magnitude is computed again: looking it up would need the magnitudes written to memory first.
    size, partner_size = _upper_bits(base, source), _upper_bits(base.gather(1, partner), source.gather(1, partner))
    coin = (bits >> 16) & 1
    return bits <= torch.where(size > partner_size - coin, draw[3], draw[2])


def _upper_bits(base: Tensor, source: Tensor) -> Tensor:
    """The upper 16 bits of the magnitudes of a task vector, as int32."""
    return (source.float() - base.float()).abs().view(torch.int32) >> 16


def constants(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor on a device, copied from pinned memory so that nobody waits for the device's earlier work."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def select(tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """``Select``. ``numbers`` are float32 [sources + 1]: the shares, and then the minimum variance."""
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
    """``MaskedMean``. ``numbers`` are float32 [sources, 3]: share, low, scale."""
    base = tensors[0].float()
    total, shares = torch.zeros_like(base), torch.zeros_like(base)
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        share = numbers[k, 0] * (delta.abs() >= numbers[k, 1])
        total, shares = total + share * delta, shares + share
    return base + numbers[0, 2] * (total / shares.where(shares != 0, 1.0))


def largest(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``Largest``. ``weights`` are float32 [sources]."""
    base = tensors[0].float()
    high = low = weights[0] * (tensors[1].float() - base)
    for k, tensor in enumerate(tensors[2:], start=1):
        part = weights[k] * (tensor.float() - base)
        high, low = torch.maximum(high, part), torch.minimum(low, part)
    return base + torch.where(high >= -low, high, low)


def disjoint(tensors: Sequence[Tensor], weights: Tensor, kept: Tensor) -> Tensor:
    """``Disjoint``.

    Elements of a block are ordered by a number of 23 bits: the upper bits of the magnitude, then earlier elements
    before later ones. The smallest number that is taken is found bit by bit, without sorting.

    Args:
        tensors: whole rows of the base and of the sources, in the order in which sources take elements.
        weights: float32 [sources].
        kept: int64 [sources], the elements that each source takes of a block.
    """
    base = tensors[0].float()
    rows, length = base.shape
    blocks = -(-length // RANK_BLOCK)
    beyond = blocks * RANK_BLOCK - length
    total, place = base, torch.arange(RANK_BLOCK, device=base.device)
    ends = torch.arange(1, blocks + 1, device=base.device) * RANK_BLOCK
    sizes = (RANK_BLOCK - (ends - length).clamp(min=0))[:, None]
    free = pad(torch.ones_like(base, dtype=torch.bool), (0, beyond)).view(rows, blocks, RANK_BLOCK)
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        order = pad(_upper_bits(base, tensor), (0, beyond)).view(rows, blocks, RANK_BLOCK) * RANK_BLOCK + (
            RANK_BLOCK - 1 - place
        )
        order = order.where(free, -1)
        wanted = (kept[k] * sizes + RANK_BLOCK - 1) // RANK_BLOCK
        least = torch.zeros_like(order[..., :1])
        for bit in reversed(range(15 + RANK_BLOCK.bit_length() - 1)):
            higher = least + (1 << bit)
            least = torch.where((order >= higher).sum(dim=-1, keepdim=True) >= wanted, higher, least)
        taken = order >= least
        free = free & ~taken
        total = total + (weights[k] * delta).where(taken.view(rows, -1)[:, :length], 0.0)
    return total


def outer(tensors: Sequence[Tensor], factors: Tensor, left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    """``Outer``.

    Args:
        tensors: whole rows.
        factors: float32 [rows, sources], for each row those of its matrix.
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
    """``Agreed``. ``numbers`` are float32 [sources, 4]: weight, ratio, votes, scale."""
    base = tensors[0].float()
    parts = [numbers[k, 0] * (tensor.float() - base) for k, tensor in enumerate(tensors[1:])]
    total, votes = torch.zeros_like(base), torch.zeros_like(base)
    for part in parts:
        total = total + part
    for k, part in enumerate(parts):
        votes = votes + (part.abs() > numbers[k, 1] * (total - part).abs())
    return base + (numbers[0, 3] * total).where(votes >= numbers[0, 2], 0.0)


def rescale(base: Tensor, factor: Tensor, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """``Rescale``: b + f (m - b), where m is the result of the plain definition of another pass.

    Args:
        base: b, in its own shape.
        factor: f: float32, of a shape that broadcasts to the base.
        function, arguments: the definition and what it takes; it gives m, flat or in the shape of the base.
    """
    wide = base.float()
    return wide + factor * (function(*arguments).view(base.shape) - wide)


# ---- derivatives with respect to their numbers -----------------------------------------------------------------------


def inner_products(gradient: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """<g, x_k> of every tensor: float64 [tensors].

    Sources are close to each other, and the differences between their products are what matters. So all but the first
    are computed as <g, x_1> + <g, x_k - x_1>, with that sum in float64.

    Args:
        gradient: g, float32 of the tensors' shape.
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
    ranked: bool,
) -> Tensor:
    """Derivatives of a loss with respect to the numbers of ``sparsify``, by formula.

    Let e_k d_k be the kept elements of a task vector, N = sum_k w_k e_k d_k and S = sum_k s_k e_k. The derivative of N
    by w_k is <g, e_k d_k>. Those of c N / S are <g, c e_k d_k / S> by w_k, -<g, c e_k N / S^2> by s_k, and <g, N / S>
    by c. Autograd gives the same, but takes more than twice as long, which would be most of what a gradient costs
    besides the passes over the model.

    Args:
        gradient: g, the derivative of the loss with respect to each element: float32 of the tensors' shape.
        tensors, numbers, draws, elect, divide, ranked: as in ``sparsify``.

    Returns:
        float64 [2 parts + 1]: by the weights, by the shares, by the scale.
    """
    base, weights = tensors[0].float(), numbers[:, 0]
    counted: list[Tensor] = []  # e_k d_k
    for k, tensor in enumerate(tensors[1:]):
        delta = tensor.float() - base
        counted.append(delta.where(_kept(tensors, k, delta, numbers, draws, ranked), 0.0))
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


def autograd_derivatives(run: Callable[..., Tensor], tensors: Sequence[Tensor], first: int, gradient: Tensor) -> Tensor:
    """Derivatives of a loss with respect to the numbers of a pass, by autograd through its plain definition.

    Args:
        run: ``Pass.run`` of a pass whose plain definition takes the tensors, and then the numbers as one tensor.
        tensors, first: as for ``run``.
        gradient: derivative of the loss with respect to each element of the piece, float32.

    Returns:
        float64, of the shape of the numbers that the definition takes.
    """
    taken: list[Tensor] = []

    def compute(function: Callable[..., Tensor], tensors: Sequence[Tensor], numbers: Tensor, *others: Any) -> Tensor:
        taken.append(numbers.requires_grad_())
        return function(tensors, numbers, *others)

    with torch.enable_grad():
        made = run(tensors, first, compute)
    (found,) = torch.autograd.grad(made, taken, gradient.reshape(made.shape))
    return found.double()
