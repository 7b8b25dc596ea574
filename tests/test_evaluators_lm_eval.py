"""The lm-eval evaluator: equal to lm-eval's own driver, safe to repeat, and clear about what is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lm_eval
import numpy as np
import pytest
import torch
from helpers_lm_eval import CHOOSE, COUNTING_CODE, COUNTS, GENERATE, questions, write_all, write_task
from helpers_miniature import MINIATURES, search_file
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluators import evaluator_settings, lm_eval_tasks
from evaluators.base import EvaluatorSettings, prompts_of
from evaluators.benchmarks import count
from evaluators.lm_eval import LmEvalEvaluator, LmEvalSettings
from evaluators.lm_eval_model import ResidentLM, request_of
from evaluators.prompts import describe_truncated
from evaluators.scoring import score
from evaluators.tasks import miniatures
from evomerge.checkpoints.live import LiveModel
from evomerge.errors import InputError
from evomerge.inference.reading import Reader
from evomerge.inference.stopping import StopAtText
from evomerge.search.settings.search_file import load_search_file
from evomerge.testing.evaluators import EvaluatorContract
from evomerge.testing.models import byte_tokenizer, tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    write_all(path, ITEMS)
    return path


@pytest.fixture
def build(folder: Path) -> Callable[..., LmEvalEvaluator]:
    return lambda task, **changes: settings_for(folder, task, **changes).build()


def settings_for(folder: Path, task: str, **changes: Any) -> LmEvalSettings:
    given = {"task": task, "task_folders": (folder,), "allow_task_code": True, "batch_size": 4} | changes
    return LmEvalSettings.model_validate(given)


def refusal(folder: Path, task: str, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        settings_for(folder, task, **changes).build()
    return str(caught.value)


class TestGenerate(EvaluatorContract):
    task = "generate_default"
    changes: ClassVar[dict[str, object]] = {"generation": {"max_gen_toks": 9}}

    @pytest.fixture
    def settings(self, folder: Path) -> EvaluatorSettings:
        return settings_for(folder, self.task)

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()


class TestChoose(TestGenerate):
    task = "choose_default"


class TestRolling(TestGenerate):
    task = "rolling"


# Equal to simple_evaluate


def reference(live: LiveModel, folder: Path, task: str, **options: Any) -> dict[str, dict[int, float]]:
    """Per-item scores of lm-eval's own driver, by metric and row."""
    lm = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=1)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
    found: dict[str, dict[int, float]] = {}
    for sample in results["samples"][task]:
        for metric in sample["metrics"]:
            key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            found.setdefault(key, {})[sample["doc_id"]] = sample[metric]
    return found


@pytest.fixture
def _quick_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """simple_evaluate asks pip and git about this machine on every call."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda *_: None)


def raw(key: str, value: Any) -> float:
    """The item's score from what is logged: for a perplexity a log-likelihood, or that and its count of units."""
    if isinstance(value, tuple):
        return -value[0] / value[1] / (math.log(2) if key == "bits_per_byte" else 1)
    return -value if key == "log_perplexity" else value


TASKS = [
    "generate", "generate_default", "generate_first_n", "choose", "choose_default", "choose_first_n",
    "likelihood_default", "likelihood_first_n", "rolling",
]  # fmt: skip


def assert_equal(evaluator: LmEvalEvaluator, live: LiveModel, expected: dict[str, dict[int, float]], rows: Any) -> None:
    found = score(evaluator, live, "held_out", rows).scores
    assert found.keys() == evaluator.metrics.keys()
    for key, values in found.items():
        theirs = expected[key.removeprefix("log_")]
        np.testing.assert_allclose(values, [raw(key, theirs[row]) for row in rows], rtol=1e-5, err_msg=key)


@pytest.mark.usefixtures("_quick_reference")
@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_simple_evaluate(build: Callable[..., LmEvalEvaluator], folder: Path, task: str) -> None:
    evaluator = build(task)
    first, second = tiny_live(1), tiny_live(2)
    second.tokenizer = first.tokenizer
    expected = {id(live): reference(live, folder, task) for live in (first, second)}
    assert expected[id(first)] != expected[id(second)]
    for live in (first, second, first, first):
        assert_equal(evaluator, live, expected[id(live)], range(ITEMS))
        assert_equal(evaluator, live, expected[id(live)], [9, 2, 11])


