"""What a search takes from earlier ones over the same sources: a few of their candidates, as genomes of its own space.

Scores on other items only say which candidates are worth scoring here. So the best few of each earlier search are
taken, if they differ enough, and, if all parameters are real, the mean of its best tenth: under noise a mean is better
than the best of its samples, which is mostly lucky (Hansen, arXiv:1604.00772, B.1; the tenth is gamma of Nomura
et al., Warm Starting CMA-ES, AAAI 2021, arXiv:2012.06932). They are scored here before anything is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Evaluator
from evomerge.checkpoints.fingerprints import content_digest, fingerprint
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter, SearchSpace, check_genome
from evomerge.optimizers.cma_es import Box
from evomerge.recipes.base import read_recipe
from evomerge.search.estimation.preference import Preference
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.preparing.setup import StartPoint, violation
from evomerge.search.settings.early import check_start
from evomerge.search.settings.folder import open_store
from evomerge.store import CandidateRow, SearchRow, Store
from evomerge.store.record import SearchRecord

MAX = 6
"""The number of candidates taken from all earlier searches together; at least one from each."""

GOOD_SHARE = 0.1
"""The share of an earlier search's candidates whose mean is also taken."""

APART = 0.05
"""The smallest distance between those taken: root mean square over parameters, as a fraction of each range."""

Matrix = NDArray[np.float64]


