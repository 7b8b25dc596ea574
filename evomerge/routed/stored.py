"""Routers that were trained with their experts and are stored in their folder (``checkpoints/expert_files``)."""

from __future__ import annotations

import torch

from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.headers import map_file, view_entry
from evomerge.routed.computing import Router
from evomerge.routed.sites import Site

_NEVER = -1e30
"""The logit of an expert that does not change a module, whose router was trained without it. Finite, in case all
experts that are present are like that."""


def stored_router(site: Site, width: int) -> Router:
    """The rows of a module's experts, as trained; float32."""
    weight, bias = torch.zeros(len(site.changes), width), torch.full((len(site.changes),), _NEVER)
    for expert, changes in enumerate(site.changes):
        for change in changes:
            if isinstance(change, LowRank) and change.router is not None:
                entry, row = change.router
                weight[expert], bias[expert] = view_entry(entry, map_file(entry.file))[row].float(), 0.0
    return Router("linear", weight, bias)
