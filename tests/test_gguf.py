"""GGUF files that are not quantised, as sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from helpers_checkpoints import edit_json, save_model, tiny_config
from helpers_miniature import MINIATURES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from evomerge.checkpoints.places import find_folder
from evomerge.checkpoints.source import Source, open_source
from evomerge.commands.merge import merge
from evomerge.errors import InputError
from evomerge.report.serving import commands, missing

TOKENS = ["<unk>", "<s>", "</s>", "Ġ", "a", "b", "c", "ab", "Ġc"]
KINDS = {
    "F32": (torch.float32, gguf.GGMLQuantizationType.F32),
    "F16": (torch.float16, gguf.GGMLQuantizationType.F16),
    "BF16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys of a llama as llama.cpp's converter lays them out, two halves of a head in turns."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def name_of(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers", "blk"), ("self_attn.", "attn_"), ("_proj", ""), ("attn_o.", "attn_output."), ("mlp.", "ffn_"),
        ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def write(model: Any, path: Path, kind: str, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """The model as llama.cpp's converter writes it: vectors in float32, matrices in a dtype. Returns what is in it."""
    config, (dtype, stored) = model.config, KINDS[kind]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b", "Ġ c"])
    for add, token in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0)):
        add(token)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    held = {}
    for name, tensor in model.state_dict().items():
        held[name] = tensor.to(dtype if tensor.dim() == 2 else torch.float32)
        laid = held[name]
        rows = next((heads[part] for part in heads if part in name), None)
        if rows is not None and architecture == "llama":
            laid = turned(laid, rows)
        if laid.dtype == torch.bfloat16:
            raw = laid.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name_of(name), raw, raw_dtype=stored)
        else:
            writer.add_tensor(name_of(name), laid.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(vocab_size=len(TOKENS)), dtype=torch.float32)


def opened(file: Path) -> Source:
    return open_source("a", str(file), place="sources.a")


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_the_file(llama: Any, tmp_path: Path, kind: str) -> None:
    held = write(llama, tmp_path / "m.gguf", kind)
    source = opened(tmp_path / "m.gguf")
    assert source.tensors.keys() == held.keys()
    for name, tensor in held.items():
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name), tensor), name
    assert source.dtype == KINDS[kind][0]
    loaded = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 4, 5, 7, 8]])
    llama.load_state_dict({name: tensor.float() for name, tensor in held.items()})
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, llama(ids).logits, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    assert tokenizer.encode("ab c", add_special_tokens=False) == [7, 8]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_another_architecture_with_biases_and_a_tied_head(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=len(TOKENS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = {name for name, _ in model.named_parameters()}
    state = model.state_dict
    model.state_dict = lambda: {name: tensor for name, tensor in state().items() if name in names}
    held = write(model, tmp_path / "m.gguf", "BF16", "qwen2")
    source = opened(tmp_path / "m.gguf")
    assert source.tied
    assert all(torch.equal(source.read(name), tensor) for name, tensor in held.items())


def test_a_file_is_converted_once_for_each_content(llama: Any, tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "m.gguf"
    write(llama, file, "F16")
    first = find_folder(str(file), "x", None)
    assert find_folder("m.gguf", "x", tmp_path) == first
    write(llama, file, "F32")
    assert find_folder(str(file), "x", None) != first
    assert len([path for path in (own_cache / "evomerge" / "gguf").iterdir() if path.is_dir()]) == 2


def test_it_merges_with_a_folder(llama: Any, tmp_path: Path) -> None:
    held = write(llama, tmp_path / "m.gguf", "F16")
    folder = find_folder(str(tmp_path / "m.gguf"), "x", None)
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("m.gguf", str(folder))]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"}))
    merge(tmp_path / "r.yaml", tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(made[name], tensor.float()) for name, tensor in held.items())


def refused(file: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        opened(file)
    assert caught.value.place == "sources.a"


def test_what_is_no_model_in_full_precision_is_refused(llama: Any, tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "q.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    blocks = gguf.quants.quantize(np.ones((32, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    refused(file, r"is quantised \(Q8_0\).*llama-quantize --allow-requantize .*q.gguf q-BF16.gguf BF16")
    write(llama, tmp_path / "m.gguf", "F16", "nobodys")
    refused(tmp_path / "m.gguf", "transformers does not read .*m.gguf")
    whole = tmp_path / "whole.gguf"
    write(llama, whole, "F16")
    for name, content in (("cut.gguf", whole.read_bytes()[:200]), ("text.gguf", b"GGUF"), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name} cannot be read as GGUF")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "folder", "Name the file: .*m.gguf")
    assert not list(own_cache.rglob("*.safetensors"))


# ---- out of the way ----


def test_the_commands_of_others_are_printed_and_what_they_would_miss(tmp_path: Path, capsys: Any) -> None:
    save_model(tiny_config(), tmp_path / "a")  # whose tokenizer is a list of words
    models = [{"model": "a", "parameters": {"weight": 1}}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    merge(tmp_path / "r.yaml", tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"vllm serve {tmp_path / 'out'}" in printed
    assert "other programs may not read it: the tokenizer is a WordLevel" in printed
    assert "llama-quantize out.gguf out-Q4_K_M.gguf Q4_K_M" in (tmp_path / "out" / "README.md").read_text()


def test_folders_that_converters_cannot_read_are_told(tmp_path: Path) -> None:
    assert missing(MINIATURES / "base") == []
    folder = tmp_path / "folder"
    shutil.copytree(MINIATURES / "base", folder)
    edit_json(folder / "config.json", architectures=None)
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert missing(folder) == [
        "config.json says no architectures",
        "there is no file of weights in safetensors",
        "the index names one.safetensors, which is not there",
        "there is neither a tokenizer.json nor a tokenizer.model",
    ]


def test_of_a_model_that_reads_images_the_tower_is_a_second_file(tmp_path: Path) -> None:
    said = commands("my models/out", {"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {}})
    tower = "'my models/out-mmproj.gguf'"
    assert f"{said['make GGUF for llama.cpp'].replace('out.gguf', 'out-mmproj.gguf')} --mmproj" in said.values()
    assert f"-m 'my models/out-Q4_K_M.gguf' --mmproj {tower} --image" in said["ask llama.cpp about an image"]
    pixtral = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"model_type": "pixtral"}}
    assert commands("out", pixtral).keys() == said.keys()
    folder = shutil.copytree(MINIATURES / "vision", tmp_path / "folder")
    tower_of_clip = "llama.cpp converts no tower of LlavaForConditionalGeneration; its GGUF reads texts alone"
    assert missing(folder) == [tower_of_clip]
    assert not any(
        "mmproj" in command for command in commands("out", json.loads((folder / "config.json").read_text())).values()
    )
    (folder / "processor_config.json").unlink()
    assert missing(folder)[1:] == ["there is no preprocessor_config.json, which says how images become pixels"]
