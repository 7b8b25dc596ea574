"""Candidates' tasks on a live model: asked, answered by an engine, graded and checked."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from evaluators.base import Evaluator, Graded
from evaluators.scoring import Scoring
from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.errors import described
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Batch, Engine, Response
from evomerge.printable import printable
from evomerge.recipes.use import ExpertUse, together
from evomerge.search.work.jobs import Failed, Measured, Task


class Attempt:
    """The tasks of one candidate while they are being scored.

    Args:
        evaluators: in the order that tasks refer to them.
        live: holds the candidate's weights.
        engine: answers with them.
        model: which of the engine's models the candidate is.

    Attributes:
        seconds: by phase, so far.

    Raises:
        InputError: an item cannot be scored with such a model.
    """

    def __init__(
        self, evaluators: Sequence[Evaluator], live: LiveModel, engine: Engine, tasks: Sequence[Task], model: int = 0
    ) -> None:
        self._live, self._engine, self._model, self._tasks = live, engine, model, tasks
        self.seconds: dict[str, float] = {}
        reader = Reader.of(live)
        self._scorings = [Scoring(evaluators[task.evaluator], reader, task.split, task.indices) for task in tasks]
        self._responses: dict[int, list[Response]] = {}
        self._graded: dict[int, Graded] = {}
        self._uses: dict[int, list[ExpertUse]] = {}

    @property
    def unanswered(self) -> dict[int, Batch]:
        """The batches that an engine has yet to answer, by the number of the task."""
        return {
            number: Batch(scoring.requests, (task.evaluator, task.split), self._model)
            for number, (task, scoring) in enumerate(zip(self._tasks, self._scorings, strict=True))
            if scoring.requests and number not in self._responses
        }

    def take(self, number: int, responses: list[Response]) -> None:
        """The responses to the batch of a task."""
        self._responses[number] = responses
        self._take_use(number)

    def _take_use(self, number: int) -> None:
        """Record the use of experts since the last call for a task; no other task has asked since."""
        if self._live.use is not None and (use := self._live.use.take()) is not None:
            self._uses.setdefault(number, []).append(use)

    def can_grade(self, number: int) -> bool:
        """Whether grading a task needs only the model's responses."""
        return not self._scorings[number].needs_model

    def grade(self, number: int) -> None:
        """Have the evaluator of an answered task grade its items, and check the result.

        Raises:
            ValueError: the evaluator, which may be a plug-in, returned something other than it declares.
            NotFiniteError: a score is NaN or Inf.
        """
        scoring, count = self._scorings[number], len(self._tasks[number].indices)
        graded = scoring.finish(self._responses.get(number, []), self._live, self._engine)
        if scoring.needs_model:
            self._take_use(number)
        _check(scoring.evaluator, graded, count)
        self._graded[number] = graded
        for phase, seconds in graded.seconds.items():
            self.took(phase, seconds)

    def finish(self) -> None:
        """Grade the remaining tasks, which need the model itself. Raises as ``grade``."""
        for number in range(len(self._tasks)):
            if number not in self._graded:
                self.grade(number)

    def took(self, phase: str, seconds: float) -> None:
        """Add to the seconds of a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def measured(self) -> Measured:
        """The result, once all tasks are graded."""
        graded = [self._graded[number] for number in range(len(self._tasks))]
        answers, drawings = [dict(task.answers) for task in graded], [dict(task.drawings) for task in graded]
        uses = [together(self._uses.get(number, ())) for number in range(len(self._tasks))] if self._uses else []
        scores = [task.scores for task in graded]
        return Measured(scores, self.seconds, answers, self._live.change, uses, drawings)


def answered(engine: Engine, attempts: Sequence[Attempt]) -> Iterator[tuple[Attempt, int]]:
    """Have the engine answer all requests of some attempts; yields each task once its attempt has the responses.

    The engine's time is divided among the attempts in proportion to their requests.
    """
    asked = [(attempt, number, batch) for attempt in attempts for number, batch in attempt.unanswered.items()]
    if not asked:
        return
    responses, seconds = engine.respond([batch for _, _, batch in asked]), 0.0
    while True:
        started = time.perf_counter()
        answer = next(responses, None)
        seconds += time.perf_counter() - started
        if answer is None:
            break
        attempt, number, _ = asked[answer[0]]
        attempt.take(number, answer[1])
        yield attempt, number
    share = seconds / sum(len(batch.requests) for _, _, batch in asked)
    for attempt, _, batch in asked:
        attempt.took("generate", share * len(batch.requests))


def score(engine: Engine, attempt: Attempt, device: torch.device) -> None:
    """Answer and grade all tasks of one candidate.

    On an accelerator, tasks are graded in a separate thread while the next ones are answered.

    Raises:
        Exception: whatever an evaluator or the model does.
    """
    if device.type == "cpu":  # grading in parallel would take the core that generates answers
        for _, number in answered(engine, [attempt]):
            if attempt.can_grade(number):
                attempt.grade(number)
    else:
        with ThreadPoolExecutor(1) as beside:
            grading: list[Future[None]] = []
            for _, number in answered(engine, [attempt]):
                if attempt.can_grade(number):
                    grading.append(beside.submit(attempt.grade, number))
            for future in grading:
                future.result()
    attempt.finish()


def _check(evaluator: Evaluator, graded: Graded, count: int) -> None:
    for metric in evaluator.metrics:
        if metric not in graded.scores or graded.scores[metric].shape != (count,):
            shape = graded.scores[metric].shape if metric in graded.scores else "nothing"
            raise ValueError(f"{evaluator.name} gave {shape} for {metric} of {count} items")
    for metric, values in graded.scores.items():
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{evaluator.name}: {metric} of {int((~np.isfinite(values)).sum())} items")


def failure(error: BaseException) -> Failed:
    """The failure of an attempt that raised."""
    # Half of a surrogate pair in a message could not be written to a log.
    log = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
    if isinstance(error, NotFiniteError):
        return Failed("not_finite", str(error))
    message = described(error)
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Failed("out_of_memory", printable(str(error)) or message, log)
    if type(error).__name__ == "AcceleratorError":  # after one, CUDA fails every later call of this process
        return Failed("worker_died", printable(str(error)))
    return Failed("error", message, log)
