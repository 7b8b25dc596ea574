"""Maps sources with different vocabularies to one: a row of an embedding then stands for the same token in all.

A token is identified by its text. The merged model has the tokens of the tokenizer's source with their ids, and with
"union" those of the other sources after them: first pieces, then added tokens, each in the order of sources and ids;
then the tokens named by rules. Every source keeps its own row for the tokens that it knows. If a source lacks a token,

1. a rule for the token says where the row comes from;
2. else, if only one source knows the token, its row is used in all;
3. else all use the row of ``Vocabulary.base``, if that knows the token;
4. else the mean of the rows of the sources that know it is used;
5. and a token that no source knows gets zeros.

Rows without a token, such as those that pad an embedding to a round size, are dropped, except those of a
vision-language tokenizer's source, which all sources use: its configuration refers to image tokens by id. Newly
requested padding, and ids that the tokenizer skips, get the mean of the source's other rows. A token whose id is beyond
the rows of a source counts as missing there. A tied head follows the embedding; a separate head and its bias are
treated in the same way.

These are mergekit's rules. It considers only the sources that are mixed into a tensor; here all given sources count.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from evomerge.checkpoints.chat_templates import check_template, choose_template, own_template
from evomerge.checkpoints.headers import TORCH_DTYPES
from evomerge.checkpoints.layered import with_text_settings
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import parse_config, text_config
from evomerge.checkpoints.tokenizer_files import open_tokenizer, tokenizer_texts, with_tokens
from evomerge.checkpoints.transplant import transplanted, vocabulary_tensors
from evomerge.errors import InputError
from evomerge.plugins import unknown_name
from evomerge.vocabulary import TokenRow, TokenRule, Vocabulary


@dataclass(frozen=True)
class _Table:
    """Where the rows of the new vocabulary come from, by id, ``[ids]`` int64; -1 for none.

    Attributes:
        sources: the sources as opened.
        names: the tensors with one row per token.
        size: the number of rows including padding.
        own: the row that each source has for the token, by source.
        lent: the donor's row that is used by sources without their own, by donor.
        averaged: ids for which they use the mean, ``[ids]`` bool.
        forced: ids for which own rows are ignored, ``[ids]`` bool.
        named: ids that belong to a token, ``[ids]`` bool.
    """

    sources: Mapping[str, Source]
    names: frozenset[str]
    size: int
    own: Mapping[str, Tensor]
    lent: Mapping[str, Tensor]
    averaged: Tensor
    forced: Tensor
    named: Tensor

    def gather(self, source: str, name: str) -> Tensor:
        """A tensor of a source with ``size`` rows.

        It is a view in its own dtype if its first rows are used unchanged; otherwise it is in the widest dtype of the
        sources, so that a row taken from another source is exact.
        """
        stored = self.sources[source].read(name)
        own = torch.where(self.forced, -1, self.own[source])
        if self.size == len(own) <= len(stored) and torch.equal(own, torch.arange(len(own))):
            return stored[: self.size]
        out = torch.zeros(self.size, *stored.shape[1:], dtype=self._dtype(name))
        rows = out[: len(own)]
        lacking = own < 0
        for donor, lent in self.lent.items():
            if (taken := lacking & (lent >= 0)).any():
                rows[taken] = self.sources[donor].read(name)[lent[taken]].to(out.dtype)
        if (taken := lacking & self.averaged).any():
            rows[taken] = self._mean(name, taken).to(out.dtype)
        rows[~lacking] = stored[own[~lacking]].to(out.dtype)
        if self.size > int(self.named.sum()):
            mean = (rows if self.named.all() else rows[self.named]).mean(0, dtype=torch.float32).to(out.dtype)
            rows[~self.named] = mean
            out[len(own) :] = mean
        return out

    def _mean(self, name: str, ids: Tensor) -> Tensor:
        """The mean of the rows of the sources that know the tokens, float32."""
        total, count = torch.zeros(()), torch.zeros(())
        for source, own in self.own.items():
            stored, known = self.sources[source].read(name), own[ids] >= 0
            rows = stored[own[ids].clamp(min=0)].float()
            known = known.view(-1, *[1] * (stored.ndim - 1))
            total, count = total + torch.where(known, rows, 0.0), count + known
        return total / count

    def _dtype(self, name: str) -> torch.dtype:
        dtypes = [
            torch.float32 if name in source.changes else TORCH_DTYPES[source.tensors[name].dtype]
            for source in self.sources.values()
        ]
        return functools.reduce(torch.promote_types, dtypes)


@dataclass
class AlignedSource(Source):
    """A source mapped to another vocabulary.

    ``tensors`` and ``config`` have the new number of rows. Tensors with one row per token are gathered on first read,
    and then kept in memory, because a search reads them for every candidate. All others are read unchanged.
    """

    table: _Table | None = None
    _gathered: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gathered": {}}

    def read(self, name: str) -> Tensor:
        if self.table is None or name not in self.table.names:
            return super().read(name)
        if name not in self._gathered:
            self._gathered[name] = self.table.gather(self.name, name)
        return self._gathered[name]

    def release(self, name: str) -> None:
        if self.table is None or name not in self.table.names:
            super().release(name)
        else:
            self._gathered.pop(name, None)
            self.table.sources[self.name].release(name)


def align(sources: Mapping[str, Source], tokenizer: str, vocabulary: Vocabulary) -> dict[str, Source]:
    """The sources mapped to one vocabulary, all with the tokenizer and the token ids of the merged model.

    Opens tokenizers, but no weights. If nothing is requested, the sources are returned unchanged.

    Args:
        tokenizer: the source that provides the tokenizer.

    Raises:
        InputError: a tokenizer cannot be loaded or extended, a rule names something unknown, or the chat template is
            invalid.
    """
    if vocabulary.chat_template is not None:
        check_template(vocabulary.chat_template, "vocabulary.chat_template")
    elif not vocabulary.aligns:
        return dict(sources)
    _check_names(vocabulary, sources)
    model = sources[tokenizer]
    if vocabulary.kind == "transplant":
        others = {name: source for name, source in sources.items() if name != tokenizer}
        return {name: transplanted(others[name], model) if name in others else model for name in sources}
    order = {tokenizer: model, **sources}
    tokenizers = {name: open_tokenizer(source) for name, source in order.items()}
    template = _template(vocabulary, tokenizers, tokenizer)
    if not vocabulary.aligns:
        texts = tokenizer_texts(model, tokenizers[tokenizer], chat_template=template) if template is not None else {}
        return {**sources, tokenizer: replace(model, tokenizer_texts=texts)}
    names = vocabulary_tensors(model)
    known = {name: _known(source, tokenizers[name], names) for name, source in order.items()}
    plain, added = _new_tokens(known, tokenizer, vocabulary)
    ids = with_tokens(known[tokenizer].ids, plain, added)
    texts = {}
    if plain or added or template is not None:
        texts = tokenizer_texts(model, tokenizers[tokenizer], plain, added, template)
    table = _table(order, names, known, ids, vocabulary)
    aligned: dict[str, Source] = {name: _aligned(source, model, table, texts) for name, source in sources.items()}
    if texts:
        _check_tokenizer(aligned[tokenizer], ids)
    return aligned


def _template(vocabulary: Vocabulary, tokenizers: Mapping[str, Any], model: str) -> str | None:
    """The chat template to write; None to keep that of the tokenizer's source."""
    if vocabulary.chat_template is None:
        return None
    template = choose_template(vocabulary.chat_template, tokenizers.values())
    return None if template == own_template(tokenizers[model]) else template


