"""Adapters taken out of models: loaded in peft, they are the model again."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers_checkpoints import WORDS, edit_tensors, save_model, save_tokenizer, tiny_config
from helpers_miniature import MINIATURES, search_file
from helpers_vision import save_vision
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.commands.extract import ExtractOptions, extract
from evomerge.errors import InputError
from evomerge.extraction import adapter
from evomerge.extraction.adapter import extract as make
from evomerge.extraction.factors import RankRule, factorised, lost_energy
from evomerge.extraction.held import Extracting
from evomerge.merging.arithmetic.jobs import WorkerThreads

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = torch.arange(3, 15).reshape(2, 6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_MOE = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

MODELS: dict[str, Any] = {
    "llama": tiny_config(),
    "tied head": tiny_config(tie_word_embeddings=True),
    "biases": Qwen2Config(**_GROUPED),
    "fused qkv, stored the other way round": GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "fused qkv with biases": GPTNeoXConfig(**_SIZES),
    "fused qkv and mlp": Phi3Config(**_GROUPED, pad_token_id=0),
    "a head with a bias": PhiConfig(**_SIZES, pad_token_id=0),
    "a tied head with a bias": PhiConfig(**_SIZES, pad_token_id=0, tie_word_embeddings=True),
    "experts": MixtralConfig(**_GROUPED, num_local_experts=3),
    "experts and a shared one": Qwen2MoeConfig(**_MOE, num_experts=3, shared_expert_intermediate_size=20),
    "a dense layer before experts": Glm4MoeConfig(
        **_MOE, n_routed_experts=3, n_shared_experts=1, first_k_dense_replace=1, head_dim=4, n_group=1, topk_group=1
    ),
}


def opened(folder: Path) -> Source:
    return open_source("model", str(folder), place="MODEL")


def pair(config: Any, folder: Path) -> tuple[Path, Path]:
    return save_model(config, folder / "model", seed=1), save_model(config, folder / "base", seed=0)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(MODELS["llama"], tmp_path_factory.mktemp("llamas"))


def logits_in_peft(base: Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        return adapted(PROMPT).logits


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(PROMPT).logits


@pytest.mark.parametrize(
    ("family", "embeddings"),
    [*((family, form) for family in MODELS for form in ("full", "tokens")), ("a head with a bias", "low_rank")],
)
def test_at_full_rank_the_adapter_is_the_model_in_peft(tmp_path: Path, family: str, embeddings: Any) -> None:
    model, base = pair(MODELS[family], tmp_path)
    made = make(opened(model), opened(base), tmp_path / "adapter", Extracting(RankRule(), embeddings))
    assert made.lost < 1e-12
    assert torch.allclose(logits_in_peft(base, tmp_path / "adapter"), logits(model), rtol=1e-5, atol=2e-6)
    ours, theirs = open_source("a", f"{base}+{tmp_path / 'adapter'}", place="a"), opened(model)
    for name in theirs.tensors:
        assert torch.allclose(ours.read(name).float(), theirs.read(name).float(), rtol=1e-5, atol=1e-6), name


def test_a_fixed_rank_holds_what_that_many_singular_values_hold(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    model, base = (opened(folder) for folder in llamas)
    made = make(model, base, tmp_path / "adapter", Extracting(RankRule(most=5), "low_rank"))
    by_name = {loss.tensor: loss for loss in made.losses}
    assert by_name["model.norm.weight"].form == "full"
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        squares = torch.linalg.svdvals(model.read(name).double() - base.read(name).double()) ** 2
        assert by_name[name].form == "rank 5"
        assert by_name[name].lost == pytest.approx(float(squares[5:].sum()), rel=1e-4)
    adapted = open_source("a", f"{llamas[1]}+{tmp_path / 'adapter'}", place="a")
    rest = adapted.read("lm_head.weight") - model.read("lm_head.weight").float()
    assert float(rest.square().sum()) == pytest.approx(by_name["lm_head.weight"].lost, rel=1e-4)
    assert logits_in_peft(llamas[1], tmp_path / "adapter").isfinite().all()


@pytest.mark.parametrize("family", ["biases", "fused qkv, stored the other way round", "experts"])
def test_what_is_said_to_be_lost_is_what_the_merged_model_lacks_in_peft(tmp_path: Path, family: str) -> None:
    model, base = pair(MODELS[family], tmp_path)
    made = make(opened(model), opened(base), tmp_path / "adapter", Extracting(RankRule(most=4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, wanted = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base, model))
        merged = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    lacks = {
        name: float((tensor.double() - merged[name].double()).square().sum())
        for name, tensor in wanted.state_dict().items()
    }
    for loss in made.losses:
        assert lacks[loss.tensor] == pytest.approx(loss.lost, rel=1e-4, abs=1e-8), loss.tensor
    assert 0.05 < made.lost < 0.95
    stated = json.loads((tmp_path / "adapter" / "extraction.json").read_text())["lost_energy"]
    assert stated == pytest.approx(sum(lacks[loss.tensor] for loss in made.losses) / made.energy, rel=1e-4)


def test_ranks_by_energy_are_the_least_that_hold_it(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    model, base = (opened(folder) for folder in llamas)
    made = make(model, base, tmp_path / "adapter", Extracting(RankRule(energy=0.9), "none"))
    for loss in made.losses:
        if not loss.form.startswith("rank"):
            continue
        rank = int(loss.form.split()[1])
        squares = torch.linalg.svdvals(model.read(loss.tensor).double() - base.read(loss.tensor).double()) ** 2
        held = squares.cumsum(0) / squares.sum()
        assert held[rank - 1] >= 0.9 > (held[rank - 2] if rank > 1 else 0.0)
        assert loss.lost / loss.energy <= 0.1 + 1e-9
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert settings["rank_pattern"] == settings["alpha_pattern"] != {}
    assert {loss.form for loss in made.losses if "embed" in loss.tensor} == {"left as in the base"}
    theirs = open_source("a", f"{llamas[1]}+{tmp_path / 'adapter'}", place="a")
    ours = {name: theirs.read(name) for name in theirs.changes}
    merged = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llamas[1], dtype=torch.float32), str(tmp_path / "adapter")
    ).merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert name not in ours or torch.allclose(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_change_of_few_directions_is_found_whole(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a model that an adapter was merged into in float32, the adapter again, and nothing else."""
    base = llamas[1]
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    save_tokenizer(tmp_path / "merged")
    made = make(opened(tmp_path / "merged"), opened(base), tmp_path / "adapter", Extracting(RankRule(energy=1 - 1e-9)))
    assert {loss.form for loss in made.losses} == {"unchanged", "rank 3"}
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == ["q_proj"]
    again = make(opened(tmp_path / "merged"), opened(base), tmp_path / "again", Extracting(RankRule(energy=1 - 1e-9)))
    assert again.losses == made.losses
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()


