"""Converts texts to the token ids that a model is given. All evaluators and engines use this.

Special tokens are handled only here. A text begins with the tokens that the tokenizer puts at the start of texts, once:
if the text already contains them, as every rendered chat prompt of Llama 3 or Gemma does, they are not added again.
Tokens that the tokenizer would put at the end of a text are omitted, because the model is to continue from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from evomerge.errors import InputError
from evomerge.inference.media import Media
from evomerge.inference.processing import processed

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel

_PROBES = ("a", "0", "the", ".")


@dataclass(frozen=True)
class Prompt:
    """An input of a model, which then writes an answer or has a given answer scored.

    Attributes:
        text: the prompt, rendered.
        answer: what is scored after it; empty if the model writes the answer.
        ids: all tokens, including those that do not fit.
        scored: how many of the last tokens belong to the answer.
        room: how many of the last tokens the model can be given; None for all.
        place: where the item was read, for messages.
        media: the pictures, in the order of ``IMAGE`` in the text. Each picture takes up as many tokens as the model
            uses for it.
    """

    text: str
    answer: str
    ids: Sequence[int]
    scored: int
    room: int | None
    place: str
    media: tuple[Media, ...] = ()

    @property
    def unread(self) -> int:
        """How many tokens at the end are not fed in: nothing is predicted after the last token of an answer."""
        return 1 if self.scored else 0

    @property
    def lost(self) -> int:
        """How many tokens at the beginning do not fit."""
        return 0 if self.room is None else max(0, len(self.ids) - self.room)

    @property
    def fed(self) -> Sequence[int]:
        """The tokens that fit: a prompt that is too long is truncated at the beginning."""
        return self.ids[self.lost :]


@dataclass(frozen=True)
class Reader:
    """The properties of a model that determine how it reads texts.

    Attributes:
        tokenizer: as loaded by transformers; None for a table of tensors.
        context: the maximum number of tokens of prompt and answer; None if unlimited.
        embeddings: the size of its embedding, in tokens; None if not known yet.
        generation: its generation settings that differ from transformers' defaults; None before there is a model.
        device: the device that it runs on; None before there is a model.
        processor_of: loads the processor for text and pictures, once; None for a text model.
    """

    tokenizer: Any
    context: int | None
    embeddings: int | None = None
    generation: Mapping[str, Any] | None = None
    device: torch.device | None = None
    processor_of: Callable[[], Any] | None = None

    @classmethod
    def of(cls, live: LiveModel) -> Reader:
        """The reader of a live model; a table of tensors reads nothing."""
        if live.tokenizer is None:
            return cls(None, None, device=live.device)
        rows: int = live.model.get_input_embeddings().weight.shape[0]
        context = getattr(live.model.config.get_text_config(), "max_position_embeddings", None)
        settings = live.model.generation_config.to_diff_dict()
        return cls(live.tokenizer, context, rows, settings, live.device, live.processor_of)

    @property
    def processor(self) -> Any:
        """The processor for text and pictures, as loaded by transformers; None for a text model.

        Raises:
            InputError: the model's folder has none, or it cannot be loaded.
        """
        return None if self.processor_of is None else self.processor_of()

    @property
    def templates(self) -> Any:
        """The object with the chat template: the processor, if it has its own. Raises like ``processor``."""
        return self.tokenizer if getattr(self.processor, "chat_template", None) is None else self.processor

    def prompt(self, text: str, most: int, place: str, media: tuple[Media, ...] = ()) -> Prompt:
        """A text that the model answers with up to ``most`` tokens.

        Args:
            media: the pictures that ``IMAGE`` stands for in the text, in order.

        Raises:
            InputError: it has no tokens, the context has no room for the answer, or the model lacks one of its tokens;
                the model cannot read pictures, one cannot be read, or they do not fit.
        """
        ids = self._encoded(text, media, place)
        if not ids:
            problem = f"its prompt {text!r} has no tokens to start an answer from"
            raise InputError(place, problem, "Write something there.")
        self.check_known(ids, place)
        if self.context is not None and self.context <= most:
            problem = f"is {most}, but prompt and answer together may have {self.context} tokens"
            raise InputError("max_new_tokens", problem, "Lower it.")
        prompt = Prompt(text, "", ids, 0, None if self.context is None else self.context - most, place, media)
        return _whole(prompt)

    def pair(self, text: str, answer: str, place: str, media: tuple[Media, ...] = ()) -> Prompt:
        """A text and an answer that is scored after it.

        Args:
            media: as for ``prompt``.

        Raises:
            InputError: the answer has no tokens or more than the context, or the model lacks one of its tokens; the
                model cannot read pictures, one cannot be read, or they do not fit.
        """
        before, after = encode_pair(self.tokenizer, text, answer)
        if media:  # the tokens at the boundary do not depend on the number of tokens of a picture
            before = self._encoded(text.rstrip(), media, place)
        if not after:
            raise InputError(place, f"its answer {answer!r} adds no token to those of its prompt", "Leave it out.")
        self.check_known([*before, *after], place)
        if self.context is not None and len(after) > self.context:
            problem = f"its answer is {len(after)} tokens long, and prompt and answer may have {self.context}"
            raise InputError(place, problem, "Shorten the item or leave it out.")
        # Nothing is predicted after the last token, so it is not fed in.
        room = None if self.context is None else self.context + 1
        return _whole(Prompt(text, answer, [*before, *after], len(after), room, place, media))

    def _encoded(self, text: str, media: tuple[Media, ...], place: str) -> list[int]:
        if not media:
            return encode(self.tokenizer, text)
        start, _ = special_tokens(self.tokenizer)
        return processed(self.processor, text, media, start, place).ids

    def check_known(self, ids: Sequence[int], place: str) -> None:
        """Reject tokens that the model has no embedding for."""
        if self.embeddings is not None and (highest := max(ids, default=0)) >= self.embeddings:
            shown = self.tokenizer.decode([highest])
            problem = f"the tokenizer gives token {highest} ({shown!r}), and the model has {self.embeddings} embeddings"
            raise InputError(place, problem, "Take the tokenizer of a source that has all of its tokens.")


def _whole(prompt: Prompt) -> Prompt:
    """The prompt; rejected if truncation would remove a part of a picture."""
    if prompt.media and prompt.lost:
        tokens, room = len(prompt.ids) - prompt.unread, (prompt.room or 0) - prompt.unread
        problem = f"has {tokens:,} tokens with its pictures, and there is room for {room:,}"
        raise InputError(prompt.place, problem, "Shorten the text, show fewer pictures, or raise `max_length`.")
    return prompt


# ---- tokens ----------------------------------------------------------------------------------------------------------

_Added = tuple[list[int], list[int]]
_added: WeakKeyDictionary[Any, _Added] = WeakKeyDictionary()


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that the model continues: the tokenizer's start tokens once, and no end token."""
    start, _ = special_tokens(tokenizer)
    ids = encode_plain(tokenizer, text)
    return ids if ids[: len(start)] == start else [*start, *ids]


