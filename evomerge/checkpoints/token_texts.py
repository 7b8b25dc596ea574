"""Decodes what tokens stand for into bytes, so that tokens of two tokenizers can be matched whatever their notation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

Meaning = bytes | str
"""The bytes that a token stands for in a text; for a special or added token (``<|im_end|>``) its name."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def meanings(tokenizer: Any) -> dict[int, Meaning]:
    """The meaning of each id of a tokenizer of the tokenizers library.

    Supported are the byte letters of GPT-2 and similar tokenizers, SentencePiece's marker for a space and its byte
    tokens, and WordPiece's marker for a piece inside a word.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {int(token["id"]): str(token["content"]) for token in content.get("added_tokens") or ()}
    kind = content["model"].get("type")
    is_bytes = "ByteLevel" in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    found: dict[int, Meaning] = {}
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            found[number] = added[number]
        elif is_bytes:
            found[number] = _from_letters(token)
        elif kind == "WordPiece":
            prefix = str(content["model"].get("continuing_subword_prefix") or "##")
            found[number] = (token.removeprefix(prefix) if token.startswith(prefix) else f" {token}").encode()
        elif match := _BYTE.fullmatch(token):
            found[number] = bytes([int(match[1], 16)])
        else:
            found[number] = token.replace("\u2581", " ").encode()
    return found


def matched(model: Any, donor: Any) -> dict[int, int]:
    """For each id of the donor's tokenizer that the model's tokenizer knows too, the id there.

    Tokens with equal meaning match, preferably those with equal text. The tokens that begin, end and pad a text match
    whatever they are called.
    """
    ours, theirs = meanings(model), meanings(donor)
    texts = model.get_vocab()
    known: dict[Meaning, int] = {}
    for number in sorted(ours):
        known.setdefault(ours[number], number)
    found: dict[int, int] = {}
    for token, number in donor.get_vocab().items():
        meaning = theirs[number]
        if token in texts and ours[texts[token]] == meaning:
            found[number] = texts[token]
        elif meaning in known:
            found[number] = known[meaning]
    for role in _ROLES:
        own, other = (getattr(tokenizer, f"{role}_id") for tokenizer in (model, donor))
        if own is not None and other is not None:
            found.setdefault(other, own)
    return found


def text_of(meaning: Meaning) -> str:
    """A meaning as a text that can be tokenized."""
    return meaning if isinstance(meaning, str) else meaning.decode(errors="replace")


def _from_letters(token: str) -> bytes:
    letters = _letters()
    return b"".join(letters.get(letter, letter.encode()) for letter in token)


@cache
def _letters() -> Mapping[str, bytes]:
    """The letter that GPT-2 and similar tokenizers use for each byte: itself if printable, else one above 255."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte if byte in seen else 256 + hidden.index(byte)): bytes([byte]) for byte in range(256)}
