"""What a budget buys: how well scores distinguish models, how many generations there are, and what these can learn.

It is computed from the search's own numbers, before anything is scored. The spread of scores is unknown then, so they
are assumed to be from 0 to 1; and how much CMA-ES learns from a number of candidates is a rule of thumb.
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
from evomerge.report.entries import count_text
from evomerge.search.preparing.setup import ObjectiveInfo, Setup
from evomerge.search.settings.gradient import gradient_problem
from search_spaces.parameter_space import ParameterSpaceSettings

if TYPE_CHECKING:
    from evomerge.search.preparing.prepare import Prepared

FROM_SOURCE, FROM_CANDIDATE = 0.4, 0.2
"""The share of right-or-wrong items that a merge answers differently from a source, and from another candidate.

On the miniatures, the former is 0.3 to 0.45, and the latter from 0.05 near the best candidates to 0.4 far from them."""

CANDIDATES_A_STEP = 10
"""Candidates per parameter until CMA-ES has learnt a step size for each.

Covariances are learnt at a rate of mu_eff / n^2 per generation of lambda candidates (Hansen, arXiv:1604.00772), with
mu_eff about lambda / 4: in 4 n^2 candidates. A diagonal alone is learnt (n + 2) / 3 times as fast (Ros & Hansen, PPSN
2008): in 12 n, commonly rounded to 10 n."""

CANDIDATES_A_COVARIANCE = 4
"""Times n^2: candidates until it has learnt the covariances of n parameters; see above."""

MIN_RUNG = 25
"""Items of a first rung: fewer only distinguish very different candidates (docs/scoring.md)."""

MIN_GENERATIONS = 10
"""With fewer generations, a population is too large for the budget."""

_GROWTH = 3  # from rung to rung, like the rungs beyond the last one


class Advice(BaseModel):
    """A key of the search file, a better value for it, and the reason."""

    key: str
    value: str
    text: str


class Outlook(BaseModel):
    """What to expect from a search; unknown values are None.

    Attributes:
        search_error: the maximum standard error of a candidate's score on the search split.
        luck: the maximum by which the best of this many equal candidates looks better than it is.
        held_out_difference: the smallest difference between a merge and a source that held-out items detect, at 95%.
        candidates: the number of candidates beyond baselines and start.
        population: the size of a generation.
        generations: the number of generations.
        learns_steps: for how many parameters they suffice to learn step sizes; None if the optimizer has none.
        learns_covariances: for how many parameters they suffice to learn covariances.
        advice: how to improve the search.
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
    """The maximum standard error of a mean of n scores from 0 to 1: sqrt(p (1 - p) / n) for p = 1/2."""
    return 0.5 / math.sqrt(items)


def luck_of_the_best(candidates: int, error: float) -> float:
    """How far the best of N equally good candidates is above their mean, if their errors are independent.

    The expected maximum of N normal numbers by Blom, Phi^-1((N - 3/8) / (N + 1/4)), times the standard error.
    """
    return max(0.0, float(special.ndtri((candidates - 0.375) / (candidates + 0.25)))) * error


def least_difference(items: int, differing: float, confidence: float) -> float:
    """The smallest mean paired difference of n right-or-wrong items that a one-sided test detects.

    If a share q of the items is answered differently, a paired difference has a variance of at most q: z sqrt(q / n).
    """
    return float(special.ndtri(confidence)) * math.sqrt(differing / items)


def learnable(candidates: int) -> tuple[int, int]:
    """For how many parameters CMA-ES can learn step sizes, and for how many covariances, from this many candidates."""
    return candidates // CANDIDATES_A_STEP, math.isqrt(candidates // CANDIDATES_A_COVARIANCE)


