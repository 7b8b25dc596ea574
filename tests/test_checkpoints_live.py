from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoints import WORDS, edit_json, in_own_memory, save_model, save_tokenizer, tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from evomerge.checkpoints.live import LiveModel, NotFiniteError, check_live, live_model, load_weights
from evomerge.checkpoints.roles import model_roles
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.structure import empty_model
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError
from evomerge.recipes.stack import Role, roles

CPU = torch.device("cpu")
N = len(WORDS)
SMALL: dict[str, Any] = {
    "vocab_size": N, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": tiny_config(),
    "llama3_rope": tiny_config(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
        }
    ),
    "llama_tied": tiny_config(tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=4, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=N, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "gpt_neox": GPTNeoXConfig(**SMALL, tie_word_embeddings=False),
    "phi": PhiConfig(**SMALL, tie_word_embeddings=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(config, root / name) for name, config in MODELS.items()}


def opened(folder: Path) -> Source:
    return open_source("maths", str(folder), place="sources.maths")


def weights(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, source.read(name)) for name in source.tensors)


def loaded(folder: Path, dtype: torch.dtype | None = None) -> LiveModel:
    source = opened(folder)
    live = live_model(source, CPU, dtype)
    load_weights(live, weights(source))
    return live


# ---- roles ----


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_a_role_and_every_role_a_tensor(folders: dict[str, Path], name: str) -> None:
    source = opened(folders[name])
    found = source.roles
    assert list(found) == list(source.tensors)
    lacking = set(roles(2)) - set(found.values())
    assert lacking == ({Role("head")} if source.tied else set())
    assert set(live_model(source, CPU).tensors) == set(found)


EXPECTED: dict[str, dict[str, tuple[str, int | None]]] = {
    "llama": {
        "model.embed_tokens.weight": ("embedding", None),
        "model.layers.0.self_attn.q_proj.weight": ("attention", 0),
        "model.layers.1.mlp.down_proj.weight": ("mlp", 1),
        "model.layers.1.input_layernorm.weight": ("norm", 1),
        "model.norm.weight": ("norm", None),
        "lm_head.weight": ("head", None),
    },
    "qwen2": {"model.layers.1.self_attn.k_proj.bias": ("attention", 1)},
    "gemma2": {
        "model.layers.0.pre_feedforward_layernorm.weight": ("norm", 0),
        "model.layers.0.post_attention_layernorm.weight": ("norm", 0),
        "model.layers.0.mlp.gate_proj.weight": ("mlp", 0),
    },
    "gpt2": {
        "transformer.wte.weight": ("embedding", None),
        "transformer.wpe.weight": ("embedding", None),
        "transformer.h.1.ln_1.bias": ("norm", 1),
        "transformer.h.1.attn.c_attn.weight": ("attention", 1),
        "transformer.h.0.mlp.c_fc.bias": ("mlp", 0),
        "transformer.ln_f.weight": ("norm", None),
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": ("embedding", None),
        "gpt_neox.layers.0.attention.query_key_value.bias": ("attention", 0),
        "gpt_neox.layers.0.post_attention_layernorm.weight": ("norm", 0),
        "embed_out.weight": ("head", None),
    },
    "phi": {
        "model.layers.1.self_attn.dense.weight": ("attention", 1),
        "model.layers.1.mlp.fc1.bias": ("mlp", 1),
        "model.final_layernorm.bias": ("norm", None),
        "lm_head.bias": ("head", None),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_by_name(folders: dict[str, Path], name: str) -> None:
    found = opened(folders[name]).roles
    assert {n: (found[n].kind, found[n].layer) for n in EXPECTED[name]} == EXPECTED[name]


def test_norms_inside_attention_belong_to_it() -> None:
    experts = Qwen3MoeConfig(**SMALL, num_key_value_heads=2, head_dim=4, num_experts=4, moe_intermediate_size=8)
    found = model_roles(empty_model(experts, "x"), 2)
    assert found["model.layers.0.self_attn.q_norm.weight"] == Role("attention", 0)
    assert found["model.layers.1.mlp.gate.weight"] == Role("mlp", 1)


def test_a_mixer_that_takes_part_in_the_cache_counts_as_attention() -> None:
    found = model_roles(empty_model(MambaConfig(vocab_size=N, hidden_size=16, num_hidden_layers=2), "x"), 2)
    assert found["backbone.layers.1.mixer.in_proj.weight"] == Role("attention", 1)
    assert found["backbone.layers.1.norm.weight"] == Role("norm", 1)


# ---- live models ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_source_is_what_from_pretrained_gives(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    live = loaded(folders[name], dtype)
    plain = in_own_memory(AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype).eval())
    prompt = torch.arange(3, 3 + 12).reshape(2, 6)
    with torch.inference_mode():
        ours, theirs = live.model(prompt).logits, plain(prompt).logits
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)
        settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        assert torch.equal(live.model.generate(prompt, **settings), plain.generate(prompt, **settings))
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(buffer, buffers[n]) for n, buffer in live.model.named_buffers())
    assert not live.model.training
    check_live(live)


