"""Spectral routing: a token is routed to the experts that change it most, relative to their change on their own texts.

The logit of an expert is |S V^T x| / m, with the singular values S and right singular vectors V of its change s B A
(SpectR, arXiv 2504.03454, section 3), which is the norm of what it adds to the module's output, and m the mean of that
norm over the tokens of its own texts. Without m the expert with the largest change would get every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.routed.factors import factors_of
from evomerge.routed.sites import Site
from evomerge.routed.spectra import right_singular


def spectral_weights(sites: Sequence[Site], width: Mapping[str, int]) -> dict[str, Tensor]:
    """S V^T of each expert, by the module of the site: float32 [experts, ranks, inputs], padded with zeros.

    Args:
        width: the input widths of modules, by name.
    """

    def rows_of(site: Site) -> Tensor:
        scaled = []
        for expert in range(len(site.changes)):
            factors = factors_of(site, expert)
            if factors is None:
                scaled.append(torch.zeros(0, width[site.module]))
            else:
                values, rows = right_singular(factors)
                scaled.append(values[:, None] * rows)
        most = max(len(rows) for rows in scaled)
        padded = [torch.nn.functional.pad(rows, (0, 0, 0, most - len(rows))) for rows in scaled]
        return torch.stack(padded)

    modules = [site.module for site in sites]
    return dict(zip(modules, WorkerThreads().in_order(rows_of, sites), strict=True))


def normalised(weights: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights divided by m, the mean norms float32 [experts] by module; zeros for experts that change nothing."""
    found = {}
    for module, weight in weights.items():
        size = sizes[module][:, None, None]
        found[module] = torch.where(size > 0, weight / size.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    return found
