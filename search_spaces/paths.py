"""Paths through layers, shared by the spaces over data flow.

A path is a list of hops, each a layer of a pool of models. Its genes determine the sequence of layers (with one of the
encodings of ``path_encodings``) and how much each hop is scaled.
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
"""The limit for a space. A search of a few thousand candidates cannot learn more, and the store holds all numbers."""

EncodingName = Literal["indicators", "integers", "blocks", "pruning"]

_ENCODINGS_OF = {  # settings without meaning in other encodings
    "repeats": ("indicators",),
    "segments": ("blocks",),
    "bits": ("indicators", "pruning"),
    "start": ("indicators", "pruning"),
}


Count = Annotated[int, Field(gt=0, le=10_000)]
"""A number of layers or segments; no model has a tenth of this limit."""


class PathSettings(SpaceSettings):
    """The settings of paths in the ``space:`` section of a search file.

    Args:
        encoding: how a genome encodes a path. "indicators", as in the paper: all layers of A, then of the others, and
            the whole row again; each position of this row has a number, and is on the path iff it is above 0.
            "integers": a number for each position of the path, which skips it or names a layer. "blocks": a few
            segments, each a run of layers of one model: which model, from which layer, how many. "pruning": like
            "indicators", for A only and once, so that a path is A without some of its layers: a smaller and faster
            model.
        repeats: how often the row of "indicators" is repeated; 3 by default.
        segments: the number of segments for "blocks"; 4 by default.
        bits: make the slots of "indicators" and "pruning" choices of off and on, for optimizers that support choices.
        start: the defaults of the slots of "indicators" and "pruning", where an optimizer with `x0: default` starts.
            Those of A, once, are two default step sizes of CMA-ES above the threshold: on with a probability of 98%.
            All others are "sparse", two step sizes below it (2%), or as in the "paper" at the threshold (50%). With the
            latter, two models of 32 layers begin with paths of about 110 hops, which ``max_hops`` cuts, so that every
            early candidate has the maximum length and is far from A; with "sparse" they are A with a few changes.
        max_hops: the maximum length of a path. By default twice the number of layers of A, or that number for
            "pruning".
        keep_ends: the first layer of A is always the first hop, and its last layer the last, as in the paper.
        scale: "hop": a number for each slot of the encoding. "transition": a number for each pair of layers that may
            follow each other, M x M of them for M layers (the paper's W). "none": hops are not scaled.
        scaling: what is scaled: "stream", the whole hidden state before the hop, or "update", what the hop adds to it.
            The number of a segment applies to the stream that enters it, or to what each of its hops adds.
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
        """Reject settings that contradict each other or the numbers of layers; model A is the first of ``depths``.

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
        """The maximum length of a path if model A has this many layers."""
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
    """The numbers of a genome that encode a path and its scales.

    Args:
        settings: the settings of the space.
        depths: the number of layers of each model, by its name in the names of parameters; model A first.

    Raises:
        InputError: the settings contradict each other or do not fit the models.
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
            picks = [self._encoding.single_hop(inner)]
        return picks, list(self._scales(picks, scales))

    def point(self, path: Sequence[int]) -> list[float] | None:
        """Numbers that encode this path, unscaled; None if there are none."""
        inner = self._encoding.numbers_of(path if self._ends is None else path[1:-1])
        if inner is None:
            return None
        numbers = inner + [1.0] * self._scales_count()
        return numbers if [pick.layer for pick in self.read(numbers)[0]] == list(path) else None

    def with_fixed_ends(self, path: Sequence[int]) -> tuple[int, ...]:
        """The path with its first and last hop corrected if the ends of A are fixed."""
        return tuple(path) if self._ends is None else (self._ends[0], *path[1:-1], self._ends[1])

    def _encode(self, depths: Mapping[str, int]) -> Encoding:
        settings = self._settings
        layers = next(iter(depths.values()))
        max_hops, start = (self.most - 2, range(1, layers - 1)) if self._ends else (self.most, range(layers))
        match settings.encoding:
            case "integers":
                return Integers(len(self._labels), max_hops, start)
            case "blocks":
                return Blocks(depths, settings.segments or 4, max_hops, start)
            case "pruning":
                row = list(self._row(depths, 1))
                row = row[1:-1] if self._ends else row
            case "indicators":
                row = list(self._row(depths, settings.repeats or 3))
                # The first slot is the first hop itself; the last hop comes after the row.
                row = row[1:] if self._ends else row
        off = 0.0 if settings.start == "paper" else -ON
        return Indicators(row, max_hops, start, off=off, bits=bool(settings.bits))

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
        """The scale of each hop. Nothing precedes the first one, so it has no transition."""
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
