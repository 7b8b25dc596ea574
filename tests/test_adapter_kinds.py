"""Adapters of every kind but plain LoRA, against peft's own merge in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers_checkpoints import WORDS, edit_json, save_model, tiny_config
from safetensors.torch import load_file, save_file
from test_adapters import CONFIG, LINEAR, WEIGHTS, merged, opened, train
from transformers import GPT2Config, MixtralConfig, Qwen3MoeConfig

from evomerge.checkpoints.adapter_changes import LowRank
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.merging.adapters.low_rank import family_of

pytestmark = pytest.mark.filterwarnings("ignore")

_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_config(num_key_value_heads=1), tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return save_model(config, tmp_path_factory.mktemp("models") / "gpt2")


def like_peft(base: Path, *adapters: Path) -> Source:
    """Hold every tensor against peft's to 1e-6 of the largest; return the source."""
    source, state = opened(base, *adapters), merged(base, *adapters).state_dict()
    for name, part in source.parts.items():
        expected = part.of(state[part.tensor])
        assert (source.read(name).float() - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    return source


KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 5, "target_modules": LINEAR, "rank_pattern": {"q_proj": 2}}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 5, "target_modules": LINEAR, "alpha_pattern": {"up_proj": 3}}),
    "lokr, both sides factored": (
        peft.LoKrConfig, {"r": 1, "alpha": 1, "target_modules": LINEAR, "decompose_both": True, "decompose_factor": 4},
    ),
    "lokr, no side factored": (peft.LoKrConfig, {"r": 16, "alpha": 4, "target_modules": LINEAR}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8, "r": 0, "target_modules": LINEAR}),
    "oft by Cayley": (
        peft.OFTConfig, {"oft_block_size": 4, "r": 0, "target_modules": LINEAR, "use_cayley_neumann": False},
    ),
    "oft of other series": (
        peft.OFTConfig, {"oft_block_size": 4, "r": 0, "target_modules": LINEAR, "num_cayley_neumann_terms": 3},
    ),
    "oft of one block for all": (
        peft.OFTConfig, {"oft_block_size": 8, "r": 0, "target_modules": LINEAR, "block_share": True},
    ),
    "oft within a bound": (
        peft.OFTConfig, {"oft_block_size": 8, "r": 0, "target_modules": LINEAR, "coft": True, "eps": 0.3},
    ),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4, "target_modules": LINEAR}),
    "vera": (peft.VeraConfig, {"r": 3, "target_modules": LINEAR}),
    "adalora": (
        peft.AdaLoraConfig,
        {"init_r": 4, "lora_alpha": 8, "target_modules": LINEAR, "total_step": 100, "tinit": 1, "tfinal": 1},
    ),
    "pissa": (
        peft.LoraConfig, {"r": 3, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": "pissa"},
    ),
    "olora": (
        peft.LoraConfig, {"r": 3, "lora_alpha": 3, "target_modules": LINEAR, "init_lora_weights": "olora"},
    ),
    "dora on embeddings": (
        peft.LoraConfig, {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True},
    ),
    "tokens": (
        peft.LoraConfig, {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 30]},
    ),
    "tokens of both ends": (
        peft.LoraConfig,
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 9]}},
    ),
}  # fmt: skip

ARE_SUMS = (
    "loha",
    "lokr",
    "lokr, both sides factored",
    "lokr, no side factored",
    "vera",
    "adalora",
    "pissa",
    "olora",
)


@pytest.mark.parametrize("case", KINDS)
def test_a_fold_is_what_peft_makes_of_it(plain: Path, tmp_path: Path, case: str) -> None:
    kind, settings = KINDS[case]
    adapter = train(plain, tmp_path / "adapter", kind=kind, **settings)
    source, base = like_peft(plain, adapter), opened(plain)
    changed = {name for name in base.tensors if not torch.equal(source.read(name), base.read(name).float())}
    assert changed == set(source.changes)
    if case in ARE_SUMS:
        assert family_of({"base": base, "tuned": source}).adapted == ("tuned",)
        for name in source.changes:
            ((left, right, scale),) = source.low_rank(name)
            made = base.read(name).float() + scale * left @ right
            assert torch.allclose(made, source.read(name), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("case", ["pissa", "vera", "adalora"])
def test_of_weights_that_are_stored_the_other_way_round(gpt2: Path, tmp_path: Path, case: str) -> None:
    kind, settings = KINDS[case]
    modules = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    like_peft(gpt2, train(gpt2, tmp_path / "adapter", kind=kind, **{**settings, **modules}))


def test_tokens_of_a_tied_embedding_change_in_both_places(tmp_path: Path) -> None:
    base = save_model(tiny_config(tie_word_embeddings=True), tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    source = like_peft(base, adapter)
    assert set(source.changes) == {
        "model.embed_tokens.weight",
        *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)),
    }


