"""Searches over prompts on the miniatures, from the search file alone: confirmed, exported, verified, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_miniature import MINIATURES, evomerge, export_of, json_of, newest_scored, search_file
from helpers_prompts import save_prefix, save_prompt, save_started_prompt
from helpers_search import table
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.store import Store

BASE = MINIATURES / "base"
ITEMS = {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:4]", "held_out": "test[:3]"}
CATCMA = {"name": "catcma", "population": 4}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    above = tmp_path_factory.mktemp("prompts")
    made = {
        f"started{seed}": save_started_prompt(BASE, above / f"s{seed}", rows=4, seed=seed, text="Q: Ken has 12 apples.")
        for seed in (1, 2)
    }
    made["random"] = save_prompt(BASE, above / "random", rows=4)
    made |= {f"prefix{seed}": save_prefix(BASE, above / f"p{seed}", rows=4, seed=seed) for seed in (1, 2)}
    return made


def prompts_file(folder: Path, prompts: dict[str, Path], *names: str, space: Any = (), **changes: Any) -> Path:
    sources = {"base": str(BASE), **{name: f"{BASE}+{prompts[name]}" for name in names}}
    if dict(space).get("kind", "prompts") == "prompts":
        space = {"kind": "prompts", "block": 2} | dict(space)
    file: dict[str, Any] = {
        "sources": sources, "space": space, "optimizer": CATCMA,
        "objectives": {"mini_math_ja": ITEMS}, "budget": {"candidates": 8}, "confirm": {"top": 1},
    }  # fmt: skip
    return search_file(folder, **{**file, **changes})


@pytest.mark.nightly  # prefixes are, below
def test_soft_prompts_are_searched_and_exported(prompts: dict[str, Path], tmp_path: Path) -> None:
    file = prompts_file(tmp_path, prompts, "started1", "started2", space={"arithmetic": True, "tokens": 6})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    with Store.open(tmp_path / "search" / "search.db") as store:
        labels = [row.label for row in store.candidates()][:5]
    assert labels == ["base", "started1", "started2", "all prompts", "mean of the prompts"]
    row = newest_scored(tmp_path / "search")
    assert export_of(row, tmp_path / "search", tmp_path / "out") == 0
    rows = sum(run["rows"] for run in json.loads(row.recipe)["runs"])
    assert rows > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("Q:")["input_ids"][: rows + 1]
    first = model.config.vocab_size - rows
    assert tokens == [*range(first, first + rows), model.config.bos_token_id]


def test_prefixes_are_searched_and_verified_in_peft(
    prompts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = prompts_file(tmp_path, prompts, "prefix1", "prefix2", budget={"candidates": 7}, dtype="float32")
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    row = newest_scored(tmp_path / "search")
    capsys.readouterr()
    assert export_of(row, tmp_path / "search", tmp_path / "out") == 0
    assert "verified: mini_math_ja" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    assert evomerge("inspect", f"{BASE}+{tmp_path / 'out'}") == 0
    assert "prefix of keys and values" in capsys.readouterr().out


BAD: dict[str, tuple[tuple[str, ...], dict[str, Any], str, str]] = {
    "a space of weights": (("random",), {"space": {"kind": "data_flow_space"}}, "sources.random", "kind: prompts"),
    "several at once": (("random", "started1"), {"together": 2}, "together", "cannot share a forward pass"),
    "vLLM": (("prefix1", "prefix2"), {"engine": "vllm"}, "engine", "transformers"),
    "both kinds": (("random", "prefix1"), {}, "space", "there are both"),
    "began otherwise": (
        ("random", "started1"), {"space": {"kind": "prompts", "arithmetic": True}}, "space.arithmetic", "is not known",
    ),
    "more than the context": (
        ("random",), {"space": {"tokens": 132}}, "space.tokens", "132 tokens may stand before a text",
    ),
    "no base": (("random",), {"base": None, "tokenizer": "base"}, "space", "`base: NAME`"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_searched_is_refused(
    prompts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    names, changes, place, words = BAD[case]
    assert evomerge("validate", prompts_file(tmp_path, prompts, *names, **changes)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert place in said
    assert words in said


def test_prompts_of_another_base_are_refused(
    prompts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = prompts_file(tmp_path, prompts, "started1", "started2")
    content = yaml.safe_load(file.read_text())
    content["sources"]["started2"] = f"{MINIATURES / 'maths'}+{prompts['started2']}"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert evomerge("validate", file) == 2
    assert "works only with the model that it was trained on" in " ".join(capsys.readouterr().err.split())


@pytest.mark.nightly
@pytest.mark.parametrize("pool", ["in_process", "ray"])
def test_resumed_is_uninterrupted_in_both_pools(prompts: dict[str, Path], tmp_path: Path, pool: str) -> None:
    settings = {"pool": pool, "cluster": {"workers": 2}} if pool == "ray" else {"pool": pool}
    names, space = ("started1", "random"), {"tokens": 8}
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = prompts_file(tmp_path / "whole", prompts, *names, space=space, budget={"candidates": 12}, **settings)
    parts = prompts_file(tmp_path / "parts", prompts, *names, space=space, budget={"candidates": 8}, **settings)
    assert evomerge("search", whole, "--dir", tmp_path / "whole" / "s") == 0
    assert evomerge("search", parts, "--dir", tmp_path / "parts" / "s") == 0
    assert evomerge("resume", tmp_path / "parts" / "s", "--set", "budget.candidates=12") == 0
    assert table(tmp_path / "whole" / "s") == table(tmp_path / "parts" / "s")


@pytest.mark.nightly
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = [f"objectives.{task}.items=8" for task in ("zoo_math_ja", "zoo_math_en")]
    told += ["budget.candidates=10", "optimizer.population=4", "pool=in_process", "confirm.top=1"]
    changes = [argument for change in told for argument in ("--set", change)]
    example = MINIATURES.parent / "prompts.yaml"
    assert evomerge("search", example, "--dir", tmp_path / "search", *changes) == 0
    assert json_of(capsys, "status", tmp_path / "search", "--json")["state"] == "finished"
