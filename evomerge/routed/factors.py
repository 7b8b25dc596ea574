"""Reads the tensors of experts from their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints.adapter_changes import LowRank, Vector
from evomerge.checkpoints.headers import TensorEntry, map_file, view_entry
from evomerge.errors import InputError
from evomerge.routed.computing import LowRankExperts, VectorExperts
from evomerge.routed.sites import Site


@dataclass(frozen=True)
class LowRankFactors:
    """One expert's change to one weight, s B A: float32 on the CPU.

    Attributes:
        down: A, [ranks, inputs].
        up: B, [outputs, ranks], times the scaling s of its adapter.
    """

    down: Tensor
    up: Tensor


def factors_of(site: Site, expert: int) -> LowRankFactors | None:
    """An expert's change to a site, with all adapters of its source combined; None if there is none."""
    changes = [change for change in site.changes[expert] if isinstance(change, LowRank)]
    if not changes:
        return None
    pairs = [(change.pair(_read), change.scale) for change in changes]
    downs, ups = [down for (down, _), _ in pairs], [up * scale for (_, up), scale in pairs]
    return LowRankFactors(torch.cat(downs), torch.cat(ups, dim=1))


def side_by_side(site: Site, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> LowRankExperts:
    """All changes of experts to a site, concatenated, on a device and in the dtype of its weight.

    Args:
        names: the names of the experts, for messages.

    Raises:
        InputError: an adapter contains NaN or Inf.
    """
    downs, ups, spreads = [], [], []
    for expert, changes in enumerate(site.changes):
        for change in changes:
            assert isinstance(change, LowRank)
            down, up = (factor.to(device, dtype) for factor in change.pair(_read))
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise InputError(f"sources.{names[expert]}", f"its adapter of {site.weight} has NaN or Inf")
            downs.append(down)
            ups.append(up.T)
            spread = torch.zeros(len(names), len(down), device=device)
            spread[expert] = change.scale
            spreads.append(spread)
    return LowRankExperts(torch.cat(downs), (torch.cat(ups),), torch.cat(spreads, dim=1))


def vectors_of(site: Site, names: Sequence[str], width: int, device: torch.device) -> VectorExperts:
    """The (IA)3 vectors of a site; those of several adapters of one source are multiplied.

    Args:
        width: the width of what they scale.

    Raises:
        InputError: a vector contains NaN or Inf.
    """
    rows = torch.ones(len(names), width)
    for expert, changes in enumerate(site.changes):
        for change in changes:
            assert isinstance(change, Vector)
            rows[expert] *= change.vector(_read)
        if not torch.isfinite(rows[expert]).all():
            raise InputError(f"sources.{names[expert]}", f"its vector of {site.weight} has NaN or Inf")
    return VectorExperts((rows - 1).to(device))


def only(experts: LowRankExperts, present: Sequence[int]) -> LowRankExperts | None:
    """Only the experts of one module with these indices; None if there are none."""
    mask = (experts.spread[list(present)] != 0).any(0)
    if bool(mask.all()):
        return experts
    if not bool(mask.any()):
        return None
    (up,) = experts.ups
    return LowRankExperts(experts.down[mask], (up[mask],), experts.spread[:, mask].contiguous())


def _read(entry: TensorEntry) -> Tensor:
    return view_entry(entry, map_file(entry.file))
