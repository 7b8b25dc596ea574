"""Sources whose configurations say other things of weights of equal shapes: told, and each source scored as itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import edit_json, save_model, tiny_config
from helpers_miniature import evomerge, json_of, search_file
from test_layer_places import config_of, load
from test_paths import CPU, answer, copy_of, open_both, path_recipe
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.differences import differences, warnings_across
from evomerge.checkpoints.live import configured, live_model
from evomerge.checkpoints.source import Source
from evomerge.merging.building.export import write_model
from evomerge.merging.materialise import Materialiser
from evomerge.merging.path import configured_by
from evomerge.recipes.stack import Blend, StackRecipe

# An architecture, what the configuration of the second source says, and the setting that is named.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "rotary base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta"),
    "rotary scaling": (
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, "rope_type",
    ),
    "rotary base, as older files have it": ("llama", {"rope_parameters": None, "rope_theta": 500.0}, "rope_theta"),
    "eps of norms": ("qwen3", {"rms_norm_eps": 0.05}, "rms_norm_eps"),
    "window": ("mistral", {"sliding_window": 2}, "sliding_window"),
    "kinds of attention": ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
    "a multiplier": ("granite", {"attention_multiplier": 0.5}, "attention_multiplier"),
    "a cap of logits": ("gemma2", {"final_logit_softcapping": 2.0}, "final_logit_softcapping"),
    "experts for a token": ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    "weights of experts": ("qwen3_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    "the order of blocks": ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual"),
}  # fmt: skip


def save_both(case: str, changes: dict[str, Any], folder: Path) -> dict[str, Source]:
    for seed, name in enumerate("ab"):
        save_model(config_of(case), folder / name, seed=seed, dtype=torch.float32)
    edit_json(folder / "b" / "config.json", **changes)
    return open_both(folder)


def uniform(blend: Blend) -> StackRecipe:
    return StackRecipe.uniform(blend, sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)


MEAN = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 0.5, "b": 0.5}})


@pytest.mark.parametrize("case", CASES)
def test_a_source_alone_has_its_own_settings_and_a_merge_those_of_the_tokenizers_source(
    case: str, tmp_path: Path
) -> None:
    model_type, changes, setting = CASES[case]
    sources = save_both(model_type, changes, tmp_path)
    (warning, *_) = warnings_across(sources, "a")
    assert any(setting in said and said.startswith("b: ") for said in warnings_across(sources, "a")), warning
    expected = {n: answer(AutoModelForCausalLM.from_pretrained(tmp_path / n).eval()) for n in "ab"}

    live, materialiser = live_model(sources["a"], CPU), Materialiser(sources)
    materialiser.write(uniform(copy_of("b")), live)
    assert configured_by(uniform(copy_of("b")), sources) == "b"
    assert torch.equal(answer(configured(live, sources["b"]).model), expected["b"])
    assert not torch.equal(answer(live.model), expected["b"])
    write_model(uniform(copy_of("b")), sources, tmp_path / "alone", texts={})
    assert torch.equal(answer(load(tmp_path / "alone")), expected["b"])

    assert configured_by(uniform(MEAN), sources) == "a"
    materialiser.write(uniform(MEAN), live)
    write_model(uniform(MEAN), sources, tmp_path / "mean", texts={})
    assert torch.equal(answer(load(tmp_path / "mean")), answer(live.model))
    materialiser.write(uniform(copy_of("a")), live)
    assert torch.equal(answer(live.model), expected["a"])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.5},
        {"max_position_embeddings": 64, "eos_token_id": [2, 3], "pad_token_id": 2},
        {"transformers_version": "4.0.0", "dtype": "bfloat16", "somebody_s_note": "a", "_name_or_path": "x"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},  # a whole number is the same number
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
    ],
)
def test_what_computes_nothing_is_no_difference(changes: dict[str, Any], tmp_path: Path) -> None:
    sources = save_both("llama", changes, tmp_path)
    assert differences(sources["a"], sources["b"]) == {}
    assert warnings_across(sources, "a") == []
    assert configured_by(uniform(copy_of("b")), sources) == "a"


def test_no_merge_is_taken_for_a_source(tmp_path: Path) -> None:
    sources = save_both("llama", {"rms_norm_eps": 0.05}, tmp_path)
    half = Blend(method="passthrough", sources=("b",), parameters={"scale": {"b": 0.5}})
    several = [
        uniform(half),
        uniform(MEAN),
        path_recipe([("b", 0), ("b", 1)]),  # with the ends of a
        path_recipe([("b", 1), ("b", 0)]).model_copy(update={"embedding": 1, "norm": 1, "head": 1}),
        path_recipe([("b", 0)]),
    ]
    assert [configured_by(recipe, sources) for recipe in several] == ["a"] * len(several)


def test_one_model_under_two_names_is_told(tmp_path: Path) -> None:
    sources = save_both("llama", {}, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for again in (sources["a"], open_both(tmp_path)["a"]):
        (warning,) = warnings_across({**sources, "c": again}, "a")
        assert warning.startswith("a and c are the same model")


def test_a_search_says_it_and_scores_each_source_as_that_model_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("one", "two")):
        theta = {"rope_type": "default", "rope_theta": 10.0**seed * 100}
        config = tiny_config(rope_parameters=theta, max_position_embeddings=64)
        save_model(config, tmp_path / name, seed=seed, dtype=torch.float32)
    rng = random.Random(1)
    items = [
        {"prompt": " ".join(f"w{rng.randrange(29)}" for _ in range(20)), "answer": f"w{rng.randrange(29)}"}
        for _ in range(8)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    objective = {
        "evaluator": "likelihood", "metric": "log_likelihood", "file": "items.jsonl", "prompt": "{prompt}",
        "answer": " {answer}",
    }  # fmt: skip
    file = search_file(
        tmp_path, sources={"one": str(tmp_path / "one"), "two": str(tmp_path / "two")}, base=None, tokenizer="one",
        space={"method": "linear"}, objectives={"fluent": objective}, optimizer={"name": "random"},
        budget={"candidates": 5},
    )  # fmt: skip
    assert evomerge("validate", file) == 0
    assert "rope_parameters.rope_theta is 1000, but 100 in one" in " ".join(capsys.readouterr().out.split())
    assert evomerge("inspect", tmp_path / "one", tmp_path / "two") == 0
    assert "two: rope_parameters.rope_theta is 1000" in " ".join(capsys.readouterr().out.split())
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    capsys.readouterr()
    rows = json_of(capsys, "top", tmp_path / "search", "--all", "--json")
    alone = json_of(capsys, "score", tmp_path / "two", file, "--split", "search", "--json")
    baseline = next(row for row in rows if row["label"] == "two")
    assert baseline["scores"]["fluent"]["mean"] == alone["objectives"]["fluent"]["mean"]
    assert evomerge("export", tmp_path / "search", tmp_path / "out", "--candidate", "c0001") == 0
