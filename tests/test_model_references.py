"""A model with its adapter is one model, whichever command is given it: the same scores everywhere."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from helpers_miniature import MINIATURES, evomerge, json_of, search_file
from transformers import AutoModelForCausalLM

BASE = MINIATURES / "base"

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "use_dora": True},
    "whole modules": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An adapter of a kind on the miniature base, of random numbers that change what it says."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("adapters") / kind.replace(" ", "-")
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[kind]))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn_like(parameter))
            model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "dtype"), [("lora", None), ("lora", "float32"), ("dora", None), ("whole modules", None)]
)
def test_every_command_scores_the_same(
    kind: str, dtype: str | None, adapter: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = f"{BASE}+{adapter(kind)}"
    items = [{"prompt": f"{n} + {n}", "answer": f" = {2 * n}"} for n in range(20)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    objective = {"evaluator": "likelihood", "metric": "log_likelihood", "file": "items.jsonl"}
    file = search_file(
        tmp_path, sources={"base": str(BASE), "tuned": tuned}, objectives={"m": objective}, budget={"candidates": 6},
        confirm={"top": 1}, dtype=dtype,
    )  # fmt: skip

    def scored(model: object) -> float:
        found = json_of(capsys, "score", model, file, "--split", "search", "--json")
        return float(found["objectives"]["m"]["mean"])

    assert evomerge("search", file, "--dir", tmp_path / "out") == 0
    wanted = json_of(capsys, "show", tmp_path / "out", "tuned", "--json")["scores"]["m"]["mean"]
    assert scored(tuned) == wanted
    assert scored(BASE) != pytest.approx(wanted, abs=1e-3)
    assert evomerge("export", tmp_path / "out", tmp_path / "exported", "--candidate", "tuned") == 0
    assert scored(tmp_path / "exported") == wanted
    recipe = {"merge_method": "passthrough", "dtype": dtype or "bfloat16", "models": [{"model": tuned}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "merged") == 0
    assert scored(tmp_path / "merged") == wanted
    capsys.readouterr()
    assert evomerge("inspect", BASE, tuned, "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_models_that_cannot_be_scored_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (name, change) in enumerate(
        [
            ("generation_config.json", {"num_beams": "x"}),
            ("generation_config.json", {"temperature": [], "do_sample": "x"}),
            ("tokenizer_config.json", {"model_max_length": "x"}),
            ("config.json", {"sliding_window": -1, "return_dict": False}),
        ]
    ):
        model = tmp_path / f"model{number}"
        shutil.copytree(MINIATURES / "maths", model)
        there = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(there | change))
        code = evomerge("score", model, search_file(tmp_path), "--split", "search")
        said = capsys.readouterr().err
        assert code in (0, 2)
        assert "Traceback" not in said
        if code == 2:
            assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
