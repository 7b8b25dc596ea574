"""Greedy decoding of many prompts at once: rows that end make room for prompts that wait.

``model.generate`` computes a batch until its slowest row ends, copies the whole cache at every step, and computes
few-shot examples anew for every prompt. Here the cache is one table of keys and values, written in place:

- What all prompts have in common is computed once and copied to rows.
- A row that ended gives its place to the last row, so that only open rows are computed; places are filled again in
  groups, by prompts of like lengths.
- Every row ends at the same column. So each row is padded on the left and nowhere else, as in ``generate``, and
  positions that a model derives from distances (ALiBi) are right as well.

A row attends to its own tokens alone: those beside it change the order of sums, and so the last bits, and nothing else.
So rows may even be of several models that share their modules: before a forward pass the groups of its rows are told.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from evomerge.inference.answering import answered
from evomerge.inference.showing import ShownRows, reads_in_order

_COLUMNS = 64
"""Room for so many tokens is made at once: making it copies the table, or moves what is in use."""

_PREFILL_TOKENS, _PREFILL_TOKENS_CPU = 8192, 1024
"""Most tokens of prompts in one forward pass: a layer's activations need far more memory than its keys and values. On a
processor so few that they stay in its cache: a model of 135 M answered 60 prompts of 55 tokens in 6/7 of the time.
"""

_REFILL = 4
"""Rows wait until a quarter of them is free: a forward pass of few prompts takes about as long as one of many."""


class NoTableError(Exception):
    """The model's cache is not keys and values of every token, so there is no table of it.

    Attributes:
        alone: whether it has no cache of either kind that transformers knows. Such a state is not kept apart by rows:
            RWKV's mixes them, and takes padding for text.
    """

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone


Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [groups, heads, tokens, width]: the tokens that the prompts of a group begin with."""


@dataclass(frozen=True)
class Groups:
    """Prompts that are answered by models of their own, which differ in what one model's modules compute for a row.

    Attributes:
        of: the group of each prompt; groups are counted from 0, and none is empty.
        tell: is given the group of every row before each forward pass.
    """

    of: Sequence[int]
    tell: Callable[[Sequence[int]], None] = field(default=lambda rows: None)


