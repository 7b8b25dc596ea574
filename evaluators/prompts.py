"""Builds prompts: from an item's own text to the text that the model reads. All evaluators use this.

``evomerge.inference.reading`` converts the text to token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydantic import Field

from evaluators.base import EvaluatorSettings, Split
from evomerge.errors import InputError
from evomerge.inference.media import IMAGE, Media
from evomerge.inference.reading import Prompt, Reader

ENCODING = "tokens 2"
"""Part of an evaluator's version: changes whenever equal texts could be tokenized differently."""

_FITTING = 64
_MAX_TOKENISED = 4096
_NAMED = 3


class PromptSettings(EvaluatorSettings):
    """How prompts are given to the model, for every evaluator with prompts.

    Attributes:
        apply_chat_template: apply the chat template of the model's tokenizer, with the prompt as the user's turn.
        system_instruction: text before every prompt; with the chat template, the system's turn.
        max_length: the maximum number of tokens of prompt and answer; by default the model's context.
    """

    apply_chat_template: bool = False
    system_instruction: str | None = None
    max_length: int | None = Field(default=None, ge=2)

    def limited(self, reader: Reader) -> Reader:
        """The reader, limited to this maximum number of tokens of prompt and answer."""
        return reader if self.max_length is None else replace(reader, context=self.max_length)

    @property
    def shaping(self) -> list[object]:
        """The settings that affect the tokens of a prompt, for an evaluator's version."""
        return [ENCODING, self.apply_chat_template, self.system_instruction, self.max_length]


class FewshotSettings(PromptSettings):
    """Settings of evaluators whose items have a right answer.

    Attributes:
        num_fewshot: the number of worked examples before each question: the first of the search split, except itself.
    """

    num_fewshot: int = Field(default=0, ge=0, le=1000)

    @property
    def shaping(self) -> list[object]:
        return [*super().shaping, self.num_fewshot]


@dataclass(frozen=True)
class Example:
    """A worked example: a prompt and its right answer, with its pictures. ``hash`` is that of its item."""

    prompt: str
    answer: str
    hash: str
    media: tuple[Media, ...] = ()


# ---- text ------------------------------------------------------------------------------------------------------------


def render(
    templates: Any, settings: PromptSettings, prompt: str, examples: Sequence[Example] = (), *, in_parts: bool = False
) -> str:
    """The text that the model reads: a system instruction, worked examples and the prompt.

    Args:
        templates: a tokenizer or a processor, which has the chat template.
        in_parts: pass turns to the template as lists of texts and pictures, as processors' templates expect.

    Raises:
        InputError: there is no chat template, or one that cannot be used for this.
    """
    system = settings.system_instruction
    if not settings.apply_chat_template:
        shown = [_joined(example.prompt, example.answer) for example in examples]
        return "\n\n".join([*([system] if system else []), *shown, prompt])
    turns: list[Mapping[str, Any]] = [{"role": "system", "content": system}] if system else []
    for example in examples:
        turns += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer.strip()}]
    turns.append({"role": "user", "content": prompt})
    return chat_text(templates, as_content_parts(turns) if in_parts else turns)


