"""Checks across sources, and of their weights' values, before a search begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evomerge.checkpoints.folder import load_json
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import parse_config
from evomerge.errors import InputError

_SAME_SHAPE = "Merge fine-tunes of one base."
_SAME_TOKENIZER = "Merge models that share a tokenizer, or give one the other's tokenizer files if they mean the same."

# Fields that change what weights of equal shape mean: two heads of 64 are not four of 32.
_MEANING = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")


def check_compatible(sources: Mapping[str, Source]) -> None:
    """Refuse sources that cannot be mixed tensor by tensor.

    All are held against the first: architecture, layers, tying, every tensor's name and shape, vocabulary and special
    tokens. The padding token may differ: it never takes part in what a model computes.

    Raises:
        InputError: naming the two sources, what differs and both values.
    """
    first, *others = sources.values()
    vocabulary = _vocabulary(first)
    for other in others:
        _same(first, other, "model_type", first.config["model_type"], other.config["model_type"])
        _same(first, other, "architectures", first.config.get("architectures"), other.config.get("architectures"))
        _same(first, other, "number of layers", first.layers, other.layers)
        _same(
            first, other, "tie_word_embeddings", first.tied, other.tied,
            "Untie the tied one: set tie_word_embeddings to false and save the embedding again as the head.",
        )  # fmt: skip
        mine, theirs = (parse_config(s.config, s.place) for s in (first, other))
        _same(first, other, "vocab_size", mine.vocab_size, theirs.vocab_size, _SAME_TOKENIZER)
        _same(first, other, "hidden_size", mine.hidden_size, theirs.hidden_size)
        for name in first.tensors.keys() | other.tensors.keys():
            _same(first, other, f"shape of {name}", _shape(first, name), _shape(other, name))
        for field in _MEANING:
            _same(first, other, field, getattr(mine, field, None), getattr(theirs, field, None))
        _same_vocabulary(first, other, vocabulary, _vocabulary(other))
        for token in ("bos_token", "eos_token", "unk_token"):
            _same(first, other, token, _special(first, token), _special(other, token), _SAME_TOKENIZER)


def check_finite(source: Source) -> None:
    """Read every weight once and refuse a source with NaN or an infinity in one of them.

    Raises:
        InputError: naming the tensor.
    """
    for name in source.tensors:
        tensor = source.read(name)
        # A sum is thirty times faster than isfinite and never finite over a bad element; that it may overflow over
        # good ones is why a bad sum is confirmed.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                source.place,
                f"{name} in {source.tensors[name].file.name} has NaN or Inf in {bad:,} of {tensor.numel():,} elements",
                "The model is broken; download or train it again.",
            )


def _same(one: Source, other: Source, field: str, mine: Any, theirs: Any, mend: str = _SAME_SHAPE) -> None:
    if mine != theirs:
        raise InputError(other.place, f"{other.name} and {one.name} differ in {field}: {theirs} and {mine}", mend)


def _shape(source: Source, name: str) -> str:
    return str(list(source.tensors[name].shape)) if name in source.tensors else "absent"


def _same_vocabulary(one: Source, other: Source, mine: dict[str, int], theirs: dict[str, int]) -> None:
    different = mine.items() ^ theirs.items()
    if not different:
        return
    token = min(different, key=lambda pair: pair[1])[0]
    raise InputError(
        other.place,
        f"{other.name} and {one.name} differ in the tokenizer's vocabulary ({len(theirs):,} and {len(mine):,} tokens): "
        f"{token!r} is {theirs.get(token, 'absent')} and {mine.get(token, 'absent')}",
        _SAME_TOKENIZER,
    )


def _vocabulary(source: Source) -> dict[str, int]:
    """Every token of tokenizer.json with its id, added tokens as well."""
    file = source.folder / "tokenizer.json"
    if not file.exists():
        raise InputError(
            source.place,
            f"has no tokenizer.json in {source.folder}",
            "Load its tokenizer with `AutoTokenizer.from_pretrained` and write it with `save_pretrained`.",
        )
    content = load_json(file, source.place)
    try:
        tokens = content["model"]["vocab"]
        # Unigram models list [token, score] in the order of ids; all others map tokens to ids.
        found = {t[0]: i for i, t in enumerate(tokens)} if isinstance(tokens, list) else dict(tokens)
        found |= {added["content"]: added["id"] for added in content.get("added_tokens") or ()}
        highest = max(found.values())
    except (KeyError, TypeError, IndexError, ValueError):
        raise InputError(source.place, "tokenizer.json holds no vocabulary", "Download it again.") from None
    size = parse_config(source.config, source.place).vocab_size
    if highest >= size:
        raise InputError(
            source.place,
            f"the tokenizer has token ids up to {highest:,}, but the model only {size:,} embeddings (vocab_size)",
            "Give the model the tokenizer that it was trained with.",
        )
    return found


def _special(source: Source, token: str) -> str | None:
    """A special token's text, from tokenizer_config.json or, in older folders, special_tokens_map.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source.folder / name).exists():
            value = load_json(source.folder / name, source.place).get(token)
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None:
                return str(value)
    return None
