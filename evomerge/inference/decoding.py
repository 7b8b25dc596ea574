"""Greedy decoding of many prompts with continuous batching: rows that finish make room for waiting prompts.

``model.generate`` computes a batch until its slowest row finishes, copies the whole KV cache at every step, and
computes few-shot examples again for every prompt. Here the cache is one table of keys and values, written in place:

- The prefix that all prompts share is computed once and copied to rows.
- A finished row is replaced by the last row, so that only open rows are computed. Free rows are filled again in groups,
  with prompts of similar lengths.
- Every row ends at the same column. Each row is thus padded only on the left, as in ``generate``, and positions that a
  model derives from distances (ALiBi) are right as well.

A row attends only to its own tokens. Other rows affect the order of summation and thus the last bits, nothing else.
Rows may even belong to several models that share their modules, if these are told the groups of the rows before each
forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from evomerge.inference.image_tokens import PictureRows, reads_in_order
from evomerge.inference.progress import report_answered

_COLUMNS = 64
"""The table grows by this many columns at a time, since growing it means copying it or moving the used part."""

_PREFILL_TOKENS, _PREFILL_TOKENS_CPU = 8192, 1024
"""The maximum number of prompt tokens in one forward pass: a layer's activations need far more memory than its keys and
values. On a CPU the limit keeps activations in the CPU's cache: a model with 135 M parameters answered 60 prompts of 55
tokens in 6/7 of the time.
"""

_REFILL = 4
"""Prompts wait until a quarter of the rows is free: a prefill of few prompts takes about as long as one of many."""


class NoTableError(Exception):
    """The model's cache does not hold the keys and values of every token, so it cannot be replaced by a table.

    Attributes:
        alone: whether it has no cache of any kind that transformers knows. Such a state is not kept separate by row:
            RWKV's mixes rows, and treats padding as text.
    """

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone


Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [groups, heads, tokens, width], for the tokens that a group's prompts begin with."""


@dataclass(frozen=True)
class Groups:
    """Groups of prompts for different models, which differ in what the shared modules compute for a row.

    Attributes:
        of: the group of each prompt; groups are counted from 0, and none is empty.
        tell: called with the group of every row before each forward pass.
    """

    of: Sequence[int]
    tell: Callable[[Sequence[int]], None] = field(default=lambda rows: None)


class Decoder:
    """Greedy answers of a model to prompts, in a table of rows.

    Args:
        model: a transformers model in eval mode.
        prompts: token ids, at least one each.
        most: the maximum number of tokens of an answer.
        ends: end tokens; each is the last token of its answer.
        ended: says which of some answers end because of their text.
        groups: the groups of the prompts; None if one model answers them all.
        shown: pictures of the prompts; None if there are none.

    Attributes:
        answers: the tokens so far of each prompt's answer.

    Raises:
        NoTableError: ``model.generate`` must be used instead.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        most: int,
        ends: frozenset[int],
        ended: Callable[[Sequence[Sequence[int]]], Sequence[bool]],
        groups: Groups | None = None,
        shown: PictureRows | None = None,
    ) -> None:
        self._shown = shown
        self._model, self._prompts, self._most, self._ends, self._ended = model, prompts, most, ends, ended
        self._groups = groups or Groups([0] * len(prompts))
        self.answers: list[list[int]] = [[] for _ in prompts]
        # Longest first: a prompt that joins later then always fits left of the column that is written next.
        self._order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        self._finished: set[int] = set()
        self._accepted = inspect.signature(model.forward).parameters
        self._prefill_tokens = _PREFILL_TOKENS_CPU if model.device.type == "cpu" else _PREFILL_TOKENS
        of = self._groups.of
        members = [[prompts[i] for i in range(len(prompts)) if of[i] == group] for group in range(max(of) + 1)]
        self._given: int = getattr(model, "prefix_length", 0)  # length of a soft prefix, which has only keys
        self._shared = min(map(_common, members))  # the same number for all groups, so that one batch computes them
        if shown:  # pictures all have the same token, whatever their content
            token = model.config.image_token_id
            self._shared = min(self._shared, *(shown.text_before(i, token) for i in range(len(prompts))))
        starts = [group_prompts[0][: max(self._shared, 1)] for group_prompts in members]
        self._prefix = self._prefixes(starts, max(map(len, prompts)) + most)

    @torch.inference_mode()
    def run(self, rows: int) -> None:
        """Answer the prompts that are still open, at most ``rows`` at a time.

        Raises:
            torch.OutOfMemoryError: too many rows. It can be called again with fewer: finished answers are kept.
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
        # A shorter prompt recomputes that many shared tokens; a soft prefix, which no forward pass makes, cannot be.
        least = longest - (self._shared - self._given) if self._given else 0
        return [i for i in group if len(self._prompts[i]) >= least]

    def _admit(self, table: _Table, group: Sequence[int]) -> list[int]:
        """Put prompts into the last rows of the table, and return the first token of each answer.

        All prompts of a group end at the same column, and are computed from the first column at which one of them
        leaves the common prefix. Left of it, rows are copies of the prefix, each from its own offset.
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
        """The most likely next token of every row of the window."""
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
        """Record the tokens of the last ``count`` rows, and remove finished rows from the table."""
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
        report_answered(len(closed))

    @torch.inference_mode()
    def _prefixes(self, starts: Sequence[Sequence[int]], longest: int) -> Prefix:
        """The prefix of every group; ``starts`` are its tokens, the same number for each."""
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
        """The content of the model's own cache for these rows of tokens.

        Args:
            longest: the maximum number of tokens of a row. A sliding window of more never moves, so such a layer keeps
                every token.
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
            raise NoTableError(alone=False)  # some step needs other inputs than these
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _known(self, **inputs: Any) -> dict[str, Any]:
        """The inputs that the model accepts."""
        return {name: value for name, value in inputs.items() if name in self._accepted}