class Decoder:
    """Greedy answers of a model to some prompts, in a table of rows.

    Args:
        model: a transformers model in eval mode.
        prompts: token ids, at least one each.
        most: most tokens of an answer.
        ends: tokens that end an answer; they are its last token.
        ended: which of some answers end by their text.
        groups: of the prompts; None where all are answered by the one model.
        shown: pictures of the prompts; None where there are none.

    Attributes:
        answers: of each prompt the tokens so far.

    Raises:
        NoTableError: ``model.generate`` must do it.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        most: int,
        ends: frozenset[int],
        ended: Callable[[Sequence[Sequence[int]]], Sequence[bool]],
        groups: Groups | None = None,
        shown: ShownRows | None = None,
    ) -> None:
        self._shown = shown
        self._model, self._prompts, self._most, self._ends, self._ended = model, prompts, most, ends, ended
        self._groups = groups or Groups([0] * len(prompts))
        self.answers: list[list[int]] = [[] for _ in prompts]
        # The longest first: a prompt that joins later then always fits left of the column that is written next.
        self._order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        self._finished: set[int] = set()
        self._accepted = inspect.signature(model.forward).parameters
        self._prefill_tokens = _PREFILL_TOKENS_CPU if model.device.type == "cpu" else _PREFILL_TOKENS
        of = self._groups.of
        members = [[prompts[i] for i in range(len(prompts)) if of[i] == group] for group in range(max(of) + 1)]
        self._given: int = getattr(model, "prefix_length", 0)  # of the tokens of each prompt: keys, and no text
        self._shared = min(map(_common, members))  # of every group as many, so that one batch computes them all
        if shown:  # all pictures have one token, whatever they show
            token = model.config.image_token_id
            self._shared = min(self._shared, *(shown.text_before(i, token) for i in range(len(prompts))))
        starts = [group_prompts[0][: max(self._shared, 1)] for group_prompts in members]
        self._prefix = self._prefixes(starts, max(map(len, prompts)) + most)

    @torch.inference_mode()
    def run(self, rows: int) -> None:
        """Answer what is not answered yet, at most ``rows`` at a time.

        Raises:
            torch.OutOfMemoryError: too many rows. It can be run again with fewer: answers that have ended stay.
        """
        waiting = [i for i in self._order if i not in self._finished]
        for number in waiting:
            self.answers[number] = []
        table = _Table(self._prefix, min(rows, len(waiting)), self._model.device)
        while waiting or table.open:
            if (rows - len(table.open)) * _REFILL >= rows:
                while waiting and len(table.open) < rows:
                    group = self._group(waiting, rows - len(table.open))
                    del waiting[: len(group)]
                    self._close(table, self._admit(table, group), len(group))
            if table.open:
                self._close(table, self._step(table), len(table.open))

    def _group(self, waiting: Sequence[int], free: int) -> Sequence[int]:
        longest = len(self._prompts[waiting[0]])
        group = waiting[: min(free, max(1, self._prefill_tokens // max(1, longest - self._shared)))]
        # Of a shorter prompt as many shared tokens are fed in again; those that no forward pass makes must not be.
        least = longest - (self._shared - self._given) if self._given else 0
        return [i for i in group if len(self._prompts[i]) >= least]

    def _admit(self, table: _Table, group: Sequence[int]) -> list[int]:
        """Put prompts into the last rows of the table; the first token of each answer.

        All prompts of a group end at the same column and are fed in from the same column on, the first one at which
        some prompt leaves the common prefix. Left of it, rows are copies of the prefix, each from its own offset.
        """
        prompts = [self._prompts[i] for i in group]
        longest, device = len(prompts[0]), self._model.device
        fed = max(1, longest - self._shared)
        offsets = torch.tensor([longest - len(ids) for ids in prompts], device=device)
        groups = torch.tensor([self._groups.of[i] for i in group], device=device)
        window = table.admit(group, [len(ids) for ids in prompts], offsets, fed, groups)
        tokens = torch.tensor([[0] * (fed - len(ids)) + list(ids[-fed:]) for ids in prompts], device=device)
        positions = torch.arange(longest - fed, longest, device=device) - offsets[:, None]
        pictures = self._shown.inputs(self._model, group, fed) if self._shown else {}
        return self._forward(table, window, tokens, positions.clamp(min=0), pictures)

    def _step(self, table: _Table) -> list[int]:
        device = self._model.device
        tokens = torch.tensor([[self.answers[i][-1]] for i in table.open], device=device)
        positions = torch.tensor(table.lengths, device=device)[:, None]
        return self._forward(table, table.advance(), tokens, positions)

    def _forward(
        self,
        table: _Table,
        window: _Window,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        pictures: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The likeliest next token of every row of the window."""
        table.place.window = window
        self._groups.tell([self._groups.of[i] for i in table.open[window.rows]])
        out = self._model(
            input_ids=tokens,
            attention_mask=table.mask[window.rows, window.start : window.at + tokens.shape[1]],
            past_key_values=table,
            use_cache=True,
            **self._known(position_ids=positions, logits_to_keep=1),
            **(pictures or {}),
        )
        likeliest: list[int] = out.logits[:, -1].float().argmax(-1).tolist()
        return likeliest

    def _close(self, table: _Table, tokens: Sequence[int], count: int) -> None:
        """Write down the tokens of the last ``count`` rows, and take out of the table those that ended."""
        first = len(table.open) - count
        answers = [self.answers[i] for i in table.open[first:]]
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
        by_text = self._ended(answers)
        closed = [
            first + row
            for row, answer in enumerate(answers)
            if by_text[row] or answer[-1] in self._ends or len(answer) == self._most
        ]
        self._finished.update(table.open[row] for row in closed)
        table.remove(closed)
        answered(len(closed))

    @torch.inference_mode()
    def _prefixes(self, starts: Sequence[Sequence[int]], longest: int) -> Prefix:
        """The prefix of every group; ``starts`` are their tokens, equally many."""
        step = max(1, self._prefill_tokens // len(starts[0]))
        prefixes: list[Prefix] = []
        for first in range(0, len(starts), step):
            part = starts[first : first + step]
            self._groups.tell(range(first, first + len(part)))
            prefixes.append(self._prefix_cache(part, longest))
        if len(prefixes) == 1:
            return prefixes[0]
        layers = zip(*prefixes, strict=True)
        return [
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer])) for layer in layers
        ]

    def _prefix_cache(self, starts: Sequence[Sequence[int]], longest: int) -> Prefix:
        """What is in the cache that the model itself makes of some rows of tokens.

        Args:
            longest: most tokens of a row. A window of more never moves, so that such a layer keeps every token.
        """
        tokens = torch.tensor([list(ids) for ids in starts], device=self._model.device)
        out = self._model(input_ids=tokens, use_cache=True, **self._known(logits_to_keep=1))
        cache: Any = getattr(out, "past_key_values", None)
        if cache is None:
            raise NoTableError(alone=getattr(out, "cache_params", None) is None)
        if type(cache) is not DynamicCache or not all(
            _keeps_all(layer, tokens.shape, longest) for layer in cache.layers
        ):
            raise NoTableError(alone=False)
        own = type(self._model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
        if own and not reads_in_order(self._model):
            raise NoTableError(alone=False)  # it needs other inputs than these at some step
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _known(self, **inputs: Any) -> dict[str, Any]:
        """Those of the inputs that the model takes."""
        return {name: value for name, value in inputs.items() if name in self._accepted}


@dataclass(frozen=True)
class _Window:
    """The part of the table that a forward pass sees: it reads columns from ``start`` and writes from ``at`` on."""

    rows: slice
    start: int
    at: int


class _Place:
    """Where the next forward pass reads and writes.

    A table and its layers share it, and the layers know no more of the table: in a circle of references, tables of
    gigabytes would stay until Python's collector comes by.
    """

    def __init__(self) -> None:
        self.window = _Window(slice(0, 0), 0, 0)


class _Table(Cache):  # type: ignore[misc]
    """Keys and values of the open rows, which are the first ones, and which all end at the same column.

    Attributes:
        open: which prompt each row is of.
        lengths: tokens of each row, prompt and answer.
        mask: int64 [rows, columns], 1 where a row has a token.
        place: what the next forward pass sees.

    Keys and values of a layer are on that layer's device, all else is on the model's first.
    """

    def __init__(self, prefix: Prefix, rows: int, device: torch.device) -> None:
        self.place = _Place()
        super().__init__(layers=[_TableLayer(self.place, keys, values, rows) for keys, values in prefix])
        self.open: list[int] = []
        self.lengths: list[int] = []
        keys, _ = prefix[0]
        self.mask = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self._end = 0
        self._several = keys.shape[0] > 1

    def admit(
        self, numbers: Sequence[int], lengths: Sequence[int], offsets: torch.Tensor, fed: int, groups: torch.Tensor
    ) -> _Window:
        """Rows for prompts of these lengths, the longest first; all but the ``fed`` last columns hold the prefix.

        ``offsets``: int64 [prompts], by how much each is shorter than the first; ``groups``: int64 [prompts].
        """
        longest = lengths[0]
        if not self.open:
            self._end = 0
            self._make_room(longest)
            self._end = longest
        rows, start = slice(len(self.open), len(self.open) + len(numbers)), self._end - longest
        self.mask[rows] = 0
        if self._several:  # one model's NaN, left where another's row has no token, would be in that one's sums
            for layer in self.layers:
                layer.clear(rows)
        self.mask[rows, start : self._end] = (torch.arange(longest, device=offsets.device) >= offsets[:, None]).long()
        if longest > fed:
            source = (torch.arange(longest - fed, device=offsets.device) - offsets[:, None]).clamp(min=0)
            for layer in self.layers:
                layer.copy_prefix(rows, slice(start, self._end - fed), source, groups)
        self.open.extend(numbers)
        self.lengths.extend(lengths)
        return _Window(rows, start, self._end - fed)

    def advance(self) -> _Window:
        """One more column for every open row."""
        self._make_room(1)
        start = self._end - max(self.lengths)
        self.mask[: len(self.open), self._end] = 1
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return _Window(slice(0, len(self.open)), start, self._end - 1)

    def remove(self, rows: Sequence[int]) -> None:
        """Take out rows, in ascending order: the last ones that stay move into the places of those."""
        if not rows:
            return
        gone, left = set(rows), len(self.open) - len(rows)
        to = [row for row in rows if row < left]
        movers = [row for row in range(left, len(self.open)) if row not in gone]
        if to:
            start = self._end - max(self.lengths)
            at, of = (torch.tensor(indices, device=self.mask.device) for indices in (to, movers))
            self.mask[at] = self.mask[of]
            for layer in self.layers:
                layer.move(of, at, slice(start, self._end))
        for place, mover in zip(to, movers, strict=True):
            self.open[place], self.lengths[place] = self.open[mover], self.lengths[mover]
        del self.open[left:], self.lengths[left:]

    def _make_room(self, columns: int) -> None:
        """Have so many columns right of the end: by moving what is in use to the left, or by a larger table."""
        if self._end + columns <= self.mask.shape[1]:
            return
        used = slice(self._end - max(self.lengths, default=0), self._end)
        width = used.stop - used.start
        if width + columns + _COLUMNS // 2 <= self.mask.shape[1]:
            _move_left(self.mask, used, -1)
            for layer in self.layers:
                layer.move_left(used)
        else:
            wide = width + columns + _COLUMNS
            self.mask = _widened(self.mask, wide, used, -1)
            for layer in self.layers:
                layer.widen(wide, used)
        self._end = width


class _TableLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [rows, heads, columns, width]; the prefix's, [groups, heads, tokens, width]."""

    is_sliding = False

    def __init__(self, place: _Place, prefix_keys: torch.Tensor, prefix_values: torch.Tensor, rows: int) -> None:
        super().__init__()
        self._place, self._prefix = place, (prefix_keys, prefix_values)
        # Zeros, because nothing that is not finite may stand where no row has a token: 0 times NaN is NaN.
        self.keys, self.values = (part.new_zeros(rows, part.shape[1], 0, part.shape[3]) for part in self._prefix)
        self.is_initialized = True

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        window = self._place.window
        end = window.at + keys.shape[2]
        self.keys[window.rows, :, window.at : end] = keys
        self.values[window.rows, :, window.at : end] = values
        return self.keys[window.rows, :, window.start : end], self.values[window.rows, :, window.start : end]

    def get_seq_length(self) -> int:
        return self._place.window.at - self._place.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There from the start."""

    def copy_prefix(self, rows: slice, columns: slice, source: torch.Tensor, groups: torch.Tensor) -> None:
        """``source``: int64 [rows, columns], the token of the prefix of the row's group that goes there."""
        groups, source = groups.to(self.keys.device), source.to(self.keys.device)
        for part, prefix in zip((self.keys, self.values), self._prefix, strict=True):
            part[rows, :, columns] = prefix[groups[:, None], :, source].transpose(1, 2)

    def clear(self, rows: slice) -> None:
        for part in (self.keys, self.values):
            part[rows] = 0

    def move(self, rows: torch.Tensor, to: torch.Tensor, columns: slice) -> None:
        rows, to = rows.to(self.keys.device), to.to(self.keys.device)
        for part in (self.keys, self.values):
            part[to, :, columns] = part[rows, :, columns]

    def move_left(self, used: slice) -> None:
        for part in (self.keys, self.values):
            _move_left(part, used, -2)

    def widen(self, columns: int, used: slice) -> None:
        self.keys, self.values = (_widened(part, columns, used, -2) for part in (self.keys, self.values))


def _move_left(part: torch.Tensor, used: slice, dim: int) -> None:
    """Put the columns in use first, where they are: a new table takes two to three times as long, most of it for memory
    that the system has to clear. What lies right of them is written before it is read.
    """
    for at in range(used.start, used.stop, used.start):  # pieces that do not overlap where they go
        piece = part.narrow(dim, at, min(used.start, used.stop - at))
        part.narrow(dim, at - used.start, piece.shape[dim]).copy_(piece)


def _widened(part: torch.Tensor, columns: int, used: slice, dim: int) -> torch.Tensor:
    """Zeros, so many columns, that begin with those in use."""
    width = used.stop - used.start
    shape = list(part.shape)
    shape[dim] = columns
    wider = part.new_zeros(shape)
    wider.narrow(dim, 0, width).copy_(part.narrow(dim, used.start, width))
    return wider


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share; one at least is left to each, to go on from."""
    low, high = min(map(list, prompts)), max(map(list, prompts))  # what these two share, all that lie between share
    same = next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    return min(same, min(map(len, prompts)) - 1)


def _keeps_all(layer: Any, made_of: Sequence[int], longest: int) -> bool:
    """Whether a layer of a cache made of so many rows and tokens holds each of them, and will go on to do so."""
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.sliding_window <= longest:
            return False
    elif type(layer) is not DynamicLayer:
        return False
    return bool(layer.is_initialized) and all(
        part.ndim == 4 and [part.shape[0], part.shape[2]] == list(made_of) for part in (layer.keys, layer.values)
    )