@pytest.mark.usefixtures("_quick_reference")
@pytest.mark.parametrize("task", ["generate_first_n", "choose", "likelihood_first_n"])
def test_a_subset_equals_simple_evaluate_on_samples(
    build: Callable[..., LmEvalEvaluator], folder: Path, task: str
) -> None:
    live, rows = tiny_live(3), [2, 5, 11]
    expected = reference(live, folder, task, samples={task: rows})
    assert_equal(build(task), live, expected, rows)


@pytest.mark.usefixtures("_quick_reference")
def test_a_slice_draws_the_examples_that_simple_evaluate_draws(
    build: Callable[..., LmEvalEvaluator], folder: Path
) -> None:
    live, task = tiny_live(3), "choose_default"
    expected = reference(live, folder, task, limit=5)
    assert_equal(build(task, held_out="test[:5]"), live, expected, range(5))


@pytest.mark.usefixtures("_quick_reference")
def test_the_search_split_equals_simple_evaluate_on_it(tmp_path: Path) -> None:
    splits = {split: questions(split, 6) for split in ("training", "validation")}
    (tmp_path / "counting.py").write_text(COUNTING_CODE)
    shots = "num_fewshot: 2\nfewshot_split: training\n"
    write_task(tmp_path, "plain", GENERATE + COUNTS + shots, **splits, test=questions("test", 6))
    write_task(tmp_path, "swapped", GENERATE + COUNTS + shots, **splits)  # simple_evaluate takes validation now
    live = tiny_live(4)
    expected = reference(live, tmp_path, "swapped")
    found = score(settings_for(tmp_path, "plain").build(), live, "search", range(6)).scores
    for key, values in found.items():
        np.testing.assert_allclose(values, list(expected[key].values()), rtol=1e-6)


FILTERS = """\
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: whole
    filter:
      - function: take_first
  - name: first
    filter:
      - function: regex
        regex_pattern: "(.)"
      - function: take_first
"""


@pytest.mark.usefixtures("_quick_reference")
def test_named_filters_equal_simple_evaluate(build: Callable[..., LmEvalEvaluator], tmp_path: Path) -> None:
    live, splits = tiny_live(5), {split: questions(split, 6) for split in ("validation", "test")}
    unfiltered = build("generate", held_out="test[:6]")
    score(unfiltered, live, "held_out", range(6))
    answers = [group[0].resps[0] for group in unfiltered._instances["held_out"]]
    for row, target in zip(splits["test"], [*answers[:2], answers[2][:1], answers[3][:1], "no", "no"], strict=True):
        row["answer"] = target
    write_task(tmp_path, "filtered", GENERATE + FILTERS, **splits)
    evaluator = settings_for(tmp_path, "filtered").build()
    assert evaluator.metrics == {"exact_match,whole": True, "exact_match,first": True}
    scores = score(evaluator, live, "held_out", range(6)).scores
    assert scores["exact_match,whole"].tolist() == [1, 1, 0, 0, 0, 0]
    assert scores["exact_match,first"].tolist() == [0, 0, 1, 1, 0, 0]
    assert_equal(evaluator, live, reference(live, tmp_path, "filtered"), range(6))


# Prompts, splits and versions


def prompts(evaluator: LmEvalEvaluator, split: Any = "held_out") -> list[str]:
    return [group[0].args[0] for group in evaluator._instances[split]]


def test_an_item_is_not_among_its_own_examples(tmp_path: Path) -> None:
    shots = "num_fewshot: 3\n"  # lm-eval falls back to the validation split, which is the search split here
    splits = {split: questions(split, 5) for split in ("validation", "test")}
    write_task(tmp_path, "shots", CHOOSE + shots, **splits)
    evaluator = settings_for(tmp_path, "shots").build()
    for row, prompt in zip(splits["validation"], prompts(evaluator, "search"), strict=True):
        assert prompt.count(row["question"]) == 1
        assert prompt.count("Q:") == 4


