"""Before a search begins: selecting some of many sources, with jobs of the pool; every score is recorded at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console

from evomerge.commands.outside import OutsideJobs
from evomerge.errors import InputError
from evomerge.merging.building.derived import Derived, make_source
from evomerge.merging.measured.amplitude import kappa, relative_norms
from evomerge.merging.measured.evidence import Evidence
from evomerge.optimizers.base import random_state
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.report.screen import duration
from evomerge.search.driving.dispatch import Pending
from evomerge.search.estimation.items import ItemOrder, plain_order
from evomerge.search.estimation.scores import ScoreTable, estimate, missing_tasks, to_scores
from evomerge.search.estimation.selection import Chosen, ObjectiveRace, Row, by_gain, pooled_difference, start_by_gains
from evomerge.search.opening.session import contents_of, make_pool
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared, with_sources
from evomerge.search.preparing.setup import Counts, ObjectiveInfo
from evomerge.search.settings.folder import EVIDENCE_NAME, SOURCES_NAME, write_settings
from evomerge.search.settings.sections import Budget, Select
from evomerge.search.settings.selecting import REST, choices, random_name, searched
from evomerge.search.work.jobs import Descended, Failed, Finished, Measured
from evomerge.store import Estimate, Scores, Store
from evomerge.store.events import Compared, Fate, ScoredItems, Selected, SelectedSource, SelectScored

MIN_KEPT = 2
"""The number of sources that are always kept, because a single one leaves nothing to merge."""

KEPT, WITH_REST, CONTROL = "average of the kept", "average with the rest", "the first kept, and random directions"
"""The names of the scored merges in the report."""

Sums = Mapping[str, Mapping[str, float]]
"""For some merges, the factor of each source's change."""


def select(folder: Path, prepared: Prepared, store: Store, pool: Pool, console: Console) -> Prepared | None:
    """Select sources as the search file says, and return the search over them; the caller holds the lease.

    Earlier scores are read from the store, so that an interrupted selection continues with the same result.

    Returns:
        The unchanged search if there is nothing to select; None if it was stopped first.

    Raises:
        InputError: a source cannot be scored.
    """
    section = prepared.file.select
    if section is None:
        return prepared
    started = time.monotonic()
    console.print(f"selecting: at most {section.keep} of {len(choices(prepared.file))} sources", style="dim")
    selection = Selection(folder, prepared, store, section)
    if not selection.run_race(pool):
        return None
    pool.close()  # its workers may hold all sources
    if not selection.run_merges():
        return None
    chosen = selection.end()
    console.print(f"selected in {duration(time.monotonic() - started)}", style="dim")
    return chosen


