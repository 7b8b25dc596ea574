"""Four published systems that are normally trained from scratch, as settings of a space over existing experts.

What a paper leaves open is which adapters are used where, and that is searched. The numbers are those of the papers, or
of their code if the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from evomerge.recipes.routed import Balance

Form = Literal["mov", "molora", "loramoe", "mola"]

_DENSE: Mapping[str, Any] = {
    "router": "fitted", "gate": "softmax", "per": "module", "base_expert": False, "fixed": {"top_k": "all"},
}  # fmt: skip

FORMS: Mapping[Form, Mapping[str, Any]] = {
    # Zadouri et al. 2023, arXiv 2309.05444, equation 2: vectors of keys, values and the mlp's inner activation, with
    # separate routing for each head of a token.
    "mov": {**_DENSE, "heads": True, "where": "all", "presence": "each"},
    # The same paper, equation 3: every linear layer of attention and mlp.
    "molora": {**_DENSE, "heads": False, "where": "all", "presence": "each"},
    # Dou et al. 2023, arXiv 2312.09979, equations 2 to 6: experts only in the mlp. Its script trains without the
    # localized balancing loss, which requires items that state their group; `balance: {localized: 0.1}` adds it.
    "loramoe": {**_DENSE, "heads": False, "where": "mlp", "presence": "each"},
    # Gao et al. 2024, arXiv 2402.08562, equations 3 to 5: a softmax over the experts of a layer, of which two are kept
    # and renormalised; four groups of layers have different numbers of experts; balancing loss with factor 0.001.
    "mola": {
        **_DENSE, "heads": False, "where": "all", "presence": "allocation", "groups": 4, "fixed": {"top_k": 2},
        "balance": Balance(switch=0.001),
    },
}  # fmt: skip

OVERRIDABLE = frozenset({"fixed", "balance", "groups", "router"})
"""Keys that a search file may override; ``fixed`` is added to what the form itself fixes."""

MOLA_SHAPES: tuple[tuple[int, ...], ...] = ((8, 6, 4, 2), (2, 4, 6, 8), (8, 2, 2, 8), (5, 5, 5, 5))
"""The number of experts in each quarter of the layers (MoLA, section 3.3), out of at most eight."""
