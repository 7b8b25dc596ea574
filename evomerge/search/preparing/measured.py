"""What a search measures of its sources' weights when it begins: each is read once, and the results are kept.

These are how strongly to merge (the kappa baseline of ``merging.measured.amplitude``) and the tiers of layers
(``merging.adapters.tiers``). Checking a search file reads no weights for them.
"""

from __future__ import annotations

from dataclasses import replace

from evomerge.merging.adapters.tiers import tiers_of
from evomerge.merging.measured.amplitude import EVEN, kappa, relative_norms
from evomerge.merging.measured.evidence import Evidence
from evomerge.search.preparing.prepare import Prepared, build_space, space_of
from evomerge.store import Store
from search_spaces.base import Measures
from search_spaces.parameter_space import LAW, ParameterSpaceSettings


def with_measures(prepared: Prepared, store: Store, evidence: Evidence) -> Prepared:
    """The search with a space that depends on measurements of the sources' weights.

    A search that began without the kappa baseline continues without it, because asks are replayed.

    Args:
        evidence: of the sources; it keeps the results.
    """
    file, recorded = prepared.file, store.candidates(step=0)
    if file.base is None:
        return prepared
    has_law = any(row.label.startswith(LAW) for row in recorded) if recorded else bool(planned_baselines(prepared))
    has_tiers = getattr(file.space, "profile", None) == "tiers"
    if not (has_law or has_tiers):
        return prepared
    norms = relative_norms(prepared.sources, file.base, evidence) if has_law else {}
    measures = Measures(
        kappa=kappa(list(norms.values())) if has_law else None,
        tiers=tiers_of(prepared.sources, file.base, evidence) if has_tiers else None,
    )
    space = build_space(file, prepared.sources, measures)
    return replace(prepared, setup=replace(prepared.setup, space=space, space_measures=measures))


def plans_soups(prepared: Prepared) -> bool:
    """Whether a search that begins now has baselines from the losses on calibration texts."""
    file = prepared.file
    mixed = [name for name in file.sources if name != file.base]
    over_weights = isinstance(file.space, ParameterSpaceSettings)
    return prepared.calibration is not None and file.baselines.soups and over_weights and len(mixed) > 1


def planned_baselines(prepared: Prepared) -> int:
    """How many kappa baselines a search that begins now will have."""
    if prepared.file.base is None or not prepared.file.baselines.kappa:
        return 0
    space = space_of(prepared.file, prepared.sources, Measures(kappa=EVEN))
    return len(list(space.baselines())) - len(list(prepared.setup.space.baselines()))
