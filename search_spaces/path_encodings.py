"""Encodings of a path, that is, of a sequence of layers, as bounded numbers.

Encodings identify layers by index: 0 to M - 1 for all layers of model A, then those of the next model, and so on. They
describe what lies between the fixed ends of a path, or the whole path if its ends are not fixed; ``paths`` does the
rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from evomerge.genome import Parameter

ON = 2 / 3
"""Two default step sizes above the threshold: CMA-ES starts with 1/6 of a range, and a slot's range is 2 wide."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A position of an encoding that can put layers on the path; its other parameters (a scale) are named after it."""

    name: str
    group: str


@dataclass(frozen=True, slots=True)
class SlotLayer:
    """One hop of a path: the slot that put it there and the layer, both by index."""

    slot: int
    layer: int


class Encoding(Protocol):
    """Bounded numbers, and the paths that they encode."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    def picks(self, numbers: Sequence[float]) -> list[SlotLayer]:
        """The path that the numbers encode; it may be empty, and is never longer than the limit."""
        ...

    def single_hop(self, numbers: Sequence[float]) -> SlotLayer:
        """The only hop of the path if the numbers encode an empty path."""
        ...

    def numbers_of(self, path: Sequence[int]) -> list[float] | None:
        """Numbers that encode this path if it is within the limit; None if there are none."""
        ...


class Indicators:
    """A slot for each layer of a long row of layers, used iff its number is above 0.

    Akiba et al. (arXiv 2403.13187, section 3.2): all layers of A, then those of B, ..., and the whole row r times. If
    more slots are on than the path may have, those with the largest numbers stay, and the first on ties.

    Args:
        row: a slot for each position of the row, and its layer.
        max_hops: the maximum length of a path.
        start: the path that the defaults encode, with its slots at ``ON``.
        off: the default of all other slots.
        bits: numbers are choices of "off" (0) and "on" (1).
    """

    def __init__(
        self, row: Sequence[tuple[Slot, int]], max_hops: int, start: Sequence[int], *, off: float, bits: bool
    ) -> None:
        self.slots = [slot for slot, _ in row]
        self._layers = [layer for _, layer in row]
        self._max_hops = max_hops
        self._off, self._on = (0.0, 1.0) if bits else (off, ON)
        defaults = _known(self.numbers_of(start))
        self.parameters = [
            Parameter(f"{slot.name}.on", 0.0, 1.0, default, "choice", slot.group, ("off", "on"))
            if bits
            else Parameter(f"{slot.name}.on", -1.0, 1.0, default, group=slot.group)
            for slot, default in zip(self.slots, defaults, strict=True)
        ]

    def picks(self, numbers: Sequence[float]) -> list[SlotLayer]:
        used = [slot for slot, number in enumerate(numbers) if number > 0]
        strongest = sorted(used, key=lambda slot: -numbers[slot])[: self._max_hops]
        return [SlotLayer(slot, self._layers[slot]) for slot in sorted(strongest)]

    def single_hop(self, numbers: Sequence[float]) -> SlotLayer:
        """The slot closest to being on."""
        slot = max(range(len(numbers)), key=numbers.__getitem__)
        return SlotLayer(slot, self._layers[slot])

    def numbers_of(self, path: Sequence[int]) -> list[float] | None:
        numbers = [self._off] * len(self._layers)
        slot = 0
        for layer in path:
            try:
                slot = self._layers.index(layer, slot)
            except ValueError:
                return None
            numbers[slot] = self._on
            slot += 1
        return numbers


class Integers:
    """A whole number for each position of the path: 0 skips it, i is layer i - 1."""

    def __init__(self, layers: int, max_hops: int, start: Sequence[int]) -> None:
        self.slots = [_slot(f"slots.{i + 1}") for i in range(max_hops)]
        self.parameters = [
            Parameter(f"{slot.name}.layer", 0.0, float(layers), default, "int", slot.group)
            for slot, default in zip(self.slots, _known(self.numbers_of(start)), strict=True)
        ]

    def picks(self, numbers: Sequence[float]) -> list[SlotLayer]:
        return [SlotLayer(slot, round(number) - 1) for slot, number in enumerate(numbers) if round(number) > 0]

    def single_hop(self, numbers: Sequence[float]) -> SlotLayer:
        """The first layer of A."""
        return SlotLayer(0, 0)

    def numbers_of(self, path: Sequence[int]) -> list[float] | None:
        if len(path) > len(self.slots):
            return None
        return [layer + 1.0 for layer in path] + [0.0] * (len(self.slots) - len(path))


class Blocks:
    """Segments, each a run of consecutive layers of one model: which model, from which layer, how many.

    A run ends at its model's last layer, and starts there if the model has no layer with the given index. If the
    segments are longer than the limit, the path is cut at its end. Surplus segments split the longest runs of a path,
    so that each part can be moved.

    Args:
        depths: the number of layers of each model, by name.
    """

    def __init__(self, depths: Mapping[str, int], segments: int, max_hops: int, start: Sequence[int]) -> None:
        self._depths = list(depths.values())
        self._first = [0, *accumulate(self._depths)][:-1]  # first layer of each model
        self._max_hops = max_hops
        self.slots = [_slot(f"segments.{i + 1}") for i in range(segments)]
        deepest = max(self._depths)
        names = tuple(depths)
        defaults = iter(_known(self.numbers_of(start)))
        self.parameters = []
        for slot in self.slots:
            if len(names) > 1:  # with a single model there is no choice
                self.parameters.append(
                    Parameter(f"{slot.name}.source", 0.0, len(names) - 1, next(defaults), "choice", slot.group, names)
                )
            self.parameters += [
                Parameter(f"{slot.name}.start", 0.0, deepest - 1, next(defaults), "int", slot.group),
                Parameter(f"{slot.name}.length", 0.0, min(deepest, max_hops), next(defaults), "int", slot.group),
            ]

    def picks(self, numbers: Sequence[float]) -> list[SlotLayer]:
        picks = []
        for slot in range(len(self.slots)):
            model, start, length = self._segment(numbers, slot)
            stop = min(start + length, self._depths[model])
            picks += [SlotLayer(slot, self._first[model] + layer) for layer in range(start, stop)]
        return picks[: self._max_hops]

    def single_hop(self, numbers: Sequence[float]) -> SlotLayer:
        """The first layer of the first segment."""
        model, start, _ = self._segment(numbers, 0)
        return SlotLayer(0, self._first[model] + start)

    def numbers_of(self, path: Sequence[int]) -> list[float] | None:
        runs = self._runs(path)
        while len(runs) < len(self.slots) and any(len(run) > 1 for run in runs):
            longest = max(runs, key=len)
            at, half = runs.index(longest), len(longest) // 2
            runs[at : at + 1] = [longest[:half], longest[half:]]
        if len(runs) > len(self.slots):
            return None
        numbers: list[float] = []
        for run in [*runs, *[range(0)] * (len(self.slots) - len(runs))]:
            model = self._model(run.start)
            numbers += [float(model)] if len(self._depths) > 1 else []
            numbers += [float(run.start - self._first[model]), float(len(run))]
        return numbers

    def _segment(self, numbers: Sequence[float], slot: int) -> tuple[int, int, int]:
        size = len(numbers) // len(self.slots)
        *choice, start, length = (round(number) for number in numbers[slot * size : (slot + 1) * size])
        model = choice[0] if choice else 0
        return model, min(start, self._depths[model] - 1), length

    def _runs(self, path: Sequence[int]) -> list[range]:
        runs: list[range] = []
        for layer in path:
            if runs and layer == runs[-1].stop and layer not in self._first:
                runs[-1] = range(runs[-1].start, layer + 1)
            else:
                runs.append(range(layer, layer + 1))
        return runs

    def _model(self, layer: int) -> int:
        return bisect_right(self._first, layer) - 1


def _slot(name: str) -> Slot:
    return Slot(name, name)


def _known(numbers: list[float] | None) -> list[float]:
    """The numbers of a path that every encoding can express: A from one layer to another."""
    assert numbers is not None
    return numbers