def with_start(prepared: Prepared, recorded: tuple[StartPoint, ...] | None = None) -> Prepared:
    """A search with what it takes from earlier ones: what was ``recorded`` when it was created, or read from them now.

    Raises:
        InputError: naming ``start_from``: no search there, one with other models, or one that does not fit this space.
    """
    file = prepared.file
    most = max(1, MAX // max(1, len(file.start_from)))
    start = recorded
    if start is None:
        check_start(file)
        folders = file.start_from
        start = tuple(point for folder in folders for point in _of_search(folder, prepared, most))
    return replace(prepared, setup=replace(prepared.setup, start=start)) if start else prepared


def recorded_start(store: Store) -> tuple[StartPoint, ...]:
    """What a search took from earlier ones when it was created; they need not exist any more."""
    return tuple(StartPoint(np.array(p.genome, dtype=np.float64), p.label) for p in store.search().record.start)


def _of_search(folder: Path, prepared: Prepared, most: int) -> list[StartPoint]:
    space = prepared.setup.space
    with open_store(folder) as store:
        search = store.search()
        _check_same_models(search.record, prepared.file.base, prepared.sources, folder)
        _check_items(store, search.record, prepared.evaluators, folder)
        ranked = _ranked(search, _scored(store, search.record))
    if not ranked:
        raise InputError("start_from", f"nothing is scored in {folder} that it did not begin with", "Leave it out.")
    mapping = _Mapping(search.record, space)
    points = _chosen(search.name, ranked, mapping, space.parameters, most)
    if not points:
        kind, method = search.record.space.get("kind"), search.record.space.get("method")
        what = f"a {kind}" + (f" of {method}" if method else "")
        problem = f"no candidate of {folder}, which searched {what}, is like anything that this space holds"
        raise InputError("start_from", problem, "Start from a search of the same kind of space and of related methods.")
    for point in points:
        check_genome(point.genome, space.parameters, f"start_from: {point.label}")
    return points


def _check_same_models(record: SearchRecord, base: str | None, sources: Mapping[str, Source], folder: Path) -> None:
    """Refuse a search over other models: they are matched by name and compared by the contents of their files."""
    for name in (*record.files, *sources):
        if name not in sources or name not in record.files:
            here, there = ("that search", "this one") if name not in sources else ("this search", "that one")
            problem = f"{here} has a source {name} and {there} has not ({folder})"
            raise InputError("start_from", problem, "Both need the same sources under the same names.")
    if record.base != base:
        problem = f"that search has the base {record.base or 'none'}, and this one has {base or 'none'} ({folder})"
        raise InputError("start_from", problem, "Changes to another base make different models.")
    for name, files in record.files.items():
        if content_digest(fingerprint(sources[name], files)) != content_digest(files):
            problem = f"the source {name} is not the model that it was in {folder}"
            raise InputError("start_from", problem, "Its candidates would be different models here. Leave it out.")


def _check_items(store: Store, record: SearchRecord, evaluators: Sequence[Evaluator], folder: Path) -> None:
    """Refuse to confirm on items by which an earlier search chose the starting candidates of this one."""
    chosen_by: set[tuple[str, str, tuple[str, ...]]] = set()
    for number, recorded in enumerate(record.evaluators):
        used = max((m.items for m in record.judging if m.evaluator == number), default=0)
        texts = store.item_texts(recorded.version, "search")[:used]
        pictures = store.item_pictures(recorded.version, "search")[:used]
        chosen_by |= {(*text, shown) for text, shown in zip(texts, pictures, strict=True)}
    for evaluator in evaluators:
        both = [
            item
            for item in evaluator.items("held_out")
            if item.question and (item.question, item.answer, tuple(one.sha256 for one in item.media)) in chosen_by
        ]
        if both:
            first = both[0].question[:60]
            problem = f"{len(both)} held-out items of {evaluator.name} are search items of {folder}: {first!r}"
            hint = "Confirm on others: what this search begins with was chosen by these."
            raise InputError("start_from", problem, hint)


def _scored(store: Store, record: SearchRecord) -> list[CandidateRow]:
    """The candidates that an earlier search found, each recipe once: scored, and meeting its constraints."""
    rows = [row for row in store.candidates(statuses=("done", "eliminated")) if row.step > 0]
    return [row for row in rows if all(o.name in row.objectives for o in record.objectives) and _is_kept(row, record)]


def _is_kept(row: CandidateRow, record: SearchRecord) -> bool:
    known = ((c, row.objectives[c.name].mean) for c in record.constraints if c.name in row.objectives)
    return all(violation(mean, c.threshold, at_least=c.maximise) == 0.0 for c, mean in known)


def _ranked(search: SearchRow, rows: Sequence[CandidateRow]) -> list[CandidateRow]:
    """Candidates, the best first, by what decides there; for a front the best in each objective in turn."""
    objectives, preference = search.record.objectives, Preference.of_search(search)
    if not rows:
        return []
    means = np.array([[-o.sign * row.objectives[o.name].mean for o in objectives] for row in rows])
    errors = np.array([[row.objectives[o.name].stderr or 0.0 for o in objectives] for row in rows])
    losses = shrunk(means, errors)
    if preference.decides:
        orders = [preference.order(losses, losses)]
        plain = [preference.order(means, means)]
    else:
        orders, plain = [preference.order(losses, losses), *losses.T], [preference.order(means, means), *means.T]
    ranks = [np.lexsort((own, order)).tolist() for own, order in zip(plain, orders, strict=True)]
    in_turn = dict.fromkeys(at for places in zip(*ranks, strict=True) for at in places)
    return [rows[at] for at in in_turn]


def shrunk(means: Matrix, errors: Matrix) -> Matrix:
    """Estimates shrunk towards their common mean according to their noise: float64 [candidates, objectives].

    Empirical Bayes (Efron & Morris, JASA 70, 1975): m + t^2 / (t^2 + s_i^2) (x_i - m), where m is the mean of all and
    t^2 their variance beyond that of the noise, max(0, var(x) - mean(s^2)). So a candidate that was lucky on few items
    does not precede one that was good on many.
    """
    centre = means.mean(axis=0)
    spread = np.maximum(0.0, means.var(axis=0) - (errors**2).mean(axis=0))
    total = spread + errors**2
    weight = np.where(total > 0, spread / np.where(total > 0, total, 1.0), 1.0)
    return np.asarray(centre + weight * (means - centre))


@dataclass(frozen=True)
class _Mapping:
    """Maps candidates of an earlier search to genomes of this space."""

    record: SearchRecord
    space: SearchSpace

    def genome(self, row: CandidateRow) -> Genome | None:
        nearest = self.space.genome_of(read_recipe(row.recipe, self.record.sources))
        # A space that cannot map recipes may still be the same one.
        is_same = tuple(self.record.parameters) == tuple(self.space.parameters)
        return row.genome if nearest is None and is_same else nearest


def _chosen(
    name: str, ranked: Sequence[CandidateRow], mapping: _Mapping, parameters: Sequence[Parameter], most: int
) -> list[StartPoint]:
    """At most this many, far enough apart: first the mean of the best, then the best."""
    box, taken = Box(parameters), list[StartPoint]()
    for point in _offered(name, ranked, mapping, parameters):
        unit = box.unit(point.genome)
        if all(math.sqrt(np.mean((unit - box.unit(other.genome)) ** 2)) >= APART for other in taken):
            taken.append(point)
        if len(taken) == most:
            break
    return taken


def _offered(
    name: str, ranked: Sequence[CandidateRow], mapping: _Mapping, parameters: Sequence[Parameter]
) -> Iterator[StartPoint]:
    """Candidates for the start, the best first; they are mapped lazily."""
    good = ranked[: max(2, round(GOOD_SHARE * len(ranked)))]
    if all(p.kind == "real" for p in parameters):
        genomes = [genome for row in good if (genome := mapping.genome(row)) is not None]
        if len(genomes) > 1:
            yield StartPoint(np.mean(genomes, axis=0), f"from {name}, mean of {len(genomes)}")
    for row in ranked:
        if (genome := mapping.genome(row)) is not None:
            yield StartPoint(genome, f"from {name} {row.id}")
