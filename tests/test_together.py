"""Candidates scored together, against the same worker that writes each into the weights and scores it alone."""

from __future__ import annotations

import inspect
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from helpers_lm_eval import CHOOSE, COUNTING_CODE, COUNTS, GENERATE, questions, write_lines, write_task
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapters import LINEAR, train
from test_low_rank_rows import arithmetic, candidates, opened, recipe_of, refused, rows_of, shares_of
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from evaluators.base import Direct, Evaluator, Graded, ImperativeEvaluator, Item, Outcome, Split, texts
from evaluators.change import ChangeSettings
from evaluators.cost import CostSettings
from evaluators.function import FunctionSettings
from evaluators.likelihood import LikelihoodSettings
from evaluators.lm_eval import LmEvalSettings
from evomerge.checkpoints.live import LiveModel
from evomerge.checkpoints.source import Source
from evomerge.inference import decoding
from evomerge.inference.generation import Decoding, answer_groups
from evomerge.inference.reading import Reader
from evomerge.inference.requests import Batch, Engine, Generate, Request, Response, respond_to
from evomerge.inference.transformers_engine import TransformersEngine
from evomerge.merging.adapters.low_rank import base_recipe, family_of
from evomerge.merging.building.builders import BuildContext, Builders
from evomerge.merging.building.stack_builder import StackBuilder
from evomerge.merging.materialise import Materialiser
from evomerge.recipes.stack import StackRecipe
from evomerge.search.work.jobs import Failed, Finished, Job, Measured, Task
from evomerge.search.workers.worker import Worker
from evomerge.testing.models import byte_tokenizer