def test_settings_change_the_prompts(build: Callable[..., LmEvalEvaluator]) -> None:
    assert prompts(build("choose", num_fewshot=1))[0].count("Q:") == 2
    assert prompts(build("choose", system_instruction="Think."))[0].startswith("Think.")
    changed = build("generate", generation={"max_gen_toks": 3})
    assert all(group[0].args[1]["max_gen_toks"] == 3 for group in changed._instances["held_out"])
    assert score(changed, tiny_live(), "held_out", range(ITEMS)).scores["letters"].max() <= 3


def test_splits_are_roles_or_names_with_slices(build: Callable[..., LmEvalEvaluator]) -> None:
    evaluator = build("choose", search="training[:-2]", held_out="training[-2:]")
    assert (len(evaluator.items("search")), len(evaluator.items("held_out"))) == (ITEMS - 2, 2)
    whole = build("choose", search="training", held_out="test")
    assert whole.items("search") == [*evaluator.items("search"), *evaluator.items("held_out")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"held_out": "tests"}, "held_out: there is no split 'tests'. There are: training (training), validation"),
        ({"search": "validation[12:]"}, "search: 'validation[12:]' has no items; 'validation' has 12"),
        ({"search": "validation[:0]"}, "search: 'validation[:0]' has no items"),
        ({"search": "validation[:10%]"}, "search: 'validation[:10%]' is not a split. Write `test`, `test[250:]`"),
        ({"search": "test[:7]", "held_out": "test[5:]"}, "held_out: shares 2 rows of 'test' with the search split"),
        ({"num_fewshot": 50}, "cannot be used (ValueError: Sample larger than population"),
    ],
)
def test_splits_that_cannot_be(folder: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(folder, "choose_default", **changes)


def test_the_same_item_in_both_splits(tmp_path: Path) -> None:
    test = questions("test", 4)
    write_task(tmp_path, "leak", CHOOSE, validation=[*questions("validation", 4), test[2]], test=test)
    said = refusal(tmp_path, "leak")
    assert "held_out: has 1 items that the search split has too (row 2 of 'test' is the first" in said


def test_versions(tmp_path: Path) -> None:
    def version(folder: Path, **changes: Any) -> str:
        return settings_for(folder, "generate", **changes).build().version

    write_all(tmp_path / "one", 3)
    write_all(tmp_path / "two", 3)
    first = version(tmp_path / "one")
    assert version(tmp_path / "two") == first, "where a task lies does not change its scores"
    assert version(tmp_path / "one", generation={"max_gen_toks": 9}) != first
    assert version(tmp_path / "one", held_out="test[:2]") != first
    data = tmp_path / "one" / "generate.test.jsonl"
    data.write_text(data.read_text().replace("what is", "what was"))
    assert version(tmp_path / "one") != first
    code = tmp_path / "two" / "counting.py"
    code.write_text(code.read_text() + "\n# graded otherwise\n")
    assert version(tmp_path / "two") != first


def test_metrics_of_many_items_are_left_out(tmp_path: Path) -> None:
    splits = {split: questions(split, 3) for split in ("validation", "test")}
    both = "  - metric: f1\n    aggregation: f1\n    higher_is_better: true\n"
    write_task(tmp_path, "both", CHOOSE + both, **splits)
    assert settings_for(tmp_path, "both").build().metrics == {"acc": True, "acc_norm": True}
    head = CHOOSE[: CHOOSE.index("metric_list")]
    write_task(tmp_path, "alone", head + "metric_list:\n" + both, **splits)
    assert "has no metric that gives every item a number (f1)" in refusal(tmp_path, "alone")


# What a person gets wrong


def drop(rows: list[dict[str, Any]], key: str, row: int | None = None) -> list[dict[str, Any]]:
    return [{k: v for k, v in item.items() if k != key or row not in (None, i)} for i, item in enumerate(rows)]


def change(rows: list[dict[str, Any]], key: str, value: Any, row: int) -> list[dict[str, Any]]:
    return [item | {key: value} if i == row else item for i, item in enumerate(rows)]


@pytest.mark.parametrize(
    ("text", "test", "said"),
    [
        (CHOOSE, [], "a data file is empty"),
        (CHOOSE, drop(questions("test", 4), "question"), "lacks a field that its prompt or answer needs"),
        (CHOOSE, drop(questions("test", 4), "question", 2), "held_out, row 2: "),
        (CHOOSE, drop(questions("test", 4), "gold", 3), "held_out, row 3: "),
        (CHOOSE, change(questions("test", 4), "gold", 4, 1), "row 1: cannot be used (ValueError: the answer is"),
        (CHOOSE, change(questions("test", 4), "gold", 9, 0), "IndexError"),
        (CHOOSE.replace(": acc\n", ": accc\n"), questions("test", 4), "no metric 'accc'. Did you mean 'acc"),
        (CHOOSE.replace("aggregation: mean", "aggregation: men"), questions("test", 4), "no aggregation 'men'. Did"),
        (CHOOSE.replace("to_text", "to_txt"), questions("test", 4), "no key 'doc_to_txt'. Did you mean 'doc_to"),
        (CHOOSE + "unsafe_code: true\n", questions("test", 4), "unsafe_code"),
        (CHOOSE + "doc_to_audio: sound\n", questions("test", 4), "plays sounds"),
        (CHOOSE + "doc_to_image: question\n", questions("test", 4), "(ValueError: `doc_to_image` gives"),
        (CHOOSE + "fewshot_split: nowhere\n", questions("test", 4), "nowhere"),
        (GENERATE + "process_results: !function counting.fails\n", questions("test", 4), "grading of row 0: cannot be"),
        (GENERATE + "process_results: !function counting.gone\n", questions("test", 4), "no attribute 'gone'"),
        (GENERATE + "  do_sample: true\n  temperature: 0.7\n", questions("test", 4), "samples its answers"),
        (GENERATE + "  do_sample: true\n", questions("test", 4), "samples its answers"),
    ],
)  # fmt: skip
def test_broken_tasks(tmp_path: Path, text: str, test: list[dict[str, Any]], said: str) -> None:
    (tmp_path / "counting.py").write_text("def fails(doc, results):\n    return {'acc': 1 / len(results[0])}\n")
    write_task(tmp_path, "broken", text, validation=questions("validation", 4), test=test)
    message = refusal(tmp_path, "broken")
    assert message.startswith("task broken")
    assert said in message


def test_broken_data_files(tmp_path: Path) -> None:
    write_task(tmp_path, "broken", CHOOSE, validation=questions("validation", 4), test=questions("test", 4))
    data = tmp_path / "broken.test.jsonl"
    data.write_text('{"question": \n')
    assert "a data file cannot be read (ArrowInvalid: JSON parse error" in refusal(tmp_path, "broken")
    data.unlink()
    assert "a data file is missing" in refusal(tmp_path, "broken")


def test_sampling_can_be_switched_off(tmp_path: Path) -> None:
    splits = {split: questions(split, 3) for split in ("validation", "test")}
    write_task(tmp_path, "hot", GENERATE + "  do_sample: true\n  temperature: 0.7\n", **splits)
    evaluator = settings_for(tmp_path, "hot", generation={"do_sample": False}).build()
    before = torch.get_rng_state()
    score(evaluator, tiny_live(), "search", range(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_unreadable_task_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: [\n")
    assert "mine.yaml: is not a task file: while parsing" in refusal(tmp_path, "mine")


def test_settings_that_a_task_cannot_take(folder: Path) -> None:
    assert "has no generation settings" in refusal(folder, "choose", generation={"max_gen_toks": 3})
    said = refusal(folder, "mini_math_ja", num_fewshot=2)
    assert "fixes the number of examples at 0" in said


def test_code_of_others_needs_consent(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (tmp_path / "counting.py").write_text(f"open({str(trace)!r}, 'w')\n" + COUNTING_CODE)
    splits = {split: questions(split, 3) for split in ("validation", "test")}
    write_task(tmp_path, "mine", GENERATE + COUNTS, **splits)
    assert "Read them, then set `allow_task_code: true`" in refusal(tmp_path, "mine", allow_task_code=False)
    assert not trace.exists()
    settings_for(tmp_path, "mine").build()
    assert trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% for i in range(999999) %}{{ 'long' * 1000 }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ n }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    ],
)
def test_a_template_without_an_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(lm_eval_tasks, "_MAX_SECONDS", 0.2)
    splits = {split: questions(split, 3) for split in ("validation", "test")}
    write_task(tmp_path, "endless", GENERATE.replace("Q: {{question}}\\nA:", template), **splits)
    assert "task endless" in refusal(tmp_path, "endless")


def test_unknown_kind_and_task_folder(tmp_path: Path) -> None:
    assert evaluator_settings("lm_eval", "objectives.a.evaluator") is LmEvalSettings
    with pytest.raises(InputError, match=r"a.evaluator: there is no evaluator 'lm_evil'. Did you mean 'lm_eval'"):
        evaluator_settings("lm_evil", "objectives.a.evaluator")
    assert "task_folders: there is no folder" in refusal(tmp_path / "nowhere", "mini_math_ja")


# lm-eval's own tasks


def test_a_task_of_the_library_is_found_without_indexing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "_library", lambda _: pytest.fail("indexed"))
    assert "mgsm_direct_ja" in lm_eval_tasks.find_manager("mgsm_direct_ja", ()).task_index


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"temperature": "x"}, "generation.temperature: must be a finite number"),
        ({"temperature": math.nan}, "generation.temperature: must be a finite number"),
        ({"top_p": []}, "generation.top_p: must be a finite number"),
        ({"max_gen_toks": "x"}, "generation.max_gen_toks: must be a whole number"),
        ({"max_gen_toks": -1}, "generation.max_gen_toks: must be a whole number"),
        ({"max_new_tokens": 10**12}, "generation.max_new_tokens: must be a whole number"),
        ({"max_gen_toks": True}, "generation.max_gen_toks: must be a whole number"),
        ({"until": 5}, "generation.until: is neither a text nor a list of texts"),
        ({"until": ["a", 5]}, "generation.until: is neither a text nor a list of texts"),
        ({"do_sample": "no"}, "generation.do_sample: must be true or false"),
        ({"temprature": 0}, "there is no setting 'temprature'. Did you mean 'temperature'"),
    ],
)
def test_generation_settings_are_looked_at_first(folder: Path, generation: dict[str, Any], said: str) -> None:
    assert said in refusal(folder, "generate", generation=generation)