@dataclass(frozen=True)
class _Known:
    """The tokens of a source: all ids, the settings of added tokens, and its number of rows."""

    ids: Mapping[str, int]
    added: Mapping[str, AddedToken]
    rows: int

    def row(self, token: str) -> int:
        """The row of a token; -1 if there is none."""
        row = self.ids.get(token, -1)
        return row if row < self.rows else -1


def _known(source: Source, tokenizer: Any, names: Sequence[str]) -> _Known:
    decoder: Mapping[int, AddedToken] = tokenizer.added_tokens_decoder
    rows = min(source.tensors[name].shape[0] for name in names if name in source.tensors)
    return _Known(tokenizer.get_vocab(), {decoder[number].content: decoder[number] for number in sorted(decoder)}, rows)


def _new_tokens(
    known: Mapping[str, _Known], tokenizer: str, vocabulary: Vocabulary
) -> tuple[list[str], list[AddedToken]]:
    """The tokens to add to the tokenizer: pieces, and added tokens, which may already be pieces."""
    model = known[tokenizer]
    plain: dict[str, None] = {}
    added: dict[str, AddedToken] = {}
    if vocabulary.kind == "union":
        for other in known.values():
            added = {token: entry for token, entry in other.added.items() if other.row(token) >= 0} | added
        added = {token: entry for token, entry in added.items() if token not in model.added}
        for other in known.values():
            for token in sorted(other.ids, key=lambda token: other.ids[token]):
                if other.row(token) >= 0 and token not in model.ids and token not in added:
                    plain[token] = None
    there = {*model.ids, *plain, *added}
    ruled = [AddedToken(token) for token in sorted(vocabulary.tokens) if token not in there]
    return list(plain), [*added.values(), *ruled]


