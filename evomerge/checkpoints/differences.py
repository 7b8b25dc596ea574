"""What configurations say differently of weights of equal shapes: settings that change what a model computes.

A merge has one configuration, that of the tokenizer's source, so weights of the others are run by settings that they
were not trained with. That can be meant, and often does little; nobody should do it unknowingly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from evomerge.checkpoints.source import Source
from evomerge.printable import printable

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


def _effect(key: str) -> str:
    return next(
        (said for pattern, said in _EFFECTS.items() if re.search(pattern, key)),
        "its weights may compute something else by it",
    )
