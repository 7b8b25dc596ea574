"""Where a search stands, as data: what `status --json` prints and every screen draws."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from evomerge.errors import InputError
from evomerge.search.folder import open_store
from evomerge.search.statistics import mean_and_error, paired_difference, sign_test
from evomerge.store import CandidateRow, SearchRow, Store, current_holder
from evomerge.store.front import knee

_RECENT = 200  # candidates that the time split and the failures are taken from, so that a status costs the same always


class Value(BaseModel):
    """An objective of a candidate: the mean over ``n`` items and its standard error, as the metric gives it."""

    mean: float
    stderr: float
    n: int


class Gap(BaseModel):
    """The paired difference to another model on the same items; positive is better, whichever way the metric goes."""

    to: str
    mean: float
    low: float
    high: float


class ConfirmedValue(Value):
    """A value on the held-out split, with its differences to every source and the uniform average."""

    difference: list[Gap]


class Entry(BaseModel):
    """A candidate with its objectives on the search split."""

    id: str
    label: str
    objectives: dict[str, Value]


class ConfirmedEntry(BaseModel):
    """A candidate with its objectives on the held-out split."""

    id: str
    label: str
    objectives: dict[str, ConfirmedValue]


class Counts(BaseModel):
    """Candidates by what became of them: asked = done + failed + cached + running + those that wait."""

    asked: int
    done: int
    failed: int
    cached: int
    running: int


class Budget(BaseModel):
    """What the search may spend and what it has spent."""

    candidates: int | None
    hours: float | None
    hours_spent: float


class SearchStatus(BaseModel):
    """A search at one moment. ``best`` is the best by the first objective; ``winner`` is chosen on held-out items."""

    name: str
    state: str
    why: str
    space: str
    optimizer: str
    parameters: int
    candidates: Counts
    budget: Budget
    directions: dict[str, str]
    sources: list[str]
    best: Entry | None
    baselines: list[Entry]
    front: list[str]
    front_entries: list[Entry]
    failures: dict[str, int]
    seconds: dict[str, float]
    confirmed: list[ConfirmedEntry]
    confirmed_baselines: list[Entry]
    winner: str | None

    def confirmed_values(self, candidate: str) -> Mapping[str, Value]:
        """A candidate's objectives on the held-out split, baselines included; empty when it has none."""
        known: dict[str, Mapping[str, Value]] = {found.id: found.objectives for found in self.confirmed}
        known |= {found.id: found.objectives for found in self.confirmed_baselines}
        return known.get(candidate, {})


def candidate_id(number: int) -> str:
    """How a candidate is named to people: c0042."""
    return f"c{number:04d}"


def candidate_number(text: str, store: Store) -> int:
    """The number of the candidate that a person names by its id, its number, or the label of a landmark.

    Raises:
        InputError: there is none.
    """
    for row in store.candidates(step=0):
        if row.label == text:
            return row.number
    digits = text.removeprefix("c")
    if digits.isdecimal() and int(digits) < sum(store.counts().values()):
        return int(digits)
    raise InputError(text, "is no candidate of this search", "`evomerge top` lists them; a source goes by its name.")


def chosen(store: Store, candidate: str) -> int:
    """The number of the candidate that a person names: by its id, a source's name, "best" or "knee".

    "best" is the winner of the confirmation, else the best by the first objective; "knee" the best compromise on the
    front.

    Raises:
        InputError: there is no such candidate, or none has been scored.
    """
    status = status_of(store)
    if candidate == "best":
        if status.winner is not None:
            return int(status.winner.removeprefix("c"))
        if status.best is None:
            raise InputError(store.place, "has no candidate with scores yet")
        return int(status.best.id.removeprefix("c"))
    if candidate == "knee":
        front = store.front()
        if not front:
            raise InputError(store.place, "has no front yet")
        return front[knee(np.array([row.losses for row in front], dtype=np.float64))].number
    return candidate_number(candidate, store)


