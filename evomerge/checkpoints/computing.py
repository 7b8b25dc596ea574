"""The settings of a configuration that change what a model computes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

_COMPUTES_NOTHING = re.compile(
    r"_.*|architectures|model_type|transformers_version|torch_dtype|dtype|vocab_size|tie_word_embeddings"
    r"|use_cache|return_dict.*|output_.*|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|chunk_size_feed_forward|is_decoder|is_encoder_decoder|\w*cross_attention\w*|.*_token_ids?"
    r"|.*drop(out)?(_p|_prob|_rate|_ratio)?|.*pdrop|init_.*|initializer_.*|.*_init(_scale|_std|_range)?|summary_.*"
    r"|\w*(aux|z)_loss\w*|router_jitter_noise|pretraining_tp|slow_but_exact|attn_implementation|experts_implementation"
    r"|max_window_layers|use_sliding_window|reorder_and_upcast_attn|tokenizer_class|prefix|name_or_path|rope_theta"
    r"|rope_scaling|ignore_keys_at_rope_validation|base_model_\w+_plan|num_(nextn_predict|mtp)_layers"
    r"|num_logits_to_keep|use_(associative_scan|mambapy|mamba_kernels)|rescale_\w+|time_step_(floor|init_scheme|max|min)"
    r"|no_rope_layer_interval|interleave_moe_layer_step|full_attn_idxs|sliding_window_pattern|lambda_std_dev"
)
"""Settings that do not affect a model's output for a text, or that repeat another setting."""

_LENGTHS = re.compile(r"max_position_embeddings|n_positions|max_seq_len|seq_length|context_length")


def computing_settings(parsed: Any, depth: str) -> dict[str, str]:
    """The settings of a transformers configuration that change what the model computes, as JSON texts by their keys.

    Keys of nested dictionaries are joined (``rope_parameters.rope_theta``). Settings that the class of the
    configuration does not know are left out, and so is the number of layers, whose key is ``depth``.
    """
    known = {field.name for field in dataclasses.fields(type(parsed))}
    flat: dict[str, str] = {}
    for key, value in parsed.to_dict().items():
        if key in known and key != depth:
            flat |= dict(_flat(key, value))
    default_rope = flat.get("rope_parameters.rope_type") in (None, '"default"')
    return {key: text for key, text in flat.items() if not (default_rope and _LENGTHS.fullmatch(key))}


def image_settings(parsed: Any) -> dict[str, str]:
    """The same outside the text model, for a model that reads images: the number of tokens per image, for example."""
    known = {field.name for field in dataclasses.fields(type(parsed))} - {"text_config"}
    flat: dict[str, str] = {}
    for key, value in parsed.to_dict().items():
        if key in known:
            flat |= dict(_flat(key, value))
    return flat


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if _COMPUTES_NOTHING.fullmatch(key.rpartition(".")[2]) and not key.startswith("rope_parameters."):
        return
    if isinstance(value, dict) and value:
        for inner, content in value.items():
            yield from _flat(f"{key}.{inner}", content)
    else:
        whole = isinstance(value, float) and value.is_integer()  # 10000 and 10000.0 are one number
        yield key, json.dumps(int(value) if whole else value, default=str)
