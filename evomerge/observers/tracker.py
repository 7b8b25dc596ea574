"""The base of experiment trackers: a run for the search, a row per candidate, and the front at the end."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.observers.base import ENDED, News, Observer, ObserverState, genome_of, named
from evomerge.store.events import State
from evomerge.store.rows import CandidateRow

Row = Mapping[str, float | str | None]


class Tracker(Observer):
    """Reports candidates in the order in which they ended, and saves its position, so that a resumed search continues.

    If a process is killed between reporting and saving, its last second is reported again.
    """

    def __init__(self, kept: ObserverState) -> None:
        self.kept = kept
        self.seq = kept.content.get("seq", 0)
        self._step: int = kept.content.get("told", 0)
        self._best: dict[str, float] = kept.content.get("best", {})

    def tell(self, news: News) -> None:
        if not news.events:
            return
        for event in news.events:
            if (row := news.ended_by(event)) is not None:
                self._step += 1
                self.candidate(self._step, row, self._values(row, news), genome_of(row, news.search))
        if any(event.kind == "state" and event.read(State).state in ENDED for event in news.events):
            self.front(self._step, [_front_row(row, news) for row in news.front], news)
        self.flush()
        self.kept.save(seq=news.events[-1].seq, told=self._step, best=self._best)

    def _values(self, row: CandidateRow, news: News) -> dict[str, float]:
        """A candidate's objectives by name, and the best of each so far under "best/"."""
        means = {o.name: row.objectives[o.name].mean for o in news.objectives if o.name in row.objectives}
        values = {f"candidate/{name}": mean for name, mean in means.items() if math.isfinite(mean)}
        for objective in news.objectives:
            name = objective.name
            if row.eligible and row.same_as is None and name in means:
                better = max if objective.maximise else min
                self._best[name] = better(self._best.get(name, means[name]), means[name])
        return values | {f"best/{name}": best for name, best in self._best.items()}

    @abstractmethod
    def candidate(self, step: int, row: CandidateRow, values: Mapping[str, float], genome: Mapping[str, float]) -> None:
        """Report a candidate that has ended. ``step`` counts them from 1."""

    @abstractmethod
    def front(self, step: int, rows: Sequence[Row], news: News) -> None:
        """Report the front when the search has ended, and again after a confirmation: a row per candidate, all with the
        same columns.
        """

    @abstractmethod
    def flush(self) -> None:
        """Send buffered data."""

    def close(self) -> None:
        self.kept.close()


def _front_row(row: CandidateRow, news: News) -> Row:
    content: dict[str, Any] = {"candidate": named(row.number)}
    held_out = news.held_out.get(row.number, {})
    for objective in news.objectives:
        content[objective.name] = row.objectives[objective.name].mean
        content[f"held_out/{objective.name}"] = held_out.get(objective.name)
    names = (parameter.name for parameter in news.search.record.parameters)
    genome = genome_of(row, news.search)
    return content | {f"genome/{name}": genome.get(name) for name in names}