def encode_whole(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a complete text: also with the tokenizer's end tokens, once."""
    _, end = special_tokens(tokenizer)
    ids = encode(tokenizer, text)
    return ids if not end or ids[-len(end) :] == end else [*ids, *end]


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with no special tokens except those written in it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def first_token(tokenizer: Any) -> int:
    """The token before the first token of a text without a prompt, as in lm-eval."""
    token: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its continuation, split as in lm-eval.

    Trailing spaces of a prompt move to the answer, whose tokens are those that the whole text has in addition. A token
    that spans the boundary counts as the prompt's.
    """
    before = prompt.rstrip()
    after = prompt[len(before) :] + answer
    if before:
        start = encode(tokenizer, before)
        return start, encode(tokenizer, before + after)[len(start) :]
    first, (start, _) = first_token(tokenizer), special_tokens(tokenizer)
    start = start if start[-1:] == [first] else [first]  # as if after an empty prompt
    ids = encode_plain(tokenizer, after)
    return start, ids[1:] if ids[:1] == [first] else ids


def special_tokens(tokenizer: Any) -> _Added:
    """The tokens that a tokenizer puts before and after every text."""
    if tokenizer not in _added:
        _added[tokenizer] = _probe(tokenizer)
    return _added[tokenizer]


def _probe(tokenizer: Any) -> _Added:
    for text in (*_PROBES, *itertools.islice(tokenizer.get_vocab(), 100)):
        plain = encode_plain(tokenizer, text)
        whole: list[int] = tokenizer.encode(text, verbose=False)
        for begin in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[begin : begin + len(plain)] == plain:
                return whole[:begin], whole[begin + len(plain) :]
    return [], []
