"""Columns over all candidates, from which figures and studies are made; cached until the store has a new event."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from evomerge.report.confirmed import held_out
from evomerge.report.entries import measure_text
from evomerge.search.estimation.preference import Preference
from evomerge.search.estimation.statistics import mean_and_error
from evomerge.store import Store, summaries
from evomerge.store.events import Shortlist
from evomerge.store.record import Measure, Number
from evomerge.store.rows import Estimate, candidate_id
from evomerge.store.summaries import Measured

Numbers = NDArray[np.int64]
Values = NDArray[np.float64]
Mask = NDArray[np.bool_]

Result = TypeVar("Result")

_COLUMNS = (
    "number",
    "step",
    "origin",
    "label",
    "status",
    "same_as",
    "eligible",
    "on_front",
    "finished_at",
    "niche",
    "elite",
)
_MAX_KEPT = 4  # searches whose columns are cached: 10,000 candidates of 200 parameters take about 20 MB


class PerState(Generic[Result]):
    """A cached function of a store, recomputed only when the store has a new event."""

    def __init__(self, compute: Callable[[Store], Result]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], tuple[int, Result]] = OrderedDict()

    def __call__(self, store: Store) -> Result:
        key, newest = (store.place, store.search_id), summaries.last_event(store)
        with self._lock:
            kept = self._kept.get(key)
        if kept is not None and kept[0] == newest:
            return kept[1]
        result = self._compute(store)
        with self._lock:
            self._kept[key] = newest, result
            self._kept.move_to_end(key)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return result


class Columns:
    """All candidates of a search, by number.

    Attributes:
        numbers: int64 [n]; ``step``, ``eligible``, ``on_front``, ``elite`` and ``finished_at`` (seconds since 1970, NaN
            if unfinished) have the same order.
        niches: the bin of each candidate along each feature; empty if it has no niche.
        origins, labels, statuses: texts [n].
        own: bool [n]: whether the candidate was scored itself, instead of reusing the scores of an equal recipe.
    """

    def __init__(self, store: Store) -> None:
        self.search = store.search()
        columns = summaries.columns(store, _COLUMNS)
        self.numbers: Numbers = np.array(columns["number"], dtype=np.int64)
        self.step: Numbers = np.array(columns["step"], dtype=np.int64)
        self.origins: list[str] = columns["origin"]
        self.labels: list[str] = columns["label"]
        self.statuses: NDArray[np.str_] = np.array(columns["status"], dtype=np.str_)
        self.own: Mask = np.array([same is None for same in columns["same_as"]], dtype=np.bool_)
        self.eligible: Mask = np.array(columns["eligible"], dtype=np.bool_)
        self.on_front: Mask = np.array(columns["on_front"], dtype=np.bool_)
        self.niches: list[list[int]] = [niche or [] for niche in columns["niche"]]
        self.elite: Mask = np.array(columns["elite"], dtype=np.bool_)
        self.finished_at: Values = np.array(
            [np.nan if at is None else at for at in columns["finished_at"]], dtype=np.float64
        )
        self._measured: dict[str, Measured] = {}

    @property
    def objectives(self) -> tuple[Measure, ...]:
        """The objectives of the search, in order."""
        return self.search.record.objectives

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Objectives, constraints and features."""
        return self.search.record.measures

    def objective(self, name: str | None) -> Measure:
        """An objective by name, by default the first one. Raises KeyError if there is none with this name."""
        return self.objectives[0] if name is None else {o.name: o for o in self.objectives}[name]

    @cached_property
    def preference(self) -> Preference:
        """The preference by which the search chooses."""
        return Preference.of_search(self.search)

    @property
    def numbers_that_decide(self) -> Sequence[Number]:
        """What the choice is based on: the only objective, the scalarisation, or all objectives of a front."""
        if not self.preference.scalar:
            return self.objectives
        items = sum(o.items for o in self.objectives)
        return [Number(name=self.preference.scalar, maximise=self.preference.sign < 0, items=items)]

    def measured(self, store: Store, name: str) -> Measured:
        """Means, standard errors and numbers of items of a measure or of the scalarisation, [n] each; read once.

        Unknown means and errors are NaN, unknown numbers of items 0.
        """
        if name == self.preference.scalar and name not in self._measured:
            self._measured[name] = self._scalars(store)
        if name not in self._measured:
            self._measured[name] = summaries.measured(store, name, self.numbers)
        return self._measured[name]

    def _scalars(self, store: Store) -> Measured:
        """The value of the scalarisation of each candidate, scaled as everywhere else; its error is unknown."""
        known = [self.measured(store, o.name) for o in self.objectives]
        signs = [-o.sign for o in self.objectives]
        losses = np.stack([sign * means for sign, (means, _, _) in zip(signs, known, strict=True)], axis=1)
        order = self.preference.order(losses, losses[self.on_front | self.baseline])
        items = np.sum([items for _, _, items in known], axis=0)
        return self.preference.sign * order + 0.0, np.full(len(order), np.nan), items

    @cached_property
    def baseline(self) -> Mask:
        """Which candidates are baselines, which are asked for first."""
        return np.asarray(self.step == 0)

    @cached_property
    def names(self) -> list[str]:
        """The display name of each candidate: its id, and its label if it has one."""
        ids = map(candidate_id, self.numbers.tolist())
        return [f"{name} {label}".strip() for name, label in zip(ids, self.labels, strict=True)]

    def of_origin(self, origin: str) -> Mask:
        """Which candidates have this origin: a kind of baseline, or the optimizer."""
        return np.array([name == origin for name in self.origins], dtype=np.bool_)

    def hours(self) -> Values:
        """Hours from the start of the search to the end of each candidate, including pauses; NaN if unfinished."""
        return (self.finished_at - self.search.created_at) / 3600