def test_the_projection_loses_hardly_more_than_the_largest_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((300, 120), (120, 300)):
        change = torch.randn(shape) @ torch.diag(torch.linspace(1, 0.05, shape[1]))  # falls slowly: the hard case
        squares = torch.linalg.svdvals(change.double()) ** 2
        lost = lost_energy(change, factorised(change, RankRule(most=16), name="x"))
        assert float(squares[16:].sum()) <= lost <= 1.005 * float(squares[16:].sum())


@pytest.mark.parametrize("form", ["full", "tokens"])
def test_what_is_held_in_full_is_held_as_the_model_stores_it(
    llamas: tuple[Path, Path], tmp_path: Path, form: Any
) -> None:
    made = make(opened(llamas[0]), opened(llamas[1]), tmp_path / "adapter", Extracting(RankRule(2), form))
    held = load_file(tmp_path / "adapter" / WEIGHTS)
    factors = {name: tensor for name, tensor in held.items() if ".lora_" in name}
    others = {name: tensor for name, tensor in held.items() if name not in factors}
    assert {tensor.dtype for tensor in factors.values()} == {torch.float32}
    assert {tensor.dtype for tensor in others.values()} == {torch.bfloat16}
    rows = sum(tensor.nbytes for name, tensor in others.items() if "norm" not in name)
    assert made.tables == rows > 0


def test_an_adapter_is_the_same_whatever_the_number_of_threads(
    llamas: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for threads in (1, 3):
        monkeypatch.setattr(adapter, "WorkerThreads", partial(WorkerThreads, threads))
        losses = make(opened(llamas[0]), opened(llamas[1]), tmp_path / str(threads), Extracting(RankRule(2))).losses
        made.append((losses, *((tmp_path / str(threads) / name).read_bytes() for name in (WEIGHTS, CONFIG))))
    assert made[0] == made[1]


def test_the_preset_for_vllm_holds_nothing_that_it_refuses(tmp_path: Path) -> None:
    """Its loader takes factors of linear layers alone, and one scale for all of them."""
    model, base = pair(MODELS["biases"], tmp_path)
    made = make(opened(model), opened(base), tmp_path / "adapter", Extracting(RankRule(energy=0.9), preset="vllm"))
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    refused = ("modules_to_save", "target_parameters", "trainable_token_indices", "use_dora")
    assert not any(settings[key] for key in refused)
    assert settings["bias"] == "none"
    assert settings["r"] == settings["lora_alpha"]
    assert all(settings["alpha_pattern"][name] == rank for name, rank in settings["rank_pattern"].items())
    names = load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) and ".layers." in name for name in names)
    left = {loss.tensor for loss in made.losses if loss.form == "left as in the base"}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"} <= left


def test_of_a_model_that_reads_images_the_tower_has_factors_too(tmp_path: Path) -> None:
    model, base = (save_vision("llava", tmp_path / name, seed=seed) for seed, name in enumerate(("model", "base")))
    made = make(opened(model), opened(base), tmp_path / "adapter", Extracting(RankRule(most=3)))
    forms = {loss.tensor: loss.form for loss in made.losses}
    assert forms["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"] == "rank 3"
    assert forms["model.language_model.layers.0.self_attn.q_proj.weight"] == "rank 3"
    assert forms["lm_head.weight"] == "full"
    adapted = open_source("a", f"{base}+{tmp_path / 'adapter'}", place="a")
    wanted, name = opened(model), "model.layers.0.mlp.up_proj.weight"
    change = wanted.read(name).double() - opened(base).read(name).double()
    left, sizes, right = torch.linalg.svd(change)
    expected = opened(base).read(name).double() + (left[:, :3] * sizes[:3]) @ right[:3]
    assert torch.allclose(adapted.read(name).double(), expected, atol=1e-5)


