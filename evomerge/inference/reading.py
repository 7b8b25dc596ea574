"""How a model reads: from a text to the token ids that it is given. All evaluators and engines use this.

Special tokens are decided on here and nowhere else. A text begins with the tokens that the tokenizer puts at the start
of texts, once: a text that says them itself, as every rendered chat prompt of Llama 3 or Gemma does, gets no second
ones. What the tokenizer would put at the end of a text is left out, because the model is to go on from there.
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
    """What a model is given, for it to write an answer or to have one scored.

    Attributes:
        text: the prompt, rendered.
        answer: what is scored after it; empty where the model writes the answer.
        ids: all tokens, also those that have no room.
        scored: how many of the last are the answer's.
        room: how many of the last tokens the model can be given; None for all.
        place: where the item was read, for people.
        media: what the model is shown beside the text, in the order in which ``IMAGE`` stands there. Among the tokens
            each picture has as many places as the model gives it.
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
        """How many tokens at the end the model is not given: after the last of an answer nothing is predicted."""
        return 1 if self.scored else 0

    @property
    def lost(self) -> int:
        """How many tokens at the beginning have no room."""
        return 0 if self.room is None else max(0, len(self.ids) - self.room)

    @property
    def fed(self) -> Sequence[int]:
        """The tokens that have room: a prompt that is too long loses its beginning."""
        return self.ids[self.lost :]


@dataclass(frozen=True)
class Reader:
    """What of a model decides on how it reads texts.

    Attributes:
        tokenizer: as transformers loads it; None of a table of tensors.
        context: most tokens of prompt and answer; None for no bound.
        embeddings: how many tokens it knows; None where that is not known yet.
        generation: its generation settings that are not transformers' own; None where there is no model yet.
        device: where it computes; None where there is no model yet.
        processor_of: opens what makes a model's inputs of text and pictures, once; None of a model that reads text
            alone.
    """

    tokenizer: Any
    context: int | None
    embeddings: int | None = None
    generation: Mapping[str, Any] | None = None
    device: torch.device | None = None
    processor_of: Callable[[], Any] | None = None

    @classmethod
    def of(cls, live: LiveModel) -> Reader:
        """That of a live model; a table of tensors reads nothing."""
        if live.tokenizer is None:
            return cls(None, None, device=live.device)
        rows: int = live.model.get_input_embeddings().weight.shape[0]
        context = getattr(live.model.config.get_text_config(), "max_position_embeddings", None)
        settings = live.model.generation_config.to_diff_dict()
        return cls(live.tokenizer, context, rows, settings, live.device, live.processor_of)

    @property
    def processor(self) -> Any:
        """What makes a model's inputs of text and pictures, as transformers loads it; None of a model of texts.

        Raises:
            InputError: there is none in the model's folder, or none that can be loaded.
        """
        return None if self.processor_of is None else self.processor_of()

    @property
    def templates(self) -> Any:
        """What has the chat template: the processor, where it has one of its own. Raises as ``processor``."""
        return self.tokenizer if getattr(self.processor, "chat_template", None) is None else self.processor

    def prompt(self, text: str, most: int, place: str, media: tuple[Media, ...] = ()) -> Prompt:
        """A text that the model answers with up to ``most`` tokens.

        Args:
            media: the pictures that ``IMAGE`` stands for in the text, in order.

        Raises:
            InputError: it has no tokens, the context has no room for the answer, or a token is none of the model's; the
                model reads no pictures, one cannot be read, or they do not fit.
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
            media: as of ``prompt``.

        Raises:
            InputError: the answer has no tokens or more than the context, or a token is none of the model's; the model
                reads no pictures, one cannot be read, or they do not fit.
        """
        before, after = encode_pair(self.tokenizer, text, answer)
        if media:  # the tokens of the border are the same, however many tokens a picture has
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
        """Refuse tokens that the model has no embedding for."""
        if self.embeddings is not None and (highest := max(ids, default=0)) >= self.embeddings:
            shown = self.tokenizer.decode([highest])
            problem = f"the tokenizer gives token {highest} ({shown!r}), and the model has {self.embeddings} embeddings"
            raise InputError(place, problem, "Take the tokenizer of a source that has all of its tokens.")


def _whole(prompt: Prompt) -> Prompt:
    """The prompt, refused where it would lose a part of a picture at its beginning."""
    if prompt.media and prompt.lost:
        tokens, room = len(prompt.ids) - prompt.unread, (prompt.room or 0) - prompt.unread
        problem = f"has {tokens:,} tokens with its pictures, and there is room for {room:,}"
        raise InputError(prompt.place, problem, "Shorten the text, show fewer pictures, or raise `max_length`.")
    return prompt


# ---- tokens ----------------------------------------------------------------------------------------------------------

_Added = tuple[list[int], list[int]]
_added: WeakKeyDictionary[Any, _Added] = WeakKeyDictionary()


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that the model goes on from: the tokenizer's start tokens once, and no end token."""
    start, _ = special_tokens(tokenizer)
    ids = encode_plain(tokenizer, text)
    return ids if ids[: len(start)] == start else [*start, *ids]


def encode_whole(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that is complete: also the tokenizer's end tokens, once."""
    _, end = special_tokens(tokenizer)
    ids = encode(tokenizer, text)
    return ids if not end or ids[-len(end) :] == end else [*ids, *end]


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text with no special tokens but those that it spells."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def first_token(tokenizer: Any) -> int:
    """What comes before the first token of a text after nothing, as in lm-eval."""
    token: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of what comes after it, cut as lm-eval does.

    Spaces at the end of a prompt go to the answer, whose tokens are those that the whole has more. A token that reaches
    over the border counts as the prompt's.
    """
    before = prompt.rstrip()
    after = prompt[len(before) :] + answer
    if before:
        start = encode(tokenizer, before)
        return start, encode(tokenizer, before + after)[len(start) :]
    first, (start, _) = first_token(tokenizer), special_tokens(tokenizer)
    start = start if start[-1:] == [first] else [first]  # with the prompt that stands before it
    ids = encode_plain(tokenizer, after)
    return start, ids[1:] if ids[:1] == [first] else ids


def special_tokens(tokenizer: Any) -> _Added:
    """The tokens that a tokenizer puts before and behind every text."""
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