columns_of: PerState[Columns] = PerState(Columns)
"""The candidates of a search, read again when it has new events."""


def confirmed_values(store: Store, columns: Columns) -> dict[int, Mapping[str, Estimate]]:
    """The held-out measures of the candidates on the latest shortlist, by candidate number."""
    frozen = store.events(kinds=("shortlist",), newest=1)
    if not frozen:
        return {}
    shortlist = frozen[0].read(Shortlist).candidates
    return {number: values for number in shortlist if (values := _held_out(store, number, columns.measures))}


def _held_out(store: Store, number: int, measures: Sequence[Measure]) -> dict[str, Estimate]:
    items = held_out(store, number, measures)
    return {name: mean_and_error(values) for name, values in items.items()}


def thinned(mask: Mask, keep: Mask, most: int) -> Mask:
    """All of ``mask`` [n] that are also in ``keep`` [n], and at most ``most`` others, spread evenly."""
    rest = np.flatnonzero(mask & ~keep)
    if len(rest) > most:
        rest = rest[np.linspace(0, len(rest) - 1, most).round().astype(np.int64)]
    kept: Mask = mask & keep
    kept[rest] = True
    return kept


def value_text(name: str, mean: float, error: float, items: int, wanted: int) -> str:
    """A measure of a candidate on the search split: 'maths 0.620 ± 0.024 on 200 items'."""
    text = f"{name} {number_text(name, mean, error)}"
    return f"{text} on {items} items" if items >= wanted else f"{text} estimated from {items} of {wanted} items"


def number_text(name: str, mean: float, error: float) -> str:
    """A mean with its error. A scalarisation, whose name has a space, has no error on the search split."""
    return f"{mean:.3f}" if " " in name and math.isnan(error) else measure_text(mean, error)


def axis_title(measure: Number) -> str:
    """A measure and its direction, kept short for narrow screens."""
    return f"{measure.name} {'↑' if measure.maximise else '↓'}"