SHOTS = "Q: 2 + 3?\nA: 5\n\nQ: 7 - 1?\nA: 6\n\n"
PROMPTS = [f"{SHOTS}Q: {'so ' * (n % 4)}what is {n * n} + {n}?\nA:" for n in range(14)]
SMALL: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def second_tries(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Of candidates that could not be answered in one go; a test that expects one takes it out."""
    found: list[str] = []
    yield found
    logged = [
        record.message for record in caplog.get_records("call") if record.name == "evomerge.search.workers.together"
    ]
    assert logged == found


def save(config: Any, folder: Path) -> Path:
    """A random model with weights large enough that its answers differ from prompt to prompt."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


ADAPTERS: dict[str, dict[str, Any]] = {
    "maths": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_rslora": True},
    "japanese": {
        "r": 2, "lora_alpha": 3, "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 1.5},
    },
    "last": {"r": 3, "lora_alpha": 4, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("family")
    base = save(LlamaConfig(**SMALL), folder / "base")
    return opened(base, **{n: train(base, folder / n, seed=i, **each) for i, (n, each) in enumerate(ADAPTERS.items())})


def start(sources: dict[str, Source], evaluators: Sequence[Evaluator]) -> Worker:
    builders = Builders(BuildContext(sources, "base", dtype=torch.float32))
    live = stack_of(builders).live
    live.model.generation_config.eos_token_id = list(range(0, 259, 16))  # about every tenth answer ends at each token
    return Worker("here", builders, evaluators)


def stack_of(builders: Builders) -> StackBuilder:
    stack = builders.of_kind("stack")
    assert isinstance(stack, StackBuilder)
    return stack


def jobs_of(recipes: Sequence[StackRecipe], tasks: Sequence[Task]) -> list[Job]:
    return [Job(10 + number, 1, recipe, tasks) for number, recipe in enumerate(recipes)]


class Asking(Evaluator):
    """An evaluator of answers. ``said`` are those of each model that was scored; ``check`` sees them first."""

    name, version = "asking", "1"
    splits: ClassVar[dict[Split, list[Item]]] = {split: [Item(p, p) for p in PROMPTS] for split in get_args(Split)}

    def __init__(
        self,
        most: int = 12,
        stop: Sequence[str] = ("\n", "e"),
        batch_size: int = 5,
        check: Callable[[list[str]], None] = lambda answers: None,
    ) -> None:
        self.metrics = {"code": True}
        self.most, self.stop, self.batch_size, self.check = most, tuple(stop), batch_size, check
        self.said: list[list[str]] = []

    def requests(self, reader: Reader, split: Split, indices: Sequence[int]) -> Sequence[Request | Direct]:
        return [self.request(reader, PROMPTS[index]) for index in indices]

    def request(self, reader: Reader, text: str) -> Request:
        return Generate(reader.prompt(text, self.most, text), self.most, self.stop, self.batch_size)

    def grade(self, split: Split, indices: Sequence[int], responses: Sequence[Response | Outcome]) -> Graded:
        return self.graded([texts(responses)])

    def graded(self, turns: Sequence[list[str]]) -> Graded:
        self.check(turns[-1])
        self.said.append([answer for answers in turns for answer in answers])
        codes = [zlib.crc32("|".join(own).encode()) % 9973 for own in zip(*turns, strict=True)]
        return Graded({"code": np.array(codes, np.float32)})


class InTurns(ImperativeEvaluator, Asking):
    """Asks three times: each turn's prompts are those of the turn before with their answers."""

    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        prompts, turns = [PROMPTS[index] for index in indices], []
        for _ in range(3):
            turns.append(texts(respond_to(engine, [self.request(Reader.of(live), text) for text in prompts])))
            prompts = [prompt + answer + "?" for prompt, answer in zip(prompts, turns[-1], strict=True)]
        return self.graded(turns)


def measured(finished: Sequence[Finished]) -> list[list[dict[str, list[float]]]]:
    """The scores of every job, task and metric."""
    found = []
    for each in finished:
        assert isinstance(each.result, Measured), each.result
        found.append([{name: values.tolist() for name, values in scores.items()} for scores in each.result.scores])
    return found


def test_answers_are_those_of_each_candidate_alone(sources: dict[str, Source]) -> None:
    evaluator = Asking()
    worker = start(sources, [evaluator])
    jobs = jobs_of(candidates(sources, 2, 6), [Task(0, "search", range(len(PROMPTS)))])
    alone = [worker.run(job) for job in jobs]
    said = list(evaluator.said)
    assert len({answer for answers in said for answer in answers}) > 20
    assert len({len(answer) for answers in said for answer in answers}) > 4
    evaluator.said.clear()
    together = worker.run_together(jobs)
    assert evaluator.said == said
    assert measured(together) == measured(alone)
    assert [(each.candidate, each.attempt, each.worker) for each in together] == [
        (each.candidate, each.attempt, each.worker) for each in alone
    ]
    assert {"merge", "generate"} <= together[0].result.timings.keys()
    assert measured([worker.run(job) for job in jobs]) == measured(alone)  # no trace is left
    assert measured(worker.run_together(jobs[::-1])) == measured(alone)[::-1]


@pytest.mark.parametrize("base", ["base", "maths"])
def test_how_far_a_candidate_is_from_the_base_is_that_of_the_merged_weights(
    sources: dict[str, Source], base: str
) -> None:
    """Of the adapters' factors as of the weights that a merge writes, and the evaluator says the same."""
    builders = Builders(BuildContext(sources, "base", dtype=torch.float32, base=base))
    worker = Worker("here", builders, [ChangeSettings().build()])
    jobs = jobs_of(candidates(sources, 2, 4), [Task(0, "search", [0])])
    alone, together = (
        [each.result for each in found] for found in ([*map(worker.run, jobs)], worker.run_together(jobs))
    )
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, Measured)
        assert isinstance(other, Measured)
        assert one.change is not None
        assert other.change == pytest.approx(one.change, rel=1e-5)
        assert other.scores[0]["change"].tolist() == [np.float32(other.change)]
    assert len({each.change for each in alone if isinstance(each, Measured)}) == len(jobs)


def test_candidates_ask_for_different_items_and_evaluators(sources: dict[str, Source]) -> None:
    """Some are done when others go on, and what is asked next hangs on what was answered."""
    evaluators = [InTurns(), Asking(most=5), Asking(stop=())]
    worker = start(sources, evaluators)
    recipes = candidates(sources, 2, 4)
    shares: list[list[Task]] = [
        [Task(0, "search", [3, 1]), Task(1, "search", range(9))],
        [Task(1, "search", [2])],
        [Task(2, "search", range(5)), Task(0, "search", [0, 7, 13]), Task(1, "search", [])],
        [],
    ]
    jobs = [Job(n, 1, recipe, tasks) for n, (recipe, tasks) in enumerate(zip(recipes, shares, strict=True))]
    assert measured(worker.run_together(jobs)) == measured([worker.run(job) for job in jobs])


def test_all_candidates_share_forward_passes(sources: dict[str, Source]) -> None:
    worker = start(sources, [Asking(batch_size=100), Asking(batch_size=100, stop=["a"])])
    jobs = jobs_of(candidates(sources, 2, 4), [Task(0, "search", range(6)), Task(1, "search", range(6))])
    passes: list[tuple[int, int]] = []
    forward = stack_of(worker._builders).live.model.forward

    def watched(input_ids: torch.Tensor, **rest: Any) -> Any:
        passes.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(input_ids=input_ids, **rest)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    with mock.patch.object(stack_of(worker._builders).live.model, "forward", watched):
        worker.run_together(jobs)
    shared = len(SHOTS.encode()) + len("Q: ")
    assert passes[0] == (4, 8)  # the probe
    assert passes[1] == (4, shared)  # what each candidate's prompts have in common, once
    assert passes[2][0] == 24
    assert len(passes) <= 1 + 2 * (1 + 12)


def test_likelihoods_and_answers_of_one_job(sources: dict[str, Source], tmp_path: Path) -> None:
    write_lines(tmp_path / "items.jsonl", [{"prompt": f"{n} + {n} =", "answer": f" {2 * n}"} for n in range(20)])
    likelihood = LikelihoodSettings(file=tmp_path / "items.jsonl", batch_tokens=40).build()
    worker = start(sources, [likelihood, Asking()])
    count = len(likelihood.items("search"))
    jobs = jobs_of(candidates(sources, 2, 4), [Task(0, "search", range(count)), Task(1, "search", range(5))])
    alone, together = (measured(found) for found in ([worker.run(job) for job in jobs], worker.run_together(jobs)))
    differing = set()
    for one, other in zip(alone, together, strict=True):
        for metric, values in one[0].items():
            assert np.allclose(values, other[0][metric], atol=1e-4)
        assert one[1] == other[1]
        differing.add(round(one[0]["log_likelihood"][0], 3))
    assert len(differing) == 4


def test_tasks_of_lm_eval(sources: dict[str, Source], tmp_path: Path) -> None:
    """Answers of one request type after another's likelihoods, by an evaluator that keeps its requests."""
    splits = {split: questions(split, 5) for split in ("training", "validation", "test")}
    (tmp_path / "counting.py").write_text(COUNTING_CODE)
    shots = "num_fewshot: 2\nfewshot_split: training\n"
    write_task(tmp_path, "mine", GENERATE + COUNTS + shots, **splits)
    write_task(tmp_path, "beams", GENERATE + "  num_beams: 2\n" + COUNTS, **splits)
    write_task(tmp_path, "choose", CHOOSE, **splits)
    evaluators = [
        LmEvalSettings(task=task, task_folders=(tmp_path,), allow_task_code=True, batch_size=8).build()
        for task in ("mine", "beams", "choose")
    ]
    worker = start(sources, evaluators)
    jobs = jobs_of(candidates(sources, 2, 3), [Task(n, "search", range(4)) for n in range(3)])
    together = worker.run_together(jobs)
    assert measured(together) == measured([worker.run(job) for job in jobs])


FUNCTION = """\
import sys

def score(items, generate):
    print("to the side")
    first = generate([item["question"] for item in items], 8)
    second = generate([item["question"] + answer + "!" for item, answer in zip(items, first)], 8, ["a"])
    return [float(sum(map(ord, a + b)) % 997) for a, b in zip(first, second)]
"""


def test_a_function_of_ones_own(sources: dict[str, Source], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTION)
    write_lines(tmp_path / "items.jsonl", questions("test", 12))
    evaluator = FunctionSettings(
        file=tmp_path / "mine.py",
        items_file=tmp_path / "items.jsonl",
        metrics={"code": "maximize"},
        allow_task_code=True,
    ).build()
    worker = start(sources, [evaluator])
    jobs = jobs_of(candidates(sources, 2, 3), [Task(0, "search", range(len(evaluator.items("search"))))])
    out = sys.stdout
    assert measured(worker.run_together(jobs)) == measured([worker.run(job) for job in jobs])
    assert sys.stdout is out


def test_without_a_table_each_candidate_is_answered_for_itself(tmp_path: Path) -> None:
    base = save(Gemma2Config(**{**SMALL, "head_dim": 8, "sliding_window": 16}), tmp_path / "base")
    folders = {f"a{n}": train(base, tmp_path / f"a{n}", seed=n, r=2, target_modules=LINEAR) for n in range(2)}
    family = opened(base, **folders)
    evaluator = Asking()
    worker = start(family, [evaluator])
    jobs = jobs_of(candidates(family, 2, 3), [Task(0, "search", range(6))])
    assert measured(worker.run_together(jobs)) == measured([worker.run(job) for job in jobs])
    assert len(set(map(tuple, evaluator.said))) == 3


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def three(sources: dict[str, Source]) -> tuple[Asking, Worker, list[Job]]:
    evaluator = Asking()
    tasks = [Task(0, "search", range(6))]
    return evaluator, start(sources, [evaluator]), jobs_of(candidates(sources, 2, 3), tasks)


def test_an_exception_ends_its_candidate_alone(three: tuple[Asking, Worker, list[Job]]) -> None:
    evaluator, worker, jobs = three
    alone = [worker.run(job) for job in jobs]
    bad = evaluator.said[1]

    def check(answers: list[str]) -> None:
        if answers == bad:
            raise KeyError("one")

    evaluator.check = check
    first, second, third = worker.run_together(jobs)
    assert measured([first, third]) == measured([alone[0], alone[2]])
    assert isinstance(second.result, Failed)
    assert (second.result.reason, second.result.message) == ("error", "KeyError: 'one'")
    assert "raise KeyError" in second.result.log


def test_a_candidate_that_breaks_the_model_ends_alone(
    three: tuple[Asking, Worker, list[Job]], second_tries: list[str]
) -> None:
    _, worker, jobs = three
    alone, answer = [worker.run(job) for job in jobs], TransformersEngine._answers

    def breaking(self: TransformersEngine, batches: Sequence[Batch], how: Decoding, places: Any, found: Any) -> None:
        if any(batches[number].model == 1 for number in places):
            raise IndexError("index out of range in self")
        answer(self, batches, how, places, found)

    with mock.patch.object(TransformersEngine, "_answers", breaking):
        first, second, third = worker.run_together(jobs)
    assert measured([first, third]) == measured([alone[0], alone[2]])
    assert isinstance(second.result, Failed)
    assert second.result.message.startswith("IndexError")
    second_tries.append("3 candidates are answered one at a time: index out of range in self")


def test_a_function_that_fails_for_one_candidate_ends_it_alone(sources: dict[str, Source]) -> None:
    evaluator = InTurns()
    worker = start(sources, [evaluator, Asking()])
    jobs = jobs_of(candidates(sources, 2, 3), [Task(0, "search", range(4)), Task(1, "search", range(4))])
    alone = [worker.run(job) for job in jobs]
    bad = evaluator.said[1][-4:]

    def check(answers: list[str]) -> None:
        if answers == bad:
            raise SystemExit("one")

    evaluator.check = check
    first, second, third = worker.run_together(jobs)
    assert measured([first, third]) == measured([alone[0], alone[2]])
    assert isinstance(second.result, Failed)
    assert second.result.message == "SystemExit: one"


@pytest.mark.parametrize(("source", "weight"), [("maths", 1e39), ("japanese", 1e20)])
def test_numbers_that_are_not_finite(three: tuple[Asking, Worker, list[Job]], source: str, weight: float) -> None:
    """Too large for the coefficient itself, or for the logits."""
    _, worker, jobs = three
    sources = stack_of(worker._builders).sources
    large = recipe_of(dict(sources), [arithmetic({source: weight})] * 2)
    jobs.insert(1, Job(5, 1, large, jobs[0].tasks))
    alone, together = [worker.run(job) for job in jobs], worker.run_together(jobs)
    assert measured(together[:1] + together[2:]) == measured(alone[:1] + alone[2:])
    for each in (alone[1], together[1]):
        assert isinstance(each.result, Failed)
        assert each.result.reason == "not_finite"


def test_scores_are_checked(three: tuple[Asking, Worker, list[Job]]) -> None:
    evaluator, worker, jobs = three
    evaluator.metrics = {"code": True, "other": True}
    for each in worker.run_together(jobs):
        assert isinstance(each.result, Failed)
        assert each.result.message == "ValueError: asking gave nothing for other of 6 items"


def test_what_all_share_fails_for_all(three: tuple[Asking, Worker, list[Job]]) -> None:
    _, worker, jobs = three
    with mock.patch.object(Materialiser, "write", side_effect=torch.OutOfMemoryError("full")):
        results = [each.result for each in worker.run_together(jobs)]
    assert [(each.reason, each.message) for each in results if isinstance(each, Failed)] == [
        ("out_of_memory", "full")
    ] * 3
    measured(worker.run_together(jobs))


def test_other_recipes_and_measured_speeds_are_refused(three: tuple[Asking, Worker, list[Job]]) -> None:
    _, worker, jobs = three
    sources = dict(stack_of(worker._builders).sources)
    scaled = recipe_of(sources, [arithmetic({"maths": 1.0})] * 2, scales=[1.0, 0.5])
    first, second = worker.run_together([jobs[0], Job(4, 1, scaled, jobs[0].tasks)])
    assert isinstance(first.result, Measured)
    assert isinstance(second.result, Failed)
    assert second.result.message == f"NotLowRankError: {refused(sources, scaled)}"
    timed = start(sources, [CostSettings(measure=True, tokens=4, answer=2).build()])
    (only,) = timed.run_together(jobs_of([jobs[0].recipe], [Task(0, "search", [0])]))
    assert isinstance(only.result, Failed)
    assert "measures speed" in only.result.message


def test_out_of_memory_halves_the_rows_of_all(three: tuple[Asking, Worker, list[Job]]) -> None:
    evaluator, worker, jobs = three
    evaluator.batch_size = 18
    alone = [worker.run(job) for job in jobs]
    forward, seen = stack_of(worker._builders).live.model.forward, []

    def limited(input_ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(input_ids.shape[0])
        if input_ids.shape[0] > 3:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **rest)

    limited.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    with mock.patch.object(stack_of(worker._builders).live.model, "forward", limited):
        assert measured(worker.run_together(jobs)) == measured(alone)
    assert 18 in seen


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded(sources: dict[str, Source]) -> Iterator[tuple[LiveModel, Any]]:
    """A live model with three candidates beside it, and their rows."""
    recipes = candidates(sources, 2, 3)
    live = stack_of(start(sources, [])._builders).live
    Materialiser(sources).write(base_recipe(recipes[0], sources, family_of(sources)), live)
    rows = rows_of(sources, live)
    with rows.mixed([shares_of(rows, sources, recipe) for recipe in recipes]):
        yield live, rows


ENDS = st.lists(st.integers(3, 258), min_size=1, max_size=6)


@settings(max_examples=settings().max_examples // 4)
@given(
    st.lists(st.lists(ENDS, min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(3, 258), max_size=6), min_size=3, max_size=3),
    st.integers(1, 10), st.integers(1, 6), st.integers(1, 20), st.integers(0, 6),
)  # fmt: skip
def test_any_prompts_of_any_candidates_in_any_number_of_rows(
    decoded: tuple[LiveModel, Any], groups: list[list[list[int]]], shared: list[list[int]], most: int, batch: int,
    prefill: int, columns: int,
) -> None:  # fmt: skip
    live, rows = decoded
    prompts = [[start + end for end in ends] for start, ends in zip(shared, groups, strict=False)]
    with mock.patch.multiple(decoding, _PREFILL_TOKENS_CPU=prefill, _COLUMNS=columns):
        found = answer_groups(live, prompts, Decoding(most, (), batch), rows.choose)
    for number, (group, answers) in enumerate(zip(prompts, found, strict=True)):
        for prompt, answer in zip(group, answers, strict=True):
            one = answer_groups(live, [[prompt]], Decoding(most, (), 1), lambda _, n=number: rows.choose([n]))
            assert one == [[answer]]


def test_nan_of_one_candidate_stays_with_it(sources: dict[str, Source]) -> None:
    recipes = candidates(sources, 2, 2)
    live = stack_of(start(sources, [])._builders).live
    Materialiser(sources).write(base_recipe(recipes[0], sources, family_of(sources)), live)
    rows = rows_of(sources, live)
    shares = shares_of(rows, sources, recipes[0])
    live.model.generation_config.eos_token_id = 0  # what comes of NaN: such rows end at once
    # A long row of the sound candidate stays open beside its short ones, which get the rows that the broken one leaves.
    broken = [[5] * 25, [6] * 24]
    sound = [[40] * 30, *([41 + n] * (3 + n) for n in range(6))]
    how = Decoding(9, (), 3)
    with rows.mixed([shares * torch.nan, shares]):
        together = answer_groups(live, [broken, sound], how, rows.choose)[1]
        (alone,) = answer_groups(live, [sound], how, lambda _: rows.choose([1]))
    assert together == alone
