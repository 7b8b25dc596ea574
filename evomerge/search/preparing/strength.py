"""The baseline by the law of how strongly to merge, for which all sources are read once.

A search has it when it begins, and goes on with it only if it began with it.
"""

from __future__ import annotations

from dataclasses import replace

from evomerge.merging.amplitude import EVEN, kappa, relative_norms
from evomerge.merging.evidence import Evidence
from evomerge.search.preparing.prepare import Prepared, build_space
from evomerge.store import Store
from search_spaces.parameter_space import LAW


def with_law(prepared: Prepared, store: Store, evidence: Evidence) -> Prepared:
    """The search with the baseline by the law of ``merging.amplitude``, where it is to have one.

    A search of an older program goes on without: what it was asked is what is replayed.

    Args:
        evidence: of the sources, where their norms are kept.
    """
    file, recorded = prepared.file, store.candidates(step=0)
    begins, had = not recorded, any(row.label.startswith(LAW) for row in recorded)
    if file.base is None or not (planned_baselines(prepared) if begins else had):
        return prepared
    norms = relative_norms(prepared.sources, file.base, evidence)
    space = build_space(file, prepared.sources, kappa(list(norms.values())))
    return replace(prepared, setup=replace(prepared.setup, space=space))


def planned_baselines(prepared: Prepared) -> int:
    """How many baselines by the law a search will have that begins now."""
    if prepared.file.base is None or not prepared.file.baselines.kappa:
        return 0
    space = build_space(prepared.file, prepared.sources, EVEN)
    return len(list(space.baselines())) - len(list(prepared.setup.space.baselines()))
