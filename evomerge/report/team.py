"""A team of candidates for people: its members, and its coverage compared with its best member and the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.table import Table

from evomerge.errors import InputError
from evomerge.report.confirmed import better, held_out
from evomerge.search.estimation.statistics import paired_difference
from evomerge.search.estimation.team import coverage, greedy_team, majority
from evomerge.store import CandidateRow, Store
from evomerge.store.events import TeamChosen
from evomerge.store.record import Measure

Matrix = NDArray[np.float64]

MAX = 8
"""The maximum size of a team: nobody would run more models."""

_CURVE_POINTS = 40


class Share(BaseModel):
    """A share of the held-out items, and how far the team's coverage is above it, with its 95% interval."""

    share: float
    difference: float
    low: float
    high: float


class Member(BaseModel):
    """A member of a team, on the held-out items: its mean, overall and by objective, the share that it alone solves,
    and the coverage of the team up to it.
    """

    number: int
    id: str
    label: str
    mean: float
    by_objective: dict[str, float]
    alone: float
    covered: float


class Team(BaseModel):
    """The results of a team on the held-out items of all objectives that are maximised.

    Attributes:
        items: the number of items.
        objectives: the number of items of each objective, in order.
        members: the members in the order in which they were chosen.
        coverage: the share of items that at least one member solves.
        majority: the share of items that more than half of the members solve.
        against: comparisons by name: with its best member, the best source, the best team of equally many sources, and
            all sources together.
        solved: for each member whether it solves each item, as a text of 0 and 1, or tenths in between.
    """

    items: int
    objectives: dict[str, int]
    members: list[Member]
    coverage: float
    majority: float
    against: dict[str, Share]
    solved: list[str]


def search_scores(store: Store, rows: list[CandidateRow], measures: list[Measure]) -> tuple[list[int], Matrix]:
    """The numbers of candidates with scores on all items, and their scores: float64 [candidates, items]."""
    numbers, found = [], []
    for row in rows:
        by_version = {scores.evaluator: scores for scores in store.scores(row.number, "search")}
        if any(m.version not in by_version or len(by_version[m.version].items) < m.items for m in measures):
            continue
        numbers.append(row.number)
        found.append(np.concatenate([better(m, by_version[m.version].metrics[m.metric][: m.items]) for m in measures]))
    return numbers, np.array(found)


def maximised(store: Store) -> list[Measure]:
    """The objectives whose items can be covered. Raises InputError if none is maximised."""
    measures = [objective for objective in store.search().record.objectives if objective.sign > 0]
    if not measures:
        raise InputError("objectives", "none is maximised, and a team covers items that are solved")
    return measures


def choose_team(store: Store, count: int) -> TeamChosen:
    """Choose the members of a team on the search split, in the form in which they are recorded.

    Raises:
        InputError: too few candidates are scored on all items, or ``count`` is out of range.
    """
    if not 2 <= count <= MAX:
        raise InputError("-k", f"is {count}", f"A team has 2 to {MAX} members.")
    rows = [row for row in store.candidates() if row.status == "done"]
    numbers, scores = search_scores(store, rows, maximised(store))
    if len(numbers) < count:
        problem = f"{len(numbers)} candidates are scored on all items, which is fewer than {count}"
        raise InputError("-k", problem, f"Take {len(numbers)}, or go on with the search.")
    baselines = sum(row.step == 0 for row in rows)
    sizes = np.unique(np.geomspace(max(baselines, count), len(numbers), _CURVE_POINTS).round().astype(int)).tolist()
    curve = [(size, *_offered(scores[:size], count)) for size in sizes]
    return TeamChosen(candidates=[numbers[place] for place in greedy_team(scores, count)], curve=curve)


def _offered(scores: Matrix, count: int) -> tuple[float, float]:
    """The coverage of the best team of this size, and what the best candidate solves."""
    return float(coverage(list(scores[greedy_team(scores, count)])).mean()), float(scores.mean(axis=1).max())


