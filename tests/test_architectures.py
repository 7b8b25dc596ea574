"""Every architecture that transformers loads as a stack of layers: tiny random models from its configuration class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_checkpoints import WORDS, in_own_memory, save_model
from helpers_tiers import architectures
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.live import LiveModel, check_live, for_scoring, live_model, load_weights
from evomerge.checkpoints.source import Source, open_source
from evomerge.checkpoints.writer import FolderWriter
from evomerge.recipes.stack import Role

N = len(WORDS)
CPU = torch.device("cpu")
PROMPT = torch.arange(3, 15).reshape(2, 6)
SMALL: dict[str, Any] = {
    "vocab_size": N, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 4}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 4}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 4, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 4, "sliding_window": 4}),
    "phi": ("PhiConfig", {**SMALL, "tie_word_embeddings": False}),
    "phi3": ("Phi3Config", {**GROUPED, "tie_word_embeddings": False}),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "gpt2": ("GPT2Config", {"vocab_size": N, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "head_dim": 4}),
    # What nobody thought of while this was written.
    "falcon": ("FalconConfig", {**SMALL, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("BloomConfig", {"vocab_size": N, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "stablelm": ("StableLmConfig", {**GROUPED, "use_qkv_bias": True}),
    "smollm3": ("SmolLM3Config", GROUPED),
    "gptj": ("GPTJConfig", {"vocab_size": N, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mpt": ("MptConfig", {"vocab_size": N, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}),
    "cohere": ("CohereConfig", GROUPED),
    "granite": ("GraniteConfig", GROUPED),
    "granite_moe": ("GraniteMoeConfig", {**GROUPED, "num_local_experts": 4}),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "glm4": ("Glm4Config", {**GROUPED, "head_dim": 4}),
    "gpt_oss": ("GptOssConfig", {**GROUPED, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("MambaConfig", {"vocab_size": N, "hidden_size": 16, "num_hidden_layers": 2}),
    "rwkv": ("RwkvConfig", {"vocab_size": N, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 32}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture(params=architectures(MODELS))
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    if name not in folders:
        kind, settings = MODELS[name]
        folders[name] = save_model(getattr(transformers, kind)(**settings), tmp_path_factory.mktemp("models") / name)
    return folders[name]


def opened(folder: Path) -> Source:
    return open_source("maths", str(folder), place="sources.maths")


def loaded(source: Source) -> LiveModel:
    live = live_model(source, CPU)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    check_live(live)
    return live


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        model = in_own_memory(AutoModelForCausalLM.from_pretrained(folder).eval())
        return model(PROMPT, use_cache=False).logits


def test_a_loaded_source_is_what_from_pretrained_gives(folder: Path) -> None:
    source = opened(folder)
    assert source.layers == 2
    assert source.warnings == ()
    live = loaded(source)
    with torch.inference_mode():
        assert torch.equal(live.model(PROMPT, use_cache=False).logits, logits(folder))


def test_every_layer_has_attention_and_mlp(folder: Path) -> None:
    source = opened(folder)
    roles = source.roles
    found = set(roles.values())
    assert list(roles) == list(source.tensors)
    for layer in range(2):
        assert Role("attention", layer) in found
        assert (Role("mlp", layer) in found) == ("mamba" not in str(folder))
    model = live_model(source, CPU).model
    matrices = {id(model.get_input_embeddings().weight): "embedding"}
    if not source.tied:
        matrices[id(model.get_output_embeddings().weight)] = "head"
    parameters = dict(model.named_parameters())
    for name, part in source.parts.items():
        if (expected := matrices.get(id(parameters.get(part.tensor)))) is not None:
            assert roles[name] == Role(expected, None), name  # type: ignore[arg-type]
            matrices.pop(id(parameters[part.tensor]))
        elif roles[name].layer is None:
            assert roles[name].kind in ("norm", "embedding", "head"), name
            assert roles[name].kind != "head" or name.endswith("bias"), name
    assert matrices == {}


def test_what_is_written_is_read_by_transformers(folder: Path, tmp_path: Path) -> None:
    source = opened(folder)
    layout = [(name, entry.shape, source.read(name).dtype) for name, entry in source.tensors.items()]
    with FolderWriter(tmp_path / "out", layout) as out:
        for name in source.tensors:
            out.write(name, source.read(name))
        out.add_file(folder / "config.json")
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    again = opened(tmp_path / "out")
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.tensors)


class RowByRow(TorchFunctionMode):
    """Counts the linear layers that are given a batch which does not lie in memory as one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            batch = args[0]
            pairs = zip(batch.stride()[:-2], batch.shape[1:], batch.stride()[1:], strict=False)
            self.count += batch.shape[0] > 1 and any(outer != size * inner for outer, size, inner in pairs)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [{}, {"logits_to_keep": 1}, {"logits_to_keep": 3}], ids=["all", "last", "some"])
def test_no_matrix_is_multiplied_row_by_row(folder: Path, kept: dict[str, int]) -> None:
    """torch would copy the matrix for each row: with a vocabulary of 50,000, seconds and gigabytes."""
    plain = for_scoring(AutoModelForCausalLM.from_pretrained(folder))
    for model in (loaded(opened(folder)).model, plain):
        with torch.inference_mode(), RowByRow() as products:
            model(PROMPT, **kept)
            model.generate(PROMPT, max_new_tokens=3, do_sample=False)
        assert products.count == 0


@pytest.mark.parametrize("head", ["ModernBertDecoderConfig", "BertConfig"])
def test_nor_are_the_matrices_of_a_head_of_several(head: str) -> None:
    config = getattr(transformers, head)(**SMALL, is_decoder=True)
    model = for_scoring(AutoModelForCausalLM.from_config(config))
    with torch.inference_mode(), RowByRow() as products:
        model(PROMPT, logits_to_keep=1)
    assert products.count == 0
