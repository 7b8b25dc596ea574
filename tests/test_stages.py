"""Recipes in stages: as if every stage had been merged to a folder in float32, and named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_checkpoints import edit_json, save_model, save_tokenizer, tiny_config
from helpers_miniature import MINIATURES, short_search_file
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.source import open_source
from evomerge.cli import main
from evomerge.commands.merge import merge
from evomerge.errors import InputError
from evomerge.mergekit import dump_recipe, load_recipe_file
from evomerge.recipes.base import read_recipe
from evomerge.recipes.staged import StagedRecipe
from evomerge.store import Store

Document = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "maths", "code", "chat")):
        save_model(tiny_config(), folder / name, seed=seed)
    return folder


def weighted(*models: Path | str) -> list[Document]:
    return [{"model": str(model), "parameters": {"weight": 1 - 0.3 * n}} for n, model in enumerate(models)]


def mean(*models: Path | str) -> list[Document]:
    return [{"model": str(model), "parameters": {"weight": 1}} for model in models]


def first(models: Path, **changes: Any) -> Document:
    """TIES of two models; in float32, so that what a folder of it holds is not rounded."""
    return {
        "name": "pair", "merge_method": "ties", "base_model": str(models / "base"), "dtype": "float32",
        "parameters": {"density": 0.5},
        "models": weighted(models / "maths", models / "code"),
    } | changes  # fmt: skip


def second(models: Path, pair: str = "pair", **changes: Any) -> Document:
    return {
        "merge_method": "slerp", "base_model": pair, "models": [{"model": pair}, {"model": str(models / "chat")}],
        "parameters": {"t": [0.2, 0.6]}, "dtype": "float32", "out_dtype": "bfloat16",
    } | changes  # fmt: skip


def write(path: Path, *documents: Document) -> Path:
    path.write_text("---\n".join(yaml.safe_dump(document) for document in documents))
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def unnamed(document: Document) -> Document:
    return {key: value for key, value in document.items() if key != "name"}


def test_two_stages_are_what_is_merged_by_hand(models: Path, tmp_path: Path) -> None:
    merge(write(tmp_path / "first.yaml", unnamed(first(models))), tmp_path / "pair")
    merge(write(tmp_path / "second.yaml", second(models, str(tmp_path / "pair"))), tmp_path / "by hand")
    assert tensors(tmp_path / "pair")["model.norm.weight"].dtype == torch.float32
    for number, documents in enumerate(([first(models), second(models)], [second(models), first(models)])):
        out = tmp_path / f"out {number}"
        merge(write(tmp_path / "both.yaml", *documents), out)
        assert equal(out, tmp_path / "by hand")
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
            assert (out / name).read_text() == (tmp_path / "by hand" / name).read_text()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    rounded = {"dtype": "bfloat16", "out_dtype": "bfloat16"}
    merge(write(tmp_path / "first.yaml", unnamed(first(models, **rounded))), tmp_path / "rounded")
    merge(write(tmp_path / "second.yaml", second(models, str(tmp_path / "rounded"))), tmp_path / "of rounded")
    assert not equal(tmp_path / "of rounded", tmp_path / "by hand")  # what mergekit-multi would make of bfloat16


def test_a_stage_may_have_other_layers_and_another_vocabulary(models: Path, tmp_path: Path) -> None:
    save_model(tiny_config(), models / "other words", seed=7)
    save_tokenizer(models / "other words", ["<unk>", "<s>", "</s>", *(f"v{i}" for i in range(29))])
    edit_json(models / "other words" / "config.json", bos_token_id=1)
    stack = {
        "name": "deep", "merge_method": "passthrough", "dtype": "float32",
        "slices": [
            {"sources": [{"model": str(models / "maths"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(models / "code"), "layer_range": [0, 1]}]},
        ],
    }  # fmt: skip
    words = {
        "name": "words", "merge_method": "linear", "dtype": "float32", "tokenizer_source": "union",
        "models": [{"model": str(models / n), "parameters": {"weight": 1}} for n in ("base", "other words")],
    }  # fmt: skip
    for document in (stack, words):
        name = document["name"]
        last = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}}], "dtype": "float32"}
        merge(write(tmp_path / "one.yaml", unnamed(document)), tmp_path / f"{name} alone")
        merge(write(tmp_path / "two.yaml", document, last), tmp_path / name)
        assert equal(tmp_path / name, tmp_path / f"{name} alone")
        for file in ("config.json", "tokenizer.json"):
            assert (tmp_path / name / file).read_text() == (tmp_path / f"{name} alone" / file).read_text()
    assert open_source("deep", str(tmp_path / "deep"), place="x").layers == 3


def test_kept_stages_are_used_again_as_long_as_they_follow_from_the_same(models: Path, tmp_path: Path) -> None:
    keep = tmp_path / "stages"
    copy = tmp_path / "code"
    save_model(tiny_config(), copy, seed=2)

    def made(number: int, **changes: Any) -> set[str]:
        document = first(models, **changes)
        document["models"][1]["model"] = str(copy)
        merge(write(tmp_path / "both.yaml", document, second(models)), tmp_path / f"out {number}", keep=keep)
        return {path.name for path in keep.iterdir()}

    (one,) = made(0)
    written = (keep / one / "model.safetensors").stat().st_mtime_ns
    assert made(1) == {one}
    assert (keep / one / "model.safetensors").stat().st_mtime_ns == written
    assert equal(tmp_path / "out 0", tmp_path / "out 1")
    assert len(made(2, parameters={"density": 0.9})) == 2
    assert not equal(tmp_path / "out 0", tmp_path / "out 2")
    changed = tensors(copy)
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1
    save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    assert len(made(3)) == 3
    assert not equal(tmp_path / "out 0", tmp_path / "out 3")


def test_three_stages_of_which_two_are_of_one(models: Path, tmp_path: Path) -> None:
    """Also what is computed for two that read it is the same for both."""
    half: Document = {"merge_method": "linear", "dtype": "float32"}
    documents: list[Document] = [
        {**half, "name": "a", "models": mean(models / "maths", models / "code")},
        {**half, "name": "b", "models": mean("a", models / "chat")},
        {**half, "models": mean("a", "b")},
    ]
    merge(write(tmp_path / "all.yaml", *documents), tmp_path / "out")
    stored = {name: tensors(models / name) for name in ("maths", "code", "chat")}
    for name, tensor in tensors(tmp_path / "out").items():
        a = (stored["maths"][name].double() + stored["code"][name].double()) / 2
        expected = (a + (a + stored["chat"][name].double()) / 2) / 2
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_recipe_in_stages_is_read_back(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(write(tmp_path / "both.yaml", first(models), second(models)), out)
    recipe = load_recipe_file(out / "recipe.yaml", lambda reference: {})
    assert isinstance(recipe, StagedRecipe)
    assert [stage.name for stage in recipe.stages] == ["pair", "model"]
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe
    assert "stage pair" in (out / "README.md").read_text()
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    merge(tmp_path / "again.yaml", tmp_path / "again")
    assert equal(tmp_path / "again", out)


BAD: dict[str, tuple[Any, str]] = {
    "two models": (lambda m: [unnamed(first(m)), unnamed(first(m))], "two documents have no name"),
    "two of a name": (lambda m: [first(m), first(m), second(m)], "two documents are 'pair'"),
    "unused": (lambda m: [first(m), second(m, str(m / "maths"))], "pair is used by no other document"),
    "circle": (
        lambda m: [second(m, "b", name="a"), second(m, "a", name="b"), second(m, "a")], "each other in a circle",
    ),
    "no merge": (lambda m: [{"name": "pair", "models": []}, second(m)], "pair: is no merge"),
    "not keys": (lambda m: [["pair"], second(m)], "document 1: is not a merge"),
    "no name": (lambda m: [first(m, name=3), second(m)], "document 1: name: must be a text"),
    "missing model": (lambda m: [first(m, base_model="nowhere/at-all"), second(m)], "nowhere"),
    "unknown key": (lambda m: [first(m, densty=1), second(m)], "both.yaml: pair: .*densty"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_stages_that_cannot_be_are_refused(models: Path, tmp_path: Path, case: str) -> None:
    documents, words = BAD[case]
    with pytest.raises(InputError, match=words):
        merge(write(tmp_path / "both.yaml", *documents(models)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["both.yaml"]


# ---- in a search ----


def run(*arguments: str) -> None:
    """A command that ends well."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


