"""A tokenizer with reserved tokens that it puts before every text, in place of a prompt's rows.

They precede the tokenizer's own start tokens, which is where peft puts a prompt, both in its post-processor and in its
chat template, which is rendered without the post-processor.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken

from evomerge.checkpoints.chat_templates import own_template
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.tokenizer_files import load_tokenizer, open_tokenizer, tokenizer_texts
from evomerge.errors import InputError
from evomerge.inference.reading import encode_plain, special_tokens

_FAST = "PreTrainedTokenizerFast"
"""The class that reads everything from tokenizer.json, by the name that every version of transformers knows."""


@dataclass(frozen=True)
class PromptTokens:
    """A tokenizer that begins every text with new tokens.

    Attributes:
        texts: its files, by name.
        first: the id of the first new token; the others follow.
        tokenizer: the loaded tokenizer, set up for scoring.
    """

    texts: Mapping[str, str]
    first: int
    tokenizer: Any


def prompt_tokens(source: Source, count: int) -> PromptTokens:
    """The tokenizer of a source with this many new tokens before every text.

    Raises:
        InputError: a tokenizer of this kind cannot be extended, or cannot put anything before texts.
    """
    tokenizer = open_tokenizer(source)
    ids = tokenizer.get_vocab()
    names = list(itertools.islice((name for name in _names() if name not in ids), count))
    first = 1 + max(ids.values())
    added = [AddedToken(name, special=True, normalized=False) for name in names]
    template = own_template(tokenizer)
    wrapped = None if template is None else _wrapped(template, names, tokenizer)
    texts = tokenizer_texts(source, tokenizer, added=added, chat_template=wrapped)
    content = json.loads(texts["tokenizer.json"])
    numbered = dict(zip(names, itertools.count(first)))
    content["post_processor"] = _before(content.get("post_processor"), numbered, source.place)
    texts["tokenizer.json"] = _dump(content)
    config = json.loads(texts.get("tokenizer_config.json", "{}"))
    for key in ("add_bos_token", "add_eos_token"):  # would rebuild the post-processor, which has them already
        config.pop(key, None)
    wanted = [*numbered.values(), *special_tokens(tokenizer)[0]]
    for kind in (None, _FAST):  # some classes create their own post-processor when loaded
        said = config if kind is None else {**config, "tokenizer_class": kind}
        made = {**texts, "tokenizer_config.json": _dump(said)}
        loaded = load_tokenizer(replace(source, tokenizer_texts=made))
        if special_tokens(loaded)[0] == wanted:
            return PromptTokens(made, first, loaded)
    problem = "its tokenizer does not put new tokens before texts"
    raise InputError(source.place, problem, "Give the tokenizer of another source.")


def _names() -> Iterator[str]:
    return (f"<|soft_{number}|>" for number in itertools.count())


def _wrapped(template: str, names: Sequence[str], tokenizer: Any) -> str:
    """A chat template that begins with the new tokens, and with the start tokens if it does not contain them."""
    start, _ = special_tokens(tokenizer)
    try:
        said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        says_start = encode_plain(tokenizer, said)[: len(start)] == start
    except (TemplateError, TypeError, ValueError):  # a template that expects different turns
        says_start = True
    begins = [] if says_start else tokenizer.convert_ids_to_tokens(start)
    return "{{ " + json.dumps("".join([*names, *begins])) + " }}" + template


def _before(processor: dict[str, Any] | None, tokens: Mapping[str, int], place: str) -> dict[str, Any]:
    """A post-processor that puts tokens before everything that the given one adds."""
    kind = None if processor is None else processor["type"]
    if processor is None:
        processor = {"type": "TemplateProcessing", "single": [_text("A")], "pair": [_text("A"), _text("B")]}
    elif kind == "ByteLevel":
        return {"type": "Sequence", "processors": [processor, _before(None, tokens, place)]}
    elif kind == "Sequence":
        steps = list(processor["processors"])
        templates = [n for n, step in enumerate(steps) if step["type"] == "TemplateProcessing"]
        if templates:
            steps[templates[0]] = _before(steps[templates[0]], tokens, place)
        else:
            steps.append(_before(None, tokens, place))
        return {**processor, "processors": steps}
    elif kind != "TemplateProcessing":
        problem = f"its tokenizer puts special tokens around texts by {kind}, which takes no other tokens"
        raise InputError(place, problem, "Give the tokenizer of another source.")
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in tokens]
    known = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in tokens.items()}
    return {
        **processor,
        "single": [*pieces, *processor["single"]],
        "pair": [*pieces, *processor["pair"]],
        "special_tokens": {**processor.get("special_tokens", {}), **known},
    }


def _text(letter: str) -> dict[str, Any]:
    return {"Sequence": {"id": letter, "type_id": 0}}


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
