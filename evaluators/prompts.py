"""What a model is asked: from an item's own words to the text that it reads, and to token ids. All evaluators use this.

Special tokens are decided on here and nowhere else. A text begins with the tokens that the tokenizer puts at the start
of texts, once: a text that says them itself, as every rendered chat prompt of Llama 3 or Gemma does, gets no second
ones. What the tokenizer would put at the end of a text is left out, because the model is to go on from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pydantic import Field

from evaluators.base import EvaluatorSettings
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

ENCODING = "tokens 2"
"""Part of an evaluator's version: changes whenever equal texts could become other tokens."""

_PROBES = ("a", "0", "the", ".")
_FITTING = 64
_MOST_TOKENISED = 4096
_NAMED = 3


class PromptSettings(EvaluatorSettings):
    """What the search file says of how prompts are put to the model, for every evaluator that prompts.

    Attributes:
        apply_chat_template: put prompts in the chat template of the model's tokenizer, as a user's turn.
        system_instruction: text before every prompt; with the chat template, the system's turn.
        max_length: most tokens of prompt and answer; the model's context when left out.
    """

    apply_chat_template: bool = False
    system_instruction: str | None = None
    max_length: int | None = Field(default=None, ge=2)

    @property
    def shaping(self) -> list[object]:
        """What of these settings decides on the tokens of a prompt, for an evaluator's version."""
        return [ENCODING, self.apply_chat_template, self.system_instruction, self.max_length]


class FewshotSettings(PromptSettings):
    """The same for evaluators whose items have a right answer.

    Attributes:
        num_fewshot: so many worked examples before each question: the first of the search split but for itself.
    """

    num_fewshot: int = Field(default=0, ge=0, le=1000)

    @property
    def shaping(self) -> list[object]:
        return [*super().shaping, self.num_fewshot]


@dataclass(frozen=True)
class Example:
    """A worked example: a prompt and its right answer. ``hash`` is its item's."""

    prompt: str
    answer: str
    hash: str


@dataclass(frozen=True)
class Reader:
    """What of a model decides on how it reads texts.

    Attributes:
        tokenizer: as transformers loads it.
        context: most tokens that it reads; None for no bound.
        embeddings: how many tokens it knows; None where that is not known yet.
    """

    tokenizer: Any
    context: int | None
    embeddings: int | None = None

    @classmethod
    def of(cls, live: LiveModel) -> Reader:
        """That of a live model."""
        rows: int = live.model.get_input_embeddings().weight.shape[0]
        return cls(live.tokenizer, getattr(live.model.config, "max_position_embeddings", None), rows)

    def room(self, settings: PromptSettings) -> int | None:
        """Most tokens of prompt and answer; None for no bound."""
        return self.context if settings.max_length is None else settings.max_length


@dataclass(frozen=True)
class Asked:
    """What a model is given for an item.

    Attributes:
        text: the prompt, rendered.
        answer: what is scored after it; empty where the model writes the answer.
        ids: all tokens, also those that have no room.
        scored: how many of the last are the answer's.
        room: how many of the last tokens the model can be given; None for all.
        place: where the item was read, for people.
    """

    text: str
    answer: str
    ids: Sequence[int]
    scored: int
    room: int | None
    place: str

    @property
    def unread(self) -> int:
        """How many tokens at the end the model is not given: after the last of an answer nothing is predicted."""
        return 1 if self.scored else 0

    @property
    def lost(self) -> int:
        """How many tokens at the beginning have no room."""
        return 0 if self.room is None else max(0, len(self.ids) - self.room)


# ---- tokens ----------------------------------------------------------------------------------------------------------

_Added = tuple[list[int], list[int]]
_added: WeakKeyDictionary[Any, _Added] = WeakKeyDictionary()


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that the model goes on from: the tokenizer's start tokens once, and no end token."""
    start, _ = _special(tokenizer)
    ids = encode_plain(tokenizer, text)
    return ids if ids[: len(start)] == start else [*start, *ids]


def encode_whole(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that is complete: also the tokenizer's end tokens, once."""
    _, end = _special(tokenizer)
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
    start, ids = [first_token(tokenizer)], encode_plain(tokenizer, after)
    return start, ids[1:] if ids[:1] == start else ids


def _special(tokenizer: Any) -> _Added:
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


# ---- text ------------------------------------------------------------------------------------------------------------


def render(tokenizer: Any, settings: PromptSettings, prompt: str, examples: Sequence[Example] = ()) -> str:
    """The text that the model reads: a system instruction, worked examples and the prompt.

    Raises:
        InputError: the tokenizer has no chat template, or one that cannot be used for this.
    """
    system = settings.system_instruction
    if not settings.apply_chat_template:
        shown = [_joined(example.prompt, example.answer) for example in examples]
        return "\n\n".join([*([system] if system else []), *shown, prompt])
    turns = [{"role": "system", "content": system}] if system else []
    for example in examples:
        turns += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer.strip()}]
    return chat_text(tokenizer, [*turns, {"role": "user", "content": prompt}])


