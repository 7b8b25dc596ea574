"""How numbers say a path: encodings of a sequence of layers as bounded numbers.

An encoding knows layers as numbers alone: 0 to M - 1, all layers of model A, then those of the next model, and so on.
It says what lies between the fixed ends of a path, or all of it where there are none; ``paths`` does the rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from evomerge.genome import Parameter

ON = 2 / 3
"""Two default steps above the threshold: CMA-ES starts with a step of 1/6 of a range, and that of a slot is 2 wide."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of an encoding that puts layers on the path; what else belongs to it (a scale) is named after it."""

    name: str
    group: str


@dataclass(frozen=True, slots=True)
class SlotLayer:
    """One hop of a path: the slot that put it there and the layer, both by number."""

    slot: int
    layer: int


class Encoding(Protocol):
    """Bounded numbers, and the paths that they say."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def parameters(self) -> Sequence[Parameter]: ...

    def picks(self, numbers: Sequence[float]) -> list[SlotLayer]:
        """The path that the numbers say; it may be empty, and is never longer than there is room for."""
        ...

    def only(self, numbers: Sequence[float]) -> SlotLayer:
        """The one hop that stands for an empty path."""
        ...

    def numbers_of(self, path: Sequence[int]) -> list[float] | None:
        """Numbers that say this path where there is room for it; None where no numbers do."""
        ...


class Indicators:
    """A slot for each layer of a long row of layers, used iff its number is above 0.

    Akiba et al. (arXiv 2403.13187, section 3.2): all layers of A, then those of B, ..., and the whole again, r times.
    Where more slots are on than there is room for, those with the largest numbers stay, the first of equal ones.

    Args:
        row: a slot for each place of the row, and its layer.
        room: the longest path.
        start: the path that the defaults lead to, its slots at ``ON``.
        off: the default of all other slots.
        bits: numbers are choices of "off" (0) and "on" (1).
    """

    def __init__(
        self, row: Sequence[tuple[Slot, int]], room: int, start: Sequence[int], *, off: float, bits: bool
    ) -> None:
        self.slots = [slot for slot, _ in row]
        self._layers = [layer for _, layer in row]
        self._room = room
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
        strongest = sorted(used, key=lambda slot: -numbers[slot])[: self._room]
        return [SlotLayer(slot, self._layers[slot]) for slot in sorted(strongest)]

    def only(self, numbers: Sequence[float]) -> SlotLayer:
        """The slot nearest to being on."""
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
    """A whole number for each place of the path: 0 skips it, i is layer i - 1."""

    def __init__(self, layers: int, room: int, start: Sequence[int]) -> None:
        self.slots = [_slot(f"slots.{i + 1}") for i in range(room)]
        self.parameters = [
            Parameter(f"{slot.name}.layer", 0.0, float(layers), default, "int", slot.group)
            for slot, default in zip(self.slots, _known(self.numbers_of(start)), strict=True)
        ]

    def picks(self, numbers: Sequence[float]) -> list[SlotLayer]:
        return [SlotLayer(slot, round(number) - 1) for slot, number in enumerate(numbers) if round(number) > 0]

    def only(self, numbers: Sequence[float]) -> SlotLayer:
        """The first layer of A."""
        return SlotLayer(0, 0)

    def numbers_of(self, path: Sequence[int]) -> list[float] | None:
        if len(path) > len(self.slots):
            return None
        return [layer + 1.0 for layer in path] + [0.0] * (len(self.slots) - len(path))


class Blocks:
    """Segments, each a run of layers that follow each other in one model: which model, from which layer, how many.

    A run ends with its model's last layer, and starts there where the model has no layer of that number. Where segments
    are longer than there is room for, the end of the path is cut. Segments that a path has no need of split its longest
    runs, so that each part of it can be moved.

    Args:
        depths: the number of layers of each model, by its name.
    """

    def __init__(self, depths: Mapping[str, int], segments: int, room: int, start: Sequence[int]) -> None:
        self._depths = list(depths.values())
        self._first = [0, *accumulate(self._depths)][:-1]  # layer of each model
        self._room = room
        self.slots = [_slot(f"segments.{i + 1}") for i in range(segments)]
        deepest = max(self._depths)
        names = tuple(depths)
        defaults = iter(_known(self.numbers_of(start)))
        self.parameters = []
        for slot in self.slots:
            if len(names) > 1:  # a choice of one is none
                self.parameters.append(
                    Parameter(f"{slot.name}.source", 0.0, len(names) - 1, next(defaults), "choice", slot.group, names)
                )
            self.parameters += [
                Parameter(f"{slot.name}.start", 0.0, deepest - 1, next(defaults), "int", slot.group),
                Parameter(f"{slot.name}.length", 0.0, min(deepest, room), next(defaults), "int", slot.group),
            ]

    def picks(self, numbers: Sequence[float]) -> list[SlotLayer]:
        picks = []
        for slot in range(len(self.slots)):
            model, start, length = self._segment(numbers, slot)
            stop = min(start + length, self._depths[model])
            picks += [SlotLayer(slot, self._first[model] + layer) for layer in range(start, stop)]
        return picks[: self._room]

    def only(self, numbers: Sequence[float]) -> SlotLayer:
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
    """The numbers of a path that every encoding can say: A from one layer to another."""
    assert numbers is not None
    return numbers
