"""Where layers write to the residual stream, measured on a tiny random model of every architecture that is known."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers
from helpers_tiers import architectures
from test_architectures import EXPERTS, GROUPED, MODELS, PROMPT, SMALL
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from evomerge.checkpoints.residual import DIRECT, POST_NORMED, Writers, residual_writers
from evomerge.checkpoints.structure import layer_stack

LATENT: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "head_dim": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ROUTED: dict[str, Any] = {**EXPERTS, "head_dim": 4, "n_routed_experts": 4, "num_local_experts": 4}

# The settings of other architectures and of other forms of the same, beside those that all of them share.
OTHERS: dict[str, dict[str, Any]] = {
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "opt normed after": {"ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "bloom adding to norms": {"n_layer": 2, "n_head": 4, "apply_residual_connection_post_layernorm": True},
    "falcon one norm": {"alibi": False, "new_decoder_architecture": False, "parallel_attn": True, "bias": True},
    "falcon in sequence": {"alibi": True, "new_decoder_architecture": False, "parallel_attn": False},
    "gpt_neox in sequence": {"use_parallel_residual": False},
    "stablelm parallel": {"use_parallel_residual": True},
    "granite multiplied": {"residual_multiplier": 0.3},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 8, "residual_multiplier": 0.3},
    "qwen3_moe half dense": {**ROUTED, "mlp_only_layers": [0]},
    "afmoe": {**ROUTED, "num_dense_layers": 1},
    "helium": {"head_dim": 4},
    "apertus": {}, "arcee": {}, "biogpt": {}, "cohere2": {}, "cwm": {}, "diffllama": {}, "ernie4_5": {"use_bias": True},
    "exaone4": {}, "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2}, "glm": {"head_dim": 4},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"}, "deepseek_v3": LATENT,
    "dots1": {**ROUTED, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1}, "gpt_bigcode": {"n_embd": 16, "n_layer": 2, "n_head": 4},
    "hunyuan_v1_dense": {"head_dim": 4}, "hunyuan_v1_moe": {"head_dim": 4, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**ROUTED, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {**ROUTED, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    "minimax_m2": ROUTED, "ministral": {"head_dim": 4}, "ministral3": {"head_dim": 4}, "nanochat": {}, "nemotron": {},
    "olmo3": {}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "persimmon": {},
    "phimoe": {"num_local_experts": 4}, "qwen3_5_text": LINEAR, "qwen3_5_moe_text": {**EXPERTS, **LINEAR},
    "qwen3_next": {**EXPERTS, **LINEAR}, "seed_oss": {"head_dim": 4, "attention_out_bias": True}, "solar_open": ROUTED,
    "vaultgemma": {"head_dim": 4},
}  # fmt: skip

REFUSED = {
    "mamba": "no transformer: its layers are state space models",
    "rwkv": "the first layer norms the stream itself, and the model halves stream and weights as it runs",
}
NOT_ADDED_TO = {"opt normed after", "bloom adding to norms"}  # the layer norms the stream itself
NOT_NORMED = {*NOT_ADDED_TO, "exaone4", "flex_olmo", "olmo2", "olmo3"}  # or its blocks read the stream as it is
KNOWN = [case for case in (*MODELS, *OTHERS) if case not in REFUSED]


def configuration(case: str) -> Any:
    if case in MODELS:
        kind, settings = MODELS[case]
        return getattr(transformers, kind)(**settings)
    model_type = case.split()[0]
    shared = SMALL if model_type in ("opt", "bloom", "gpt_neox", "falcon", "biogpt", "deepseek_v3") else GROUPED
    return CONFIG_MAPPING[model_type](**{**shared, **OTHERS[case]})


def random_model(case: str) -> Any:
    """Weights, biases and norms far from what they are at the start, and a stream whose mean square is about 1."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(configuration(case), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.2) * torch.randn_like(parameter))
        model.get_input_embeddings().weight.normal_()
    return model.requires_grad_(False)


def layers_of(model: Any) -> nn.ModuleList:
    return layer_stack(model, 2)[1]


def writers_of(model: Any, layer: nn.Module) -> Writers:
    writers = residual_writers(layer, model.config.model_type, model.config)
    assert writers is not None
    return writers


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def times(output: Any, factor: float) -> Any:
    return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


@contextmanager
def scaled_outputs(layer: nn.Module, writers: Writers, factor: float) -> Iterator[None]:
    with ExitStack() as hooks:
        for name in writers.modules:
            module = layer.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(lambda _m, _i, output: times(output, factor)))
        yield