def chat_text(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, opens: bool = True) -> str:
    """Turns of a conversation in the tokenizer's chat template.

    Args:
        opens: the text ends where the model's own turn begins; else in the midst of the last turn given.

    Raises:
        InputError: the tokenizer has no chat template, or one that cannot be used for these turns.
    """
    place = "apply_chat_template"
    if tokenizer.chat_template is None:
        mend = "Leave it out, or take the tokenizer of a source that has one (`tokenizer:`)."
        raise InputError(place, "the tokenizer has no chat template", mend)
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=opens, continue_final_message=not opens
        )
    except Exception as error:  # a template is a program of its author's
        mend = "Take the tokenizer of another source (`tokenizer:`), or leave it out."
        if turns[0]["role"] == "system":
            mend = "It may have no place for a system instruction: put that into the prompts."
        problem = f"the tokenizer's chat template fails ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        raise InputError(place, problem, mend) from error
    return text


def behind(settings: PromptSettings, answer: str) -> str:
    """An answer as it follows its prompt: a model's turn in a chat begins with no space."""
    return answer.lstrip() if settings.apply_chat_template else answer


def _joined(prompt: str, answer: str) -> str:
    """A question with its answer; a space between them where neither brings one, as in lm-eval."""
    glued = not prompt or not answer or prompt[-1].isspace() or answer[0].isspace()
    return prompt + ("" if glued else " ") + answer


class Examples:
    """The worked examples of an evaluator's items: the first of the search split, and never an item itself.

    Raises:
        InputError: there are too few.
    """

    def __init__(self, count: int, items: Sequence[Example], place: str) -> None:
        if count >= len(items) and count:
            problem = f"asks for {count} examples, and there are {len(items)} items to take them from"
            raise InputError(f"{place}: num_fewshot", problem, "Lower it.")
        self._count, self._first = count, items[: count + 1] if count else []

    @property
    def all(self) -> Sequence[Example]:
        """All that any item has."""
        return self._first

    def of(self, hashed: str) -> Sequence[Example]:
        """Those of the item with this hash."""
        return [example for example in self._first if example.hash != hashed][: self._count]


# ---- whether it fits -------------------------------------------------------------------------------------------------


def asked_pair(
    reader: Reader, settings: PromptSettings, prompt: str, answer: str, place: str, examples: Sequence[Example] = ()
) -> Asked:
    """A prompt and an answer that is scored after it.

    Raises:
        InputError: the answer has no tokens or more than the context, or a token is none of the model's.
    """
    text, said = render(reader.tokenizer, settings, prompt, examples), behind(settings, answer)
    before, after = encode_pair(reader.tokenizer, text, said)
    if not after:
        raise InputError(place, f"its answer {answer!r} adds no token to those of its prompt", "Leave it out.")
    check_known(reader, [*before, *after], place)
    context = reader.room(settings)
    if context is not None and len(after) > context:
        problem = f"its answer is {len(after)} tokens long, and prompt and answer may have {context}"
        raise InputError(place, problem, "Shorten the item or leave it out.")
    # Nothing is predicted after the last token, so it is not fed in.
    return Asked(text, said, [*before, *after], len(after), None if context is None else context + 1, place)


def asked_prompt(
    reader: Reader, settings: PromptSettings, prompt: str, most: int, place: str, examples: Sequence[Example] = ()
) -> Asked:
    """A prompt that the model answers with up to ``most`` tokens.

    Raises:
        InputError: it has no tokens, the context has no room for the answer, or a token is none of the model's.
    """
    text = render(reader.tokenizer, settings, prompt, examples)
    ids = encode(reader.tokenizer, text)
    if not ids:
        raise InputError(
            place, f"its prompt {prompt!r} has no tokens to start an answer from", "Write something there."
        )
    check_known(reader, ids, place)
    context = reader.room(settings)
    if context is not None and context <= most:
        problem = f"is {most}, but prompt and answer together may have {context} tokens"
        raise InputError("max_new_tokens", problem, "Lower it.")
    return Asked(text, "", ids, 0, None if context is None else context - most, place)


def check_known(reader: Reader, ids: Sequence[int], place: str) -> None:
    """Refuse tokens that the model has no embedding for."""
    rows = reader.embeddings
    if rows is not None and (highest := max(ids, default=0)) >= rows:
        shown = reader.tokenizer.decode([highest])
        problem = f"the tokenizer gives token {highest} ({shown!r}), and the model has {rows} embeddings"
        raise InputError(place, problem, "Take the tokenizer of a source that has all of its tokens.")


def too_long(asked: Callable[[int], Sequence[Asked]], sizes: Sequence[int]) -> Iterator[Asked]:
    """What loses its beginning, of the longest items: one of each that does.

    Args:
        asked: what the model is given for the item at a position.
        sizes: about how long each item is. The longest are looked at first, until many in a row fit.
    """
    fitting = 0
    for position in sorted(range(len(sizes)), key=lambda i: -sizes[i])[:_MOST_TOKENISED]:
        longest = max(asked(position), key=lambda each: each.lost, default=None)
        if longest is None or not longest.lost:
            fitting += 1
            if fitting == _FITTING:
                return
            continue
        fitting = 0
        yield longest


def told_too_long(found: Sequence[Asked]) -> str:
    """Which items lose their beginning, as a sentence for people; empty for none."""
    if not found:
        return ""
    named = "; ".join(f"{each.place} ({len(each.ids) - each.unread:,} tokens)" for each in found[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    room = min(each.room - each.unread for each in found if each.room is not None)
    items = "1 item is too long and loses its" if len(found) == 1 else f"{len(found)} items are too long and lose their"
    return f"{items} beginning, as there is room for {room:,} tokens: {named}{more}"
