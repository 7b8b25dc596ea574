"""The miniature models and their tasks are what the documents, the examples and the other tests take them for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from helpers_lm_eval import shipped_items, shipped_tasks
from PIL import ImageChops
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "examples" / "miniatures"
TASKS = ROOT / "evaluators" / "tasks"
METRICS = {"mini_math_ja": {"acc_ja", "acc"}, "mini_math_en": {"acc"}, "mini_translate_ja": {"acc"}}

sys.path.insert(0, str(ROOT / "scripts"))
import miniature_problems as problems  # noqa: E402
import picture_problems as pictures  # noqa: E402

from evaluators.tasks import miniatures  # noqa: E402


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    return shipped_tasks(METRICS)


@pytest.mark.parametrize("name", ["base", "maths", "japanese"])
def test_model_is_a_small_plain_folder(name: str) -> None:
    folder = MODELS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\nlicense: apache-2.0\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for special in ("pad", "bos", "eos"):
        assert getattr(model.generation_config, f"{special}_token_id") == getattr(tokenizer, f"{special}_token_id")


def test_tokenizer_knows_every_text_and_is_the_same_for_all() -> None:
    files = {(MODELS / name / "tokenizer.json").read_bytes() for name in ("base", "maths", "japanese")}
    assert len(files) == 1
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    for text in ("Ken has 123 apples.\nA:", "問: ケンはりんごを12個持っています。", "naïve 鬱 😀 \t ok"):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer.encode("1234567890", add_special_tokens=False)) == 10


@pytest.mark.parametrize("task", METRICS)
def test_splits_are_large_and_share_nothing(task: str) -> None:
    contents = {}
    for split in ("search", "held_out"):
        items = shipped_items(task, split)
        # The answer stands for the sum; a sentence to translate is its own content.
        contents[split] = {item["answer"] if "number" in item else item["prompt"] for item in items}
        assert len(items) >= 400
        assert len(contents[split]) == len(items)
    assert not contents["search"] & contents["held_out"]


def test_no_model_was_trained_on_the_sum_of_an_item() -> None:
    def sum_of(answer: str) -> tuple[int, str, int]:
        first, operator, second = answer.split(" =")[0].split()
        return int(first), operator, int(second)

    for task in ("mini_math_ja", "mini_math_en"):
        for split in ("search", "held_out"):
            assert {problems.split_of(*sum_of(item["answer"])) for item in shipped_items(task, split)} == {split}


@pytest.mark.parametrize("task", METRICS)
def test_items_on_disk_are_those_that_the_script_makes(task: str) -> None:
    for split in ("search", "held_out"):
        assert shipped_items(task, split) == problems.task_items(task, split, len(shipped_items(task, split)))


@pytest.mark.parametrize("task", METRICS)
def test_gold_answers_score_one(tasks: dict[str, Any], task: str) -> None:
    loaded = tasks[task]
    for documents in (loaded.validation_docs(), loaded.test_docs()):
        assert len(documents) >= 400
        for document in documents:
            assert loaded.process_results(document, [document["answer"]]) == dict.fromkeys(METRICS[task], 1.0)
    assert loaded.doc_to_text(document) == document["prompt"]
    assert set(loaded.higher_is_better()) == METRICS[task]
    assert all(loaded.higher_is_better().values())


def test_language_and_number_both_count_in_japanese(tasks: dict[str, Any]) -> None:
    score = tasks["mini_math_ja"].process_results
    for document in tasks["mini_math_ja"].test_docs():
        japanese, number = document["answer"], document["number"]
        sum_ = japanese.split(" =")[0]
        assert score(document, [f"{sum_} = {number}, so the answer is {number}."]) == {"acc_ja": 0.0, "acc": 1.0}
        assert score(document, [japanese.replace(str(number), str(number + 1))]) == {"acc_ja": 0.0, "acc": 0.0}
    assert score(document, [""]) == {"acc_ja": 0.0, "acc": 0.0}


def test_commas_group_digits(tasks: dict[str, Any]) -> None:
    score = tasks["mini_math_en"].process_results
    assert score({"number": 1234}, [" the answer is 1,234."])["acc"] == 1.0
    assert score({"number": 234}, [" the answer is 1,234."])["acc"] == 0.0
    assert score({"number": 7}, [" 12, 7"])["acc"] == 1.0
    assert score({"number": 19}, [" 19.0"])["acc"] == 1.0
    assert score({"number": 19}, [" -19."])["acc"] == 0.0


def test_maths_expert_answers_in_english_and_the_japanese_expert_in_japanese() -> None:
    """One problem each, so that a model saved into the wrong folder does not go unseen."""
    problem = next(item for item in shipped_items("mini_math_ja", "search") if "+" in item["answer"])
    for name, word in (("maths", "answer"), ("japanese", "答え")):
        tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
        model = AutoModelForCausalLM.from_pretrained(MODELS / name)
        inputs = tokenizer([problem["prompt"]], return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        assert word in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_the_miniature_that_sees_is_a_small_plain_folder() -> None:
    folder = MODELS / "vision"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert "/" not in (folder / "config.json").read_text().replace("</", "")  # no path of who made it
    maths = AutoModelForCausalLM.from_pretrained(MODELS / "maths").state_dict()
    mine = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    for name, tensor in mine.items():
        assert torch.equal(tensor[: len(maths[name])], maths[name]), name
    processor = AutoProcessor.from_pretrained(folder)
    assert len(processor.tokenizer) == len(AutoTokenizer.from_pretrained(MODELS / "maths")) + 1


@pytest.mark.parametrize("split", ["search", "held_out"])
def test_pictures_show_what_their_answers_say(split: pictures.Split) -> None:
    """And only sums of the split, none twice; items in both languages are of the same pictures."""
    scenes = pictures.different_scenes(split, 500)
    sums = {(scene.first, scene.operator, scene.second) for scene in scenes}
    assert len(sums) == 500
    assert {problems.split_of(*one) for one in sums} == {split}
    for language in ("en", "ja"):
        items = shipped_items(f"mini_picture_{language}", split)
        assert [item["answer"] for item in items] == [scene.asked(language).answer for scene in scenes]
        assert {item["prompt"] for item in items} == {scenes[0].asked(language).prompt}
        for item, scene in list(zip(items, scenes, strict=True))[::25]:
            (shown,) = miniatures.shown(item)
            assert ImageChops.difference(shown, pictures.picture(scene)).getbbox() is None


def test_stories_have_as_many_tokens_as_pictures_have_patches() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    random = Random("stories")
    for _ in range(200):
        story = pictures.draw_scene(random, "train").story
        assert len(tokenizer.encode(story, add_special_tokens=False)) == pictures.TOKENS