def _table(
    sources: Mapping[str, Source],
    names: Sequence[str],
    known: Mapping[str, _Known],
    ids: Mapping[str, int],
    vocabulary: Vocabulary,
) -> _Table:
    count = 1 + max(ids.values())
    model = next(iter(sources))
    unnamed = sorted({*range(known[model].rows)} - {*ids.values()}) if sources[model].takes_images else []
    rest = torch.tensor(unnamed, dtype=torch.long)
    count = max(count, *(number + 1 for number in unnamed[-1:]), 0)
    step = vocabulary.pad_to_multiple_of or 1
    own = {name: torch.full((count,), -1) for name in sources}
    order = torch.tensor(list(ids.values()))
    for name, rows in own.items():
        rows[order] = torch.tensor([known[name].row(token) for token in ids])
    own[model][rest] = rest
    named = torch.zeros(count, dtype=torch.bool)
    named[order] = True
    named[rest] = True
    knowing = sum((rows >= 0).long() for rows in own.values())
    lent, forced, free = {name: torch.full((count,), -1) for name in own}, torch.zeros_like(named), named.clone()
    for token, rule in vocabulary.tokens.items():
        number = ids[token]
        free[number], forced[number] = False, rule.force
        if rule.donor is not None:
            lent[rule.donor][number] = _row(token, rule, known)
    for name, rows in own.items():
        alone = free & (knowing == 1) & (rows >= 0)
        lent[name][alone] = rows[alone]
    averaged = free & (knowing > 1)
    if vocabulary.base is not None:
        rows = own[vocabulary.base]
        based = averaged & (rows >= 0)
        lent[vocabulary.base][based] = rows[based]
        averaged &= ~based
    return _Table(sources, frozenset(names), -(-count // step) * step, own, lent, averaged, forced, named)


def _row(token: str, rule: TokenRule, known: Mapping[str, _Known]) -> int:
    place, asked = f"vocabulary.tokens.{token}", rule.source
    donor = known[str(rule.donor)]
    if isinstance(asked, TokenRow) and asked.token_id is not None:
        if asked.token_id >= donor.rows:
            raise InputError(place, f"takes row {asked.token_id} of {rule.donor}, which has {donor.rows:,}")
        return asked.token_id
    wanted = asked.token if isinstance(asked, TokenRow) and asked.token is not None else token
    if (row := donor.row(wanted)) < 0:
        raise InputError(place, f"takes the row of {wanted!r} of {rule.donor}, which does not know that token")
    return row


def _aligned(source: Source, model: Source, table: _Table, texts: Mapping[str, str]) -> AlignedSource:
    """A source with the table's rows, and with the token ids of the tokenizer's source in its configuration."""
    config = {key: value for key, value in source.config.items() if not key.endswith("_token_id")}
    for key, value in model.config.items():
        if key.endswith("_token_id"):
            beyond = any(type(number) is int and number >= table.size for number in _as_list(value))
            config[key] = None if beyond else value
    config = with_text_settings(config, {"vocab_size": table.size})
    if text_config(parse_config(config, source.place)).vocab_size != table.size:
        raise InputError(source.place, "config.json: vocab_size does not give this model's number of tokens")
    tensors = {
        name: replace(entry, shape=(table.size, *entry.shape[1:])) if name in table.names else entry
        for name, entry in source.tensors.items()
    }
    own = {field.name: getattr(source, field.name) for field in fields(Source)}
    settings = {**source.settings, "vocab_size": table.size}
    own |= {"config": config, "settings": settings, "tensors": tensors, "tokenizer_texts": texts}
    return AlignedSource(**own, table=table)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_names(vocabulary: Vocabulary, sources: Mapping[str, Source]) -> None:
    for name in sorted(vocabulary.used_sources() - sources.keys()):
        raise unknown_name(name, sources, "vocabulary", "source")


def _check_tokenizer(source: Source, ids: Mapping[str, int]) -> None:
    """Check that transformers reads the new tokenizer as intended."""
    vocab = open_tokenizer(source).get_vocab()
    if different := sorted(vocab.items() ^ ids.items(), key=lambda pair: pair[1]):
        token = different[0][0]
        raise InputError(
            source.place,
            f"its tokenizer takes no new tokens: {token!r} would be {vocab.get(token, 'absent')}, not {ids.get(token)}",
            "Give the tokenizer of another source, or keep its vocabulary: `vocabulary: {kind: tokenizer}`.",
        )
