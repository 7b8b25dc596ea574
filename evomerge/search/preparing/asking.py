"""What the evaluators of a search ask, looked at before any model is there: whether it fits, and how it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import get_args

from evaluators.base import Evaluator, Split
from evaluators.prompts import told_too_long, too_long
from evaluators.scoring import prompts_of
from evomerge.checkpoints.live import load_tokenizer
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import parse_config
from evomerge.errors import InputError
from evomerge.inference.reading import Prompt, Reader

_SPLITS: tuple[Split, ...] = get_args(Split)
_NAMES: Mapping[Split, str] = {"search": "search", "held_out": "held-out"}


@dataclass(frozen=True)
class Shown:
    """One prompt of a measure, for people.

    Attributes:
        place: the measure in the search file: ``objectives.maths``.
        item: where its item was read.
        prompt: the text that the model is given.
        answer: what is scored after it; empty where the model writes the answer.
        tokens: what it is given: each token's id and text; those of the prompt first.
        scored: how many of the last are scored.
    """

    place: str
    item: str
    prompt: str
    answer: str
    tokens: list[tuple[int, str]]
    scored: int


def reader_of(source: Source) -> Reader:
    """How the model of a source will read.

    Raises:
        InputError: its tokenizer cannot be used.
    """
    config = parse_config(source.config, source.place)
    return Reader(load_tokenizer(source), getattr(config, "max_position_embeddings", None))


def item_warnings(evaluators: Mapping[str, Evaluator], reader: Reader) -> Iterator[str]:
    """What is odd about items of either split: too long for the model, or there more than once.

    Args:
        evaluators: by the place in the search file that names each.

    Raises:
        InputError: an item that cannot be scored at all, with its place.
    """
    for place, evaluator in evaluators.items():
        for split in _SPLITS:
            items = evaluator.items(split)
            if again := len(items) - len({item.id for item in items}):
                yield f"{place}: {again} of {len(items)} {_NAMES[split]} items repeat another one"
            sizes = [len(item.question) + len(item.answer) for item in items]
            asked = partial(_asked, evaluator, reader, place, split)
            if warning := told_too_long(list(too_long(asked, sizes))):
                yield f"{place}: {warning}"


def shown_prompts(evaluators: Mapping[str, Evaluator], reader: Reader) -> Iterator[Shown]:
    """The first prompt of the search split of each measure that asks the model anything."""
    for place, evaluator in evaluators.items():
        for asked in _asked(evaluator, reader, place, "search", 0)[:1]:
            yield shown(asked, reader, place)


def shown(asked: Prompt, reader: Reader, place: str) -> Shown:
    """What is asked, as people read it: only the tokens that the model is given."""
    ids = list(asked.fed)
    tokens = list(zip(ids, (reader.tokenizer.decode([token]) for token in ids), strict=True))
    return Shown(place, asked.place, asked.text, asked.answer, tokens, asked.scored)


def _asked(evaluator: Evaluator, reader: Reader, place: str, split: Split, index: int) -> list[Prompt]:
    """What a model will be given for an item, as far as is known; what is wrong with it is said with the measure."""
    try:
        return prompts_of(evaluator, reader, split, index)
    except InputError as error:
        raise InputError(f"{place}: {error.place}", error.problem, error.hint) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        # A tokenizer's own panic is no Exception.
        said = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        raise InputError(place, f"its prompts cannot be put to the model ({said})") from error
