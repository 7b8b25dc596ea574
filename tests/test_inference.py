"""Engines: batches of several objectives, what goes into one forward pass, what is refused; and grading beside them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_miniature import evomerge, search_file

from evaluators.base import Evaluator, EvaluatorSettings, Graded, Item, Outcome, Split, texts
from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.errors import InputError
from evomerge.inference.media import Media
from evomerge.inference.progress import progress_listener
from evomerge.inference.reading import Prompt, Reader
from evomerge.inference.requests import (
    Batch,
    Generate,
    Likelihood,
    LogLikelihood,
    Request,
    Response,
    Text,
    refuse_media,
    respond_to,
)
from evomerge.inference.transformers_engine import TransformersEngine, generate
from evomerge.plugins import OWN
from evomerge.search.work.jobs import Task
from evomerge.search.workers.measuring import Attempt, score
from evomerge.testing.models import tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [f"{'so ' * (n % 4)}what is {n} + {n * n}?" for n in range(12)]
CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda")


def answers(live: LiveModel, words: Sequence[str], **how: Any) -> list[Request]:
    reader = Reader.of(live)
    return [Generate(reader.prompt(text, 8, text), **{"max_new_tokens": 8, "batch_size": 4, **how}) for text in words]


def likelihoods(live: LiveModel, words: Sequence[str], most: int = 8192) -> list[Request]:
    reader = Reader.of(live)
    return [Likelihood(reader.pair(text, " 12", text), most) for text in words]


def passes(live: LiveModel, batches: Sequence[Batch]) -> tuple[dict[int, list[Response]], list[int]]:
    """The responses by batch in the order that they come in, and the rows of each forward pass."""
    rows, forward = [], live.model.forward

    def watched(input_ids: torch.Tensor, **rest: Any) -> Any:
        rows.append(input_ids.shape[0])
        return forward(input_ids=input_ids, **rest)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    with mock.patch.object(live.model, "forward", watched):
        return dict(TransformersEngine(live).respond(batches)), rows


def test_batches_of_objectives_are_answered_as_each_alone() -> None:
    live = tiny_live()
    asked = [
        answers(live, WORDS[:5]), likelihoods(live, WORDS), answers(live, WORDS[3:], stop=("e",)), [],
        [*answers(live, WORDS[:2]), *likelihoods(live, WORDS[:2], 40), *answers(live, WORDS[5:7], max_new_tokens=3)],
    ]  # fmt: skip
    together, rows = passes(live, [Batch(requests, number) for number, requests in enumerate(asked)])
    alone = [passes(live, [Batch(requests)]) for requests in asked]
    assert [together[number] for number in range(len(asked))] == [found[0] for found, _ in alone]
    assert sorted(rows) == sorted(row for _, own in alone for row in own)  # and by the very same forward passes
    assert [type(r) for r in together[4]] == [Text, Text, LogLikelihood, LogLikelihood, Text, Text]
    assert [r.text for r in together[0] if isinstance(r, Text)] == generate(live, WORDS[:5], 8)


def test_what_is_answered_first_comes_first() -> None:
    live = tiny_live()
    batches = [Batch(answers(live, WORDS), 0), Batch(likelihoods(live, WORDS), 1), Batch(answers(live, WORDS[:1]), 2)]
    assert list(passes(live, batches)[0]) == [1, 0, 2]


@pytest.mark.parametrize("shaped", [False, True])  # by rows of a table, and by transformers' own loop
def test_who_listens_hears_of_every_prompt(shaped: bool) -> None:
    live, heard = tiny_live(), list[int]()
    live.model.generation_config.min_new_tokens = 3 if shaped else None
    asked = [*answers(live, WORDS, batch_size=3), *likelihoods(live, WORDS[:5], 40)]
    with progress_listener(heard.append):
        respond_to(TransformersEngine(live), asked)
    assert sum(heard) == len(asked)
    assert len(heard) > 4
    respond_to(TransformersEngine(live), asked[:1])
    assert sum(heard) == len(asked)


def test_batches_of_one_objective_share_forward_passes() -> None:
    """As those of several models on rows of one do."""
    live = tiny_live()
    halves = [
        Batch(answers(live, WORDS[:6], batch_size=50), 3, 0),
        Batch(answers(live, WORDS[6:], batch_size=50), 3, 1),
    ]
    assert max(passes(live, halves)[1]) == 12
    apart = [Batch(batch.requests, number) for number, batch in enumerate(halves)]
    assert max(passes(live, apart)[1]) == 6


@pytest.mark.parametrize("answered", [True, False])
def test_pictures_are_refused_by_engines_for_text(answered: bool) -> None:
    live, shown = tiny_live(), (Media("image", Path("kite.png")),)
    seen = Prompt("what?", "" if answered else " 1", [5, 6, 7], 0 if answered else 1, None, "line 3", shown)
    request = Generate(seen, 4) if answered else Likelihood(seen)
    with pytest.raises(InputError, match="line 3: shows the model an image, and this model reads only text"):
        respond_to(TransformersEngine(live), [*answers(live, WORDS[:2]), request])
    with pytest.raises(InputError, match="the engine vllm"):
        refuse_media([Batch([request])], "the engine vllm gives models")


# ---- scoring with an engine ------------------------------------------------------------------------------------------


class Lengths(Evaluator):
    """How long answers are; ``threads`` are those that it graded in."""

    name, version = "lengths", "1"
    metrics: ClassVar[dict[str, bool]] = {"letters": True}
    splits: ClassVar[dict[Split, list[Item]]] = {split: [Item(w, w) for w in WORDS] for split in get_args(Split)}

    def __init__(self, most: int, bad: float | None = None) -> None:
        self.most, self.bad, self.threads = most, bad, set[str]()

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> list[Request]:
        return [Generate(reader.prompt(WORDS[i], self.most, WORDS[i]), self.most, batch_size=4) for i in indices]

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        self.threads.add(threading.current_thread().name)
        found = texts(responses)
        lengths = [float(len(text)) if self.bad is None else self.bad for text in found]
        return Graded({"letters": np.array(lengths, np.float32)}, dict(zip(indices, found, strict=True)))


def measure(evaluators: Sequence[Evaluator], device: torch.device) -> Any:
    live = tiny_live()
    tasks = [Task(number, "search", [2, 0, 2]) for number in range(len(evaluators))]
    engine = TransformersEngine(live)
    attempt = Attempt(evaluators, live, engine, tasks)
    score(engine, attempt, device)
    return attempt.measured()


def test_an_accelerator_goes_on_while_answers_are_graded() -> None:
    evaluators = [Lengths(3), Lengths(9)]
    plain, beside = measure(evaluators, CPU), measure(evaluators, ACCELERATOR)
    for one, other in zip(plain.scores, beside.scores, strict=True):
        np.testing.assert_array_equal(one["letters"], other["letters"])
        assert one["letters"].shape == (3,)
    assert plain.answers == beside.answers
    assert plain.timings.keys() == beside.timings.keys() == {"generate", "score"}
    for evaluator in evaluators:
        assert len(evaluator.threads) == 2
        assert threading.current_thread().name in evaluator.threads


@pytest.mark.parametrize("device", [CPU, ACCELERATOR])
def test_what_grading_raises_ends_the_attempt(device: torch.device) -> None:
    with pytest.raises(NotFiniteError, match="lengths: letters of 3 items"):
        measure([Lengths(3), Lengths(4, bad=float("nan"))], device)


# ---- evaluators of other shapes --------------------------------------------------------------------------------------


class OldSettings(EvaluatorSettings):
    def build(self) -> Any:
        return OldEvaluator()


class OldEvaluator:
    """What packages had before evaluators had two phases."""

    name, version, metrics, measured = "old", "1", {"m": True}, frozenset[str]()
    seconds, answers = {}, {}

    def items(self, split: Split) -> list[str]:
        return [split]

    def score(self, live: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        return {"m": np.zeros(len(indices), np.float32)}


def test_an_evaluator_of_another_shape_is_told_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = dict(OWN["evomerge.evaluators"]) | {"old": f"{__name__}:OldSettings"}
    monkeypatch.setattr("evomerge.plugins.OWN", {**OWN, "evomerge.evaluators": group})
    monkeypatch.setattr("sys.path", [*__import__("sys").path, str(tmp_path)])  # so that nothing looked up is kept
    file = search_file(tmp_path, objectives={"m": {"evaluator": "old", "metric": "m"}})
    assert evomerge("validate", file) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "objectives.m: evaluator: OldEvaluator is not an evaluator" in said
    assert "evaluators.base.Evaluator" in said


def test_splits_of_one_evaluator_are_not_in_one_forward_pass() -> None:
    """A candidate that is scored again is scored in the batches that it was scored in."""
    live, evaluator = tiny_live(), Lengths(8)
    tasks = [Task(0, split, range(3)) for split in get_args(Split)]
    attempt = Attempt([evaluator], live, TransformersEngine(live), tasks)
    assert max(passes(live, list(attempt.unanswered.values()))[1]) == 3
