"""What a model's folder holds goes along: an export differs in weights, and in what the recipe changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_checkpoints import edit_json, save_model, tiny_config
from test_paths import copy_of, open_both
from transformers import AutoTokenizer

from evomerge.checkpoints.vocabulary import align
from evomerge.merging.building.export import write_model
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.vocabulary import Vocabulary

COMPANIONS = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "generation_config.json": '{"temperature": 0.6, "do_sample": true}',
    "added_tokens.json": '{"w28": 31}',
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "preprocessor_config.json": '{"image_processor_type": "x"}',
    "processor_config.json": '{"processor_class": "x"}',
    "video_preprocessor_config.json": "{}",
    "tokenizer.tiktoken": "",
    "SYSTEM_PROMPT.txt": "Be brief.",
    "LICENSE": "as is",
    "USE_POLICY.md": "be good",
}
STAY = {
    "README.md": "# model", "trainer_state.json": "{}", "training_args.bin": "", "optimizer.pt": "",
    "modeling_x.py": "", "model.gguf": "", ".gitattributes": "", "recipe.yaml": "", "lineage.json": "{}",
    "original/params.json": "{}",
}  # fmt: skip
MEAN = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 0.5, "b": 0.5}})


def listed(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        save_model(tiny_config(), tmp_path / name, seed=seed)
    for name, text in {**COMPANIONS, **STAY}.items():
        file = tmp_path / "a" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_all_but_the_weights_is_that_of_the_source(folder: Path) -> None:
    recipe = StackRecipe.uniform(MEAN, sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)
    texts = {"README.md": "# merge", "recipe.yaml": "x: 1"}
    write_model(recipe, open_both(folder), folder / "out", texts=texts)
    source, out = listed(folder / "a"), listed(folder / "out")
    assert out.keys() == source.keys() - STAY.keys() | texts.keys()
    same = out.keys() - texts.keys() - {"config.json", "model.safetensors"}
    assert {name for name in same if out[name] != source[name]} == set()
    mine, theirs = json.loads(source["config.json"]), json.loads(out["config.json"])
    assert mine == theirs
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template.keys() == {"default", "tool_use", "rag"}


def test_it_is_so_of_a_folder_that_was_exported_itself(folder: Path) -> None:
    recipe = StackRecipe.uniform(copy_of("a"), sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)
    write_model(recipe, open_both(folder), folder / "one", texts={"lineage.json": "{}"})
    (folder / "a").rename(folder / "first")
    (folder / "one").rename(folder / "a")
    write_model(recipe, open_both(folder), folder / "two", texts={"lineage.json": "[]"})
    one, two = listed(folder / "a"), listed(folder / "two")
    assert {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)} == {"lineage.json"}


def test_with_another_chat_template_the_rest_stays(folder: Path) -> None:
    sources = align(open_both(folder), "a", Vocabulary(chat_template="chatml"))
    recipe = StackRecipe.uniform(MEAN, sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)
    write_model(recipe, sources, folder / "out", texts={})
    source, out = listed(folder / "a"), listed(folder / "out")
    assert b"<|im_start|>" in out["chat_template.jinja"]
    gone = source.keys() - STAY.keys() - out.keys()
    # those of the old tokenizer, and its other templates
    assert gone == {
        "chat_template.json", "tokenizer.tiktoken", "added_tokens.json", "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
    }  # fmt: skip
    for name in ("generation_config.json", "processor_config.json", "LICENSE", "SYSTEM_PROMPT.txt"):
        assert out[name] == source[name]


def test_the_settings_of_generation_are_those_of_the_source(folder: Path) -> None:
    edit_json(folder / "a" / "generation_config.json", eos_token_id=[2, 5])
    recipe = StackRecipe.uniform(copy_of("b"), sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)
    write_model(recipe, open_both(folder), folder / "out", texts={})
    assert json.loads((folder / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]


@pytest.mark.parametrize("name", ["train.json", "notes.txt", "LICENSE", "corpus.jinja"])
def test_data_beside_a_model_are_not_copied(folder: Path, name: str) -> None:
    with (folder / "a" / name).open("wb") as file:
        file.truncate(3_000_000_000)  # takes no room on the disk until it is copied
    recipe = StackRecipe.uniform(MEAN, sources={"a": "a", "b": "b"}, tokenizer="a", layers=2)
    write_model(recipe, open_both(folder), folder / "out", texts={})
    assert not (folder / "out" / name).exists()
    assert (folder / "out" / "tokenizer_config.json").exists()
