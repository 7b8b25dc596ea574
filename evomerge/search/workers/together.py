"""Several candidates scored at once on one live model: each row of a batch belongs to one candidate.

Requests are answered for all candidates at once (``evomerge.inference.adapter_rows``), and graded candidate by
candidate. An evaluator that needs the model itself, such as a user's function, is run for one candidate after another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import Tensor

from evaluators.base import Evaluator
from evomerge.checkpoints.live import LiveModel, NotFiniteError, check_weights
from evomerge.checkpoints.low_rank_rows import CoreRows, LowRankRows
from evomerge.checkpoints.source import Source
from evomerge.inference.adapter_rows import AdapterRowsEngine, OneModel
from evomerge.inference.image_tokens import Kept
from evomerge.merging.adapters.low_rank import CoreMerges, base_recipe, coefficients, family_of, in_core_space
from evomerge.merging.adapters.low_rank_change import CoreChange, LowRankChange
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.base import Recipe
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.search.workers.measuring import Attempt, answered, failure

log = logging.getLogger(__name__)


@dataclass
class _Candidate:
    """A job in progress.

    Attributes:
        number: among the models that the engine has.
        change: its distance from the search's base; None if there is no base.
        attempt: its tasks, once they have started.
        timings: seconds by phase, apart from its tasks.
        result: once there is one.
    """

    job: Job
    number: int = 0
    change: float | None = None
    attempt: Attempt | None = None
    timings: dict[str, float] = field(default_factory=dict)
    result: Measured | Failed | None = None

    def guarded(self, step: Callable[[], None]) -> None:
        """Run a step; an exception ends only this candidate."""
        try:
            step()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as a task's SystemExit, and the panic of a tokenizer
            self.result = failure(error)


@dataclass(frozen=True)
class _Mixtures:
    """One way of computing candidates in addition to the base's weights.

    Attributes:
        engine: answers for several candidates at once.
        numbers: (recipe) -> the engine's input for a candidate, and its distance from the search's base.
    """

    engine: AdapterRowsEngine
    numbers: Callable[[Recipe], tuple[Tensor, float | None]]


class Together:
    """Scores several candidates made from low-rank adapters at once: weighted sums, or merges in core space.

    Args:
        sources: one model and low-rank adapters of it.
        materialiser: writes the former into the live model.
        live: on transformers, without a serving engine.
        evaluators: in the order that jobs refer to them. They know the model by its forward passes and answers alone,
            and measure no speed.
        base: the source that candidates' changes are measured from, or None.
        kept: where image tokens are stored if memory has no room; None for nowhere.

    Raises:
        NotLowRankError: the sources are not a model and its low-rank adapters.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        materialiser: Materialiser,
        live: LiveModel,
        evaluators: Sequence[Evaluator],
        base: str | None = None,
        kept: Kept | None = None,
    ) -> None:
        if live.engine is not None:
            raise ValueError("a serving engine answers for one candidate at a time")
        self._sources, self._materialiser, self._live, self._evaluators = sources, materialiser, live, evaluators
        self._family = family_of(sources)
        self._base, self._kept = base, kept

    # The factors of either way are loaded when first needed.

    @cached_property
    def _sums(self) -> _Mixtures:
        family, sources = self._family, self._sources
        rows = LowRankRows(self._live, [sources[name] for name in family.adapted], family.weights)
        change = None if self._base is None else LowRankChange(sources, family, self._base)

        def numbers(recipe: Recipe) -> tuple[Tensor, float | None]:
            own = coefficients(recipe, sources, family, self._materialiser.fitted_for(recipe))
            return rows.shares(own), None if change is None else change.of(own)

        return _Mixtures(AdapterRowsEngine(self._live, rows, self._kept), numbers)

    @cached_property
    def _core_merges(self) -> _Mixtures:
        merges = CoreMerges(self._materialiser.core_space, self._sources, self._family)
        rows = CoreRows(self._live, merges.bases)
        base = self._family.base  # of a search in core space, so changes are measured from it
        change = CoreChange(self._sources[base]) if self._base == base else None

        def numbers(recipe: Recipe) -> tuple[Tensor, float | None]:
            own = merges.matrices(recipe)
            return rows.shares(own), None if change is None else change.of(own)

        return _Mixtures(AdapterRowsEngine(self._live, rows, self._kept), numbers)

    def run(self, jobs: Sequence[Job]) -> list[Measured | Failed]:
        """The result of each job. An exception in one candidate ends only that one."""
        candidates = [_Candidate(job) for job in jobs]
        for in_core in (False, True):
            alike = [candidate for candidate in candidates if in_core_space(candidate.job.recipe) is in_core]
            if not alike:
                continue
            try:
                self._run(alike, self._core_merges if in_core else self._sums)
            except Exception as error:  # in a step that all of them share
                for candidate in alike:
                    candidate.result = candidate.result or failure(error)
        return [candidate.result for candidate in candidates if candidate.result is not None]  # all have one by now

    def _run(self, candidates: Sequence[_Candidate], mixtures: _Mixtures) -> None:
        started = time.perf_counter()
        engine, shares = mixtures.engine, self._shares(candidates, mixtures)
        going = _open(candidates)
        if not going:
            return
        self._materialiser.write(base_recipe(going[0].job.recipe, self._sources, self._family), self._live)
        check_weights(self._live)
        with engine.mixed(shares):
            finite = engine.finite([candidate.number for candidate in going])
            for candidate, sound in zip(going, finite, strict=True):
                candidate.timings["merge"] = (time.perf_counter() - started) / len(going)
                if not sound:
                    candidate.result = failure(NotFiniteError("logits"))
            for candidate in _open(candidates):
                candidate.guarded(partial(self._begin, candidate, engine))
            self._answer(_open(candidates), engine)
            for candidate in _open(candidates):
                candidate.guarded(partial(self._finish, candidate, engine))

    @staticmethod
    def _shares(candidates: Sequence[_Candidate], mixtures: _Mixtures) -> list[Tensor]:
        """The coefficients of each candidate's rows, in the order of the numbers assigned here."""
        all_shares: list[Tensor] = []
        for candidate in candidates:
            try:
                shares, candidate.change = mixtures.numbers(candidate.job.recipe)
            except Exception as error:
                candidate.result = failure(error)
            else:
                candidate.number = len(all_shares)
                all_shares.append(shares)
        return all_shares

    def _begin(self, candidate: _Candidate, engine: AdapterRowsEngine) -> None:
        """Collect the requests of the candidate's evaluators."""
        for task in candidate.job.tasks:
            if (evaluator := self._evaluators[task.evaluator]).measured:
                raise ValueError(f"{evaluator.name} measures speed, which is not the merged model's here")
        alone = OneModel(engine, candidate.number)
        candidate.attempt = Attempt(self._evaluators, self._live, alone, candidate.job.tasks, candidate.number)

    def _answer(self, candidates: Sequence[_Candidate], engine: AdapterRowsEngine) -> None:
        """Answer all candidates' requests; if that fails, one by one, so that only the faulty candidate ends."""
        try:
            self._answer_at_once(candidates, engine)
        except Exception as error:
            if len(candidates) == 1:
                candidates[0].result = failure(error)
                return
            log.warning("%d candidates are answered one at a time: %s", len(candidates), error)
            for candidate in _open(candidates):
                self._answer([candidate], engine)

    @staticmethod
    def _answer_at_once(candidates: Sequence[_Candidate], engine: AdapterRowsEngine) -> None:
        of = {id(candidate.attempt): candidate for candidate in candidates}
        for attempt, number in answered(engine, [c.attempt for c in candidates if c.attempt]):
            candidate = of[id(attempt)]
            if candidate.result is None and attempt.can_grade(number):
                candidate.guarded(partial(attempt.grade, number))

    def _finish(self, candidate: _Candidate, engine: AdapterRowsEngine) -> None:
        """Grade the tasks that need the model itself."""
        attempt = candidate.attempt
        assert attempt is not None
        engine.choose(candidate.number)
        self._live.change = candidate.change
        attempt.finish()
        for phase, seconds in candidate.timings.items():
            attempt.took(phase, seconds)
        candidate.result = attempt.measured()


def _open(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    return [candidate for candidate in candidates if candidate.result is None]
