"""Pictures among a model's tokens: computes the text decoder's input for them from files, once per item.

A vision model turns every picture into vectors of the text decoder's width, its image tokens, with a tower and a
projector. While a search merges only language models, both are the same for every candidate, and so are the tokens:
they are computed when an item is first used, one item at a time, so that they do not depend on other items in a batch.
They are passed in place of pixels as what transformers calls ``mm_encoder_outputs``, so that positions, masks and
additions in later layers are left to the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from evomerge.inference.nested import flat, joined, mapped, unflat
from evomerge.inference.processing import TYPES, processed
from evomerge.inference.reading import Prompt, Reader, special_tokens
from evomerge.inference.tower import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.checkpoints.live import LiveModel

_TEXT_KIND = {"paligemma": 1}
"""The kind of tokens that attend only to earlier ones, if not 0: here 0 is a prompt that attends to its whole self."""

MAX_BYTES = 1 << 30
"""The maximum bytes of image tokens that a process keeps in memory."""

_OUTPUTS = ("pooler_output", "deepstack_features")
"""The part of a tower's output that forward passes use; hidden states would be far larger."""


class Kept(Protocol):
    """The cache of image tokens for all processes of a search: ``evomerge.merging.measured.evidence.Evidence``."""

    def get(
        self, kind: str, follows_from: tuple[Any, ...], compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]: ...

    def recurs(self, kind: str, place: Any, follows_from: tuple[Any, ...]) -> bool: ...