def staged(tmp_path: Path, *stages: Document) -> Path:
    return short_search_file(tmp_path, space={"kind": "staged", "stages": list(stages)}, baselines={"kappa": False})


def test_a_search_over_stages_exports_what_it_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fixed stage and one that is searched below another that is searched; the export scores as recorded."""
    fixed = tmp_path / "fixed.yaml"
    (tmp_path / "mean.yaml").write_text(
        yaml.safe_dump(
            {
                "merge_method": "linear", "dtype": "float32",
                "models": [
                    {"model": str(MINIATURES / name), "parameters": {"weight": 1}} for name in ("maths", "japanese")
                ],
            }
        )
    )  # fmt: skip
    merge(tmp_path / "mean.yaml", tmp_path / "mean")
    os.replace(tmp_path / "mean" / "recipe.yaml", fixed)
    file = staged(
        tmp_path,
        {"name": "mean", "sources": ["maths", "japanese"], "recipe": str(fixed)},
        {"name": "tuned", "sources": ["maths"], "space": {"method": "task_arithmetic"}},
        {"name": "last", "sources": ["mean", "tuned"], "base": "base", "space": {"method": "task_arithmetic"}},
    )
    run("search", str(file), "--dir", str(tmp_path / "s"))
    run("export", str(tmp_path / "s"), str(tmp_path / "out"), "--candidate", "c0006")
    assert "score exactly as recorded" in capsys.readouterr().out
    with Store.open(tmp_path / "s" / "search.db") as store:
        rows = store.candidates()
        assert store.counts()["failed"] == 0
        recipes = [read_recipe(row.recipe, dict.fromkeys(("base", "maths", "japanese"), "")) for row in rows]
    assert all(isinstance(recipe, StagedRecipe) for recipe in recipes)
    assert {len(recipe.stages) for recipe in recipes if isinstance(recipe, StagedRecipe)} == {1, 3}


BAD_SPACES: dict[str, tuple[list[Document], str]] = {
    "nothing searched": ([{"name": "a", "recipe": "x.yaml"}, {"name": "b", "recipe": "x.yaml"}], "x.yaml"),
    "both": ([{"name": "a", "recipe": "x", "space": {}}, {"name": "b", "space": {}}], "needs either `recipe:`"),
    "unused": ([{"name": "a", "space": {}}, {"name": "b", "space": {}}], "a is used by no later stage"),
    "unknown": ([{"name": "a", "space": {}}, {"name": "b", "sources": ["c"], "space": {}}], "no earlier stage 'c'"),
    "a source's name": ([{"name": "maths", "space": {}}, {"name": "b", "space": {}}], "is the name of a source"),
    "kind": ([{"name": "a", "space": {"kind": "prompts"}}, {"name": "b", "space": {}}], "'prompts' makes no stage"),
    "its space": (
        [{"name": "a", "space": {"method": "tiess"}}, {"name": "b", "sources": ["a"], "space": {}}], "tiess",
    ),
    "a key of its space": (
        [{"name": "a", "space": {"methd": "ties"}}, {"name": "b", "sources": ["a"], "space": {}}],
        "space.stages[0].space.methd: is not a known key. Did you mean 'method'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SPACES)
def test_spaces_of_stages_that_cannot_be_are_refused(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, words = BAD_SPACES[case]
    for stage in stages:
        if stage.get("space") == {}:
            stage["space"] = {"method": "task_arithmetic"}
    with pytest.raises(SystemExit):
        main(["validate", str(staged(tmp_path, *stages))])
    assert words in " ".join(capsys.readouterr().err.split())
