"""Arrow routing: a token is routed to the experts whose dominant input direction it is most aligned with.

The logit of an expert is |x . v|, with v the right singular vector of its change s B A that belongs to the largest
singular value (Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv
2405.11157, section 4.2). A singular vector has no sign, hence the absolute value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.arithmetic.jobs import WorkerThreads
from evomerge.routed.factors import factors_of
from evomerge.routed.sites import Site
from evomerge.routed.spectra import right_singular


def arrow_weights(sites: Sequence[Site], width: dict[str, int]) -> dict[str, Tensor]:
    """v of each expert, by the module of the site: float32 [experts, inputs]; zeros for experts that do not change it.

    Args:
        width: the input widths of modules, by name.
    """

    def rows_of(site: Site) -> Tensor:
        rows = torch.zeros(len(site.changes), width[site.module])
        for expert in range(len(site.changes)):
            if (factors := factors_of(site, expert)) is not None:
                rows[expert] = right_singular(factors)[1][0]
        return rows

    modules = [site.module for site in sites]
    return dict(zip(modules, WorkerThreads().in_order(rows_of, sites), strict=True))