class Selection(OutsideJobs):
    """The selection among the sources of a search: a race of single sources, then a few merges of the kept ones.

    Args:
        section: the section of the search file.
    """

    log_prefix = "select"

    def __init__(self, folder: Path, prepared: Prepared, store: Store, section: Select) -> None:
        super().__init__(folder, prepared, store)
        self._folder, self._section, self._file = folder, section, prepared.file
        assert prepared.file.base is not None  # ``check_select`` guarantees it
        self._base = prepared.file.base
        self._choices = choices(prepared.file)
        self._objectives = [o for o in prepared.setup.objectives if o.maximise]
        self._orders = [self._order(number) for number in range(len(prepared.setup.evaluators))]
        self._races: list[ObjectiveRace] = []
        self._tables: dict[str, ScoreTable] = {}
        self._names: list[str] = []  # of the models that are being scored, by job number
        for event in store.events(kinds=(SelectScored.kind,)):
            said = event.read(SelectScored)
            scores = [_scores(one) for one in said.scores]
            self._table(said.model).update(prepared.setup, ScoreTable.of(prepared.setup, scores))

    def _order(self, number: int) -> ItemOrder:
        """An evaluator's items in a random order, the same for all models."""
        most = max((o.items for o in self._objectives if o.evaluator == number), default=1)
        shuffled = random_state(self._file.seed, number, most).permutation(most)
        return ItemOrder(shuffled.astype(np.int32), plain_order(most).strata)

    # The race -----------------------------------------------------------------------------------------------------

    def run_race(self, pool: Pool) -> bool:
        """Score each source and the base, rung by rung; returns False if the search was stopped first."""
        places = -(-self._section.keep // len(self._objectives))
        self._races = [
            ObjectiveRace(self._choices, places, o.items, self._section.confidence) for o in self._objectives
        ]
        for rung in self._section.rungs:
            wanted: dict[str, dict[int, int]] = {}
            for objective, race in zip(self._objectives, self._races, strict=True):
                for name in (self._base, *race.racing) if race.racing else ():
                    wanted.setdefault(name, {})[objective.evaluator] = rung
            recipes = {name: Blend.weighted_sum({name: 1.0}) for name in wanted}
            if not self._score(recipes, wanted, pool, self.prepared):
                return False
            for objective, race in zip(self._objectives, self._races, strict=True):
                if race.racing:
                    rows = [self._on(name, objective, rung) for name in race.racing]
                    race.judge(self._on(self._base, objective, rung), np.array(rows))
        return True

    @cached_property
    def _able(self) -> list[str]:
        """The sources that are not surely worse in every objective."""
        able = [name for name in self._choices if any(name not in race.out for race in self._races)]
        return able if len(able) >= MIN_KEPT else self._choices

    @property
    def scored(self) -> int:
        """The number of items scored so far."""
        return sum(table.count for table in self._tables.values())

    @cached_property
    def kept(self) -> list[Chosen]:
        """The kept sources in their order, after the race."""
        rows = {name: [self._row(name, o) for o in self._objectives] for name in self._able}
        base = [self._row(self._base, o) for o in self._objectives]
        return list(by_gain(base, rows, self._section.keep, self._section.confidence, MIN_KEPT))

    @cached_property
    def _rest(self) -> list[str]:
        """The sources that are neither kept nor known to be useless."""
        kept = {chosen.name for chosen in self.kept}
        return [] if self._section.rest == "drop" else [name for name in self._able if name not in kept]

    # Sources that are made ----------------------------------------------------------------------------------------

    @cached_property
    def _norms(self) -> dict[str, float]:
        """norm(tau) / norm(W0) of the kept sources."""
        names = (self._base, *(chosen.name for chosen in self.kept))
        evidence = Evidence(self._folder.absolute() / EVIDENCE_NAME, self._contents)
        return relative_norms({name: self.prepared.sources[name] for name in names}, self._base, evidence)

    @cached_property
    def _scales(self) -> dict[str, float]:
        """The factor of the change of each kept source."""
        known = [norm for norm in self._norms.values() if norm > 0]
        longest = self._section.norm_ratio * float(np.median(known)) if known else 0.0
        return {name: min(1.0, longest / norm) if norm > 0 else 1.0 for name, norm in self._norms.items()}

    @cached_property
    def _contents(self) -> dict[str, str]:
        return contents_of(self.store.search().record.files)

    @cached_property
    def _references(self) -> dict[str, str]:
        """The locations of all sources that may be searched or merged; missing ones are created."""
        made = {name: Derived({name: scale}) for name, scale in self._scales.items() if scale < 1.0}
        if self._rest:
            made[REST] = Derived(dict.fromkeys(self._rest, 1.0 / len(self._rest)))
        for number, name in enumerate(self._randoms):
            of = self.kept[1 + number].name
            made[name] = Derived({of: self._scales[of]}, random_seed(self._file.seed, number))
        as_they_are = {chosen.name: self._file.sources[chosen.name] for chosen in self.kept}
        root = self._folder.absolute() / SOURCES_NAME
        return as_they_are | {
            name: make_source(derived, name, self._base, self.prepared.sources, self._contents, root)
            for name, derived in made.items()
        }

    @cached_property
    def _randoms(self) -> list[str]:
        """The names of the random directions that replace all kept sources except the first."""
        return [random_name(number) for number in range(1, len(self.kept))]

    # Merges -------------------------------------------------------------------------------------------------------

    def run_merges(self) -> bool:
        """Score the average of the kept sources, the average with the rest, and the control; False if stopped first."""
        # Nothing is searched here; the file is valid all the same, because workers of a cluster read it again.
        nothing_searched = {"budget": Budget(hours=1), "optimizer": self._file.optimizer.at_shares({})}
        file = searched(self._file, self._references).model_copy(update=nothing_searched)
        prepared = with_sources(self.prepared, file)
        blends = {
            name: Blend(
                method="task_arithmetic", sources=tuple(sums), base=self._base,
                parameters={"weight": dict(sums), "lambda": 1.0, "normalize": False},
            )
            for name, sums in self._sums.items()
        }  # fmt: skip
        counts = {o.evaluator: self._section.rungs[-1] for o in self._objectives}
        with closing(make_pool(prepared, self._folder, self.files_of(prepared))) as pool:
            return self._score(blends, dict.fromkeys(blends, counts), pool, prepared)

    @cached_property
    def _sums(self) -> Sums:
        """The factors of sources by the rule in ``merging.amplitude``, which makes a sum as strong as one of them."""
        names = [chosen.name for chosen in self.kept]
        scaled = [self._norms[name] * self._scales[name] for name in names]
        weight = kappa(scaled) / len(names) ** 0.5
        sums = {KEPT: dict.fromkeys(names, weight)}
        if self._section.rest == "measured" and self._rest:
            sums[WITH_REST] = dict.fromkeys([*names, REST], weight)
        return sums | {CONTROL: dict.fromkeys([names[0], *self._randoms], weight)}

    # The end ------------------------------------------------------------------------------------------------------

    def end(self) -> Prepared:
        """Record the selection, and return the search over it."""
        said = self._said()
        names = [s.name for s in said.sources if s.fate == "kept"]
        averaged = any(source.fate == "rest" for source in said.sources)
        file = searched(self._file, {n: self._references[n] for n in (*names, *([REST] if averaged else []))})
        prepared = with_sources(self.prepared, file)
        start = start_by_gains(self.kept, prepared.setup.space.parameters)
        file = file.model_copy(update={"optimizer": file.optimizer.at_shares(start)})
        prepared = replace(prepared, file=file, setup=replace(prepared.setup, optimizer=file.optimizer))
        search = self.store.search()
        settings = file.model_dump(mode="json") | {"store": search.settings.get("store")}
        parameters = [asdict(parameter) for parameter in prepared.setup.space.parameters]
        digest = None if prepared.calibration is None else prepared.calibration.digest
        changed = {"sources": self.files_of(prepared), "parameters": parameters, "calibration": digest}
        self.store.record_selection(settings, {**search.fingerprints, **changed}, said)
        write_settings(self._folder, settings)
        return prepared

    def _said(self) -> Selected:
        others = self._compared(CONTROL)
        rest = self._compared(WITH_REST)
        averages = self._section.rest == "average" or (rest is not None and rest.mean < 0.0)
        places = {chosen.name: place for place, chosen in enumerate(self.kept, 1)}
        order = [self._base, *places, *(name for name in self._choices if name not in places)]
        items = {o.evaluator: o.items for o in self._objectives}
        return Selected(
            sources=[self._source(name, places.get(name), averages=averages) for name in order],
            scored=self.scored,
            full=len(order) * sum(items.values()),
            merges={name: self._mean(name) for name in self._sums},
            others=others,
            rest=None if rest is None else Compared(mean=-rest.mean, low=-rest.high, high=-rest.low),
        )

    def _source(self, name: str, place: int | None, *, averages: bool) -> SelectedSource:
        """The record of one source."""
        table = self._table(name)
        known = {o.name: estimate(o, table, self._orders[o.evaluator], None) for o in self._objectives}
        estimates = {objective: value for objective, value in known.items() if value is not None}
        if name == self._base:
            return SelectedSource(name=name, fate="base", estimates=estimates, items=table.count)
        if place is None:
            fate: Fate = "rest" if name in self._rest and averages else "dropped" if name in self._able else "worse"
            return SelectedSource(name=name, fate=fate, estimates=estimates, items=table.count)
        gain = self.kept[place - 1].gain
        return SelectedSource(
            name=name, fate="kept", estimates=estimates, items=table.count, place=place, gain=gain.mean,
            error=gain.stderr, norm=self._norms[name], scale=self._scales[name],
        )  # fmt: skip

    def _compared(self, other: str) -> Compared | None:
        """How much better the average of the kept sources is than another merge; None if that was not scored."""
        if other not in self._sums:
            return None
        rung = self._section.rungs[-1]
        ours, theirs = ([self._on(name, o, rung) for o in self._objectives] for name in (KEPT, other))
        gap = pooled_difference(ours, theirs)
        return Compared(mean=gap.mean, low=gap.low, high=gap.high)

    def _mean(self, merge: str) -> Estimate:
        """A merge's mean over objectives."""
        rows = [self._on(merge, o, self._section.rungs[-1]) for o in self._objectives]
        gap = pooled_difference(rows, [np.zeros_like(row) for row in rows])
        error = float(np.sqrt(sum(row.var(ddof=1) / len(row) for row in rows))) / len(rows)
        return Estimate(mean=gap.mean, stderr=error, n=sum(len(row) for row in rows))

    # Scoring ------------------------------------------------------------------------------------------------------

    def _table(self, model: str) -> ScoreTable:
        return self._tables.setdefault(model, ScoreTable())

    def _row(self, model: str, objective: ObjectiveInfo) -> Row:
        """A model's scores of an objective's items in the order asked, NaN if missing: float64 [items]."""
        positions = self._orders[objective.evaluator].positions
        values: Row = self._table(model).values(objective)[positions[positions < objective.items]].astype(np.float64)
        return values

    def _on(self, model: str, objective: ObjectiveInfo, rung: int) -> Row:
        """The same for the items of a rung."""
        positions = self._orders[objective.evaluator].positions[:rung]
        return self._row(model, objective)[: int((positions < objective.items).sum())]

    def _score(self, blends: Mapping[str, Blend], counts: Mapping[str, Counts], pool: Pool, prepared: Prepared) -> bool:
        """Score models on those of these items that each lacks; returns False if the search was stopped first."""
        self._names = list(blends)
        file, sources = prepared.file, prepared.sources
        layers = sources[file.tokenizer_source].layers

        def pending() -> Iterable[Pending]:
            for number, name in enumerate(self._names):
                if tasks := missing_tasks(self._table(name), self._orders, counts[name]):
                    recipe = StackRecipe.uniform(
                        blends[name], sources=file.sources, tokenizer=file.tokenizer_source, layers=layers,
                        vocabulary=file.merged_vocabulary, seed=file.seed, dtype=file.dtype,
                    )  # fmt: skip
                    yield Pending(-1 - number, 1, recipe, f"select {name}", tasks)

        return self.run(pool, list(pending()))

    def measured(self, pending: Pending, finished: Finished, result: Measured | Descended) -> None:
        assert isinstance(result, Measured)  # none of these jobs is a descent
        scores, name = to_scores(self.prepared.setup, result, pending.tasks), self._names[-1 - finished.candidate]
        self.store.record_event(SelectScored(model=name, scores=[_said_of(one) for one in scores]))
        self._table(name).update(self.prepared.setup, ScoreTable.of(self.prepared.setup, scores))

    def error(self, finished: Finished, failure: Failed, log: str) -> InputError:
        name = self._names[-1 - finished.candidate]
        place = f"sources.{name}" if name in self._file.sources else "select"
        hint = f"See {log} in the search's folder." if log else "Leave it out."
        return InputError(place, f"{name} cannot be scored: {failure.message}", hint)


def random_seed(seed: int, number: int) -> int:
    """The seed of the random direction with this number."""
    return int(random_state(seed, number).randint(2**31))


def _said_of(scores: Scores) -> ScoredItems:
    metrics = {name: values.astype(np.float64).tolist() for name, values in scores.metrics.items()}
    return ScoredItems(evaluator=scores.evaluator, items=scores.items.tolist(), metrics=metrics)


def _scores(said: ScoredItems) -> Scores:
    metrics = {name: np.array(values, dtype=np.float32) for name, values in said.metrics.items()}
    return Scores(said.evaluator, "search", np.array(said.items, dtype=np.int32), metrics)