def depths_of(store: Store) -> dict[str, int]:
    """How many layers each source has, from the landmarks: each source alone is one."""
    sources = store.search().settings["sources"]
    alone = {row.label: row.recipe for row in store.candidates(step=0) if row.label in sources}
    return {name: len(json.loads(alone[name])["hops"]) for name in sources if name in alone}


def read_status(folder: Path) -> SearchStatus:
    """The status of the search in a folder."""
    with open_store(folder) as store:
        return status_of(store)


def status_of(store: Store) -> SearchStatus:
    """The status of a search. Costs a few queries, however many candidates there are."""
    search = store.search()
    settings, objectives = search.settings, search.fingerprints["objectives"]
    counts = store.counts()
    driven = current_holder(store) is not None
    state = search.state
    if state in ("running", "paused", "confirming") and not driven:
        state = "interrupted"
    spent_s = search.spent_s
    if driven and state == "running":  # what is spent is recorded with each tell
        (last,) = store.events(kinds=("lease", "tell"), newest=1)
        spent_s += time.time() - last.time
    first = objectives[0]
    best = store.best(first["name"], maximise=first["maximise"])
    recent = store.candidates(statuses=["done"], newest=_RECENT)
    failed = store.candidates(statuses=["failed"], newest=_RECENT)
    front = store.front()
    landmarks = store.candidates(step=0)
    confirmed, confirmed_baselines, winner = confirmation(store, search, landmarks)
    return SearchStatus(
        name=search.name,
        state=state,
        why=search.why,
        space=describe_space(settings["space"]),
        optimizer=settings["optimizer"]["name"],
        parameters=len(search.fingerprints["parameters"]),
        candidates=Counts(
            asked=sum(counts.values()),
            done=counts["done"],
            failed=counts["failed"],
            cached=counts["cached"],
            running=counts["running"],
        ),
        budget=Budget(
            candidates=settings["budget"]["candidates"],
            hours=settings["budget"]["hours"],
            hours_spent=spent_s / 3600,
        ),
        directions={o["name"]: "maximize" if o["maximise"] else "minimize" for o in objectives},
        sources=[row.label for row in landmarks if row.origin == "source"] or list(settings["sources"]),
        best=entry(best[0]) if best else None,
        baselines=[entry(row) for row in landmarks if row.objectives],
        front=[candidate_id(row.number) for row in front],
        front_entries=[entry(row) for row in front],
        failures=dict(Counter([*(row.failure["reason"] for row in failed if row.failure), *_unconfirmed(store)])),
        seconds=_mean_seconds(recent),
        confirmed=confirmed,
        confirmed_baselines=confirmed_baselines,
        winner=winner,
    )


def entry(row: CandidateRow) -> Entry:
    """A row of the store in the words of people."""
    values = {name: Value(**found) for name, found in row.objectives.items()}
    return Entry(id=candidate_id(row.number), label=row.label, objectives=values)


def _unconfirmed(store: Store) -> list[str]:
    """Why candidates could not be scored on the held-out split."""
    events = store.events(kinds=("confirm failed",), newest=_RECENT)
    return [f"{event.payload['reason']} in confirmation" for event in events if event.payload["final"]]


def _mean_seconds(rows: Sequence[CandidateRow]) -> dict[str, float]:
    """Mean seconds of each phase over these candidates."""
    phases = dict.fromkeys(phase for row in rows for phase in row.timings)
    return {phase: float(np.mean([row.timings.get(phase, 0.0) for row in rows])) for phase in phases}


def describe_space(space: dict[str, object]) -> str:
    """The space in a few words: how paths are encoded, method and granularity."""
    told = [str(space[key]) for key in ("encoding", "method", "granularity") if space.get(key) is not None]
    return " ".join([*([str(space["kind"]).replace("_", " ")] if "encoding" in space else []), *told])