def team_of(store: Store) -> Team | None:
    """The latest team, as far as it is scored; None if there is none."""
    events = store.events(kinds=("team",))
    if not events:
        return None
    members = [store.candidate(number) for number in events[-1].read(TeamChosen).candidates]
    measures = maximised(store)
    scores = [_held_out(store, row, measures) for row in members]
    known = [one for one in scores if one is not None]
    if len(known) < len(members):
        return None
    sources = [
        (row, one)
        for row in store.candidates(step=0)
        if row.origin == "source" and (one := _held_out(store, row, measures)) is not None
    ]
    covered = coverage(known)
    beside = {"its best member": known[int(np.argmax([one.mean() for one in known]))]}
    if sources:
        rows, values = zip(*sources, strict=True)
        beside["the best source"] = values[int(np.argmax([one.mean() for one in values]))]
        numbers, found = search_scores(store, list(rows), measures)
        chosen = [numbers[place] for place in greedy_team(found, len(members))] if numbers else []
        picked = [one for row, one in sources if row.number in chosen]
        if len(picked) > 1:
            beside[f"the best {len(picked)} sources together"] = coverage(picked)
        if len(values) > 1:
            beside["all sources together"] = coverage(values)
    evaluators = store.search().record.evaluators
    objectives = {measure.name: evaluators[measure.evaluator].held_out_items for measure in measures}
    return Team(
        items=len(covered),
        objectives=objectives,
        members=[_member(members[place], place, known, objectives) for place in range(len(members))],
        coverage=float(covered.mean()),
        majority=float(majority(known).mean()),
        against={name: _share(covered, other) for name, other in beside.items()},
        solved=["".join(str(min(9, int(value * 9.99))) for value in np.clip(one, 0, 1)) for one in known],
    )


def _member(row: CandidateRow, place: int, known: Sequence[Matrix], objectives: Mapping[str, int]) -> Member:
    """The results of the member at a position in a team; ``known`` are the held-out scores of all members."""
    own, others = known[place], [*known[:place], *known[place + 1 :]]
    parts = np.split(own, np.cumsum(list(objectives.values()))[:-1])
    return Member(
        number=row.number,
        id=row.id,
        label=row.label,
        mean=float(own.mean()),
        by_objective={name: float(part.mean()) for name, part in zip(objectives, parts, strict=True)},
        alone=float(np.maximum(own - coverage(others), 0.0).mean()) if others else float(own.mean()),
        covered=float(coverage(known[: place + 1]).mean()),
    )


def _held_out(store: Store, row: CandidateRow, measures: list[Measure]) -> Matrix | None:
    """A candidate's held-out scores of all measures, concatenated: float64 [items]; None while it has none."""
    items = held_out(store, row.number if row.same_as is None else row.same_as, measures)
    return np.concatenate([better(m, items[m.name]) for m in measures]) if items else None


def _share(covered: Matrix, other: Matrix) -> Share:
    gap = paired_difference(covered.astype(np.float32), other.astype(np.float32), 0.95)
    return Share(share=float(other.mean()), difference=gap.mean, low=gap.low, high=gap.high)


def team_section(team: Team, number: int) -> str:
    """What a member solves compared with the others, for its card."""
    place = next(place for place, one in enumerate(team.members) if one.number == number)
    own = team.members[place]
    titles = ["member", *(f"{name} ({items} items)" for name, items in team.objectives.items()), "all", "it alone"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for one in team.members:
        shares = [*one.by_objective.values(), one.mean, one.alone]
        name = f"**{one.id}, this model**" if one.number == number else one.id
        lines.append(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} |")
    return (
        f"## Team\n\nThis model is one of {len(team.members)} that were chosen to solve most together. Of "
        f"{team.items:,} held-out items it solves {own.mean:.1%}, and {own.alone:.1%} no other member does. At least "
        f"one member solves {team.coverage:.1%}, and more than half of them {team.majority:.1%}. To have what a team "
        "covers, somebody or something must know which member's answer is right.\n\n" + "\n".join(lines)
    )


def team_tables(team: Team) -> tuple[Table, Table]:
    """Tables of its members and of its comparisons, for a terminal."""
    members = Table("member", "held out", "covered so far", box=None, pad_edge=False)
    for one in team.members:
        members.add_row(f"{one.id} {one.label}".strip(), f"{one.mean:.3f}", f"{one.covered:.3f}")
    beside = Table("beside it", "covers", "the team more by", box=None, pad_edge=False)
    for name, share in team.against.items():
        beside.add_row(name, f"{share.share:.3f}", f"{share.difference:+.3f} [{share.low:+.3f}, {share.high:+.3f}]")
    return members, beside