# ---- decoder inputs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureInputs:
    """The inputs of a model for the pictures of one prompt.

    Attributes:
        outputs: outputs of tower and projector, by name: nested lists of tensors, or one tensor, as the model has them.
        beside: other inputs for the pictures in a forward pass, such as grids.
        types: the kind of each token, int64 [tokens], for models that need it, by the name of that input.
    """

    outputs: Mapping[str, Any]
    beside: Mapping[str, Tensor]
    types: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in flat(self.outputs))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        parts = {"outputs": self.outputs, "beside": self.beside, "types": self.types}
        return {name: tensor.contiguous() for name, tensor in flat(parts)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PictureInputs:
        """The inverse of ``tensors``."""
        parts = unflat(tensors)
        return cls(parts["outputs"], parts.get("beside", {}), parts.get("types", {}))


class ImageTokens:
    """The image tokens of prompts for one live model, cached while its tower and projector are unchanged.

    Args:
        live: the live model.
        kept: where they are stored when memory is full; None for nowhere.
    """

    def __init__(self, live: LiveModel, kept: Kept | None = None) -> None:
        self._model, self._reader, self._kept = live.model, Reader.of(live), kept
        self._tower: str | None = None
        self._shown: dict[object, PictureInputs] = {}
        self._bytes, self._is_lasting = 0, False
        self.computed = 0  # number of tower runs, for tests and benchmarks

    def refresh(self, kept: Kept | None) -> None:
        """Check tower and projector, and discard what was computed with different ones."""
        tower = fingerprint(self._model)
        self._kept = kept
        self._is_lasting = tower is not None and kept is not None and kept.recurs("image tokens", "tower", (tower,))
        if tower is None or tower != self._tower:
            self._shown.clear()
            self._bytes = 0
        self._tower = tower

    def of(self, prompt: Prompt) -> PictureInputs:
        """The inputs for one prompt.

        Raises:
            InputError: a picture has changed since its prompt was made.
        """
        if self._tower is None or not all(media.sha256 for media in prompt.media):  # the content is unknown
            return self._compute(prompt)
        key = _key(prompt)
        if key in self._shown:
            return self._shown[key]
        if self._bytes >= MAX_BYTES:
            return self._spilled(prompt)
        shown = self._shown[key] = self._compute(prompt)
        self._bytes += shown.nbytes
        return shown

    def _spilled(self, prompt: Prompt) -> PictureInputs:
        """The same from the search's evidence, but only if the same tower was used before, to save disk space."""
        if self._kept is None or not self._is_lasting:
            return self._compute(prompt)
        follows_from = (self._tower, repr(self._reader.processor), *_key(prompt))
        return PictureInputs.of(self._kept.get("image tokens 1", follows_from, lambda: self._compute(prompt).tensors()))

    def _compute(self, prompt: Prompt) -> PictureInputs:
        import torch

        text = prompt.text if not prompt.scored else prompt.text.rstrip()
        start, _ = special_tokens(self._reader.tokenizer)
        made = processed(self._reader.processor, text, prompt.media, start, prompt.place)
        features = self._model.base_model.get_image_features
        wanted = inspect.signature(features).parameters
        inputs = {name: self._placed(value) for name, value in made.pictures.items() if name in wanted}
        self.computed += 1
        with torch.inference_mode():
            out = features(**inputs, return_dict=True)
        outputs = {name: mapped(out[name], _on_cpu) for name in _OUTPUTS if out.get(name) is not None}
        taken = inspect.signature(self._model.forward).parameters
        beside = {n: v for n, v in made.pictures.items() if n in taken and not n.startswith("pixel")}
        types = {name: torch.tensor(kinds) for name, kinds in made.types.items() if name in taken}
        return PictureInputs(outputs, beside, types)

    def _placed(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        device = self._reader.device or self._model.device
        return value.to(device, self._model.dtype if value.is_floating_point() else None)


_tokens: WeakKeyDictionary[Any, ImageTokens] = WeakKeyDictionary()


def image_tokens(live: LiveModel, kept: Kept | None) -> ImageTokens:
    """The image tokens of a live model, which exist as long as it does, for its current tower and projector."""
    if live.model not in _tokens:
        _tokens[live.model] = ImageTokens(live)
    tokens = _tokens[live.model]
    tokens.refresh(kept)
    return tokens


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _key(prompt: Prompt) -> tuple[str, ...]:
    return (prompt.text if not prompt.scored else prompt.text.rstrip(), *(media.sha256 for media in prompt.media))


# ---- rows of a batch -----------------------------------------------------------------------------------------------


class PictureRows:
    """The pictures in the rows of batches: for each prompt its pictures, or nothing."""

    def __init__(self, tokens: ImageTokens | None, prompts: Sequence[Prompt]) -> None:
        self._tokens, self._prompts = tokens, prompts

    def __bool__(self) -> bool:
        return self._tokens is not None and any(prompt.media for prompt in self._prompts)

    def text_before(self, number: int, image_token: int) -> int:
        """How many tokens of a prompt precede its first picture; all of them if there is none."""
        ids = self._prompts[number].fed
        if not self._prompts[number].media:
            return len(ids)
        return next((place for place, token in enumerate(ids) if token == image_token), 0)

    def inputs(self, model: Any, numbers: Sequence[int], width: int, *, right: bool = False) -> dict[str, Any]:
        """The inputs of a forward pass over the rows of these prompts, in addition to their tokens.

        Args:
            width: the width of the batch in tokens, to which the kinds of tokens are padded.
            right: padding is on the right.
        """
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        shown = [(n, self._tokens.of(self._prompts[n])) for n in numbers if self._tokens and self._prompts[n].media]
        if not shown:
            return {}
        outputs = {name: joined([one.outputs[name] for _, one in shown]) for name in shown[0][1].outputs}
        out = BaseModelOutputWithPooling()
        for name, value in outputs.items():
            setattr(out, name, mapped(value, lambda tensor: tensor.to(model.device, model.dtype)))
        beside = {name: torch.cat([one.beside[name] for _, one in shown]) for name in shown[0][1].beside}
        own, text = dict(shown), _TEXT_KIND.get(model.config.model_type, 0)
        types = {
            name: torch.stack([_padded(own[n].types[name] if n in own else None, text, width, right) for n in numbers])
            for name in shown[0][1].types
        }
        sent = {name: value.to(model.device) for name, value in {**beside, **types}.items()}
        return {"mm_encoder_outputs": {"image": out}, **sent}


def reads_in_order(model: Any) -> bool:
    """Whether the decoder treats image tokens like any others, each at the next position, with causal attention.

    This is not so if pictures have two-dimensional positions (Qwen-VL) or attend to themselves (Gemma, PaliGemma).
    """
    taken = inspect.signature(model.forward).parameters
    base = model.base_model
    in_a_plane = hasattr(base, "get_rope_index") or hasattr(base, "compute_3d_position_ids")
    return "mm_encoder_outputs" in taken and not in_a_plane and not any(name in taken for name in TYPES)


def _padded(kinds: Tensor | None, text: int, width: int, right: bool) -> Tensor:
    """int64 [width]: the kinds of a prompt's tokens, padded with kind ``text``, as for the tokens of an answer."""
    import torch

    row = torch.full((width,), text)
    if kinds is not None:
        place = slice(0, len(kinds)) if right else slice(width - len(kinds), width)
        row[place] = kinds
    return row
