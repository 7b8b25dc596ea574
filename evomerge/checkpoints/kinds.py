"""Recognises models of kinds that cannot be merged, by their config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evomerge.errors import InputError

_MORE_THAN_TEXT = re.compile(r"(vision|visual|image|video|audio|speech|perceiver|qformer)\w*_config")
_WITH_IMAGES = frozenset({"vision_config", "perceiver_config", "audio_config"})
"""The parts that the configuration of a vision-language model may have beside its text model."""

_CLASSIFIER = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|RewardModel)$|RewardModel$")
_MASKED = re.compile(r"For(MaskedLM|PreTraining|NextSentencePrediction)$")
_MANY_INPUTS = re.compile(r"For(ConditionalGeneration|ImageTextToText|Vision2Seq|SpeechSeq2Seq|CTC)$")
_HINT = "Only language models that go on with a text, and those that read images among its tokens, can be merged here."


def check_kind(config: Mapping[str, Any], place: str) -> None:
    """Reject a model that is not a language model, or one with parts other than a text model and vision.

    Raises:
        InputError: naming the model's class and its purpose.
    """
    name = architecture(config)
    what = name or str(config.get("model_type"))
    more = sorted(key for key, value in config.items() if _MORE_THAN_TEXT.fullmatch(key) and value)
    sees = "vision_config" in more and _WITH_IMAGES.issuperset(more)
    if more and not sees:
        senses = ", ".join(dict.fromkeys(key.partition("_")[0] for key in more))
        problem = f"is a {what}, which takes more than text in ({senses}); such models are not supported"
    elif config.get("is_encoder_decoder") is True:
        problem = f"is a {what}, an encoder with a decoder; such models are not supported"
    elif _CLASSIFIER.search(name):
        problem = f"is a {what}, a classifier: it gives labels or scores to texts; such models are not supported"
    elif _MASKED.search(name):
        problem = f"is a {what}, which fills in words that are masked; such models are not supported"
    elif _MANY_INPUTS.search(name) and not sees:
        problem = f"is a {what}, which takes other input than a text to continue; such models are not supported"
    else:
        return
    raise InputError(place, problem, _HINT)


def headless(config: Mapping[str, Any], place: str) -> InputError | None:
    """The error for a model without a head, which cannot be merged; None if its class has one."""
    name = architecture(config)
    if not name.endswith("Model") or name.endswith(("LMHeadModel", "HeadsModel")):
        return None
    problem = f"is a {name}, a model without a head for the next word, as models for embeddings are; such models are"
    return InputError(place, f"{problem} not supported", _HINT)


def architecture(config: Mapping[str, Any]) -> str:
    """The name of the model's class; empty if config.json does not say."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