def test_a_slice_of_more_digits_than_there_are_numbers(folder: Path) -> None:
    assert "has no items" in refusal(folder, "generate", search=f"test[{'9' * 5000}:]")
    evaluator = settings_for(folder, "generate", search="validation[:5]", held_out=f"test[5:{'9' * 5000}]").build()
    assert len(evaluator.items("held_out")) == ITEMS - 5


def test_data_is_found_from_the_search_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the command is run."""
    file = write_task(
        tmp_path / "tasks", "mine", GENERATE, validation=questions("validation", 5), test=questions("test", 5)
    )
    file.write_text(file.read_text().replace(str(tmp_path / "tasks"), "tasks"))
    assert '"tasks/mine.test.jsonl"' in file.read_text()
    monkeypatch.chdir("/")
    search = search_file(tmp_path, task_folders=["tasks"], allow_task_code=True, objectives={
        "m": {"task": "mine", "metric": "exact_match"},
    })  # fmt: skip
    (settings,) = load_search_file(search).evaluators().values()
    assert len(settings.build().items("held_out")) == 5
    assert Path.cwd() == Path("/")


def test_groups_and_unknown_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("arc_easy", "arc_challenge"):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntag: ai2_arc\ndataset_path: json\n")
    (tmp_path / "group.yaml").write_text("group: science\ntask: [ai2_arc, {task: sciq}]\n")
    index = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "_library", lambda _: index)
    with pytest.raises(InputError, match=r"no task 'arc_esay'. Did you mean 'arc_easy'"):
        lm_eval_tasks.find_manager("arc_esay", ())
    with pytest.raises(InputError, match=r"is a group.*arc_challenge, arc_easy, sciq"):
        lm_eval_tasks.find_manager("science", ())
    with pytest.raises(InputError, match=r"is a group.*arc_challenge, arc_easy"):
        lm_eval_tasks.find_manager("ai2_arc", ())


def test_the_tasks_of_this_project() -> None:
    evaluator = LmEvalSettings(task="mini_math_ja", search="validation[:20]", held_out="test[:20]").build()
    assert evaluator.metrics == {"acc_ja": True, "acc": True}
    assert set(score(evaluator, tiny_live(), "search", [3]).scores) == {"acc_ja", "acc"}


# Models that do not fit, and leaving no trace


def test_long_items_are_named(build: Callable[..., LmEvalEvaluator]) -> None:
    evaluator, live = build("choose"), tiny_live()
    lengths = [len(prompt) + 4 for prompt in prompts(evaluator)]  # one token a byte; answers have a blank, 3 digits
    most = sorted(lengths)[-3] - 1
    evaluator = build("choose", max_length=most)
    reader = Reader.of(live)
    asked = [max(prompts_of(evaluator, reader, "held_out", i), key=lambda a: a.lost) for i in range(len(lengths))]
    assert [each.lost for each in asked] == [max(0, length - most - 1) for length in lengths]
    said = describe_truncated([each for each in asked if each.lost])
    count, first = sum(each.lost > 0 for each in asked), next(i for i, each in enumerate(asked) if each.lost)
    assert 0 < count < ITEMS
    assert (
        f"task choose, row {first} of 'test' ({lengths[first] - 1} tokens)" in said
    )  # nothing is predicted after the last


@pytest.mark.parametrize(
    ("task", "live", "said"),
    [
        ("generate", tiny_live(context=8), "asks for answers of up to 8 tokens, but prompt and answer together"),
        ("choose", tiny_live(context=3), "row 0 of 'test': has an answer of 4 tokens, where the model can take 1 to 3"),
        ("choose", tiny_live(vocabulary=100), "row 0 of 'test': .* the model has 100 embeddings"),
    ],
)  # fmt: skip
def test_models_that_are_too_small(
    build: Callable[..., LmEvalEvaluator], task: str, live: LiveModel, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        score(build(task), live, "held_out", [0])


CHAT = """\
{% for message in messages %}[{{ message.role }}] {{ message.content }}
{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"""


def test_chat_template(build: Callable[..., LmEvalEvaluator]) -> None:
    evaluator, live = build("generate_first_n", apply_chat_template=True, system_instruction="Hi."), tiny_live()
    with pytest.raises(InputError, match="apply_chat_template: the tokenizer has no chat template"):
        score(evaluator, live, "held_out", [0])
    live.tokenizer.chat_template = CHAT
    score(evaluator, live, "held_out", [0])
    prompt = prompts(evaluator)[0]
    assert prompt.startswith("[system] Hi.\n[user] Q: ")
    assert prompt.count("[assistant]") == 2
    assert prompt.endswith("[go]")


def test_nothing_is_printed(build: Callable[..., LmEvalEvaluator], capfd: pytest.CaptureFixture[str]) -> None:
    for task in ("generate_default", "rolling"):
        score(build(task), tiny_live(), "held_out", range(3))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_settings_import_nothing_slow() -> None:
    code = "import sys, evaluators.lm_eval; print([n for n in ('torch', 'lm_eval', 'datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_model_is_shared_and_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    live = tiny_live()
    lm = ResidentLM(live.model, live.tokenizer, 4, None)
    assert lm.model is live.model
    assert lm.tok_encode("abc") == live.tokenizer.encode("abc")
    monkeypatch.setattr(live.tokenizer, "encode", lambda *_, **__: pytest.fail("encoded again"))
    assert len(lm.tok_encode("abc")) == 3


# Where a row ends


def test_rows_end_by_themselves() -> None:
    tokenizer = byte_tokenizer()
    rows = [tokenizer.encode(text) for text in ("ab\ncd", "abcd\n", "a</s>bcd", "abcde")]
    stop = StopAtText(tokenizer, ["\n", "</s>"], 0, len(rows))
    ended = []
    for length in range(1, 6):
        ended.append(stop(torch.tensor([row[:length] for row in rows]), None).tolist())
    assert ended == [
        [False, False, False, False],
        [False, False, True, False],
        [True, False, True, False],
        [True, False, True, False],
        [True, True, True, False],
    ]
    assert stop.lengths[:3].tolist() == [3, 5, 2]


def test_what_follows_an_end_token_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no token ends a sequence by itself, transformers lets an ended row run on until every row has ended."""
    live = tiny_live()
    lm = ResidentLM(live.model, live.tokenizer, 2, None)
    script = [live.tokenizer.encode(text) for text in ("a</s>zzzz", "bcdef\n")]

    def generate(input_ids: torch.Tensor, stopping_criteria: Any, **_: Any) -> torch.Tensor:
        for column in zip(*script, strict=True):
            input_ids = torch.cat([input_ids, torch.tensor(column)[:, None]], dim=1)
            if stopping_criteria(input_ids, None).all():
                break
        return input_ids

    monkeypatch.setattr(live.model, "generate", generate)
    tokens = lm._model_generate(torch.ones(2, 3, dtype=torch.long), max_length=20, stop=["\n", "</s>", ""])
    assert live.tokenizer.batch_decode(tokens[:, 3:], skip_special_tokens=True) == ["a", "bcdef\n"]


def test_the_split_that_lm_eval_scores_is_a_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robe = "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?"
    rows = [*questions("validation", 5), questions("validation", 1)[0] | {"question": robe, "answer": "3"}]
    write_task(tmp_path, "own", GENERATE, validation=rows, test=questions("test", 6))

    def counts(search: str, held_out: str) -> list[dict[str, int]]:
        settings = LmEvalSettings(
            task="own", task_folders=(tmp_path,), allow_task_code=True, search=search, held_out=held_out
        )
        evaluator = settings.build()
        return [count(item.benchmark for item in evaluator.items(split)) for split in ("search", "held_out")]

    assert counts("validation", "test") == [{"gsm8k": 1}, {}]
    monkeypatch.setattr(lm_eval_tasks, "LIBRARY_TASKS", tmp_path)
    assert counts("validation", "test") == [{"gsm8k": 1}, {"own": 6}]
    assert counts("test[2:]", "test[:2]") == [{"own": 4}, {"own": 2}]


# ---- pictures --------------------------------------------------------------------------------------------------------


class SeeingLM(HFMultimodalLM):  # type: ignore[misc]
    """lm-eval's own model of pictures around one that is in memory: it keeps no processor that it is handed."""

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer


def test_answers_about_pictures_score_as_lm_eval_scores_them() -> None:
    model = AutoModelForImageTextToText.from_pretrained(MINIATURES / "vision", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MINIATURES / "vision")
    processor.tokenizer.padding_side = "left"
    ours = LmEvalSettings(task="mini_picture_en", search="validation[:24]", held_out="test[:4]", batch_size=8).build()
    live = LiveModel(model, processor.tokenizer, processor_of=lambda: processor)
    found = score(ours, live, "search", range(24))
    theirs = SeeingLM(pretrained=model, tokenizer=processor, backend="causal", batch_size=8, max_length=256)
    instances = [group[0] for group in ours._instances["search"]]
    answers = theirs.generate_until(instances, disable_tqdm=True)
    assert list(found.answers.values()) == answers
    graded = [miniatures.score_picture_en(i.doc, [answer]) for i, answer in zip(instances, answers, strict=True)]
    for metric, values in found.scores.items():
        assert values.tolist() == pytest.approx([one[metric] for one in graded])


def test_items_are_told_apart_by_their_pictures() -> None:
    """All of a task ask the same; and what a data set holds decides, not where Python put it."""
    one, again = (
        LmEvalSettings(task="mini_picture_ja", search="validation[:9]", held_out="test[:9]").build() for _ in range(2)
    )
    assert len({item.question for item in one.items("search")}) == 1
    assert len({item.id for item in one.items("search")}) == 9
    assert one.version == again.version
    assert [item.media for item in one.items("search")] == [item.media for item in again.items("search")]


def test_likelihoods_about_pictures_are_refused() -> None:
    task = LmEvalSettings(task="mini_picture_en", search="validation[:2]", held_out="test[:2]").build()
    instance = task._instances["search"][0][0]
    asked = Instance("loglikelihood", instance.doc, ("Q:<image>", " 3", instance.args[2]), 0)
    media = task.items("search")[0].media
    reader = Reader(None, 256)
    with pytest.raises(
        InputError, match="row 0: asks for likelihoods with pictures, which lm-eval supports for no model"
    ):
        request_of(asked, reader, LmEvalSettings(task="mini_picture_en"), "row 0", media)
