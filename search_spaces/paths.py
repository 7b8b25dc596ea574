"""Paths through layers: what the spaces over data flow have in common.

A path is a list of hops, each a layer of a pool of models. Its genes say which layers come after each other (by one of
the encodings of ``path_encodings``) and by how much each hop is scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, FiniteFloat

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.recipes.stack import Scaling
from search_spaces.base import SpaceSettings
from search_spaces.path_encodings import ON, Blocks, Encoding, Indicators, Integers, Slot, SlotLayer

MAX_PARAMETERS = 10_000
"""Of a space. A search of some thousand candidates learns nothing of so many numbers, and a store holds them all."""

EncodingName = Literal["indicators", "integers", "blocks", "pruning"]

_ENCODINGS_OF = {  # settings that say nothing in other encodings
    "repeats": ("indicators",),
    "segments": ("blocks",),
    "bits": ("indicators", "pruning"),
    "start": ("indicators", "pruning"),
}


Count = Annotated[int, Field(gt=0, le=10_000)]
"""Of layers and segments; no model has a tenth of it."""


class PathSettings(SpaceSettings):
    """What ``space:`` of a search file says of paths.

    Args:
        encoding: how a genome says a path. "indicators": all layers of A, then of the others, and the whole again; a
            number for each place of this row, which is on the path iff the number is above 0 (the paper's). "integers":
            a number for each place of the path, which skips it or names a layer. "blocks": a few segments, each a run
            of layers of one model: which model, from which layer, how many. "pruning": as "indicators", of A alone and
            once, so that a path is A without some of its layers: a smaller and faster model.
        repeats: how often the row of "indicators" is laid out; 3 unless given.
        segments: of "blocks"; 4 unless given.
        bits: the slots of "indicators" and "pruning" are choices of off and on, for optimizers that know choices.
        start: the defaults of the slots of "indicators" and "pruning", where an optimizer with `x0: default` starts.
            Those of A, once, are two default steps of CMA-ES above the threshold: on with a chance of 98%. All others
            are "sparse", two steps below it (2%), or as in the "paper" on it (50%). From there two models of 32 layers
            begin with paths of some 110 hops, which ``max_hops`` cuts, so that every early candidate is as long as can
            be and far from A; from "sparse" they are A with a few changes.
        max_hops: the longest path. Twice the layers of A unless given, those of A for "pruning".
        keep_ends: the first layer of A always is the first hop, and its last layer the last, as in the paper.
        scale: "hop": a number for each slot of the encoding. "transition": a number for each pair of layers that may
            follow each other, M x M of them for M layers (the paper's W). "none": hops are not scaled.
        scaling: what is scaled: "stream", all of the hidden state before the hop, or "update", what the hop adds to it.
            A number of a segment is for the stream that enters it, or for what each of its hops adds.
        scale_bounds: the range of these numbers, which start at 1.
    """

    moves_layers: ClassVar[bool] = True

    encoding: EncodingName = "indicators"
    repeats: Count | None = None
    segments: Count | None = None
    bits: bool | None = None
    start: Literal["sparse", "paper"] | None = None
    max_hops: Count | None = None
    keep_ends: bool = True
    scale: Literal["none", "hop", "transition"] = "hop"
    scaling: Scaling = "stream"
    scale_bounds: tuple[FiniteFloat, FiniteFloat] = (0.5, 1.5)

    def check_path(self, depths: Mapping[str, int]) -> None:
        """Refuse settings that contradict each other, or the numbers of layers; model A is the first of ``depths``.

        Raises:
            InputError: naming the setting.
        """
        for name, encodings in _ENCODINGS_OF.items():
            if getattr(self, name) is not None and self.encoding not in encodings:
                problem = f"belongs to {' and '.join(encodings)}, and the encoding is {self.encoding}"
                raise InputError(f"space.{name}", problem, "Leave it out.")
        if self.bits and self.start is not None:
            raise InputError("space.start", "says where numbers begin, and bits are on or off", "Leave it out.")
        self._check_hops(depths)
        self._check_scales()
        self._check_count(depths)

    def hops(self, layers: int) -> int:
        """The longest path, where model A has so many layers."""
        return self.max_hops or layers * (1 if self.encoding == "pruning" else 2)

    def _check_hops(self, depths: Mapping[str, int]) -> None:
        (first, layers), *_ = depths.items()
        most = self.hops(layers)
        if self.keep_ends and layers < 2:
            problem = f"keeps the first and the last layer of {first}, which has only one"
            raise InputError("space.keep_ends", problem, "Set it to false.")
        if self.keep_ends and most < 3:
            hint = "Allow more, or set `keep_ends: false`."
            raise InputError("space.max_hops", f"is {most}, and the ends of {first} alone are 2 hops", hint)
        if self.encoding == "pruning":
            if most > layers:
                problem = f"is {most}; pruning takes away from the {layers} layers of {first}"
                raise InputError("space.max_hops", problem, "Use another encoding for longer paths.")
            return
        for name, depth in depths.items():
            if depth > most:
                raise InputError("space.max_hops", f"is {most}, but {name} alone is {depth} hops", "Allow more.")

    def _check_scales(self) -> None:
        low, high = self.scale_bounds
        place = "space.scale_bounds"
        if not low <= 1 <= high or low == high:
            raise InputError(place, f"are {low:g} and {high:g}; 1, which changes nothing, must lie between them")
        if self.scaling == "stream" and low <= 0:
            hint = "Raise the lower bound, or set `scaling: update`."
            raise InputError(place, f"begin at {low:g}; a stream can only be scaled by numbers above 0", hint)

    def _check_count(self, depths: Mapping[str, int]) -> None:
        every, pairs = sum(depths.values()), 0
        if self.scale == "transition":
            pairs = every**2
            if pairs > MAX_PARAMETERS:
                problem = f"makes {pairs:,} parameters of {every} layers; {MAX_PARAMETERS:,} is the limit"
                raise InputError("space.scale", problem, "Use `scale: hop`.")
        key, slots, genes = {
            "indicators": ("repeats", every * (self.repeats or 3), 1),
            "integers": ("max_hops", self.hops(next(iter(depths.values()))), 1),
            "blocks": ("segments", self.segments or 4, 3),
            "pruning": ("encoding", every, 1),
        }[self.encoding]
        if (count := slots * (genes + (self.scale == "hop")) + pairs) > MAX_PARAMETERS:
            raise InputError(f"space.{key}", f"makes about {count:,} parameters; {MAX_PARAMETERS:,} is the limit")


class PathGenes:
    """The numbers of a genome that say a path and its scales.

    Args:
        settings: of the space.
        depths: the number of layers of each model, by the name that it has in names of parameters; model A first.

    Raises:
        InputError: settings that contradict each other or the models.
    """

    def __init__(self, settings: PathSettings, depths: Mapping[str, int]) -> None:
        settings.check_path(depths)
        self._settings = settings
        self._labels = [f"{name}.{layer}" for name, depth in depths.items() for layer in range(depth)]
        layers = next(iter(depths.values()))
        self.most = settings.hops(layers)
        self._ends = (0, layers - 1) if settings.keep_ends else None
        self._encoding = self._encode(depths)
        self.slots = [*self._encoding.slots, *([Slot(e, e) for e in ("first", "last")] if self._ends else [])]
        self.parameters = [*self._encoding.parameters, *self._scale_parameters()]

    def read(self, numbers: Sequence[float]) -> tuple[list[SlotLayer], list[float]]:
        """The hops of the path and the scale of each."""
        cut = len(self._encoding.parameters)
        inner, scales = numbers[:cut], numbers[cut:]
        picks = self._encoding.picks(inner)
        if self._ends is not None:
            slots = len(self.slots)
            picks = [SlotLayer(slots - 2, self._ends[0]), *picks, SlotLayer(slots - 1, self._ends[1])]
        elif not picks:
            picks = [self._encoding.only(inner)]
        return picks, list(self._scales(picks, scales))

    def point(self, path: Sequence[int]) -> list[float] | None:
        """Numbers that say this path, unscaled; None where there are none."""
        inner = self._encoding.numbers_of(path if self._ends is None else path[1:-1])
        if inner is None:
            return None
        numbers = inner + [1.0] * self._scales_count()
        return numbers if [pick.layer for pick in self.read(numbers)[0]] == list(path) else None

    def ended(self, path: Sequence[int]) -> tuple[int, ...]:
        """The path with its first and last hop put in order where those of A are fixed."""
        return tuple(path) if self._ends is None else (self._ends[0], *path[1:-1], self._ends[1])

    def _encode(self, depths: Mapping[str, int]) -> Encoding:
        settings = self._settings
        layers = next(iter(depths.values()))
        room, start = (self.most - 2, range(1, layers - 1)) if self._ends else (self.most, range(layers))
        match settings.encoding:
            case "integers":
                return Integers(len(self._labels), room, start)
            case "blocks":
                return Blocks(depths, settings.segments or 4, room, start)
            case "pruning":
                row = list(self._row(depths, 1))
                row = row[1:-1] if self._ends else row
            case "indicators":
                row = list(self._row(depths, settings.repeats or 3))
                # The first slot is the first hop itself; the last hop comes after the row.
                row = row[1:] if self._ends else row
        off = 0.0 if settings.start == "paper" else -ON
        return Indicators(row, room, start, off=off, bits=bool(settings.bits))

    def _row(self, depths: Mapping[str, int], repeats: int) -> Iterator[tuple[Slot, int]]:
        for repeat in range(repeats):
            layers = iter(range(len(self._labels)))
            for name, depth in depths.items():
                group = f"{repeat + 1}.{name}"
                for layer in range(depth):
                    yield Slot(f"{group}.{layer}", group), next(layers)

    def _scales_count(self) -> int:
        return {"none": 0, "hop": len(self.slots), "transition": len(self._labels) ** 2}[self._settings.scale]

    def _scale_parameters(self) -> Iterator[Parameter]:
        low, high = self._settings.scale_bounds
        if self._settings.scale == "hop":
            for slot in self.slots:
                yield Parameter(f"{slot.name}.scale", low, high, 1.0, group=slot.group)
        elif self._settings.scale == "transition":
            for before in self._labels:
                for here in self._labels:
                    yield Parameter(f"{before}>{here}.scale", low, high, 1.0, group=f"{before}.scale")

    def _scales(self, picks: Sequence[SlotLayer], numbers: Sequence[float]) -> Iterator[float]:
        """The scale of each hop. Nothing comes before the first one, so it has no transition."""
        size = len(self._labels)
        for before, pick in zip([None, *picks], picks, strict=False):
            match self._settings.scale:
                case "none":
                    yield 1.0
                case "transition":
                    yield 1.0 if before is None else numbers[before.layer * size + pick.layer]
                case "hop":
                    within = before is not None and before.slot == pick.slot
                    yield 1.0 if within and self._settings.scaling == "stream" else numbers[pick.slot]