def as_content_parts(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Turns with their contents as lists of texts and pictures, as processors' chat templates expect."""
    return [{**turn, "content": _parts(turn["content"])} for turn in turns]


def _parts(content: str) -> list[Mapping[str, str]]:
    """The texts and pictures of a turn, in order."""
    parts: list[Mapping[str, str]] = []
    for number, text in enumerate(content.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if text.strip("\n"):  # templates separate texts and pictures themselves
            parts.append({"type": "text", "text": text.strip("\n")})
    return parts


def chat_text(tokenizer: Any, turns: Sequence[Mapping[str, Any]], *, opens: bool = True) -> str:
    """Format the turns of a conversation with the chat template of a tokenizer or a processor.

    Args:
        opens: the text ends where the model's own turn begins; otherwise within the last given turn.

    Raises:
        InputError: the tokenizer has no chat template, or one that cannot be used for these turns.
    """
    place = "apply_chat_template"
    if tokenizer.chat_template is None:
        hint = "Leave it out, or take the tokenizer of a source that has one (`tokenizer:`)."
        raise InputError(place, "the tokenizer has no chat template", hint)
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=opens, continue_final_message=not opens
        )
    except Exception as error:  # a template is a program and may raise anything
        hint = "Take the tokenizer of another source (`tokenizer:`), or leave it out."
        if turns[0]["role"] == "system":
            hint = "It may have no place for a system instruction: put that into the prompts."
        problem = f"the tokenizer's chat template fails ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        raise InputError(place, problem, hint) from error
    return text


def answer_after_prompt(settings: PromptSettings, answer: str) -> str:
    """An answer as it follows its prompt: in a chat, a model's turn does not begin with a space."""
    return answer.lstrip() if settings.apply_chat_template else answer


def _joined(prompt: str, answer: str) -> str:
    """A question followed by its answer, separated by a space if neither contains one there, as in lm-eval."""
    glued = not prompt or not answer or prompt[-1].isspace() or answer[0].isspace()
    return prompt + ("" if glued else " ") + answer


class Examples:
    """The worked examples of an evaluator's items: the first of the search split, but never the item itself.

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
        """All examples used by any item."""
        return self._first

    def of(self, hashed: str) -> Sequence[Example]:
        """The examples of the item with this hash."""
        return [example for example in self._first if example.hash != hashed][: self._count]


Asked = TypeVar("Asked")


class ItemRequests(Generic[Asked]):
    """The requests of an evaluator's items, built once per reader, because they are the same for every candidate.

    Args:
        make: builds the requests of the item at a position of a split.
    """

    def __init__(self, make: Callable[[Reader, Split, int], Sequence[Asked]]) -> None:
        self._make = make
        self._reader: Reader | None = None
        self._made: dict[tuple[Split, int], Sequence[Asked]] = {}

    def __call__(self, reader: Reader, split: Split, indices: Sequence[int]) -> list[Asked]:
        """The requests of the items at these positions, item after item."""
        if reader != self._reader:
            self._reader, self._made = reader, {}
        for index in indices:
            if (split, index) not in self._made:
                self._made[split, index] = self._make(reader, split, index)
        return [request for index in indices for request in self._made[split, index]]


# ---- length limits ---------------------------------------------------------------------------------------------------


def asked_pair(
    reader: Reader,
    settings: PromptSettings,
    prompt: str,
    answer: str,
    place: str,
    examples: Sequence[Example] = (),
    media: tuple[Media, ...] = (),
) -> Prompt:
    """A prompt, with its pictures, and an answer that is scored after it.

    Raises:
        InputError: as for ``Reader.pair``.
    """
    text = _rendered(reader, settings, prompt, examples)
    return settings.limited(reader).pair(
        text, answer_after_prompt(settings, answer), place, _all_media(examples, media)
    )


def asked_prompt(
    reader: Reader,
    settings: PromptSettings,
    prompt: str,
    most: int,
    place: str,
    examples: Sequence[Example] = (),
    media: tuple[Media, ...] = (),
) -> Prompt:
    """A prompt, with its pictures, that the model answers with up to ``most`` tokens.

    Raises:
        InputError: as for ``Reader.prompt``.
    """
    text = _rendered(reader, settings, prompt, examples)
    return settings.limited(reader).prompt(text, most, place, _all_media(examples, media))


def _rendered(reader: Reader, settings: PromptSettings, prompt: str, examples: Sequence[Example]) -> str:
    templates = reader.templates if settings.apply_chat_template else reader.tokenizer
    return render(templates, settings, prompt, examples, in_parts=templates is not reader.tokenizer)


def _all_media(examples: Sequence[Example], media: tuple[Media, ...]) -> tuple[Media, ...]:
    """The pictures of worked examples and of the question, in the order of the text."""
    return (*(one for example in examples for one in example.media), *media)


def truncated_prompts(asked: Callable[[int], Sequence[Prompt]], sizes: Sequence[int]) -> Iterator[Prompt]:
    """The prompts that are truncated at the beginning, among the longest items: at most one per item.

    Args:
        asked: the prompts for the item at a position.
        sizes: the approximate length of each item. The longest are checked first, until many in a row fit.
    """
    fitting = 0
    for position in sorted(range(len(sizes)), key=lambda i: -sizes[i])[:_MAX_TOKENISED]:
        longest = max(asked(position), key=lambda prompt: prompt.lost, default=None)
        if longest is None or not longest.lost:
            fitting += 1
            if fitting == _FITTING:
                return
            continue
        fitting = 0
        yield longest


def describe_truncated(prompts: Sequence[Prompt]) -> str:
    """A sentence that names the items whose prompts are truncated; empty if there are none."""
    if not prompts:
        return ""
    named = "; ".join(f"{prompt.place} ({len(prompt.ids) - prompt.unread:,} tokens)" for prompt in prompts[:_NAMED])
    more = f"; and {len(prompts) - _NAMED} more" if len(prompts) > _NAMED else ""
    room = min(prompt.room - prompt.unread for prompt in prompts if prompt.room is not None)
    items = (
        "1 item is too long and loses its" if len(prompts) == 1 else f"{len(prompts)} items are too long and lose their"
    )
    return f"{items} beginning, as there is room for {room:,} tokens: {named}{more}"
