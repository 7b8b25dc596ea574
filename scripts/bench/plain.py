"""Merge methods on whole matrices as in the papers' code: everything is computed for each candidate, in float32.

scripts/bench/merging.py compares Evomerge with their times; they serve no other purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def merged(label: str, changes: Tensor) -> Tensor:
    """The change from a method, or a step after task arithmetic, for task vectors [sources, rows, columns]."""
    if label in OF_SUM:
        return OF_SUM[label](changes.sum(dim=0), changes)
    return OF_TASKS[label](changes)


def tsv(changes: Tensor) -> Tensor:
    """TSV-Merge, Gargiulo et al. (arXiv 2412.00081): decompositions of each source and of each side."""
    count = min(changes.shape[1:]) // len(changes)
    u, s, v = (
        list(parts) for parts in zip(*(torch.linalg.svd(one, full_matrices=False) for one in changes), strict=True)
    )
    left = polar(torch.cat([x[:, :count] for x in u], dim=1))
    right = polar(torch.cat([x[:count] for x in v]))
    return (left * torch.cat([x[:count] for x in s])) @ right


def polar(matrix: Tensor) -> Tensor:
    p, _, q = torch.linalg.svd(matrix, full_matrices=False)
    return p @ q


def gram(changes: Tensor, norm: float = 1.0, eps: float = 1e-2) -> Tensor:
    """WUDI, Cheng et al. (arXiv 2503.08099): products of every task vector with itself, and an inverse."""
    above, below = 0.0, torch.zeros(changes.shape[-1], changes.shape[-1])
    for change in changes:
        own = change.T @ change / change.square().sum() ** norm
        above, below = above + change @ own, below + own
    below.diagonal().add_(eps * below.diagonal().mean())
    return above @ torch.linalg.inv(below)


def swudi(changes: Tensor) -> Tensor:
    """SWUDI, Wei et al. (arXiv 2606.07289): the same with a filter on the largest eigenvalues."""
    above, below = 0.0, torch.zeros(changes.shape[-1], changes.shape[-1])
    for change in changes:
        own = change.T @ change / change.square().sum()
        above, below = above + change @ own, below + own
    values, vectors = torch.linalg.eigh(below)
    kept = slice(int(0.15 * len(values)), None)
    values, vectors = values[kept], vectors[:, kept]
    filtered, start = 1 - torch.exp(-300 * values), changes.sum(dim=0)
    return start - (start @ vectors * filtered) @ vectors.T + (above @ vectors * (filtered / values)) @ vectors.T


def ace(changes: Tensor) -> Tensor:
    """ACE without the refinement after the inverse, which costs another decomposition."""
    return gram(changes - changes.mean(dim=1, keepdim=True), norm=0.0)


def iso(change: Tensor, changes: Tensor) -> Tensor:
    """Marczak et al. (arXiv 2502.04959), Iso-C."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return (u * s.lerp(s.mean(), 0.7)) @ v


def iso_cts(change: Tensor, changes: Tensor) -> Tensor:
    """Marczak et al., Iso-CTS: common directions of the sum, the others from each source."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    common = int(0.8 * len(s))
    each = (len(s) - common) // len(changes)
    left, right, sizes = [u[:, :common]], [v[:common]], [s[:common]]
    for one in changes:
        own = torch.linalg.svd(one - u[:, :common] @ (u[:, :common].T @ one), full_matrices=False)
        left, right, sizes = [*left, own[0][:, :each]], [*right, own[2][:each]], [*sizes, own[1][:each]]
    return torch.cat(sizes).mean() * polar(torch.cat(left, dim=1)) @ polar(torch.cat(right))


def subspace_boosting(change: Tensor, changes: Tensor) -> Tensor:
    """Skorobogat et al. (arXiv 2506.16506): small singular values are raised."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    least = s[int((s.cumsum(0) / s.sum() < 0.2).sum())]
    return (u * s.clamp(min=least)) @ v


def svc(change: Tensor, changes: Tensor) -> Tensor:
    """Singular value calibration (arXiv 2602.05536): directions that several sources share are made smaller."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    ours, theirs = u.T @ change, [u.T @ one for one in changes]
    shares = [((ours * own).sum(1) / own.square().sum(1)).clamp(min=0.1) for own in theirs]
    return (u * (s * len(changes) / sum(shares))) @ v


OF_TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "tsv": tsv, "gram": gram, "actmat": lambda changes: gram(changes, norm=0.0, eps=1e-6), "wudi": gram, "swudi": swudi,
    "ace": ace,
}  # fmt: skip
OF_SUM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iso": iso, "iso_cts": iso_cts, "subspace_boosting": subspace_boosting, "svc": svc,
}  # fmt: skip
