"""Processes a text and its pictures with a model's processor: tokens, and the model inputs for the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError
from evomerge.inference.media import IMAGE, Media
from evomerge.inference.pictures import decoded

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ("token_type_ids", "mm_token_type_ids")
"""The kind of each token, for models with such an input."""

_TEXTS = ("input_ids", "attention_mask", *TYPES)


@dataclass(frozen=True)
class Processed:
    """A text and its pictures after processing.

    Attributes:
        ids: the tokens; each picture has as many as the model uses for it.
        types: the kind of each token, for models that need it, by the name of that input.
        pictures: all other inputs, by name: pixels, sizes, grids.
    """

    ids: list[int]
    types: Mapping[str, list[int]]
    pictures: Mapping[str, Tensor]


def processed(processor: Any, text: str, media: Sequence[Media], start: Sequence[int], place: str) -> Processed:
    """Process text and pictures with a model's own processor.

    Args:
        processor: as loaded by transformers; None for a text model.
        start: the tokens that every text begins with; some processors put them after the pictures.

    Raises:
        InputError: the model cannot read pictures, ``IMAGE`` does not occur once per picture, or one cannot be read.
    """
    if processor is None:
        problem = "shows the model a picture, and this model reads only text"
        raise InputError(place, problem, "Take the tokenizer of a source that has a vision tower (`tokenizer:`).")
    own = placeholder(processor)
    text = text.replace(IMAGE, own)
    if text.count(own) != len(media):
        problem = f"its prompt says {IMAGE} {text.count(own)} times, and has {len(media)} pictures"
        raise InputError(place, problem, f"Write {IMAGE} once where each picture stands.")
    images = [decoded(one, place) for one in media]
    try:
        made = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
    except Exception as error:  # a processor may be custom code and raise anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(place, f"the model's processor cannot take its pictures ({said})") from error
    ids: list[int] = made["input_ids"][0].tolist()
    types = {name: made[name][0].tolist() for name in TYPES if name in made}
    start = [] if any(ids[at : at + len(start)] == list(start) for at in range(len(ids))) else start
    pictures = {name: value for name, value in made.items() if name not in _TEXTS}
    return Processed([*start, *ids], {name: [*[0] * len(start), *kinds] for name, kinds in types.items()}, pictures)


def placeholder(processor: Any) -> str:
    """The placeholder for a picture in texts for a processor."""
    return str(getattr(processor, "image_token", None) or IMAGE)
