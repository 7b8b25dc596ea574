from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import WORDS, edit_json, edit_tensors, save_model, save_tokenizer, tiny_config
from transformers import Qwen2Config

from evomerge.checkpoints.checks import check_compatible, check_finite
from evomerge.checkpoints.fingerprints import check_fingerprints, fingerprint
from evomerge.checkpoints.source import Source, open_source
from evomerge.errors import InputError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("models") / "base")


def opened(name: str, folder: Path) -> Source:
    return open_source(name, str(folder), place=f"sources.{name}")


# ---- compatible ----


def test_fine_tunes_of_one_base_are_compatible(base: Path, tmp_path: Path) -> None:
    save_model(tiny_config(), tmp_path / "tuned", seed=1)
    save_tokenizer(tmp_path / "tuned", pad_token="w28")
    sources = {"base": opened("base", base), "maths": opened("maths", tmp_path / "tuned")}
    check_compatible(sources)
    check_compatible({"base": sources["base"]})


def qwen(folder: Path) -> None:
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = tiny_config().to_dict()
    save_model(Qwen2Config(**{field: shape[field] for field in same}, intermediate_size=24), folder)


def words(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    return lambda folder: save_tokenizer(folder, change(list(WORDS)))


def unigram(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] = {"type": "Unigram", "vocab": [[word, -1.0] for word in [*WORDS[:5], "other", *WORDS[6:]]]}
    file.write_text(json.dumps(content))


DIFFERENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (qwen, "model_type: qwen2 and llama"),
    "class": (lambda f: edit_json(f / "config.json", architectures=["MyLlama"]), "architectures: .'MyLlama'. and"),
    "layers": (lambda f: save_model(tiny_config(num_hidden_layers=3), f), "number of layers: 3 and 2"),
    "hidden size": (lambda f: save_model(tiny_config(hidden_size=32), f), "hidden_size: 32 and 16"),
    "one shape": (
        lambda f: save_model(tiny_config(intermediate_size=20), f), r"shape of model.layers.*\b20\b.* and .*\b24\b"
    ),
    "one has a bias": (lambda f: save_model(tiny_config(mlp_bias=True), f), "mlp.*bias: .* and absent"),
    "heads": (
        lambda f: edit_json(f / "config.json", num_attention_heads=8, num_key_value_heads=4, head_dim=2),
        "shape|num_attention_heads: 8 and 4",
    ),
    "activation": (lambda f: edit_json(f / "config.json", hidden_act="gelu"), "hidden_act: gelu and silu"),
    "tied": (lambda f: save_model(tiny_config(tie_word_embeddings=True), f), "tie_word_embeddings: True and False"),
    "vocabulary size": (lambda f: save_model(tiny_config(vocab_size=40), f), "vocab_size: 40 and 32"),
    "a token renamed": (words(lambda w: [*w[:-1], "w99"]), "'w99' is 31 and absent|'w28' is absent and 31"),
    "tokens swapped": (words(lambda w: [*w[:5], w[6], w[5], *w[7:]]), "'w[23]' is [56] and [56]"),
    "fewer tokens": (words(lambda w: w[:-1]), ".31 and 32 tokens.: 'w28' is absent and 31"),
    "list of pieces": (unigram, "'other' is 5 and absent|'w2' is absent and 5"),
    "more tokens than embeddings": (words(lambda w: [*w, "w29"]), "ids up to 32, but the model only 32"),
    "end token": (lambda f: save_tokenizer(f, eos_token="w3"), "eos_token: w3 and </s>"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer broken": (lambda f: (f / "tokenizer.json").write_text("<html>"), "tokenizer.json is not JSON"),
    "tokenizer of nothing": (lambda f: (f / "tokenizer.json").write_text("{}"), "holds no vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_sources_are_refused(base: Path, tmp_path: Path, case: str) -> None:
    change, problem = DIFFERENT[case]
    shutil.copytree(base, tmp_path / "other")
    change(tmp_path / "other")
    sources = {"base": opened("base", base), "maths": opened("maths", tmp_path / "other")}
    with pytest.raises(InputError, match=problem) as caught:
        check_compatible(sources)
    assert caught.value.place == "sources.maths"
    assert caught.value.hint


def test_heads_of_another_size_are_refused_though_all_shapes_agree(tmp_path: Path) -> None:
    for folder, heads in ((tmp_path / "one", 4), (tmp_path / "two", 2)):
        save_model(tiny_config(num_attention_heads=heads, num_key_value_heads=heads), folder)
    with pytest.raises(InputError, match="num_attention_heads: 2 and 4"):
        check_compatible({"one": opened("one", tmp_path / "one"), "two": opened("two", tmp_path / "two")})


# ---- finite ----


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    save_model(tiny_config(), tmp_path, dtype=dtype)
    check_finite(opened("maths", tmp_path))
    edit_tensors(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[7:9].fill_(value))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight .* in 2 of 384 elements") as caught:
        check_finite(opened("maths", tmp_path))
    assert caught.value.place == "sources.maths"


def test_opposite_infinities_do_not_cancel(tmp_path: Path) -> None:
    save_model(tiny_config(), tmp_path)
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"].view(-1)[:2].copy_(torch.tensor([torch.inf, -torch.inf])))
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        check_finite(opened("maths", tmp_path))


def test_a_sum_that_overflows_is_no_fault(tmp_path: Path) -> None:
    save_model(tiny_config(), tmp_path, dtype=torch.float16)
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"].fill_(60000))
    source = opened("maths", tmp_path)
    assert torch.isinf(source.read("lm_head.weight").sum())
    check_finite(source)


# ---- fingerprints ----


def test_fingerprints_cover_what_makes_the_model(base: Path) -> None:
    prints = fingerprint(opened("base", base))
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= prints.keys()
    assert json.loads(json.dumps(prints)) == prints
    listed = subprocess.run(["sha256sum", base / "model.safetensors"], capture_output=True, text=True, check=True)
    assert prints["model.safetensors"]["sha256"] == listed.stdout.split()[0]


def test_an_unchanged_file_is_not_read_again(base: Path) -> None:
    source = opened("base", base)
    known = fingerprint(source)
    known["model.safetensors"]["sha256"] = "as recorded"
    assert fingerprint(source, known)["model.safetensors"]["sha256"] == "as recorded"
    assert check_fingerprints(source, known) == known


def copied(base: Path, tmp_path: Path) -> Source:
    shutil.copytree(base, tmp_path / "model")
    return opened("maths", tmp_path / "model")


def test_a_touched_file_is_the_same(base: Path, tmp_path: Path) -> None:
    source = copied(base, tmp_path)
    recorded = fingerprint(source)
    os.utime(source.folder / "model.safetensors", ns=(1, 1))
    now = check_fingerprints(source, recorded)
    assert now["model.safetensors"]["mtime_ns"] == 1
    assert now["model.safetensors"]["sha256"] == recorded["model.safetensors"]["sha256"]


def flip_one_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: flip_one_bit(f / "model.safetensors"), "model.safetensors of maths has changed"),
        (lambda f: edit_json(f / "config.json", rope_theta=5.0), "config.json of maths has changed"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json of maths is gone"),
        (lambda f: (f / "chat_template.jinja").write_text("x"), "chat_template.jinja of maths is new"),
    ],
)
def test_changed_files_are_refused(base: Path, tmp_path: Path, change: Callable[[Path], object], problem: str) -> None:
    recorded = fingerprint(copied(base, tmp_path))
    folder = tmp_path / "model"
    change(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match=problem) as caught:
        check_fingerprints(opened("maths", folder), recorded)
    assert caught.value.place == "sources.maths"
