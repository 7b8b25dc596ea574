"""What configurations say differently of weights of equal shapes: settings that change what a model computes.

A merge has one configuration, that of the tokenizer's source, so weights of the others are run by settings that they
were not trained with. That can be meant, and often does little; nobody should do it unknowingly.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from evomerge.printable import printable

if TYPE_CHECKING:
    from evomerge.checkpoints.source import Source

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
"""Settings that say nothing of what a model gives for a text, or say again what another one says."""

_LENGTHS = re.compile(r"max_position_embeddings|n_positions|max_seq_len|seq_length|context_length")

_OF_IMAGES = re.compile(r"\.mrope_\w+$")
"""Settings that say of positions in images what is the same in texts, where a model of texts alone says nothing."""

_EFFECTS: Mapping[str, str] = {
    r"rope|rotary|position|alibi": "its weights expect other positions, which shows the more the longer a text is",
    r"eps": "its norms were trained to divide by a little more or less, which mostly is a small effect",
    r"window|layer_types|chunk": "its attention was trained to reach less or more far back",
    r"multiplier|scal|softcap|logit|pre_attn": "what its layers compute was multiplied by another number",
    r"hidden_act|act_fn|activation": "its layers were trained with another activation",
    r"expert|topk|top_k|moe|n_group|routed": "its experts were chosen or weighed otherwise",
}


def computing_settings(parsed: Any, depth: str) -> dict[str, str]:
    """The settings of a transformers configuration that change what the model computes, as JSON texts by their keys.

    Keys of dictionaries are taken by themselves (``rope_parameters.rope_theta``). Left out are settings that its class
    does not know, and the number of layers, whose key is ``depth``.
    """
    known = {field.name for field in dataclasses.fields(type(parsed))}
    flat: dict[str, str] = {}
    for key, value in parsed.to_dict().items():
        if key in known and key != depth:
            flat |= dict(_flat(key, value))
    turned_plainly = flat.get("rope_parameters.rope_type") in (None, '"default"')
    return {key: text for key, text in flat.items() if not (turned_plainly and _LENGTHS.fullmatch(key))}


def seeing_settings(parsed: Any) -> dict[str, str]:
    """The same of what stands beside the text model of one that reads images: how many tokens an image becomes, say."""
    known = {field.name for field in dataclasses.fields(type(parsed))} - {"text_config"}
    flat: dict[str, str] = {}
    for key, value in parsed.to_dict().items():
        if key in known:
            flat |= dict(_flat(key, value))
    return flat


def differences(model: Source, other: Source) -> dict[str, tuple[str, str]]:
    """Settings that change what is computed in which two sources differ: values of ``model`` and ``other`` by key."""
    by_key = {}
    for key in {**model.computing, **other.computing}:
        mine, theirs = model.computing.get(key, "absent"), other.computing.get(key, "absent")
        # What is said of single layers cannot be compared where there are more of them; layers are, in their places.
        of_layers = key.partition(".")[0] in model.layered and model.layers != other.layers
        if mine != theirs and not of_layers and not (_OF_IMAGES.search(key) and "absent" in (mine, theirs)):
            by_key[key] = (mine, theirs)
    return by_key


def warnings_across(sources: Mapping[str, Source], tokenizer: str) -> list[str]:
    """Sentences on what is doubtful of sources side by side.

    These are models that are there twice, and settings that a merged model has otherwise than a source, with what that
    may do.

    Args:
        tokenizer: the source that gives the configuration of what is merged.
    """
    model = sources[tokenizer]
    return _twice(sources) + [
        f"{name}: {printable(key, 100)} is {printable(theirs, 40)}, but {printable(mine, 40)} in {tokenizer}, which "
        f"gives what is merged its configuration: {_effect(key)}"
        for name, source in sources.items()
        for key, (mine, theirs) in differences(model, source).items()
    ]


def _twice(sources: Mapping[str, Source]) -> list[str]:
    """Which sources are the very same files."""
    names: dict[frozenset[str], str] = {}
    sentences = []
    for name, source in sources.items():
        first = names.setdefault(frozenset(os.path.realpath(file) for file in source.files), name)
        if first != name:
            sentences.append(f"{first} and {name} are the same model ({source.reference}): merging both adds nothing")
    return sentences


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if _COMPUTES_NOTHING.fullmatch(key.rpartition(".")[2]) and not key.startswith("rope_parameters."):
        return
    if isinstance(value, dict) and value:
        for inner, content in value.items():
            yield from _flat(f"{key}.{inner}", content)
    else:
        whole = isinstance(value, float) and value.is_integer()  # 10000 and 10000.0 are one number
        yield key, json.dumps(int(value) if whole else value, default=str)


def _effect(key: str) -> str:
    return next(
        (said for pattern, said in _EFFECTS.items() if re.search(pattern, key)),
        "its weights may compute something else by it",
    )
