"""Several candidates scored at once on one live model, whose rows are each of a candidate of its own.

What an evaluator asks of the model is answered for all candidates in one go: an evaluator that asks for answers which
are not there yet is unwound, and starts again when they are. It is deterministic, so it asks for the same once more,
gets it at once, and goes on. No two evaluators ever run at the same time or in turns, so nothing that one keeps or sets
for a while (its requests, a generator's seed, where prints go) is seen by another. Forward passes that an evaluator
makes itself, as for likelihoods, are of its candidate alone, and are made again where it asks for answers after them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from evaluators.base import Evaluator
from evaluators.generation import Request, answer_requests, answered_by
from evomerge.checkpoints.live import LiveModel, NotFiniteError, check_weights, finite_rows
from evomerge.checkpoints.low_rank_rows import LowRankRows
from evomerge.checkpoints.source import Source
from evomerge.merging.low_rank import base_recipe, coefficients, family_of
from evomerge.merging.materialise import Materialiser
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.search.workers.measuring import Scored, failure, measured, score_task

log = logging.getLogger(__name__)


class _Unwound(BaseException):  # no Exception, which an evaluator might take for a fault of the model
    """Ends an evaluator whose answers are not there yet."""


@dataclass
class _Candidate:
    """A job on its way.

    Attributes:
        number: among the candidates that the model is mixed for.
        scored: the tasks that are done.
        timings: seconds by phase that are not an evaluator's.
        answered: what the evaluator of the next task has asked for so far, and the answers.
        calls: how often it has asked since it was started.
        wanted: what it was unwound for.
        result: once there is one.
    """

    job: Job
    number: int = 0
    scored: list[Scored] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    answered: list[tuple[Request, list[str]]] = field(default_factory=list)
    calls: int = 0
    wanted: Request | None = None
    result: Measured | Failed | None = None

    def start_over(self) -> None:
        """The evaluator of the next task begins, and will ask from its first question on."""
        self.calls, self.wanted = 0, None

    def took(self, phase: str, seconds: float) -> None:
        self.timings[phase] = self.timings.get(phase, 0.0) + seconds


class Together:
    """Scores candidates that are weighted sums of low-rank adapters, several at once.

    The adapters are held once on the live model's device, as long as this object lives.

    Args:
        sources: one model and low-rank adapters of it.
        materialiser: writes the former into the live model.
        live: on transformers, without a serving engine.
        evaluators: in the order that jobs refer to them. They know the model by its forward passes and answers alone,
            and measure no speed.

    Raises:
        NotLowRankError: the sources are something else.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        materialiser: Materialiser,
        live: LiveModel,
        evaluators: Sequence[Evaluator],
    ) -> None:
        if live.engine is not None:
            raise ValueError("a serving engine answers for one candidate at a time")
        self._sources, self._materialiser, self._live, self._evaluators = sources, materialiser, live, evaluators
        self._family = family_of(sources)
        adapted = [sources[name] for name in self._family.adapted]
        self._rows = LowRankRows(live, adapted, self._family.weights)
        self._current: _Candidate | None = None

    def run(self, jobs: Sequence[Job]) -> list[Measured | Failed]:
        """The result of each job. An exception in one candidate ends that one alone."""
        candidates = [_Candidate(job) for job in jobs]
        try:
            self._run(candidates)
        except Exception as error:  # in what all of them share
            for candidate in candidates:
                candidate.result = candidate.result or failure(error)
        return [candidate.result for candidate in candidates if candidate.result is not None]  # by now all have one

    def _run(self, candidates: Sequence[_Candidate]) -> None:
        started = time.perf_counter()
        shares = self._shares(candidates)
        going = _open(candidates)
        if not going:
            return
        self._materialiser.write(base_recipe(going[0].job.recipe, self._sources, self._family), self._live)
        check_weights(self._live)
        with self._rows.mixed(shares), answered_by(self._live, self._answer):
            self._probe(going)
            for candidate in going:
                candidate.took("merge", (time.perf_counter() - started) / len(going))
            while going := _open(going):
                for candidate in going:
                    self._advance(candidate)
                self._decode_all(_open(going))

    def _shares(self, candidates: Sequence[_Candidate]) -> list[Tensor]:
        """What rows of each candidate are mixed by, in the order of their numbers, which are given here."""
        found: list[Tensor] = []
        for candidate in candidates:
            try:
                own = coefficients(candidate.job.recipe, self._sources, self._family)
                shares = self._rows.shares(own)
            except Exception as error:
                candidate.result = failure(error)
            else:
                candidate.number = len(found)
                found.append(shares)
        return found

    def _probe(self, candidates: Sequence[_Candidate]) -> None:
        """End candidates whose logits have NaN or Inf; all are probed in one forward pass."""
        self._rows.choose([candidate.number for candidate in candidates])
        finite = finite_rows(self._live, len(candidates))
        self._rows.check_reached()
        for candidate in candidates:
            if not all(finite):  # some architectures mix rows of a batch: ask each alone
                self._rows.choose(candidate.number)
                if not all(finite_rows(self._live, 1)):
                    candidate.result = failure(NotFiniteError("logits"))

    def _advance(self, candidate: _Candidate) -> None:
        """Score a candidate until it is done, fails, or lacks answers."""
        self._current = candidate
        self._rows.choose(candidate.number)
        for task in candidate.job.tasks[len(candidate.scored) :]:
            evaluator = self._evaluators[task.evaluator]
            candidate.start_over()
            try:
                if evaluator.measured:
                    raise ValueError(f"{evaluator.name} measures speed, which is not that of the merged model here")
                scored = score_task(evaluator, self._live, task)
            except _Unwound:
                return
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                if candidate.wanted is None:
                    candidate.result = failure(error)
                return
            if candidate.wanted is not None:  # it caught what should have ended it
                return
            candidate.scored.append(scored)
            candidate.answered.clear()
        candidate.result = measured(candidate.scored, candidate.timings)

    def _answer(self, request: Request) -> list[str]:
        """What an evaluator that is being run asks of the model."""
        candidate = self._current
        assert candidate is not None
        number = candidate.calls
        candidate.calls += 1
        if number < len(candidate.answered):
            asked, answers = candidate.answered[number]
            if asked == request:
                return list(answers)
            # It asks otherwise than when it was unwound; unwinding it for that as well might never end.
            (alone,) = answer_requests(self._live, [request], lambda rows: self._rows.choose(candidate.number))
            return alone
        candidate.wanted = request
        raise _Unwound

    def _decode_all(self, candidates: Sequence[_Candidate]) -> None:
        """Answer what every candidate wants; requests that differ in their prompts alone, in one go."""
        alike: dict[tuple[object, ...], list[_Candidate]] = {}
        for candidate in candidates:
            wanted = candidate.wanted
            assert wanted is not None
            alike.setdefault((wanted.max_new_tokens, wanted.stop, wanted.batch_size), []).append(candidate)
        for group in alike.values():
            if not self._decode(group):
                for candidate in group:
                    self._decode([candidate])

    def _decode(self, group: Sequence[_Candidate]) -> bool:
        """Answer what candidates want in one go; whether that has come to an end, be it the end of a single one."""
        started = time.perf_counter()
        numbers, wanted = [each.number for each in group], [each.wanted for each in group if each.wanted is not None]
        try:
            found = answer_requests(
                self._live, wanted, lambda rows: self._rows.choose([numbers[row] for row in rows])
            )  # fmt: skip
        except Exception as error:
            if len(group) == 1:
                group[0].result = failure(error)
            else:
                log.warning("%d candidates are answered one at a time: %s", len(group), error)
            return len(group) == 1
        share = (time.perf_counter() - started) / sum(len(answers) for answers in found)
        for candidate, request, answers in zip(group, wanted, found, strict=True):
            candidate.answered.append((request, answers))
            candidate.took("generate", share * len(answers))
        return True


def _open(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    return [candidate for candidate in candidates if candidate.result is None]
