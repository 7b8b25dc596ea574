"""What a budget buys: how surely scores tell models apart, how many generations there are, and what these can learn.

Arithmetic on the search's own numbers, before anything is scored. How far scores spread is not known by then, so they
are taken to lie from 0 to 1; and what CMA-ES learns from so many candidates is a rule of thumb, no law.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel
from scipy import special

from evaluators.cost import COUNTED
from evomerge.optimizers import CatCmaSettings
from evomerge.optimizers.base import Best, default_population
from evomerge.optimizers.cma_es import StrategySettings
from evomerge.search.preparing.setup import ObjectiveInfo, Setup
from evomerge.search.settings.gradient import gradient_problem
from search_spaces.parameter_space import ParameterSpaceSettings

if TYPE_CHECKING:
    from evomerge.search.preparing.prepare import Prepared

FROM_SOURCE, FROM_CANDIDATE = 0.4, 0.2
"""The share of right-or-wrong items that a merge answers otherwise than a source, and than another candidate.

On the miniatures 0.3 to 0.45 of the former, and 0.05 of candidates near the best to 0.4 of those far from it."""

CANDIDATES_A_STEP = 10
"""Candidates a parameter until CMA-ES has learnt a step size for each.

Covariances are learnt at a rate of mu_eff / n^2 a generation of lambda candidates (Hansen, arXiv:1604.00772), with
mu_eff about lambda / 4: in 4 n^2 candidates. A diagonal alone is learnt (n + 2) / 3 times as fast (Ros & Hansen, PPSN
2008): in 12 n, for which 10 n is usually said."""

CANDIDATES_A_COVARIANCE = 4
"""Times n^2: candidates until it has learnt the covariances of n parameters; see above."""

MIN_RUNG = 25
"""Items of a first rung: fewer tell only candidates apart that are very different (docs/scoring.md)."""

MIN_GENERATIONS = 10
"""Generations from which on a population is not too large for the budget."""

_GROWTH = 3  # from rung to rung, as rungs beyond the last grow


class Advice(BaseModel):
    """A key of the search file, the value that it had better have, and why."""

    key: str
    value: str
    text: str


class Outlook(BaseModel):
    """What to expect of a search; what cannot be known of it is None.

    Attributes:
        search_error: the standard error of a candidate's score on the search split, at most.
        luck: by how much the best of so many equal candidates looks better than it is, at most.
        held_out_difference: the difference between a merge and a source that held-out items tell from none, at 95%.
        candidates: those beyond baselines and start.
        population: of a generation.
        generations: so many of these.
        learns_steps: parameters whose step sizes so many candidates can learn; None where the optimizer learns none.
        learns_covariances: parameters whose covariances they can learn.
        advice: what would make the search a better one.
    """

    search_error: float | None
    luck: float | None
    held_out_difference: float | None
    candidates: int | None
    population: int
    generations: float | None
    learns_steps: int | None
    learns_covariances: int | None
    advice: list[Advice]


# ---- formulas --------------------------------------------------------------------------------------------------------


def largest_error(items: int) -> float:
    """The standard error of a mean of n scores from 0 to 1, at most: sqrt(p (1 - p) / n) for p = 1/2."""
    return 0.5 / math.sqrt(items)


def luck_of_the_best(candidates: int, error: float) -> float:
    """By how much the best of N equally good candidates is above them, were their errors independent.

    The expected largest of N normal numbers by Blom, Phi^-1((N - 3/8) / (N + 1/4)), times the standard error.
    """
    return max(0.0, float(special.ndtri((candidates - 0.375) / (candidates + 0.25)))) * error


def least_difference(items: int, differing: float, confidence: float) -> float:
    """The least mean paired difference of n right-or-wrong items that a one-sided test tells from none.

    Where a share q of the items is answered otherwise, a paired difference has a variance of at most q: z sqrt(q / n).
    """
    return float(special.ndtri(confidence)) * math.sqrt(differing / items)


def learnable(candidates: int) -> tuple[int, int]:
    """Of how many parameters CMA-ES learns step sizes, and of how many covariances, from so many candidates."""
    return candidates // CANDIDATES_A_STEP, math.isqrt(candidates // CANDIDATES_A_COVARIANCE)


def parameters_by_granularity(layers: int, outside: int, each: int) -> dict[str, int]:
    """How many parameters a space has at every granularity, the finest first.

    Args:
        layers: of the model.
        outside: groups beside the layers: embedding, norm, head.
        each: parameters of a group.
    """
    sizes = {"block": 2 * layers + outside, "layer": layers + outside}
    sizes |= {str(size): math.ceil(layers / size) + outside for size in range(2, layers // 2 + 1)}
    return {name: groups * each for name, groups in (sizes | {"model": 1}).items()}


def rungs_for(items: int) -> list[int]:
    """Rungs of a race on so many items: a tenth of them but at least 25, then three times as many; none where that
    spares little.
    """
    first = max(MIN_RUNG, round(items / 10))
    return [rung for rung in (first, _GROWTH * first) if rung < items] if items >= 4 * MIN_RUNG else []


# ---- of a search -----------------------------------------------------------------------------------------------------


def outlook_of(prepared: Prepared, given: int) -> Outlook:
    """What to expect of a search.

    Args:
        given: how many candidates nobody searches for: baselines, and those of earlier searches.
    """
    setup = prepared.setup
    budget = setup.budget.candidates
    searched = None if budget is None else max(0, budget - given)
    population = setup.build_optimizer().population
    objective = _least_known(setup)
    error = None if objective is None else largest_error(objective.items)
    held_out = None if objective is None else setup.evaluators[objective.evaluator].held_out_items
    steps, covariances = (None, None) if searched is None or not _learns_steps(setup) else learnable(searched)
    return Outlook(
        search_error=error,
        luck=None if error is None or not searched else luck_of_the_best(searched, error),
        held_out_difference=None if not held_out else least_difference(held_out, FROM_SOURCE, 0.975),
        candidates=searched,
        population=population,
        generations=None if searched is None else searched / population,
        learns_steps=steps,
        learns_covariances=covariances,
        advice=[
            *([] if searched is None else _on_size(prepared, searched, given, population)),
            *([] if objective is None else _on_rungs(setup)),
        ],
    )


def outlook_lines(setup: Setup, outlook: Outlook) -> Iterator[tuple[str, str]]:
    """The same for people, as lines of a plan."""
    objective = _least_known(setup)
    if objective is not None and outlook.search_error is not None:
        text = f"a score of {objective.items} search items has a standard error of {outlook.search_error:.3f} at most"
        if outlook.luck:
            text += f"; the best of {outlook.candidates} may look {outlook.luck:.2f} better than it is"
        yield "precision", f"{text} (scores from 0 to 1)"
        if outlook.held_out_difference is not None:
            items = setup.evaluators[objective.evaluator].held_out_items
            difference = f"{items} held-out items tell a merge from a source from {outlook.held_out_difference:.3f} on"
            yield "precision", f"{difference} (95%, if {FROM_SOURCE:.0%} of the answers differ)"
    if outlook.generations is not None:
        text = (
            f"{outlook.generations:.0f} of {outlook.population}: {outlook.candidates} candidates beyond the baselines"
        )
        if outlook.learns_steps is not None:
            text += (
                f", enough to learn about {outlook.learns_steps} step sizes, or the covariances of "
                f"{outlook.learns_covariances} parameters (a rule of thumb)"
            )
        yield "generations", text
    for advice in outlook.advice:
        yield "advice", f"{advice.key}: {advice.value}; {advice.text}"


def _least_known(setup: Setup) -> ObjectiveInfo | None:
    """The objective of the fewest items among those that are means of scores; None where all are counted."""
    scored = [
        o
        for o in setup.objectives
        if (name := setup.evaluators[o.evaluator].name) != "change" and not (name == "cost" and o.metric in COUNTED)
    ]
    return min(scored, key=lambda o: o.items, default=None)


def _learns_steps(setup: Setup) -> bool:
    return isinstance(setup.optimizer, StrategySettings | CatCmaSettings)


def _on_size(prepared: Prepared, searched: int, given: int, population: int) -> Iterator[Advice]:
    """Whether parameters, candidates and population go together."""
    setup = prepared.setup
    if not _learns_steps(setup) or setup.proxy is not None:  # whose gradient says of all parameters at once
        return
    count, affordable = len(setup.space.parameters), searched // CANDIDATES_A_STEP
    sizes, now = _sizes(prepared)
    if now == "adaptive":  # which frees as many parameters as candidates allow
        return
    if count > affordable:
        coarser = {name: n for name, n in sizes.items() if n < count}
        fitting = next((name for name, n in coarser.items() if n <= affordable), "model")
        few = f"{count} parameters are many for {searched} candidates, which learn {affordable}"
        if prepared.file.mode == "generational" and gradient_problem(setup.space) is None:
            text = f"{few}; of the likelihood of right answers the gradient by all of them is known"
            yield Advice(key="proxy", value="{file: FILE}", text=text)
        if fitting in coarser:
            text = f"{few}; {_called(fitting)} has {coarser[fitting]}"
            yield Advice(key="space.granularity", value=fitting, text=text)
        else:
            enough = given + CANDIDATES_A_STEP * count
            yield Advice(key="budget.candidates", value=str(enough), text=few)
    elif finer := next((name for name, n in sizes.items() if count < n <= affordable and now == "model"), ""):
        text = f"{searched} candidates learn {affordable} parameters; {_called(finer)} has {sizes[finer]}"
        yield Advice(key="space.granularity", value=finer, text=text)
    usual = max(default_population(count), searched // MIN_GENERATIONS, 4)
    if population > usual:
        text = f"{population} a generation leave {searched / population:.0f} generations"
        yield Advice(key="optimizer.population", value=str(usual), text=text)


def _sizes(prepared: Prepared) -> tuple[Mapping[str, int], str]:
    """How many parameters the space has at every granularity, and which it has; none where it has no such thing."""
    space, setup = prepared.file.space, prepared.setup
    if not isinstance(space, ParameterSpaceSettings) or space.profile is not None:
        return {}, ""
    model = prepared.sources[prepared.file.tokenizer_source]
    first = setup.space.parameters[0].group
    each = sum(p.group == first for p in setup.space.parameters)
    return parameters_by_granularity(model.layers, 2 if model.tied else 3, each), str(space.granularity)


def _called(granularity: str) -> str:
    """What has numbers of its own at a granularity, in words."""
    if granularity == "model":
        return "one group of all layers"
    return f"each {granularity} by itself" if granularity in ("block", "layer") else f"groups of {granularity} layers"


def _on_rungs(setup: Setup) -> Iterator[Advice]:
    """Whether a race would spare items, or its first rung is too short to tell anything."""
    items = max(setup.counts().values())
    rungs = rungs_for(items)
    keeps = setup.build_optimizer().keeps
    if not rungs or keeps == "all" or (isinstance(keeps, Best) and setup.optimizer.name == "greedy_soup"):
        return
    if setup.racing is None:
        text = f"every candidate is scored on all {items} items, and most are out after {rungs[0]}"
        yield Advice(key="racing.rungs", value=_listed(rungs), text=text)
    elif setup.racing.rungs[0] < MIN_RUNG:
        least = least_difference(setup.racing.rungs[0], FROM_CANDIDATE, setup.racing.confidence)
        text = f"a first rung of {setup.racing.rungs[0]} items tells candidates apart only from {least:.2f} on"
        yield Advice(key="racing.rungs", value=_listed(rungs), text=text)


def _listed(rungs: Sequence[int]) -> str:
    return f"[{', '.join(map(str, rungs))}]"