def test_the_models_tokenizer_goes_along_where_it_is_another(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    model = shutil.copytree(llamas[0], tmp_path / "model")
    make(opened(model), opened(llamas[1]), tmp_path / "without", Extracting(RankRule(2)))
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    save_tokenizer(model, [*WORDS[:-1], "new"])
    make(opened(model), opened(llamas[1]), tmp_path / "with", Extracting(RankRule(2)))
    assert "new" in (tmp_path / "with" / "tokenizer.json").read_text()


# ---- what cannot be ----


def refused(model: Path, base: Path, out: Path, words: str, how: Extracting | None = None) -> None:
    before = set(out.parent.iterdir())
    with pytest.raises(InputError, match=words):
        make(opened(model), opened(base), out, how or Extracting(RankRule(2)))
    assert set(out.parent.iterdir()) == before


def test_models_that_no_adapter_lies_between_are_refused(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    model, base = llamas
    refused(base, base, tmp_path / "out", "no weight differs")
    more = save_model(tiny_config(vocab_size=40), tmp_path / "more")
    refused(more, base, tmp_path / "out", r"has 40 tokens and the base 32.*transplant BASE MODEL")
    deeper = save_model(tiny_config(num_hidden_layers=3), tmp_path / "deeper")
    refused(deeper, base, tmp_path / "out", "differ in number of layers")
    normed = shutil.copytree(base, tmp_path / "normed")
    edit_tensors(normed, lambda tensors: tensors["model.norm.weight"].add_(1))
    refused(normed, base, tmp_path / "out", "in no matrix that factors can hold, but in model.norm.weight")
    broken = shutil.copytree(model, tmp_path / "broken")
    edit_tensors(broken, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[3].fill_(torch.nan))
    refused(broken, base, tmp_path / "out", r"up_proj.weight in model.safetensors has NaN or Inf in 1 of")
    refused(model, base, base / "out", "is in the folder of a source")
    tied = pair(MODELS["tied head"], tmp_path / "tied")
    refused(*tied, tmp_path / "out", "is also the head", Extracting(RankRule(2), "low_rank"))


def test_a_full_disk_is_told_and_nothing_is_left(
    llamas: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "add", full)
    refused(*llamas, tmp_path / "out", "the disk is full")


def test_what_the_command_line_may_not_say(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    model, base = map(str, llamas)
    for wanted, words in (
        (ExtractOptions(rank="0"), "--rank: is '0'"),
        (ExtractOptions(rank="half"), "--rank: is 'half'"),
        (ExtractOptions(energy=1.5), "--energy: is 1.5"),
        (ExtractOptions(embeddings="some"), "--embeddings"),
        (ExtractOptions(preset="tgi"), "--preset"),
        (ExtractOptions(rank="513", preset="vllm"), "--preset: vLLM takes ranks up to 512, and this has 513"),
    ):
        with pytest.raises(InputError, match=words):
            extract(model, base, tmp_path / "out", wanted)
    with pytest.raises(InputError, match="--compare-ranks: needs items to score other ranks on"):
        extract(model, base, tmp_path / "out", ExtractOptions(), ranks=["4"])
    with pytest.raises(InputError, match="--base: "):
        extract(model, str(tmp_path / "nowhere"), tmp_path / "out", ExtractOptions())


def test_the_command_scores_ranks_beside_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With 3% of the energy lost the model answers as before, with 76% it does not."""
    items = {"task": "mini_math_ja", "metric": "acc", "search": "validation[:24]", "held_out": "test[:4]"}
    file = search_file(tmp_path, objectives={"problems": items})
    wanted = ExtractOptions(rank="48")
    extract(str(MINIATURES / "maths"), str(MINIATURES / "base"), tmp_path / "out", wanted, file, ["2", "full"])
    printed = capsys.readouterr().out
    assert "difference from the model" in printed
    rows = [line for line in printed.splitlines() if line.startswith("rank ")]
    assert [line.split()[1] for line in rows] == ["2", "48", "128"]
    lost = [float(line.split()[3].rstrip("%")) / 100 for line in rows]
    off = [float(line.split()[8]) for line in rows]
    assert lost[0] > 0.5 > 0.05 > lost[1] > lost[2] == 0.0
    assert off[0] < -0.5
    assert abs(off[1]) <= lost[1]
    assert "+0.000 [+0.000, +0.000]" in rows[-1]
    assert "vllm serve" not in printed
    assert "peft" in (tmp_path / "out" / "README.md").read_text()
    assert isinstance(json.loads((tmp_path / "out" / "extraction.json").read_text())["lost_energy"], float)