def test_a_live_model_takes_the_source_dtype_and_device(folders: dict[str, Path]) -> None:
    live = loaded(folders["llama"])
    assert live.model.dtype == torch.bfloat16
    assert live.device == CPU
    assert not any(p.requires_grad for p in live.model.parameters())


def test_weights_are_written_in_place_and_cast(folders: dict[str, Path]) -> None:
    live = loaded(folders["llama_tied"])
    head, embedding = live.model.lm_head.weight, live.model.get_input_embeddings().weight
    assert head is embedding
    address = head.data_ptr()
    load_weights(live, [("model.embed_tokens.weight", torch.full((N, 16), 1 / 3))])
    assert head.data_ptr() == address
    assert torch.equal(head, torch.full((N, 16), 1 / 3).bfloat16())


def test_unknown_names_and_shapes_are_errors(folders: dict[str, Path]) -> None:
    live = loaded(folders["llama_tied"])
    for name in ("model.layers.2.mlp.up_proj.weight", "lm_head.weight"):
        with pytest.raises(KeyError, match=name):
            load_weights(live, [(name, torch.zeros(N, 16))])
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape"):
        load_weights(live, [("model.norm.weight", torch.zeros(1))])


def test_what_nobody_wrote_is_noticed(folders: dict[str, Path]) -> None:
    source = opened(folders["llama"])
    live = live_model(source, CPU)
    load_weights(live, ((n, t) for n, t in weights(source) if n != "model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(NotFiniteError) as caught:
        check_live(live)
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_found(folders: dict[str, Path], value: float) -> None:
    live = loaded(folders["llama"])
    with torch.no_grad():
        live.model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(NotFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        check_live(live)


def test_logits_that_overflow_are_found(folders: dict[str, Path]) -> None:
    live = loaded(folders["llama"], torch.float16)
    with torch.no_grad():
        for parameter in live.model.parameters():
            parameter.fill_(30000)
    with pytest.raises(NotFiniteError) as caught:
        check_live(live)
    assert caught.value.where == "logits"
    assert str(pickle.loads(pickle.dumps(caught.value))) == "NaN or Inf in logits"


def test_generation_settings_come_from_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_model(tiny_config(), tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=[2, 5], max_length=17)
    assert live_model(opened(folder), CPU).model.generation_config.eos_token_id == [2, 5]
    edit_json(folder / "generation_config.json", max_new_tokens=-3)
    with pytest.raises(InputError, match=r"generation_config\.json cannot be used"):
        live_model(opened(folder), CPU)


# ---- tokenizers ----


def test_a_tokenizer_pads_on_the_left_with_its_end_token(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(opened(folders["llama"]))
    plain = AutoTokenizer.from_pretrained(folders["llama"])
    assert tokenizer.encode("w1 w2 zebra") == plain.encode("w1 w2 zebra")
    assert tokenizer(["w1", "w1 w2"], padding=True)["input_ids"] == [[2, 4], [4, 5]]


def test_a_padding_token_of_its_own_is_kept(tmp_path: Path) -> None:
    folder = save_model(tiny_config(), tmp_path)
    save_tokenizer(folder, pad_token="w28")
    assert load_tokenizer(opened(folder)).pad_token == "w28"


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "Nonsense"}}', "not json"])
def test_a_broken_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    folder = save_model(tiny_config(), tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer cannot be used") as caught:
        load_tokenizer(opened(folder))
    assert caught.value.place == "sources.maths"
