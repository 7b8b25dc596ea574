"""Gives a model another model's vocabulary: it keeps its own rows for shared tokens, and new rows are computed.

How the row of a missing token is computed (the first: Goddard and Fernandes 2025, arXiv:2506.06607):

    omp      approximates the donor's row by a few of its rows of shared tokens, and sums the model's rows likewise
    subword  the mean of the model's rows of the pieces into which its own tokenizer splits the token's text
    mean     the mean of the model's rows of all shared tokens
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.checkpoints.checks import check_tensor
from evomerge.checkpoints.folder import has, load_json, tokenizer_files
from evomerge.checkpoints.layered import with_text_settings
from evomerge.checkpoints.pursuit import pursue
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import empty_model, parse_config, stored_tensors
from evomerge.checkpoints.token_texts import matched, meanings, text_of
from evomerge.checkpoints.tokenizer_files import open_tokenizer
from evomerge.errors import InputError
from evomerge.files import read_text

RowMethod = Literal["omp", "subword", "mean"]

_ATOMS = 64
"""The default number of shared tokens that a row is computed from, but at most a quarter of the rows' width. With half
of it, small models predicted worse (docs/transplant.md)."""

_MIN_SHARED = 16
"""How many tokens two vocabularies must share for one to replace the other."""

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of a new vocabulary come from, by the donor's ids.

    Attributes:
        own: the model's row for each id, int64 [ids]; -1 if it has none.
        named: ids that belong to a token, bool [ids].
        pieces: for ids that the model lacks, the ids into which its tokenizer splits their texts.
        model: the model as opened.
        donor: its rows describe the missing tokens.
        counterparts: for each tensor of the model with one row per token, the name of the donor's, or None.
        method: how rows are computed.
        atoms: how many rows ``omp`` combines; None for the default.
    """

    own: Tensor
    named: Tensor
    pieces: Mapping[int, Sequence[int]]
    model: Source
    donor: Source
    counterparts: Mapping[str, str | None]
    method: RowMethod
    atoms: int | None

    @property
    def lacking(self) -> Tensor:
        """Ids of tokens that the model has no row for."""
        return (self.named & (self.own < 0)).nonzero().flatten()

    @property
    def shared(self) -> Tensor:
        """Ids of tokens that the model has rows for."""
        return (self.named & (self.own >= 0)).nonzero().flatten()

    def table(self, name: str) -> Tensor:
        """A tensor of the model for the new vocabulary, in its own dtype; existing rows are kept bit for bit."""
        stored = self.model.read(name)
        table = torch.zeros(len(self.own), *stored.shape[1:], dtype=stored.dtype)
        kept = self.own >= 0
        table[kept] = stored[self.own[kept]]
        if len(self.lacking):
            table[self.lacking] = self._made(stored, name).to(stored.dtype)
        if len(rest := (~self.named & ~kept).nonzero().flatten()):
            table[rest] = table[self.named].mean(0, dtype=torch.float32).to(stored.dtype)
        return table

    def _made(self, stored: Tensor, name: str) -> Tensor:
        """The rows of missing tokens, float32."""
        known = stored[self.own[self.shared]].float()
        mean = known.mean(0)
        counterpart = self.counterparts[name]
        if self.method == "mean" or stored.dim() != 2 or (self.method == "omp" and counterpart is None):
            return mean.expand(len(self.lacking), *mean.shape)
        if self.method == "subword":
            rows = [self.pieces[number] for number in self.lacking.tolist()]
            return torch.stack([stored[list(row)].float().mean(0) if row else mean for row in rows])
        assert counterpart is not None
        theirs = self.donor.read(counterpart)
        check_tensor(self.donor, counterpart, theirs)
        atoms = theirs[self.shared].float()
        there = atoms.norm(dim=1) > 0
        chosen, shares = pursue(
            theirs[self.lacking].float(), atoms[there], self.atoms or min(_ATOMS, max(1, atoms.shape[1] // 4))
        )
        ours = known[there]
        made = torch.empty(len(self.lacking), stored.shape[1])
        for start in range(0, len(made), 256):  # in chunks, to bound the memory for the gathered rows
            part = slice(start, start + 256)
            made[part] = torch.bmm(shares[part, None], ours[chosen[part]])[:, 0]
        self.donor.release(counterpart)
        return made


@dataclass
class TransplantedSource(Source):
    """A source with a donor's vocabulary. Tables of rows are computed on first read, and then cached."""

    plan: RowPlan | None = None
    _tables: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": {}}

    def read(self, name: str) -> Tensor:
        if self.plan is None or name not in self.plan.counterparts:
            return super().read(name)
        if name not in self._tables:
            self._tables[name] = self.plan.table(name)
        return self._tables[name]

    def release(self, name: str) -> None:
        if self.plan is None or name not in self.plan.counterparts:
            super().release(name)


def transplanted(
    source: Source, donor: Source, method: RowMethod = "omp", atoms: int | None = None
) -> TransplantedSource:
    """A source with the vocabulary of another one: its tokenizer, special tokens and chat template.

    Opens tokenizers, but no weights.

    Raises:
        InputError: a tokenizer cannot be loaded or interpreted, or they share too few tokens.
    """
    names = vocabulary_tensors(source)
    ours, theirs = open_tokenizer(source), open_tokenizer(donor)
    for tokenizer, one in ((ours, source), (theirs, donor)):
        if not hasattr(tokenizer, "backend_tokenizer"):
            problem = f"its tokenizer ({type(tokenizer).__name__}) is not one of the tokenizers library"
            raise InputError(one.place, problem, "Save the tokenizer with `save_pretrained` as a fast one.")
    plan = _plan(source, donor, names, ours, theirs, method, atoms)
    if len(plan.shared) < min(_MIN_SHARED, int(plan.named.sum())):
        problem = f"the vocabularies of {source.name} and {donor.name} share {len(plan.shared)} tokens"
        raise InputError(source.place, problem, "There is nothing that rows of others could be made of.")
    size = len(plan.own)
    config = {key: value for key, value in source.config.items() if not key.endswith("_token_id")}
    config |= {key: value for key, value in donor.config.items() if key.endswith("_token_id")}
    config = with_text_settings(config, {"vocab_size": size})
    tensors = {
        name: replace(entry, shape=(size, *entry.shape[1:])) if name in names else entry
        for name, entry in source.tensors.items()
    }
    own = {f.name: getattr(source, f.name) for f in fields(Source)}
    own |= {"config": config, "settings": {**source.settings, "vocab_size": size}, "tensors": tensors}
    own["tokenizer_texts"] = _texts(source, donor)
    own["files"] = (*source.files, *(file for file in donor.files if file not in source.files))
    return TransplantedSource(**own, plan=plan)


def vocabulary_tensors(source: Source) -> list[str]:
    """The tensors with one row per token: those of the model's embedding and head."""
    model = empty_model(parse_config(source.config, source.place), source.place)
    owners = [owner for owner in (model.get_input_embeddings(), model.get_output_embeddings()) if owner is not None]
    owned = {id(parameter) for owner in owners for parameter in owner.parameters(recurse=False)}
    stored = stored_tensors(model)
    return [name for name, part in source.parts.items() if id(stored[part.tensor]) in owned]


def _plan(
    source: Source, donor: Source, names: Sequence[str], ours: Any, theirs: Any, method: RowMethod, atoms: int | None
) -> RowPlan:
    rows = min(source.tensors[name].shape[0] for name in names)
    of_donor = vocabulary_tensors(donor)
    size = min(donor.tensors[name].shape[0] for name in of_donor)
    own, named = torch.full((size,), -1), torch.zeros(size, dtype=torch.bool)
    meant, pairs = meanings(theirs), matched(ours, theirs)
    for number in meant:
        if number < size:
            named[number] = True
            own[number] = row if (row := pairs.get(number, -1)) < rows else -1
    taken = set(ours.get_vocab().values())
    for number in (~named).nonzero().flatten().tolist():  # rows without a token stay as they are
        if number < rows and number not in taken:
            own[number] = number
    pieces: dict[int, Sequence[int]] = {}
    if method == "subword":
        for number in (named & (own < 0)).nonzero().flatten().tolist():
            cut = ours.encode(text_of(meant[number]), add_special_tokens=False)
            pieces[number] = [piece for piece in cut if piece < rows]
    heads = {donor.roles[name].kind: name for name in of_donor if len(donor.tensors[name].shape) == 2}
    counterparts = {
        name: (heads.get(source.roles[name].kind) or heads.get("embedding"))
        if len(source.tensors[name].shape) == 2
        else None
        for name in names
    }
    return RowPlan(own, named, pieces, source, donor, counterparts, method, atoms)


def _texts(source: Source, donor: Source) -> dict[str, str]:
    """The donor's tokenizer by file name, and the model's generation settings with the donor's tokens."""
    if donor.tokenizer_texts:
        texts = dict(donor.tokenizer_texts)
    else:
        files = [file for file in tokenizer_files(donor.folder) if file.suffix != ".model"]  # see tokenizer.json
        texts = {file.relative_to(donor.folder).as_posix(): read_text(file, donor.place) for file in files}
    if has(source.folder, _GENERATION):
        own = load_json(source.folder / _GENERATION, source.place)
        given = load_json(donor.folder / _GENERATION, donor.place) if has(donor.folder, _GENERATION) else donor.config
        own = {key: value for key, value in own.items() if not key.endswith("_token_id")}
        own |= {key: value for key, value in given.items() if key.endswith("_token_id")}
        texts[_GENERATION] = json.dumps(own, indent=2) + "\n"
    return texts