@dataclass(frozen=True)
class _Window:
    """The part of the table that a forward pass uses: it reads columns from ``start`` and writes from ``at`` on."""

    rows: slice
    start: int
    at: int


class _Place:
    """Where the next forward pass reads and writes.

    A table and its layers share this object, and layers have no other reference to the table: a reference cycle would
    keep tables of gigabytes alive until Python's garbage collector runs.
    """

    def __init__(self) -> None:
        self.window = _Window(slice(0, 0), 0, 0)


class _Table(Cache):  # type: ignore[misc]
    """Keys and values of the open rows, which are the first ones, and which all end at the same column.

    Attributes:
        open: the prompt of each row.
        lengths: tokens of each row, prompt and answer.
        mask: int64 [rows, columns], 1 for columns in which a row has a token.
        place: what the next forward pass uses.

    Keys and values of a layer are on that layer's device, everything else on the model's first device.
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
        """Add rows for prompts of these lengths, longest first; all but the last ``fed`` columns hold the prefix.

        ``offsets``: int64 [prompts], how much shorter each is than the first; ``groups``: int64 [prompts].
        """
        longest = lengths[0]
        if not self.open:
            self._end = 0
            self._make_room(longest)
            self._end = longest
        rows, start = slice(len(self.open), len(self.open) + len(numbers)), self._end - longest
        self.mask[rows] = 0
        if self._several:  # NaN left by one model in unused columns would enter another model's sums
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
        """Add one more column to every open row."""
        self._make_room(1)
        start = self._end - max(self.lengths)
        self.mask[: len(self.open), self._end] = 1
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return _Window(slice(0, len(self.open)), start, self._end - 1)

    def remove(self, rows: Sequence[int]) -> None:
        """Remove rows, given in ascending order; the last remaining rows move into their places."""
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
        """Ensure this many columns right of the end, by moving the used part to the left or by enlarging the table."""
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
    """One layer's keys and values, [rows, heads, columns, width]; the prefix's are [groups, heads, tokens, width]."""

    is_sliding = False

    def __init__(self, place: _Place, prefix_keys: torch.Tensor, prefix_values: torch.Tensor, rows: int) -> None:
        super().__init__()
        self._place, self._prefix = place, (prefix_keys, prefix_values)
        # Zeros, because unused columns must hold finite values: 0 times NaN is NaN.
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
        """Nothing to do: the tensors exist from the start."""

    def copy_prefix(self, rows: slice, columns: slice, source: torch.Tensor, groups: torch.Tensor) -> None:
        """``source``: int64 [rows, columns], the index of the prefix token of the row's group for each column."""
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
    """Move the used columns to the front, in place: a new table takes two to three times as long, mostly because the
    system has to clear its memory. Columns to the right of them are written before they are read.
    """
    for at in range(used.start, used.stop, used.start):  # in pieces that do not overlap their destination
        piece = part.narrow(dim, at, min(used.start, used.stop - at))
        part.narrow(dim, at - used.start, piece.shape[dim]).copy_(piece)


def _widened(part: torch.Tensor, columns: int, used: slice, dim: int) -> torch.Tensor:
    """Zeros with this many columns, beginning with those in use."""
    width = used.stop - used.start
    shape = list(part.shape)
    shape[dim] = columns
    wider = part.new_zeros(shape)
    wider.narrow(dim, 0, width).copy_(part.narrow(dim, used.start, width))
    return wider


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, leaving at least one token of each prompt to compute."""
    low, high = min(map(list, prompts)), max(map(list, prompts))  # all prompts share what these two do
    same = next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    return min(same, min(map(len, prompts)) - 1)


def _keeps_all(layer: Any, made_of: Sequence[int], longest: int) -> bool:
    """Whether a layer of a cache for these rows and tokens holds every token, and will continue to do so."""
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.sliding_window <= longest:
            return False
    elif type(layer) is not DynamicLayer:
        return False
    return bool(layer.is_initialized) and all(
        part.ndim == 4 and [part.shape[0], part.shape[2]] == list(made_of) for part in (layer.keys, layer.values)
    )
