"""How far the quadratics of the optimizer ``map`` can be trusted, recomputed from what it was told."""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel

from evomerge.store import SearchRow, Store, summaries


class QuadraticState(BaseModel):
    """The quadratics of the objectives, and whether they are used to propose candidates.

    Attributes:
        explained: the share of the variance of each objective that is predicted (leave-one-out); None if unknown.
        candidates: the number of candidates that they are fitted to; at least ``first_fit`` are needed.
        least: the share that is required of every objective.
        on: whether all objectives reach it.
    """

    explained: dict[str, float | None]
    candidates: int
    first_fit: int
    least: float
    on: bool


def quadratics_of(store: Store, search: SearchRow) -> QuadraticState | None:
    """The quadratics of a search with ``map``; None for other optimizers."""
    record = search.record
    if record.optimizer.name != "map":
        return None
    from evomerge.optimizers.cma_es import Box
    from evomerge.optimizers.pareto_map import MapSettings, first_fit
    from evomerge.optimizers.quadratic import Quadratic

    rows = zip(*summaries.columns(store, ["number", "losses", "eligible"]).values(), strict=True)
    told = {
        number: losses
        for number, losses, eligible in rows
        if losses and all(map(math.isfinite, losses)) and (eligible or not record.constraints)
    }
    genomes = summaries.genomes_of(store, told.keys()) if told else {}
    least = MapSettings.model_validate(search.settings["optimizer"]).least_explained
    first = first_fit(len(record.parameters))
    names = [objective.name for objective in record.objectives]
    if len(genomes) < first:
        unknown = dict.fromkeys(names, None)
        return QuadraticState(explained=unknown, candidates=len(genomes), first_fit=first, least=least, on=False)
    box = Box(record.parameters)
    units = np.array([box.unit(genome) for genome in genomes.values()])
    explained = Quadratic.fit(units, np.array([told[number] for number in genomes])).explained
    shown = {
        name: share if math.isfinite(share) else None for name, share in zip(names, explained.tolist(), strict=True)
    }
    return QuadraticState(
        explained=shown, candidates=len(genomes), first_fit=first, least=least, on=bool(explained.min() >= least)
    )


def quadratics_text(state: QuadraticState) -> str:
    """maths 0.83, japanese 0.41 of the variance foretold, by 45 candidates: on."""
    if state.candidates < state.first_fit:
        return f"fitted from {state.first_fit} candidates on, of which {state.candidates} are scored: off"
    shares = ", ".join(f"{name} {'-' if share is None else f'{share:.2f}'}" for name, share in state.explained.items())
    asked = "on" if state.on else f"off, {state.least:g} of each is asked for"
    return f"{shares} of the variance foretold, by {state.candidates} candidates: {asked}"
