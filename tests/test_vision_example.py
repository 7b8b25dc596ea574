"""examples/japanese_vlm.yaml with tiny models of its models' own configuration classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import WORDS, edit_json, edit_tensors, save_tokenizer
from helpers_vision import save_next_processor, save_twin, save_vision
from PIL import Image

from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.report.plan import shape_and_works
from evomerge.search.preparing.prepare import Prepared, prepare
from evomerge.search.settings.search_file import load_search_file

EXAMPLE = Path(__file__).parents[1] / "examples" / "japanese_vlm.yaml"
SETTINGS = ("pool=in_process", "cluster.gpus_per_worker=0", "objectives.rouge_l.items=4", "objectives.content.items=4")
MODELS = {
    "mistralai/Mistral-7B-v0.1": "base", "llava-hf/llava-v1.6-mistral-7b-hf": "llava",
    "augmxnt/shisa-gamma-7b-v1": "japanese",
}  # fmt: skip


def write_items(folder: Path) -> None:
    """Items like those of JA-VG-VQA: a picture each, a question and an answer."""
    (folder / "images").mkdir(parents=True)
    for split, count, blue in (("search", 4, 0), ("held_out", 3, 200)):
        lines = []
        for number in range(count):
            file = f"images/{split}_{number}.png"
            Image.new("RGB", (40, 30), (60 * number, 90, blue)).save(folder / file)
            item = {"image": file, "question": f"{number}番の色は?", "answer": "白い皿に乗ったケーキです。"}
            lines.append(json.dumps(item, ensure_ascii=False))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example in a folder with tiny models in place of its own; those of texts know no token of images."""
    llava = save_vision("llava_next", tmp_path / "llava", dtype=torch.bfloat16)
    save_next_processor(llava)
    source = open_source("llava", str(llava), place="llava")
    for seed, name in enumerate(("base", "japanese")):
        plain = save_twin(source, tmp_path / name, seed=seed)
        save_tokenizer(plain, WORDS)
        for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            edit_tensors(plain, lambda held, tensor=tensor: held.update({tensor: held[tensor][: len(WORDS)].clone()}))
        edit_json(plain / "config.json", vocab_size=len(WORDS))
    write_items(tmp_path / "ja_vg_vqa")
    text = EXAMPLE.read_text()
    for reference, name in MODELS.items():
        assert reference in text
        text = text.replace(reference, name)
    (tmp_path / EXAMPLE.name).write_text(text)
    return tmp_path / EXAMPLE.name


def prepared(example: Path, *settings: str) -> Prepared:
    return prepare(load_search_file(example, [*SETTINGS, *settings]))


def test_the_example_is_valid_and_its_memory_counts_images_and_beams(example: Path) -> None:
    found = prepared(example)
    assert [p.name for p in found.setup.space.parameters] == [
        f"model.{number}.{name}" for number in ("weight", "density") for name in ("llava", "japanese")
    ]
    recipe = next(mark.recipe for mark in found.setup.space.baselines())
    assert recipe.tokenizer == "llava"
    _, works = shape_and_works(found)
    # "[INST] <image> 0番の色は? [/INST]": 10 tokens of the image, the rest is one unknown word each; 5 beams of 4 items
    assert {(work.prompts, work.prompt_tokens, work.batch_size, work.new_tokens) for work in works} == {
        (20, 13, 20, 128)
    }  # fmt: skip


def test_a_processor_that_is_missing_is_named_before_anything_is_scored(example: Path) -> None:
    (example.parent / "llava" / "processor_config.json").unlink()
    with pytest.raises(InputError, match="has no processor for images"):
        prepared(example)


def test_a_model_of_texts_that_is_asked_about_images_is_named(example: Path) -> None:
    with pytest.raises(InputError, match="the vision parts of llava would be dropped"):
        prepared(example, "tokenizer=japanese")
    with pytest.raises(InputError, match=r"image|picture"):
        prepared(example, "sources={base: base, japanese: japanese}", "tokenizer=base")
