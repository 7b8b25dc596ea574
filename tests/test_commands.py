"""The command line on the miniatures: the whole way from a search file to an exported model, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_miniature import COMMAND, MINIATURES, environment, evomerge, json_of, search_file, short_search_file
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from test_early import said
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.live import live_model
from evomerge.commands.look import send_command
from evomerge.commands.run import resume
from evomerge.errors import InputError
from evomerge.report.consoles import make_console
from evomerge.report.screen import p_text
from evomerge.search.opening.session import recipe_of
from evomerge.search.settings.folder import open_store
from evomerge.search.settings.search_file import load_search_file
from evomerge.store import acquire


def test_help_is_quick() -> None:
    """In seconds of processor time, because other processes may hold the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert "validate" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.5


def test_help_says_each_command_in_a_whole_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("--help") == 0
    commands = capsys.readouterr().out.partition("Commands:")[2]
    assert "validate" in commands
    assert "..." not in commands
    assert evomerge("score", "--help") == 0
    assert "search|held_out" in capsys.readouterr().out


def test_lines_end_with_what_they_say_where_no_terminal_pads_them(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name  ", "value", box=None, pad_edge=False)
    table.add_row("one", "a  b ")
    table.add_row("longer", "")
    make_console().print(table)
    make_console().print("text \n\n  more", style="bold")
    assert capsys.readouterr().out == "name    value\none     a  b\nlonger\ntext\n\n  more\n"


def test_what_a_person_got_wrong_is_told_before_anything_heavy_is_imported(searched: Path, tmp_path: Path) -> None:
    """One process runs them all, because starting one takes longer than what a command does."""
    file = search_file(tmp_path)
    (tmp_path / "broken.yaml").write_text("name: [")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    wrong = {
        "there is no such file": ["validate", tmp_path / "nope.yaml"],
        "broken.yaml": ["search", tmp_path / "broken.yaml"],
        "is not a known key": ["validate", file, "--set", "budgets.candidates=4"],
        "must be a whole number": ["score", MINIATURES / "maths", file, "--set", "seed=x"],
        "already exists": ["search", file, "--dir", searched],
        "space.method: 'task_arithmetic' -> 'ties'": ["resume", searched, "--set", "space.method=ties"],
        "exists and is not empty": ["export", searched, tmp_path / "full"],
        "full: exists and is not empty": ["merge", file, tmp_path / "full"],
    }
    results = said(tmp_path, [[str(argument) for argument in arguments] for arguments in wrong.values()])
    for words, (code, text, heavy, _) in zip(wrong, results, strict=True):
        assert (code, heavy) == (2, []), (words, text)
        assert text.startswith("error: "), text
        assert words in text


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search with two objectives."""
    folder = tmp_path_factory.mktemp("searched")
    objectives = {
        name: {"task": name, "metric": metric, "search": "validation[:24]", "held_out": "test[:40]"}
        for name, metric in (("mini_math_ja", "acc_ja"), ("mini_translate_ja", "acc"))
    }
    file = search_file(
        folder, objectives=objectives, optimizer={"name": "nsga2", "population": 6}, budget={"candidates": 17}
    )
    assert evomerge("search", file, "--dir", folder / "search") == 0
    return folder / "search"


def test_status_as_json(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = json_of(capsys, "status", searched, "--json")
    assert status["state"] == "finished"
    assert status["candidates"] == {
        "asked": 17, "done": status["candidates"]["done"], "eliminated": 0, "failed": 0,
        "cached": 17 - status["candidates"]["done"], "running": 0,
    }  # fmt: skip
    assert [b["label"] for b in status["baselines"]][:4] == ["base", "maths", "japanese", "uniform average"]
    best = status["best"]["objectives"]["mini_math_ja"]
    assert set(best) == {"mean", "stderr", "n"}
    assert best["n"] == 24
    assert 0 <= best["mean"] <= 1
    assert status["front"]
    assert status["winner"] is None, "several objectives that nobody weighs have none"
    picks = {pick["role"]: pick["id"] for pick in status["picks"]}
    assert list(picks) == ["best at mini_math_ja", "best at mini_translate_ja", "knee"]
    assert set(picks.values()) <= {c["id"] for c in [*status["confirmed"], *status["confirmed_baselines"]]}
    for found in status["confirmed"]:
        value = found["objectives"]["mini_math_ja"]
        assert value["n"] == 40
        assert [d["to"] for d in value["difference"]] == ["base", "maths", "japanese", "uniform average"]
        assert all(d["low"] <= d["mean"] <= d["high"] for d in value["difference"])


def test_top_as_json_is_every_candidate_in_the_order_asked(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json_of(capsys, "top", searched, "--all", "--json")
    assert [row["id"] for row in rows] == [f"c{i:04d}" for i in range(17)]
    assert {"id", "origin", "genome", "recipe_hash", "status", "scores"} <= set(rows[0])
    assert set(rows[-1]["genome"]) == {"model.weight.maths", "model.weight.japanese"}
    best = json_of(capsys, "top", searched, "-k", "1", "--json")[0]
    assert best["id"] == json_of(capsys, "status", searched, "--json")["best"]["id"]


def test_json_has_null_for_what_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers are counted on one item, so they have no standard error; NaN is no JSON."""
    objectives = {"layers": {"evaluator": "cost", "metric": "layers"}}
    file = search_file(tmp_path, objectives=objectives, optimizer={"name": "random"}, budget={"candidates": 6})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    for row in (
        *json_of(capsys, "top", tmp_path / "search", "--all", "--json"),
        json_of(capsys, "show", tmp_path / "search", "maths", "--json"),
    ):
        assert row["scores"]["layers"]["stderr"] is None
    for name in ("maths", "japanese"):
        scored = json_of(capsys, "score", MINIATURES / name, file, "--split", "search", "--json")
        assert scored["objectives"]["layers"]["stderr"] is None


def test_show_and_compare(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("show", searched, "c0006") == 0
    assert "model.weight.maths = " in capsys.readouterr().out
    found = json_of(capsys, "compare", searched, "japanese", "maths", "--json")
    assert {(row["objective"], row["split"]) for row in found} == {
        (objective, split) for objective in ("mini_math_ja", "mini_translate_ja") for split in ("search", "held_out")
    }
    for row in found:
        assert row["difference"] == pytest.approx(row["a"] - row["b"])
        assert (row["better_a"] - row["better_b"]) / row["n"] == pytest.approx(row["difference"])


def test_two_candidates_are_compared_on_a_narrow_screen(
    searched: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.commands.look.make_console", lambda: Console(width=80, highlight=False))
    rows = {
        (row["objective"], row["split"]): row for row in json_of(capsys, "compare", searched, "best", "maths", "--json")
    }
    assert evomerge("compare", searched, "best", "maths") == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for row in rows.values():
        assert f"[{row['low']:+.3f}, {row['high']:+.3f}]" in text
        assert p_text(row["p"]) in text
    knee = json_of(capsys, "status", searched, "--json")["picks"][-1]["id"]
    assert f"best is {knee}, maths is c0001" in text


def test_the_searches_of_a_folder_are_listed(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").symlink_to(searched)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "search.db").write_text("no database")
    (tmp_path / "notes").mkdir()
    assert evomerge("list", tmp_path) == 0
    told = capsys.readouterr()
    lines = {line.split()[0]: line for line in told.out.splitlines()}
    assert set(lines) == {"search", "mine", "broken"}
    picks = json_of(capsys, "status", searched, "--json")["picks"]
    best = next(pick["objectives"] for pick in picks if pick["role"] == "knee")  # as held-out items choose it
    values = ", ".join(f"{value['mean']:.3f} ± {value['stderr']:.3f}" for value in best.values())
    assert f"17 of 17  {', '.join(best)}  knee {values}" in lines["mine"]
    assert "unreadable" in lines["broken"]
    assert str(tmp_path / "broken") in told.err
    assert evomerge("list", searched) == 2
    assert "is the folder of one search, not a folder of searches" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "notes")
    assert evomerge("list") == 0
    assert "no search is in searches yet" in capsys.readouterr().out


def test_a_report_goes_into_the_folder_of_its_search(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evomerge("report", searched) == 0
    assert f"written to {searched / 'report.html'}" in capsys.readouterr().err
    assert (searched / "report.html").is_file()
    assert evomerge("report", searched, "--out", "elsewhere.html") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere.html"]


def test_confirm_again_names_a_winner(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json_of(capsys, "status", searched, "--json")
    assert evomerge("confirm", searched) == 0
    after = json_of(capsys, "status", searched, "--json")
    assert after["confirmed"] == before["confirmed"]
    assert after["picks"] == before["picks"]


@pytest.fixture(scope="module")
def exported(searched: Path) -> Path:
    assert evomerge("export", searched, searched / "export") == 0
    return searched / "export"


def test_the_export_is_a_plain_folder_with_its_lineage(exported: Path, searched: Path) -> None:
    names = {file.name for file in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert {"recipe.yaml", "lineage.json", "README.md"} <= names
    lineage = json.loads((exported / "lineage.json").read_text())
    assert len(lineage["sources"]["maths"]["files"]["model.safetensors"]) == 64
    assert lineage["search"]["candidates"] == 17
    card = (exported / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "held out" in card
    assert "17 candidates" in card


def test_the_export_of_a_candidate_that_nobody_confirmed_says_so(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json_of(capsys, "top", searched, "--all", "--json")
    with open_store(searched) as store:
        number = next(n for n in range(5, len(rows)) if not store.scores(n, "held_out"))
    assert evomerge("export", searched, tmp_path / "out", "--candidate", f"c{number:04d}", "--no-verify") == 0
    note = f"c{number:04d} was never scored on held-out items."
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "out" / "README.md").read_text()


GENERATE = """
import gc, json, sys
gc.disable()
assert not any(name == "evomerge" or name.startswith("evomerge.") for name in sys.modules)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(json.loads(sys.argv[2]), return_tensors="pt")
print(json.dumps(model.generate(**ids, max_new_tokens=24, do_sample=False)[0].tolist()))
assert not any(name == "evomerge" or name.startswith("evomerge.") for name in sys.modules)
"""


@pytest.mark.nightly  # a process that imports everything; test_verifying compares exports in this one
def test_a_process_without_evomerge_generates_what_the_candidate_did(exported: Path, searched: Path) -> None:
    from evomerge.merging.materialise import Materialiser
    from evomerge.search.preparing.prepare import open_sources
    from evomerge.search.settings.search_file import SearchFile

    prompt = "問: ハナは切手を29枚持っています。ケンは切手を51枚持っています。合わせて何枚ありますか。\n答:"
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(exported), json.dumps(prompt)],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    lineage = json.loads((exported / "lineage.json").read_text())
    with open_store(searched) as store:
        file = SearchFile.model_validate(store.search().settings)
        recipe = recipe_of(store.candidate(int(lineage["search"]["candidate"][1:])), file.sources)
    sources = open_sources(file)
    live = live_model(sources["base"], torch.device("cpu"))
    Materialiser(sources).write(recipe, live)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ids = live.tokenizer(prompt, return_tensors="pt")
        expected = live.model.generate(**ids, max_new_tokens=24, do_sample=False)[0].tolist()
    finally:
        torch.set_num_threads(threads)
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert len(expected) > ids["input_ids"].shape[1] + 4


def test_an_export_that_scores_otherwise_is_refused_and_leaves_nothing(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evomerge.merging.building.stack_builder import StackBuilder

    load = StackBuilder.reload

    def another_model(*arguments: Any) -> Any:
        live = load(*arguments)
        live.model.lm_head.weight.data.mul_(0)
        return live

    monkeypatch.setattr(StackBuilder, "reload", another_model)
    assert evomerge("export", searched, tmp_path / "out") == 2
    assert "differently than was recorded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_merge_makes_the_exported_model_again(exported: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(exported, tmp_path / "moved" / "elsewhere")
    assert evomerge("merge", moved / "recipe.yaml", tmp_path / "again") == 0
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (exported, tmp_path / "again"))
    assert ours == theirs


def test_merge_reads_mergekit_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "mergekit.yaml"
    recipe.write_text(f"""
models:
  - model: {MINIATURES / "maths"}
    parameters: {{weight: 0.6}}
  - model: {MINIATURES / "japanese"}
    parameters: {{weight: 0.6}}
merge_method: task_arithmetic
base_model: {MINIATURES / "base"}
dtype: bfloat16
""")
    assert evomerge("merge", recipe, tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_merge_opens_each_source_once_and_copies_a_recipe_that_works_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.checkpoints import source as opening

    opened: list[str] = []
    open_source = opening.open_source
    monkeypatch.setattr(opening, "open_source", lambda *a, **more: opened.append(a[1]) or open_source(*a, **more))
    (tmp_path / "models").symlink_to(MINIATURES)
    (tmp_path / "mergekit.yaml").write_text("""
merge_method: linear
models:
  - {model: models/maths, parameters: {weight: 0.25}}
  - {model: {path: models/japanese}, parameters: {weight: 0.75}}
base_model: models/maths
""")
    assert evomerge("merge", tmp_path / "mergekit.yaml", tmp_path / "out") == 0
    assert sorted(opened) == ["models/japanese", "models/maths"]
    monkeypatch.undo()
    assert evomerge("merge", tmp_path / "out" / "recipe.yaml", tmp_path / "again") == 0
    ours, theirs = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "again"))
    assert ours == theirs


def test_merge_stacks_layers_of_several_models(tmp_path: Path) -> None:
    """Eight layers of models that have six: each tensor is that of its source, by the numbers in the file."""
    recipe = tmp_path / "stack.yaml"
    recipe.write_text(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {MINIATURES / "maths"}, layer_range: [0, 4]}}]
  - sources:
      - model: {MINIATURES / "japanese"}
        layer_range: [2, 6]
        parameters: {{scale: [{{filter: o_proj, value: 0.5}}, {{value: 1}}]}}
""")
    assert evomerge("merge", recipe, tmp_path / "out") == 0
    sources = {name: load_file(MINIATURES / name / "model.safetensors") for name in ("maths", "japanese")}
    merged = load_file(tmp_path / "out" / "model.safetensors")
    taken = [("maths", 0), ("maths", 1), ("maths", 2), ("maths", 3), *(("japanese", layer) for layer in range(2, 6))]
    expected = {
        name.replace(f"layers.{layer}.", f"layers.{hop}."): tensor
        * (0.5 if source == "japanese" and "o_proj" in name else 1)
        for hop, (source, layer) in enumerate(taken)
        for name, tensor in sources[source].items()
        if f"layers.{layer}." in name
    }
    expected["model.embed_tokens.weight"] = sources["maths"]["model.embed_tokens.weight"]
    expected["model.norm.weight"] = sources["japanese"]["model.norm.weight"]
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 8
    assert torch.isfinite(model(torch.tensor([[1, 5, 7]])).logits).all()


def test_score_of_a_source_equals_its_baseline(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = json_of(capsys, "status", searched, "--json")
    found = json_of(capsys, "score", MINIATURES / "japanese", searched / "search.yaml", "--split", "search", "--json")
    baseline = next(b for b in status["baselines"] if b["label"] == "japanese")
    assert found["objectives"] == baseline["objectives"]


def test_what_has_nothing_to_do_says_so_and_opens_no_model(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = said(searched, [["confirm", str(searched)], ["resume", str(searched)]])
    assert [(code, text, heavy) for code, text, heavy, _ in results] == [(0, "", [])] * 2
    assert evomerge("confirm", searched) == 0
    assert "nothing to confirm" in capsys.readouterr().out
    assert evomerge("resume", searched) == 0
    assert f"evomerge resume {searched} --set budget.candidates=N" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["created", "interrupted", "stopped", "cancelled", "running", "confirming"])
def test_the_status_of_a_search_that_has_not_ended_says_how_to_go_on(
    state: str, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(searched, tmp_path / "a search")
    assert evomerge("status", folder) == 0
    assert "resume:" not in capsys.readouterr().out
    with open_store(folder) as store, acquire(store):
        store.set_state(state)
    assert evomerge("status", folder) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"resume: evomerge resume '{folder}'"


def test_a_search_is_resumed_with_a_larger_budget_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = short_search_file(tmp_path, budget={"candidates": 7})
    folder = tmp_path / "search"
    assert evomerge("search", file, "--dir", folder) == 0
    assert evomerge("resume", folder, "--set", "space.method=ties") == 2
    assert "space.method: 'task_arithmetic' -> 'ties'" in capsys.readouterr().err
    assert evomerge("resume", folder, "--set", "budget.candidates=11") == 0
    assert json_of(capsys, "status", folder, "--json")["candidates"]["asked"] == 11
    assert evomerge("search", file, "--dir", folder) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "place", "words"),
    [
        ("sources.maths=nowhere/at-all", "sources.maths", "nowhere/at-all"),
        ("objectives.mini_translate_ja.task=mini_translates_ja", "task", "mini_translate_ja"),
        ("objectives.mini_translate_ja.metric=accuracy", "objectives.mini_translate_ja.metric", "acc"),
        ("objectives.mini_translate_ja.held_out=validation", "objectives.mini_translate_ja", "shares 24 rows"),
        ("objectives.mini_translate_ja.items=500", "objectives.mini_translate_ja.items", "24"),
        ("device=cuda:7", "device", "cannot be used here"),
        ("device=meta", "device", "cannot be used here"),
        ("budget.candidates=3", "budget.candidates", "alone are 5 (base, maths, japanese, uniform average, task_"),
        ("space={method: ties, fixed: {density: 3}}", "space", "is 3"),
        ("space={method: ties, bounds: {density: [0, 3]}}", "space.bounds.density", "is 3; it must be from 0 to 1"),
        ("space.bounds={weight: [2, 1]}", "space.bounds.weight", "not below"),
        ("objectives.second={task: mini_translate_ja, metric: acc}", "optimizer", "scalarisation"),
    ],
)
def test_bad_input_ends_with_code_2_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, place: str, words: str
) -> None:
    file = search_file(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert evomerge("search", file, "--dir", tmp_path / "search", "--set", override) == 2
    error = capsys.readouterr().err.removeprefix("opening models and tasks…\n")
    assert error.startswith("error: ")
    assert place in error
    assert words in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("folder", ["file/search", "/proc/nothing/search", "x" * 300])
def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    (tmp_path / "file").write_text("")
    assert evomerge("search", search_file(tmp_path), "--dir", tmp_path / folder) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a b[/x][red]"
    assert evomerge("search", short_search_file(tmp_path, budget={"candidates": 5}), "--dir", folder) == 0
    assert f"evomerge resume '{folder}'" in capsys.readouterr().out


def test_commands_on_what_is_no_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["status"], ["resume"], ["top"], ["pause"], ["confirm"]):
        assert evomerge(*arguments, tmp_path) == 2
        assert "is not the folder of a search" in capsys.readouterr().err


@pytest.fixture
def copied(tmp_path: Path) -> dict[str, str]:
    """Sources of one's own, to be spoilt; by name."""
    folders = {}
    for name in ("base", "maths", "japanese"):
        shutil.copytree(MINIATURES / name, tmp_path / "models" / name)
        folders[name] = str(tmp_path / "models" / name)
    return folders


def spoil(folder: str, value: float) -> None:
    """Write a number into one weight of a model."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "mlp" in name)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_with_a_broken_weight_is_refused_by_name(
    tmp_path: Path, copied: dict[str, str], capsys: pytest.CaptureFixture[str], value: float
) -> None:
    spoil(copied["maths"], value)
    file = search_file(tmp_path, sources=copied)
    assert evomerge("validate", file) == 2
    error = capsys.readouterr().err
    assert "sources.maths" in error
    assert "mlp" in error


def test_a_source_edited_since_the_search_began_is_refused_on_resume(
    tmp_path: Path, copied: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = short_search_file(tmp_path, sources=copied, budget={"candidates": 5})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    spoil(copied["japanese"], 0.25)
    assert evomerge("resume", tmp_path / "search", "--set", "budget.candidates=9") == 2
    error = capsys.readouterr().err
    assert "model.safetensors of japanese has changed since the search began" in error


def test_a_library_that_has_changed_and_scores_as_before_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = short_search_file(tmp_path, budget={"candidates": 5})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    monkeypatch.setattr("lm_eval.__version__", "9.9.9")
    assert evomerge("resume", tmp_path / "search", "--set", "budget.candidates=6") == 0
    assert "items score as recorded" in capsys.readouterr().out


def test_a_search_of_a_newer_program_is_refused(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(searched, tmp_path / "newer")
    with sqlite3.connect(tmp_path / "newer" / "search.db") as database:
        database.execute("update search set schema_version = 99")
    assert evomerge("status", tmp_path / "newer") == 2
    assert "newer Evomerge" in capsys.readouterr().err


def test_a_full_disk_at_export_is_said_and_leaves_nothing(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1_000_000))
    assert evomerge("export", searched, tmp_path / "out") == 2
    assert "1.0 MB free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_knee_and_a_named_candidate_are_exported(searched: Path, tmp_path: Path) -> None:
    for candidate in ("knee", "c0006", "uniform average"):
        out = tmp_path / candidate.replace(" ", "-")
        assert evomerge("export", searched, out, "--candidate", candidate) == 0
        assert (out / "model.safetensors").is_file()


@pytest.mark.nightly  # test_service_walk pauses and resumes by the same commands of the store
def test_a_pause_from_another_terminal_is_heard_and_resume_wakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thread stands for the other terminal: it pauses the search, and wakes it with a larger budget."""
    folder = tmp_path / "search"
    seen: list[str] = []

    def other_terminal() -> None:
        def state() -> str:
            with open_store(folder) as store:
                return store.search().state

        wait_for(lambda: (folder / "search.db").exists() and state() == "running")
        send_command(folder, "pause")
        wait_for(lambda: state() == "paused")
        seen.append(state())
        with pytest.raises(InputError, match="only its budget can be changed"):
            resume(folder, ["seed=3"])
        assert resume(folder, ["budget.candidates=34"]) == 0
        wait_for(lambda: state() != "paused")
        seen.append(state())

    thread = threading.Thread(target=other_terminal)
    thread.start()
    assert evomerge("search", short_search_file(tmp_path, budget={"candidates": 30}), "--dir", folder) == 0
    thread.join()
    assert seen[0] == "paused"
    assert seen[1] == "running"
    with open_store(folder) as store:
        assert len(store.candidates()) == 34  # the budget that the other terminal gave it
        assert store.search().settings["budget"]["candidates"] == 34
    assert load_search_file(folder / "search.yaml").budget.candidates == 34


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
