"""The names of tensors and settings in each mixture architecture, and the dense models that each can represent.

The names are the classic ones, with one tensor per expert, as written by ``save_pretrained`` and read by vLLM and
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.recipes.mixture import BIASED, Architecture

_SILENT_WIDTH = 64
"""The width of a shared expert that an architecture requires, but that adds nothing."""

_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "attention_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """An architecture.

    Attributes:
        takes: the dense architectures whose layers it can represent exactly.
        block: the name of the mixture within a layer.
        weights: an expert's names for the weights of a dense mlp.
        shared: the name within a block of the expert that processes every token, if there is one.
        count: the setting with the number of experts in a layer.
    """

    takes: frozenset[str]
    block: str
    weights: Mapping[str, str]
    shared: str | None
    count: str

    def gate(self, layer: int) -> str:
        """The name of a router's weight."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def bias(self, layer: int) -> str:
        """The name of a router's selection bias."""
        return f"model.layers.{layer}.{self.block}.gate.e_score_correction_bias"

    def expert(self, layer: int, number: int, weight: str) -> str:
        """The name of an expert's weight; ``weight`` is its name in a dense mlp."""
        return f"model.layers.{layer}.{self.block}.experts.{number}.{self.weights[weight]}.weight"


_SAME = {name: name for name in ("gate_proj", "up_proj", "down_proj")}

ARCHITECTURES: Mapping[Architecture, Names] = {
    "mixtral": Names(
        frozenset({"llama", "mistral"}),
        "block_sparse_moe",
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        None,
        "num_local_experts",
    ),
    "qwen2_moe": Names(frozenset({"qwen2", "llama"}), "mlp", _SAME, "shared_expert", "num_experts"),
    "qwen3_moe": Names(frozenset({"qwen3"}), "mlp", _SAME, None, "num_experts"),
    "glm4_moe": Names(frozenset({"llama", "mistral", "qwen2"}), "mlp", _SAME, "shared_experts", "n_routed_experts"),
}


def check_architecture(architecture: Architecture, source: Source) -> None:
    """Reject dense models that an architecture cannot represent exactly. Reads only config.json.

    Raises:
        InputError: saying what prevents it.
    """
    kind, place = source.config["model_type"], "recipe.architecture"
    fitting = [name for name, names in ARCHITECTURES.items() if kind in names.takes]
    if kind not in ARCHITECTURES[architecture].takes:
        hint = f"Of a {kind} one of these can be made: {', '.join(fitting)}." if fitting else ""
        raise InputError(place, f"a {architecture} cannot be made of models of the type {kind}", hint)
    sliding = source.config.get("sliding_window") if kind == "mistral" else source.config.get("use_sliding_window")
    if sliding and not (kind == "mistral" and architecture == "mixtral"):
        problem = f"{source.name} attends to a sliding window, which a {architecture} does not do in the same way"
        raise InputError(place, problem, "Choose `mixtral` for a mistral; of others none is exact.")
    biases = [name for name in source.tensors if name.endswith(".bias")]
    bias = next((name for name in biases if ".o_proj." in name or ".mlp." in name), None)
    if bias is not None and not (architecture == "qwen3_moe" and ".o_proj." in bias):
        raise InputError(place, f"{source.name} has {bias}, which a {architecture} cannot represent")
    if architecture == "mixtral" and any(name.endswith("q_proj.bias") for name in biases):
        raise InputError(place, f"{source.name} has biases in attention, which a mixtral cannot represent")


def mixture_config(
    architecture: Architecture,
    source: Source,
    *,
    experts: int,
    top_k: int,
    normalised: bool,
    shared: bool,
    dtype: str,
) -> dict[str, Any]:
    """The config.json of a mixture of models like a source.

    Args:
        shared: whether the shared expert is as wide as a dense mlp; a required one that adds nothing is narrow if the
            architecture allows that.
        dtype: the dtype of the weights.
    """
    from evomerge.checkpoints.structure import parse_config  # imports transformers

    dense = parse_config(source.config, source.place).to_dict()  # with the defaults of its own architecture
    width = dense["intermediate_size"]
    config = {key: dense[key] for key in _COMMON if key in dense}
    config.setdefault("head_dim", dense["hidden_size"] // dense["num_attention_heads"])
    config |= {"model_type": architecture, "dtype": dtype, "num_experts_per_tok": top_k}
    config |= {"intermediate_size": width, "output_router_logits": False}
    config[ARCHITECTURES[architecture].count] = experts
    if architecture == "mixtral":
        return {**config, "architectures": ["MixtralForCausalLM"], "sliding_window": dense.get("sliding_window")}
    config |= {"moe_intermediate_size": width, "norm_topk_prob": normalised}
    if architecture == BIASED:
        config["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": 1.0}
        return {
            **config,
            "architectures": ["Glm4MoeForCausalLM"],
            "tie_word_embeddings": False,  # vLLM supports nothing else, and would use uninitialised memory
            "attention_bias": any(name.endswith("q_proj.bias") for name in source.tensors),
            "use_qk_norm": False,
            "partial_rotary_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "num_nextn_predict_layers": 0,
        }
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
    if architecture == "qwen2_moe":
        silent = min(_SILENT_WIDTH, width)
        config |= {"qkv_bias": True, "shared_expert_intermediate_size": width if shared else silent}
        return {**config, "architectures": ["Qwen2MoeForCausalLM"]}
    return {**config, "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": dense.get("attention_bias", False)}
