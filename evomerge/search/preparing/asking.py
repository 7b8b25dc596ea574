"""The prompts of a search's evaluators, checked before any model is loaded: whether they fit, and how they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

from evaluators.base import Evaluator, Split, prompts_of
from evaluators.prompts import describe_truncated, truncated_prompts
from evomerge.checkpoints.live import processor_opener
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import parse_config, text_config
from evomerge.checkpoints.tokenizer_files import load_tokenizer
from evomerge.errors import InputError
from evomerge.inference.reading import Prompt, Reader

_SPLITS: tuple[Split, ...] = get_args(Split)
_NAMES: Mapping[Split, str] = {"search": "search", "held_out": "held-out"}


@dataclass(frozen=True)
class Shown:
    """One prompt of a measure, to be shown to people.

    Attributes:
        place: the measure in the search file: ``objectives.maths``.
        item: where its item was read.
        prompt: the text that the model receives.
        answer: the text that is scored after it; empty if the model writes the answer.
        tokens: the model's input: each token's id and text; those of the prompt first.
        scored: how many of the last are scored.
    """

    place: str
    item: str
    prompt: str
    answer: str
    tokens: list[tuple[int, str]]
    scored: int


def reader_of(source: Source) -> Reader:
    """The reader of a source's model; one without texts for a table of tensors.

    Raises:
        InputError: its tokenizer cannot be used.
    """
    if source.is_table:
        return Reader(None, None)
    config = text_config(parse_config(source.config, source.place))
    context = getattr(config, "max_position_embeddings", None)
    return Reader(load_tokenizer(source), context, processor_of=processor_opener(source))


def item_warnings(evaluators: Mapping[str, Evaluator], reader: Reader) -> Iterator[str]:
    """Warnings about items of either split: too long for the model, or duplicated.

    Args:
        evaluators: by the place in the search file that names each of them.

    Raises:
        InputError: an item that cannot be scored at all, with its place.
    """
    for place, evaluator in evaluators.items():
        for split in _SPLITS:
            items = evaluator.items(split)
            if again := len(items) - len({item.id for item in items}):
                yield f"{place}: {again} of {len(items)} {_NAMES[split]} items repeat another one"
            sizes = [len(item.question) + len(item.answer) for item in items]
            with _said_of(place):
                warning = describe_truncated(
                    list(truncated_prompts(partial(prompts_of, evaluator, reader, split), sizes))
                )
            if warning:
                yield f"{place}: {warning}"
    yield from _confirmed_elsewhere(evaluators)


def _confirmed_elsewhere(evaluators: Mapping[str, Evaluator]) -> Iterator[str]:
    """Items that candidates are chosen by and also confirmed on, by another evaluator: those scores are too high."""
    confirming = {place: one for place, one in evaluators.items() if place.startswith(("objectives.", "constraints."))}
    for place, evaluator in evaluators.items():
        asked = {item.asks for item in evaluator.items("search")} - {()}
        for other, one in confirming.items():
            shared = 0 if other == place else len(asked & {item.asks for item in one.items("held_out")})
            if shared:
                yield f"{place}: asks {shared} held-out items of {other} in the search, which confirm nothing then"


def shown_prompts(evaluators: Mapping[str, Evaluator], reader: Reader) -> Iterator[Shown]:
    """The first search-split prompt of each measure that asks the model anything."""
    for place, evaluator in evaluators.items():
        with _said_of(place):
            asked = evaluator.first_prompts(reader)
        for prompt in asked[:1]:
            yield shown(prompt, reader, place)


def shown(asked: Prompt, reader: Reader, place: str) -> Shown:
    """A prompt as shown to people, with only the tokens that the model receives."""
    ids = list(asked.fed)
    tokens = list(zip(ids, (reader.tokenizer.decode([token]) for token in ids), strict=True))
    return Shown(place, asked.place, asked.text, asked.answer, tokens, asked.scored)


@contextmanager
def _said_of(place: str) -> Iterator[None]:
    """Report errors in the prompts of a measure with its place in the search file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error.place}", error.problem, error.hint) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        # A panic of a tokenizer is not an Exception.
        said = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        raise InputError(place, f"its prompts cannot be put to the model ({said})") from error