def test_an_adalora_whose_ranks_were_cut(plain: Path, tmp_path: Path) -> None:
    kind, settings = KINDS["adalora"]
    pattern = {f"model.layers.{n}.self_attn.q_proj.lora_E": [True, False, True, False] for n in (0, 1)}
    adapter = train(plain, tmp_path / "adapter", kind=kind, **settings)
    found = load_file(adapter / WEIGHTS)
    for name in [name for name in found if "q_proj" in name]:
        kept = found[name][:, ::2] if "lora_B" in name else found[name][::2]
        found[name] = kept.contiguous()
    save_file(found, adapter / WEIGHTS)
    edit_json(adapter / CONFIG, rank_pattern=pattern)
    like_peft(plain, adapter)


EXPERTS = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=4, mlp_only_layers=[0]
    ),
}


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["mlp.experts.down_proj"]], ids=len)
@pytest.mark.parametrize("family", EXPERTS)
def test_parameters_of_experts(tmp_path: Path, family: str, targets: list[str]) -> None:
    base = save_model(EXPERTS[family], tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets)
    source = like_peft(base, adapter)
    layers = 2 if family == "mixtral" else 1
    changed = sum(".experts." in name for name in source.changes)
    assert changed == layers * 3 * (3 if len(targets) == 2 else 1)  # w1, w2 and w3 of three experts
    edit_json(adapter / CONFIG, target_parameters=["experts.other"])
    with pytest.raises(InputError, match=r"the rank of .*experts.* is 2, but its tensors have 6"):
        opened(base, adapter)


def test_several_kinds_are_folded_in_their_order(plain: Path, tmp_path: Path) -> None:
    """peft has no model with adapters of two kinds, so each is merged into what the one before made."""
    one = train(plain, tmp_path / "one", kind=peft.OFTConfig, oft_block_size=8, r=0, target_modules=["q_proj"])
    merged(plain, one).save_pretrained(tmp_path / "turned")
    for file in plain.glob("tokenizer*"):
        (tmp_path / "turned" / file.name).write_bytes(file.read_bytes())
    two = train(plain, tmp_path / "two", r=2, target_modules=["q_proj", "v_proj"])
    state = merged(tmp_path / "turned", two).state_dict()
    source = opened(plain, one, two)
    for name in source.changes:
        assert torch.allclose(source.read(name), state[name], rtol=1e-6, atol=1e-6)


BAD: dict[str, tuple[str, Any, str]] = {
    "vera without its matrices": ("vera", {"save_projection": False}, "save_projection is false"),
    "butterflies": ("boft", {"boft_n_butterfly_factor": 2}, "boft_n_butterfly_factor is above 1"),
    "loha of another rank": ("loha", {"r": 7}, "the rank of .* is 7, but its tensors have"),
    "lokr without alpha": ("lokr", {"alpha": None}, "alpha is None"),
    "adalora as lora": ("adalora", {"peft_type": "LORA", "r": 4}, "not a pair of matrices"),
    "lora as oft": ("pissa", {"peft_type": "OFT"}, "are not those of its kind"),
    "tokens of nothing": ("tokens", {"trainable_token_indices": None}, "gives no tokens of model.embed_tokens"),
    "tokens beyond the model": ("tokens", {"trainable_token_indices": [3, 7, 99]}, r"shape \[100, 16\]; here"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_fits_nothing_is_refused(plain: Path, tmp_path: Path, case: str) -> None:
    made, changes, words = BAD[case]
    kind, settings = KINDS[made]
    adapter = train(plain, tmp_path / "adapter", kind=kind, **settings)
    edit_json(adapter / CONFIG, **changes)
    with pytest.raises(InputError, match=words):
        opened(plain, adapter)


def test_a_rotation_of_another_width_is_refused(plain: Path, tmp_path: Path) -> None:
    other = save_model(tiny_config(hidden_size=32, head_dim=4, num_key_value_heads=1), tmp_path / "other")
    adapter = train(other, tmp_path / "adapter", kind=peft.OFTConfig, oft_block_size=8, r=0, target_modules=["q_proj"])
    with pytest.raises(InputError, match="for a model whose"):
        opened(plain, adapter)


def test_two_adapters_that_began_as_a_part_of_the_base_are_refused(plain: Path, tmp_path: Path) -> None:
    folders = [train(plain, tmp_path / str(n), seed=n, **KINDS["pissa"][1]) for n in range(2)]
    with pytest.raises(InputError, match="both began as a part of"):
        opened(plain, *folders)
    assert isinstance(opened(plain, folders[0]).changes["model.layers.0.self_attn.q_proj.weight"][0], LowRank)