def parameters_by_granularity(layers: int, outside: int, each: int) -> dict[str, int]:
    """The number of parameters of a space at every granularity, finest first.

    Args:
        layers: the number of layers of the model.
        outside: the number of groups outside of the layers: embedding, norm, head.
        each: the number of parameters per group.
    """
    sizes = {"block": 2 * layers + outside, "layer": layers + outside}
    sizes |= {str(size): math.ceil(layers / size) + outside for size in range(2, layers // 2 + 1)}
    return {name: groups * each for name, groups in (sizes | {"model": 1}).items()}


def rungs_for(items: int) -> list[int]:
    """Rungs of a race on this many items: a tenth but at least 25, then three times as many; empty if that saves
    little.
    """
    first = max(MIN_RUNG, round(items / 10))
    return [rung for rung in (first, _GROWTH * first) if rung < items] if items >= 4 * MIN_RUNG else []


# ---- of a search -----------------------------------------------------------------------------------------------------


def outlook_of(prepared: Prepared, given: int) -> Outlook:
    """What to expect from a search.

    Args:
        given: the number of candidates that are not searched for: baselines, and those from earlier searches.
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
    """The outlook for people, as lines of a plan."""
    objective = _least_known(setup)
    if objective is not None and outlook.search_error is not None:
        text = f"a score of {objective.items} search items has a standard error of {outlook.search_error:.3f} at most"
        if outlook.luck:
            text += f"; the best of {outlook.candidates} may look {outlook.luck:.2f} better than it is"
        yield "precision", f"{text} (scores from 0 to 1)"
        if outlook.held_out_difference is not None:
            items = setup.evaluators[objective.evaluator].held_out_items
            least = f"{outlook.held_out_difference:.3f} or more between a merge and a source"
            how = f"(95%, if {FROM_SOURCE:.0%} of the answers differ)"
            yield "precision", f"{items} held-out items detect differences of {least} {how}"
    if outlook.generations is not None:
        yield "generations", _generations(outlook)
    for advice in outlook.advice:
        yield "advice", f"{advice.key}: {advice.value}; {advice.text}"


def _generations(outlook: Outlook) -> str:
    """How many generations there are, and what can be learnt from them."""
    if not outlook.candidates:
        return "none: the baselines use up the budget, and nothing is searched"
    beyond = f"{count_text(outlook.candidates, 'candidate')} beyond the baselines"
    text = f"{outlook.generations:.0f} of {outlook.population}: {beyond}"
    if outlook.learns_steps is None:
        return text
    if not outlook.learns_steps:
        return f"{text}, too few to learn a step size (a rule of thumb)"
    steps = count_text(outlook.learns_steps, "step size")
    covariances = count_text(outlook.learns_covariances or 0, "parameter")
    return f"{text}, enough to learn about {steps}, or the covariances of {covariances} (a rule of thumb)"


def _least_known(setup: Setup) -> ObjectiveInfo | None:
    """The objective with the fewest items among those that are means of scores; None if all are counted."""
    scored = [
        o
        for o in setup.objectives
        if (name := setup.evaluators[o.evaluator].name) != "change" and not (name == "cost" and o.metric in COUNTED)
    ]
    return min(scored, key=lambda o: o.items, default=None)


def _learns_steps(setup: Setup) -> bool:
    return isinstance(setup.optimizer, StrategySettings | CatCmaSettings)


def _on_size(prepared: Prepared, searched: int, given: int, population: int) -> Iterator[Advice]:
    """Whether the numbers of parameters, candidates and generations match."""
    setup = prepared.setup
    if not _learns_steps(setup) or setup.proxy is not None:  # its gradient covers all parameters at once
        return
    count, affordable = len(setup.space.parameters), searched // CANDIDATES_A_STEP
    sizes, now = _sizes(prepared)
    if now == "adaptive":  # it frees as many parameters as candidates allow
        return
    if count > affordable:
        coarser = {name: n for name, n in sizes.items() if n < count}
        fitting = next((name for name, n in coarser.items() if n <= affordable), "model")
        known = f"{count_text(searched, 'candidate')} can learn {affordable or 'none'}"
        few = f"{count_text(count, 'parameter')} are many: {known}"
        if prepared.file.mode == "generational" and gradient_problem(setup.space) is None:
            text = f"{few}; the gradient of the likelihood of right answers covers all of them at once"
            yield Advice(key="proxy", value="{file: FILE}", text=text)
        if fitting in coarser:
            text = f"{few}; {_called(fitting)} has {coarser[fitting]}"
            yield Advice(key="space.granularity", value=fitting, text=text)
        else:
            enough = given + CANDIDATES_A_STEP * count
            yield Advice(key="budget.candidates", value=str(enough), text=few)
    elif finer := next((name for name, n in sizes.items() if count < n <= affordable and now == "model"), ""):
        text = f"{searched} candidates can learn {affordable} parameters; {_called(finer)} has {sizes[finer]}"
        yield Advice(key="space.granularity", value=finer, text=text)
    usual = max(default_population(count), searched // MIN_GENERATIONS, 4)
    if population > usual:
        leaves = count_text(round(searched / population), "generation")
        text = f"{leaves} of {population} candidates; smaller ones are better than so few"
        yield Advice(key="optimizer.population", value=str(usual), text=text)


def _sizes(prepared: Prepared) -> tuple[Mapping[str, int], str]:
    """The number of parameters at every granularity, and the granularity of the space; empty if it has none."""
    space, setup = prepared.file.space, prepared.setup
    if not isinstance(space, ParameterSpaceSettings) or space.profile is not None:
        return {}, ""
    model = prepared.sources[prepared.file.tokenizer_source]
    first = setup.space.parameters[0].group
    each = sum(p.group == first for p in setup.space.parameters)
    return parameters_by_granularity(model.layers, 2 if model.tied else 3, each), str(space.granularity)


def _called(granularity: str) -> str:
    """A granularity in words: what has its own numbers."""
    if granularity == "model":
        return "one group of all layers"
    return f"each {granularity} by itself" if granularity in ("block", "layer") else f"groups of {granularity} layers"


def _on_rungs(setup: Setup) -> Iterator[Advice]:
    """Whether a race would save items, or its first rung is too small to be useful."""
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