def confirmation(
    store: Store, search: SearchRow, landmarks: Sequence[CandidateRow]
) -> tuple[list[ConfirmedEntry], list[Entry], str | None]:
    """What is known from the held-out split: the shortlist with its paired differences, baselines, and the winner."""
    events = store.events(kinds=("shortlist", "winner"))
    shortlist = [event for event in events if event.kind == "shortlist"]
    if not shortlist:
        return [], [], None
    objectives = search.fingerprints["objectives"]
    confidence = search.settings["confirm"]["confidence"]
    scored = {row.number: held_out(store, row.number, objectives) for row in landmarks}
    others = {row.label: scored[row.number] for row in landmarks if row.origin in ("source", "average")}
    confirmed = []
    for number in shortlist[-1].payload["candidates"]:
        if ours := held_out(store, number, objectives):
            values = {o["name"]: _confirmed(o, ours, others, confidence) for o in objectives}
            label = store.candidate(number).label
            confirmed.append(ConfirmedEntry(id=candidate_id(number), label=label, objectives=values))
    baselines = [
        Entry(
            id=candidate_id(row.number),
            label=row.label,
            objectives={name: Value(**mean_and_error(values)) for name, values in scored[row.number].items()},
        )
        for row in landmarks
        if scored[row.number]
    ]
    # A winner of an earlier shortlist is none: the one that counts has not been scored to its end.
    winners = [e.payload["candidate"] for e in events if e.kind == "winner" and e.seq > shortlist[-1].seq]
    winner = candidate_id(winners[-1]) if winners else None
    return confirmed, baselines, winner


def held_out(store: Store, number: int, objectives: Sequence[dict[str, object]]) -> dict[str, NDArray[np.float32]]:
    """A candidate's held-out scores, float32 [items], for each objective; empty while it has none."""
    found = {scores.evaluator: scores.metrics for scores in store.scores(number, "held_out")}
    if any(o["version"] not in found for o in objectives):
        return {}
    return {str(o["name"]): found[str(o["version"])][str(o["metric"])] for o in objectives}


def _confirmed(
    objective: dict[str, object],
    ours: dict[str, NDArray[np.float32]],
    others: dict[str, dict[str, NDArray[np.float32]]],
    confidence: float,
) -> ConfirmedValue:
    name, sign = str(objective["name"]), 1.0 if objective["maximise"] else -1.0
    gaps = [
        Gap(to=label, **vars(paired_difference(sign * ours[name], sign * theirs[name], confidence)))
        for label, theirs in others.items()
        if theirs
    ]
    return ConfirmedValue(**mean_and_error(ours[name]), difference=gaps)


class Comparison(BaseModel):
    """Two candidates in one objective on one split; positive differences mean that the first is better.

    ``p`` is that of the two-sided sign test on the items where they differ: for right-or-wrong scores, McNemar's exact
    test.
    """

    objective: str
    split: str
    n: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    better_a: int
    better_b: int
    p: float


def compared(store: Store, a: int, b: int) -> list[Comparison]:
    """Two candidates on every split that both were scored on."""
    search = store.search()
    confidence = search.settings["confirm"]["confidence"]
    found = []
    for split in ("search", "held_out"):
        scores_a, scores_b = ({s.evaluator: s for s in store.scores(number, split)} for number in (a, b))
        for objective in search.fingerprints["objectives"]:
            version, metric = objective["version"], objective["metric"]
            if version in scores_a and version in scores_b:
                items = objective["items"] if split == "search" else None
                one, other = (scores[version].metrics[metric][:items] for scores in (scores_a, scores_b))
                found.append(_compare(objective, split, one, other, confidence))
    return found


def _compare(
    objective: dict[str, object],
    split: str,
    one: NDArray[np.float32],
    other: NDArray[np.float32],
    confidence: float,
) -> Comparison:
    sign = 1.0 if objective["maximise"] else -1.0
    gap = paired_difference(sign * one, sign * other, confidence)
    better_a, better_b = int((sign * one > sign * other).sum()), int((sign * one < sign * other).sum())
    return Comparison(
        objective=str(objective["name"]),
        split=split,
        n=len(one),
        a=float(one.mean(dtype=np.float64)),
        b=float(other.mean(dtype=np.float64)),
        difference=gap.mean,
        low=gap.low,
        high=gap.high,
        better_a=better_a,
        better_b=better_b,
        p=sign_test(better_a, better_b),
    )
