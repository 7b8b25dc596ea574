"""How a model reads: from a text to the token ids that it is given. All evaluators and engines use this.

Special tokens are decided on here and nowhere else. A text begins with the tokens that the tokenizer puts at the start
of texts, once: a text that says them itself, as every rendered chat prompt of Llama 3 or Gemma does, gets no second
ones. What the tokenizer would put at the end of a text is left out, because the model is to go on from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel

_PROBES = ("a", "0", "the", ".")


@dataclass(frozen=True)
class Media:
    """What an item or a prompt holds beside text: a file, and what kind of thing it shows."""

    kind: Literal["image"]
    file: Path


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
        media: what the model is shown beside the text.
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
        tokenizer: as transformers loads it.
        context: most tokens of prompt and answer; None for no bound.
        embeddings: how many tokens it knows; None where that is not known yet.
        generation: its generation settings that are not transformers' own; None where there is no model yet.
        device: where it computes; None where there is no model yet.
    """

    tokenizer: Any
    context: int | None
    embeddings: int | None = None
    generation: Mapping[str, Any] | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, live: LiveModel) -> Reader:
        """That of a live model."""
        rows: int = live.model.get_input_embeddings().weight.shape[0]
        context = getattr(live.model.config, "max_position_embeddings", None)
        return cls(live.tokenizer, context, rows, live.model.generation_config.to_diff_dict(), live.device)

    def prompt(self, text: str, most: int, place: str) -> Prompt:
        """A text that the model answers with up to ``most`` tokens.

        Raises:
            InputError: it has no tokens, the context has no room for the answer, or a token is none of the model's.
        """
        ids = encode(self.tokenizer, text)
        if not ids:
            problem = f"its prompt {text!r} has no tokens to start an answer from"
            raise InputError(place, problem, "Write something there.")
        self.check_known(ids, place)
        if self.context is not None and self.context <= most:
            problem = f"is {most}, but prompt and answer together may have {self.context} tokens"
            raise InputError("max_new_tokens", problem, "Lower it.")
        return Prompt(text, "", ids, 0, None if self.context is None else self.context - most, place)

    def pair(self, text: str, answer: str, place: str) -> Prompt:
        """A text and an answer that is scored after it.

        Raises:
            InputError: the answer has no tokens or more than the context, or a token is none of the model's.
        """
        before, after = encode_pair(self.tokenizer, text, answer)
        if not after:
            raise InputError(place, f"its answer {answer!r} adds no token to those of its prompt", "Leave it out.")
        self.check_known([*before, *after], place)
        if self.context is not None and len(after) > self.context:
            problem = f"its answer is {len(after)} tokens long, and prompt and answer may have {self.context}"
            raise InputError(place, problem, "Shorten the item or leave it out.")
        # Nothing is predicted after the last token, so it is not fed in.
        room = None if self.context is None else self.context + 1
        return Prompt(text, answer, [*before, *after], len(after), room, place)

    def check_known(self, ids: Sequence[int], place: str) -> None:
        """Refuse tokens that the model has no embedding for."""
        if self.embeddings is not None and (highest := max(ids, default=0)) >= self.embeddings:
            shown = self.tokenizer.decode([highest])
            problem = f"the tokenizer gives token {highest} ({shown!r}), and the model has {self.embeddings} embeddings"
            raise InputError(place, problem, "Take the tokenizer of a source that has all of its tokens.")


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