@contextmanager
def scaled_stream(layer: nn.Module, scale: float) -> Iterator[None]:
    """The stream times ``scale`` before the layer, and divided by it after."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] * scale, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * scale}

    with (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(lambda _m, _i, output: times(output, 1 / scale)),
    ):
        yield


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT, use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module", params=architectures(KNOWN))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return random_model(name)


def test_a_layer_whose_writers_give_nothing_hands_the_stream_on(name: str, model: Any) -> None:
    for layer in layers_of(model):
        seen: list[torch.Tensor] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, seen: Any = seen) -> None:
            seen += [(args[0] if args else kwargs["hidden_states"]).clone(), first(output).clone()]

        with layer.register_forward_hook(record, with_kwargs=True):
            logits(model)
            with scaled_outputs(layer, writers_of(model, layer), 0.0):
                logits(model)
        stream, moved, same_stream, kept = seen
        assert torch.equal(stream, same_stream)
        assert not torch.equal(moved, stream)
        assert torch.equal(kept, stream) == (name not in NOT_ADDED_TO)


def test_a_factor_folds_into_the_tensors(model: Any) -> None:
    whole = logits(model)
    for layer in layers_of(model):
        writers = writers_of(model, layer)
        with scaled_outputs(layer, writers, 0.7):
            scaled = logits(model)
        assert difference(scaled, whole) > 1e-3
        before = copy.deepcopy(layer.state_dict())
        for tensor, fold in writers.tensors.items():
            parameter = layer.get_parameter(tensor)
            parameter.copy_(0.7 * parameter if fold == "times" else (1 + parameter) * 0.7 - 1)
        assert difference(logits(model), scaled) < 1e-5
        layer.load_state_dict(before)


def test_normed_says_whether_scaling_the_stream_is_a_factor(name: str, model: Any) -> None:
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # torch's grouped product knows no float64
    for module in exact.modules():
        for eps in ("eps", "variance_epsilon", "epsilon"):
            if isinstance(getattr(module, eps, None), float):
                setattr(module, eps, 1e-12)
    for layer in layers_of(exact):
        writers = writers_of(exact, layer)
        with scaled_stream(layer, 1.6):
            stream = logits(exact)
        with scaled_outputs(layer, writers, 1 / 1.6):
            factor = logits(exact)
        assert writers.normed == (name not in NOT_NORMED)
        if writers.normed:
            assert difference(stream, factor) < 1e-5
        else:
            assert difference(stream, factor) > 1e-3


def test_layers_on_the_meta_device_will_do(name: str, model: Any) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(configuration(name))
    for bare, layer in zip(layers_of(empty), layers_of(model), strict=True):
        assert writers_of(empty, bare) == writers_of(model, layer)


def test_every_known_architecture_is_measured_above() -> None:
    assert {configuration(case).model_type for case in KNOWN} == DIRECT | POST_NORMED.keys()


@pytest.mark.parametrize("refused", REFUSED)
def test_no_writers_are_guessed(refused: str) -> None:
    bare = random_model(refused)
    assert all(residual_writers(layer, bare.config.model_type, bare.config) is None for layer in layers_of(bare))


def test_a_layer_that_nobody_knows_has_no_writers() -> None:
    class Block(nn.Module):
        def __init__(self, output: str) -> None:
            super().__init__()
            self.up_proj = nn.Linear(4, 4)
            setattr(self, output, nn.Linear(4, 4))

    def layer(attention: str, mlp: str) -> nn.Module:
        return nn.ModuleDict({"self_attn": Block(attention), "mlp": Block(mlp), "input_layernorm": nn.LayerNorm(4)})

    known = residual_writers(layer("o_proj", "down_proj"), "llama", None)
    assert known is not None
    assert known.modules == ("self_attn.o_proj", "mlp.down_proj")
    assert residual_writers(layer("o_proj", "down_proj"), "made_up", None) is None
    assert residual_writers(layer("o_proj", "last"), "llama", None) is None
    assert residual_writers(layer("o_proj", "down_proj"), "gemma2", None) is None
    assert residual_writers(nn.Linear(4, 4), "llama", None) is None


def test_bloom_in_pieces_is_refused_because_hooks_on_its_outputs_would_not_be_called() -> None:
    config = configuration("bloom")
    config.pretraining_tp, config.slow_but_exact = 2, True
    model = AutoModelForCausalLM.from_config(config).eval()
    calls: list[str] = []
    layer = layers_of(model)[0]
    with layer.mlp.dense_4h_to_h.register_forward_hook(lambda *_: calls.append("called")):
        logits(model)
    assert calls == []
    assert residual_writers(layer, "bloom", config) is None
