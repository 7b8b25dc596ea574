"""Which modules of a layer write to the residual stream, so that the layer's contribution can be scaled.

A block ends in a linear map to the width of the stream, and scaling its output is the same as scaling its weight and
bias. In some architectures, the output of a block passes through a norm before it is added; then that norm writes.
Names of modules do not tell which, nor whether a block adds to the stream itself (MiniMax has the modules of Mixtral,
but adds to the norm's output). So there are lists of architectures by model type, and the tests check every statement
here for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from evomerge.checkpoints.parts import Fold
from evomerge.checkpoints.roles import inside_layer


@dataclass(frozen=True)
class Writers:
    """Where a layer writes to the residual stream.

    Attributes:
        modules: names inside the layer. The output of each (if it is a tuple, the first element) is added to the
            stream, and scaling all of these outputs by f scales everything that the layer adds.
        tensors: names inside the layer of the tensors into which a factor is folded, and how. A plain layer with these
            tensors computes the same as the layer with scaled outputs.
        normed: every block reads the stream through a norm and adds to the stream itself. Then scaling the stream by
            s > 0 before the layer and by 1 / s after it has the same effect as the factor 1 / s, up to the norms' eps.
    """

    modules: tuple[str, ...]
    tensors: Mapping[str, Fold]
    normed: bool


@dataclass(frozen=True)
class _PostNorms:
    """Norms through which blocks write, how a factor folds into them, and whether blocks also read through norms."""

    names: tuple[str, str]
    fold: Fold
    normed: bool


_GEMMA = _PostNorms(("post_attention_layernorm", "post_feedforward_layernorm"), "shifted", normed=True)
_OLMO = _PostNorms(("post_attention_layernorm", "post_feedforward_layernorm"), "times", normed=False)

POST_NORMED: Mapping[str, _PostNorms] = {
    "afmoe": _PostNorms(("post_attention_layernorm", "post_mlp_layernorm"), "times", normed=True),
    "exaone4": _OLMO,
    "flex_olmo": _OLMO,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4": _PostNorms(("post_self_attn_layernorm", "post_mlp_layernorm"), "times", normed=True),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
}
"""Model types whose blocks write through a norm after them."""

DIRECT = frozenset({
    "apertus", "arcee", "biogpt", "bloom", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3",
    "diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "falcon", "gemma", "glm", "glm4_moe", "gpt2",
    "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2", "lfm2_moe", "llama", "llama4_text", "minimax_m2",
    "ministral", "ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron", "olmo", "olmoe", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma",
})  # fmt: skip
"""Model types in which the last linear map of a block writes."""

_OUTPUTS = frozenset({
    "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "fc_out", "o_proj", "out_proj", "output_linear", "w2",
})  # fmt: skip
"""Names of a block's last linear map."""


def residual_writers(layer: nn.Module, model_type: str, config: Any) -> Writers | None:
    """Where a layer writes, from its modules and names alone, so it may be on the meta device.

    Layers of one model may differ (dense and with experts, attention of several kinds), so each is examined itself.

    Args:
        layer: an element of the model's stack.
        model_type: of the configuration, such as "qwen2".
        config: the configuration of the model that holds the layer.

    Returns:
        None if the architecture is not known, or the layer does not have the modules of its architecture.
    """
    if model_type in POST_NORMED:
        return _through_norms(layer, POST_NORMED[model_type])
    # BLOOM has a setting with which it multiplies by pieces of the weight without calling the module.
    if model_type not in DIRECT or (getattr(config, "slow_but_exact", False) and config.pretraining_tp > 1):
        return None
    modules: list[str] = []
    tensors: list[str] = []
    for block, names in _blocks(layer).items():
        outputs = [name for name in names if _map_name(name) in _OUTPUTS]
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in outputs))
        if block and _has_experts(layer.get_submodule(block)):  # experts are one tensor, and have no modules
            owners = [block]
        if not outputs or len(owners) != 1:
            return None
        modules += owners
        tensors += outputs
    return Writers(tuple(modules), dict.fromkeys(tensors, "times"), _is_normed(model_type, config)) if modules else None


def _through_norms(layer: nn.Module, norms: _PostNorms) -> Writers | None:
    modules = dict(layer.named_children())
    if any(name not in modules for name in norms.names):
        return None
    tensors = [f"{name}.{tensor}" for name in norms.names for tensor, _ in modules[name].named_parameters()]
    return Writers(norms.names, dict.fromkeys(tensors, norms.fold), norms.normed)


def _is_normed(model_type: str, config: Any) -> bool:
    if model_type == "opt":
        return bool(config.do_layer_norm_before)
    if model_type == "bloom":
        return not config.apply_residual_connection_post_layernorm
    return True


def _blocks(layer: nn.Module) -> dict[str, list[str]]:
    """The tensors of each block, by the block's name; linear maps of the layer itself, as in OPT, are the block ""."""
    children = dict(layer.named_children())
    blocks: dict[str, list[str]] = {}
    for name, _ in layer.named_parameters():
        if inside_layer(layer, name) != "norm":
            top = name.partition(".")[0]
            inside = dict(children.get(top, nn.Identity()).named_children())
            blocks.setdefault(top if inside else "", []).append(name)
    return blocks


def _has_experts(block: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in block.named_modules())


def _map_name(tensor: str) -> str:
    """The name of a tensor's linear map: ``fc2`` for ``mlp.fc2.bias`` and for ``mlp.experts.fc2_bias``."""
    owner, _, own = tensor.rpartition(".")
    return owner.rpartition(".")[2] if own in ("weight", "bias") else own.removesuffix("_bias")
