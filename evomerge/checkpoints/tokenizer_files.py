"""Loads tokenizers of sources, and writes tokenizers with more tokens or another chat template."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken
from transformers import TokenizersBackend

from evomerge.checkpoints.config import first_line
from evomerge.checkpoints.folder import TEMPLATES, load_json
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.tokenizer_trial import trial
from evomerge.errors import InputError
from evomerge.files import read_text

_TEMPLATE = "chat_template.jinja"
# Below the score of any piece, so that a text that can be tokenized without the new pieces is tokenized as before.
_UNLIKELY = 1000.0


@contextmanager
def tokenizer_folder(source: Source) -> Iterator[Path]:
    """A folder with the files of a source's tokenizer: its own, or a temporary one for modified files."""
    if not source.tokenizer_texts:
        yield source.folder
        return
    with TemporaryDirectory() as folder:
        for name, text in source.tokenizer_texts.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_text(text, "utf-8")
        (Path(folder) / "config.json").write_text(json.dumps(source.config), "utf-8")
        yield Path(folder)


def open_tokenizer(source: Source) -> Any:
    """The tokenizer of a source as loaded by transformers.

    Raises:
        InputError: it cannot be loaded, or takes more time or memory for a few texts than any tokenizer needs.
    """
    with tokenizer_folder(source) as folder:
        return load_tokenizer_folder(folder, source.place)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a source, set up for batched generation: padding on the left, with a padding token.

    Raises:
        InputError: it cannot be loaded, or has neither a padding nor an end token.
    """
    tokenizer = open_tokenizer(source)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                source.place, "its tokenizer has neither a pad_token nor an eos_token", "Name one in its configuration."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer_folder(folder: Path, place: str) -> Any:
    """The tokenizer in a folder whose files were checked; raises like ``open_tokenizer``."""
    if (folder / "tokenizer.json").is_file() and (problem := trial(folder)):
        raise InputError(place, f"its tokenizer cannot be used: {problem}", "Use the one that the model came with.")
    from transformers import AutoTokenizer  # takes two seconds, and is only needed for a tokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions for broken files
        raise InputError(place, f"its tokenizer cannot be loaded: {first_line(error)}") from error


def tokenizer_texts(
    source: Source,
    tokenizer: Any,
    plain: Sequence[str] = (),
    added: Sequence[AddedToken] = (),
    chat_template: str | None = None,
) -> dict[str, str]:
    """The files, by name, of a source's tokenizer with more tokens.

    Every existing token keeps its id. Plain tokens become pieces of the model, without merges: texts are tokenized as
    before, unless they could not be split into known pieces. Added tokens are split off from a text first.

    Args:
        tokenizer: the source's tokenizer, from ``open_tokenizer``.
        plain: pieces that it does not have; they take the ids after its last.
        added: tokens of the kind that is split off first; they take the next ids, or keep theirs if they are pieces.
        chat_template: None for the source's own.

    Raises:
        InputError: a tokenizer of this kind cannot be extended with them.
    """
    if not isinstance(tokenizer, TokenizersBackend):
        raise InputError(
            source.place,
            f"its tokenizer ({type(tokenizer).__name__}) is not one of the tokenizers library and takes no new tokens",
            "Give the tokenizer of another source.",
        )
    texts = {}
    files = [source.folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    if chat_template is None:
        files += [source.folder / _TEMPLATE, *sorted((source.folder / TEMPLATES).glob("*.jinja"))]
    for file in files:
        if file.is_file():
            texts[file.relative_to(source.folder).as_posix()] = read_text(file, source.place)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = with_tokens(tokenizer.get_vocab(), plain, added)
    if plain or added:
        _extend(content, ids, plain, added, source.place)
    texts["tokenizer.json"] = _dump(content)
    if "tokenizer_config.json" in texts:
        config = load_json(source.folder / "tokenizer_config.json", source.place)
        if isinstance(config.get("added_tokens_decoder"), dict):
            config["added_tokens_decoder"] |= {str(ids[token.content]): _settings(token) for token in added}
        if chat_template is not None:
            config.pop("chat_template", None)
        texts["tokenizer_config.json"] = _dump(config)
    if chat_template is not None:
        texts[_TEMPLATE] = chat_template
    return texts


def with_tokens(ids: Mapping[str, int], plain: Sequence[str], added: Sequence[AddedToken]) -> dict[str, int]:
    """The ids of a vocabulary with these tokens appended, in order; tokens that it already has keep their ids."""
    all_ids = dict(ids)
    free = itertools.count(1 + max(all_ids.values()))
    for token in (*plain, *(token.content for token in added)):
        if token not in all_ids:
            all_ids[token] = next(free)
    return all_ids


def _extend(
    content: dict[str, Any], ids: Mapping[str, int], plain: Sequence[str], added: Sequence[AddedToken], place: str
) -> None:
    """Add tokens to the content of tokenizer.json; ``ids`` contains the ids of all tokens."""
    model = content["model"]
    if plain and model["type"] == "WordPiece":  # it uses the longest matching piece, so known texts would change
        raise InputError(
            place,
            f"its tokenizer is a WordPiece, to which {plain[0]!r} cannot be added without changing other texts",
            "Keep its vocabulary: `vocabulary: {kind: tokenizer}`.",
        )
    # Added tokens become pieces as well: only the ids of pieces are preserved when the file is read.
    if isinstance(model["vocab"], list):
        model["vocab"] += _unigram(model["vocab"], ids, place)
    else:
        model["vocab"] = dict(sorted((model["vocab"] | ids).items(), key=lambda pair: pair[1]))
    own = {token["content"]: token for token in content["added_tokens"]}
    own |= {token.content: {"id": ids[token.content], **_settings(token)} for token in added}
    content["added_tokens"] = sorted(own.values(), key=lambda token: token["id"])


def _unigram(pieces: Sequence[Sequence[Any]], ids: Mapping[str, int], place: str) -> list[list[Any]]:
    """The pieces after the last one; their ids are their positions in the list."""
    behind = {number: token for token, number in ids.items() if number >= len(pieces)}
    score = min((float(piece[1]) for piece in pieces), default=0.0) - _UNLIKELY
    if behind and len(behind) != max(behind) + 1 - len(pieces):
        raise InputError(place, "its tokenizer leaves out ids, so that it takes no new tokens", "Choose another one.")
    return [[behind[number], score] for number in sorted(behind)]


def _settings(token: AddedToken) -> dict[str, Any]:
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {field: getattr(token, field) for field in fields}


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
