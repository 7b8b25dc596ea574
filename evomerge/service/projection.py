"""A search as an Optuna study, for Optuna's plots and dashboard. It is derived from the store, which is authoritative.

A study holds the candidates that were completely scored and have a genome. If there are many parameters, it shows means
over layer groups, because neither a plot nor the dashboard can show 200 parameters.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evomerge.genome import Parameter
from evomerge.report.parameters import alike
from evomerge.service.reading import Columns, Mask, Numbers, PerState, Values, columns_of, thinned
from evomerge.store import Store, summaries
from evomerge.store.record import Measure
from evomerge.store.rows import candidate_id

MAX_PARAMETERS = 20
"""The maximum number of parameters in a study; the dashboard sends all of them with every trial."""

MAX_TRIALS = 1000
"""The maximum number of trials in a study: all baselines and the front, and others spread evenly over the search."""

_METRIC_NAMES = "study:metric_names"  # the key under which ``Study.set_metric_names`` stores them


@dataclass(frozen=True, eq=False)
class Gene:
    """A parameter of the study: a parameter of the space, or the mean of corresponding parameters of all layer groups.

    ``places`` are positions in the genome.
    """

    name: str
    places: tuple[int, ...]
    distribution: BaseDistribution

    def values(self, genomes: Values) -> list[Any]:
        """Its value in each genome [n, parameters]: a number, or the name of a choice."""
        if isinstance(self.distribution, CategoricalDistribution):
            return [self.distribution.choices[int(at)] for at in genomes[:, self.places[0]]]
        means = genomes[:, list(self.places)].mean(axis=1)
        return (
            [round(value) for value in means.tolist()]
            if isinstance(self.distribution, IntDistribution)
            else means.tolist()
        )


@dataclass(frozen=True, eq=False)
class Projection:
    """The data from which studies of a search are made.

    Attributes:
        genes: the parameters of its studies.
        numbers: int64 [n], candidates that were completely scored and have a genome.
        genomes: float64 [n, parameters].
        values: float64 [n, objectives].
        all: the number of such candidates, of which n are included.
    """

    columns: Columns
    genes: tuple[Gene, ...]
    numbers: Numbers
    genomes: Values
    values: Values
    all: int

    @property
    def notes(self) -> list[str]:
        """Sentences that say what a study leaves out."""
        notes = []
        if len(self.numbers) < self.all:
            notes.append(f"From {len(self.numbers):,} of {self.all:,} candidates, evenly over the search.")
        if any(len(gene.places) > 1 for gene in self.genes):
            notes.append("Parameters are means over all layer groups.")
        shown, all_ = sum(len(gene.places) for gene in self.genes), len(self.columns.search.record.parameters)
        if shown < all_:
            notes.append(f"{shown} of {all_} parameters are shown, those that vary most.")
        return notes

    def study(self, objective: Measure | None, genes: Sequence[Gene] | None = None) -> optuna.Study:
        """A study of one objective, or of all if None; with these genes, or those of the projection."""
        objectives = self.columns.objectives
        chosen = objectives if objective is None else [objective]
        places = [i for i, o in enumerate(objectives) if any(o.name == one.name for one in chosen)]
        description = StudyDescription(
            name=self.columns.search.name,
            directions=[StudyDirection.MAXIMIZE if o.maximise else StudyDirection.MINIMIZE for o in chosen],
            metrics=[o.name for o in chosen],
            notes=self.notes,
        )
        trials = self._trials(self.genes if genes is None else genes, self.values[:, places])
        storage = ReadOnlyStorage(lambda: {description.name: description}, lambda name: trials)
        return optuna.load_study(study_name=description.name, storage=storage)

    def _trials(self, genes: Sequence[Gene], values: Values) -> list[FrozenTrial]:
        distributions = {gene.name: gene.distribution for gene in genes}
        columns = [gene.values(self.genomes) for gene in genes]
        names, at = [gene.name for gene in genes], np.searchsorted(self.columns.numbers, self.numbers).tolist()
        ended = self.columns.finished_at[at].tolist()
        rows = zip(self.numbers.tolist(), at, ended, values.tolist(), *columns, strict=True)
        return [
            _trial(number, self.columns.labels[place], end, means, dict(zip(names, genome, strict=True)), distributions)
            for number, place, end, means, *genome in rows
        ]

    def gene(self, name: str) -> Gene:
        """A gene of the studies, or a parameter of the space, by name. Raises KeyError if there is none."""
        for gene in self.genes:
            if gene.name == name:
                return gene
        for place, parameter in enumerate(self.columns.search.record.parameters):
            if parameter.name == name:
                return Gene(name, (place,), distribution_of([parameter]))
        raise KeyError(name)


def _trial(
    number: int,
    label: str,
    ended_at: float,
    values: list[float],
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
) -> FrozenTrial:
    """A candidate as an Optuna trial. ``create_trial`` is not used because it checks every value against its bounds,
    which takes a third of a second for 1,000 trials.
    """
    moment = None if math.isnan(ended_at) else datetime.datetime.fromtimestamp(ended_at)
    return FrozenTrial(
        number=number, trial_id=number, state=TrialState.COMPLETE, value=None, values=values, params=params,
        distributions=distributions, datetime_start=moment, datetime_complete=moment, intermediate_values={},
        user_attrs={"candidate": candidate_id(number), "label": label}, system_attrs={},
    )  # fmt: skip


def _project(store: Store) -> Projection:
    columns = columns_of(store)
    measured = [columns.measured(store, o.name) for o in columns.objectives]
    whole: Mask = columns.own & np.array([status == "done" for status in columns.statuses], dtype=np.bool_)
    for objective, (means, _, items) in zip(columns.objectives, measured, strict=True):
        whole &= np.isfinite(means) & (items >= objective.items)
    numbers, genomes = summaries.genomes(store)
    whole &= np.isin(columns.numbers, numbers)
    taken = thinned(whole, columns.baseline | columns.on_front, MAX_TRIALS)
    chosen = genomes[np.isin(numbers, columns.numbers[taken])]
    parameters = columns.search.record.parameters
    return Projection(
        columns=columns,
        genes=genes_of(parameters, chosen),
        numbers=columns.numbers[taken],
        genomes=chosen,
        values=np.stack([means[taken] for means, _, _ in measured], axis=1),
        all=int(whole.sum()),
    )


projection_of: PerState[Projection] = PerState(_project)
"""The projection of a search, recomputed when the store has new events."""


# ---- parameters ------------------------------------------------------------------------------------------------------


def genes_of(parameters: Sequence[Parameter], genomes: Values) -> tuple[Gene, ...]:
    """At most MAX_PARAMETERS genes: the parameters themselves, or means of corresponding ones over all layer groups.

    If there are still too many, those are kept whose values spread most over their range.

    Args:
        parameters: the parameters of the search space.
        genomes: float64 [n, parameters].
    """
    if len(parameters) <= MAX_PARAMETERS:
        return tuple(Gene(p.name, (i,), distribution_of([p])) for i, p in enumerate(parameters))
    genes = [
        Gene(name, tuple(places), distribution_of([parameters[place] for place in places]))
        for name, places in alike(parameters).items()
    ]
    if len(genes) > MAX_PARAMETERS:
        spread = [_spread(gene, parameters, genomes) for gene in genes]
        kept = sorted(np.argsort(spread, kind="stable")[::-1][:MAX_PARAMETERS].tolist())
        genes = [genes[i] for i in kept]
    return tuple(genes)


def distribution_of(parameters: Sequence[Parameter]) -> BaseDistribution:
    """The range of a parameter, or of the mean of several parameters with the same range."""
    first = parameters[0]
    if len(parameters) > 1 or first.kind == "real":
        return FloatDistribution(first.low, first.high)
    if first.kind == "int":
        return IntDistribution(int(first.low), int(first.high))
    return CategoricalDistribution(tuple(first.choices))


def _spread(gene: Gene, parameters: Sequence[Parameter], genomes: Values) -> float:
    """The standard deviation of a gene relative to its range."""
    first = parameters[gene.places[0]]
    width = first.high - first.low
    return float(genomes[:, list(gene.places)].mean(axis=1).std() / width) if width and len(genomes) else 0.0


# ---- storage ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyDescription:
    """Everything that Optuna needs to know about a study except its trials."""

    name: str
    directions: list[StudyDirection]
    metrics: list[str]
    notes: list[str]


class ReadOnlyStorage(BaseStorage):  # type: ignore[misc]
    """An Optuna storage whose studies are computed on demand. It refuses every write.

    Trials are never copied, although Optuna's plots ask for copies many times: copying would take seconds.

    Args:
        studies: returns every study by name.
        trials: returns the trials of a study.
    """

    def __init__(
        self, studies: Callable[[], Mapping[str, StudyDescription]], trials: Callable[[str], list[FrozenTrial]]
    ) -> None:
        self._studies = studies
        self._trials = trials
        self._ids: dict[str, int] = {}  # a study keeps its number for the lifetime of this object

    def _id(self, name: str) -> int:
        return self._ids.setdefault(name, len(self._ids))

    def knows(self, study_id: int) -> bool:
        """Whether there is a study with this number."""
        return any(self._id(name) == study_id for name in self._studies())

    def get_study_id_from_name(self, study_name: str) -> int:
        if study_name not in self._studies():
            raise KeyError(study_name)
        return self._id(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._description(study_id).name

    def _description(self, study_id: int) -> StudyDescription:
        for name, description in self._studies().items():
            if self._id(name) == study_id:
                return description
        raise KeyError(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._description(study_id).directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        notes = self._description(study_id).notes
        return {"note": " ".join(notes)} if notes else {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {_METRIC_NAMES: self._description(study_id).metrics}

    def get_all_studies(self) -> list[Any]:
        from optuna.study._frozen import FrozenStudy  # the required return type has no public name

        def frozen(name: str, description: StudyDescription) -> FrozenStudy:
            number = self._id(name)
            return FrozenStudy(
                study_name=name, direction=None, directions=description.directions, study_id=number,
                user_attrs=self.get_study_user_attrs(number), system_attrs=self.get_study_system_attrs(number),
            )  # fmt: skip

        return [frozen(name, description) for name, description in self._studies().items()]

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        trials = self._trials(self._description(study_id).name)
        return [trial for trial in trials if states is None or trial.state in states]

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a study projected from a search can only be read")

    # Trials of different studies may share an id; no read-only function asks for a single trial.
    get_trial = _refuse
    create_new_study = delete_study = set_study_user_attr = set_study_system_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = set_trial_intermediate_value = _refuse
    set_trial_user_attr = set_trial_system_attr = _refuse
