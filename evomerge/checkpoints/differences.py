"""Differences between the configurations of sources in settings that change what a model computes.

A merge has one configuration, that of the tokenizer's source, so the weights of other sources run with settings that
they were not trained with. That may be intended, and often has little effect, but users should know about it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from evomerge.checkpoints.source import Source
from evomerge.printable import printable

_OF_IMAGES = re.compile(r"\.mrope_\w+$")
"""Settings of positions in images, which mean nothing for texts and are absent from text models."""

_EFFECTS: Mapping[str, str] = {
    r"rope|rotary|position|alibi": "its weights expect other positions, which matters more in longer texts",
    r"eps": "its norms were trained with another eps, which usually has a small effect",
    r"window|layer_types|chunk": "its attention was trained with another range",
    r"multiplier|scal|softcap|logit|pre_attn": "its layers were trained with another scale",
    r"hidden_act|act_fn|activation": "its layers were trained with another activation",
    r"expert|topk|top_k|moe|n_group|routed": "its experts were selected or weighted differently",
}


def differences(model: Source, other: Source) -> dict[str, tuple[str, str]]:
    """Computing settings in which two sources differ: the values of ``model`` and of ``other``, by key."""
    by_key = {}
    for key in {**model.computing, **other.computing}:
        mine, theirs = model.computing.get(key, "absent"), other.computing.get(key, "absent")
        # Lists by layer of different lengths are not compared; single layers are, where they are used.
        of_layers = key.partition(".")[0] in model.layered and model.layers != other.layers
        if mine != theirs and not of_layers and not (_OF_IMAGES.search(key) and "absent" in (mine, theirs)):
            by_key[key] = (mine, theirs)
    return by_key


def warnings_across(sources: Mapping[str, Source], tokenizer: str) -> list[str]:
    """Warnings about doubtful combinations of sources, as sentences.

    They name models that appear twice, and settings in which the merged model differs from a source, with the effect
    that this may have.

    Args:
        tokenizer: the source whose configuration the merged model gets.
    """
    model = sources[tokenizer]
    return _twice(sources) + [
        f"{name}: {printable(key, 100)} is {printable(theirs, 40)}, but {printable(mine, 40)} in {tokenizer}, whose "
        f"configuration the merged model gets: {_effect(key)}"
        for name, source in sources.items()
        for key, (mine, theirs) in differences(model, source).items()
    ]


def _twice(sources: Mapping[str, Source]) -> list[str]:
    """Warnings about sources that are the same files."""
    names: dict[frozenset[str], str] = {}
    sentences = []
    for name, source in sources.items():
        first = names.setdefault(frozenset(os.path.realpath(file) for file in source.files), name)
        if first != name:
            sentences.append(f"{first} and {name} are the same model ({source.reference}): merging both adds nothing")
    return sentences


def _effect(key: str) -> str:
    return next(
        (effect for pattern, effect in _EFFECTS.items() if re.search(pattern, key)),
        "its weights may compute something else with it",
    )
