"""Interprets the tensors that each kind of adapter stores for a module as changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from evomerge.checkpoints.adapter_changes import (
    Change,
    Hadamard,
    Kronecker,
    LowRank,
    OfExpert,
    OfExperts,
    Rotation,
    Rows,
    Scaled,
    Shift,
    Started,
    Vector,
)
from evomerge.checkpoints.adapter_settings import AGAIN, FOLD, STARTS, AdapterSettings
from evomerge.checkpoints.headers import TensorEntry
from evomerge.checkpoints.parts import Part
from evomerge.errors import InputError

Router = tuple[TensorEntry, int]
"""The router of an expert's module, and the index of the expert's row."""

TOKENS = ".token_adapter"
"""The suffix that PEFT appends to the name of a module of which only rows are trained."""

_ROWS = "trainable_tokens_delta"

TENSORS = (
    "lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "ia3_l",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
    "lokr_w2_b", "oft_R", "boft_R", "boft_s", "vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", _ROWS,
)  # fmt: skip
"""The tensor names of all kinds, without the name of their module."""


@dataclass(frozen=True)
class Held:
    """The content of an adapter's file for one module.

    Attributes:
        module: its name in the model.
        tensors: its tensors by kind; biases are under ``KIND.bias``.
        has_bias: whether the model's module has a bias.
    """

    module: str
    tensors: Mapping[str, TensorEntry]
    has_bias: bool

    @property
    def weight(self) -> str:
        """The name of the module's weight."""
        return f"{self.module}.weight"

    def matrices(self, settings: AdapterSettings, *names: str, optional: Sequence[str] = ()) -> list[TensorEntry]:
        """Some of its tensors, which must have two dimensions.

        Args:
            optional: names of other tensors that are allowed.

        Raises:
            InputError: one is missing or has other dimensions, or there are unexpected ones.
        """
        entries = [self.tensors.get(name) for name in names]
        found = [entry for entry in entries if entry is not None and len(entry.shape) == 2]
        if len(found) < len(names) or not self.tensors.keys() <= {*names, *optional}:
            raise self.wrong(settings, "a pair of matrices" if len(names) == 2 else "those of its kind")
        return found

    def wrong(self, settings: AdapterSettings, wanted: str) -> InputError:
        """The error for tensors other than those ``wanted``."""
        problem = f"the adapter's tensors for {self.module} are not {wanted}: {', '.join(self.tensors)}"
        return InputError(settings.place, problem, FOLD)


Found = Iterator[tuple[str, Change]]


def changes_of(held: Held, settings: AdapterSettings, router: Router | None) -> Found:
    """The changes that an adapter makes to tensors of one module, by their names in the model.

    Raises:
        InputError: its tensors do not match its kind.
    """
    if _ROWS in held.tensors:
        yield from _rows(held, settings)
    elif settings.kind == "LORA":
        yield from _lora(held, settings, router)
    else:
        yield from _KINDS[settings.kind](held, settings)


def _rows(held: Held, settings: AdapterSettings) -> Found:
    (rows,) = held.matrices(settings, _ROWS)
    module = held.module.removesuffix(TOKENS)
    yield f"{module}.weight", Rows(rows, settings.tokens_of(module))


def _lora(held: Held, settings: AdapterSettings, router: Router | None) -> Found:
    embedded = "lora_embedding_A" in held.tensors
    infix = "lora_embedding_" if embedded else "lora_"
    down, up = held.matrices(
        settings, infix + "A", infix + "B", optional=(infix + "B.bias", "lora_magnitude_vector")
    )  # fmt: skip
    scale = settings.scale(held.module, down.shape[0])
    if router is not None and (router[0].shape[1:] != down.shape[1:] or router[1] >= router[0].shape[0]):
        problem = f"the router of {held.module} has the shape {list(router[0].shape)}, which is none of expert "
        raise InputError(settings.place, f"{problem}{router[1]} with {down.shape[1]} inputs", AGAIN)
    start = settings.config.get("init_lora_weights")
    if start in STARTS:
        yield held.weight, Started(down, up, scale, embedded, start=cast(Literal["pissa", "olora"], start))
    else:
        yield held.weight, LowRank(down, up, scale, embedded, held.tensors.get("lora_magnitude_vector"), router)
    if (bias := held.tensors.get(infix + "B.bias")) is not None:
        yield f"{held.module}.bias", Shift(bias, scale)


def _ia3(held: Held, settings: AdapterSettings) -> Found:
    vector = held.tensors.get("ia3_l")
    if vector is None or len(held.tensors) > 1 or len(vector.shape) != 2 or 1 not in vector.shape:
        raise held.wrong(settings, "a vector")
    of_inputs = vector.shape[1] != 1
    yield held.weight, Vector(vector, of_inputs, transposed=False)
    if held.has_bias and not of_inputs:
        yield f"{held.module}.bias", Vector(vector, of_inputs, transposed=False)


def _adalora(held: Held, settings: AdapterSettings) -> Found:
    down, up, inner = held.matrices(settings, "lora_A", "lora_B", "lora_E")
    if inner.shape != (down.shape[0], 1):
        raise held.wrong(settings, "a pair of matrices and a number for each rank")
    yield held.weight, Scaled(down, up, settings.scale(held.module, None), transposed=False, inner=inner)


def _vera(held: Held, settings: AdapterSettings) -> Found:
    inner, outer = held.tensors.get("vera_lambda_d"), held.tensors.get("vera_lambda_b")
    down, up = held.tensors.get("vera_A"), held.tensors.get("vera_B")
    if inner is None or outer is None or down is None or up is None or len(inner.shape) != 1 or len(outer.shape) != 1:
        raise held.wrong(settings, "vera_lambda_b and vera_lambda_d with vera_A and vera_B, which all modules share")
    if down.shape[0] != inner.shape[0] or up.shape[1] != inner.shape[0] or up.shape[0] < outer.shape[0]:
        raise held.wrong(settings, "of one rank")
    inputs = down.shape[1]  # reduced to the weight's own once that is known
    yield held.weight, Scaled(down, up, 1.0, transposed=False, inner=inner, outer=outer, size=(outer.shape[0], inputs))


def _loha(held: Held, settings: AdapterSettings) -> Found:
    up, down, up2, down2 = held.matrices(settings, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    scale = settings.scale(held.module, down.shape[0])
    yield held.weight, Hadamard(down, up, scale, transposed=False, down2=down2, up2=up2)


def _lokr(held: Held, settings: AdapterSettings) -> Found:
    sides = []
    for side in ("lokr_w1", "lokr_w2"):
        names = [side] if side in held.tensors else [f"{side}_a", f"{side}_b"]
        entries = [held.tensors[name] for name in names if name in held.tensors]
        if len(entries) < len(names) or any(len(entry.shape) != 2 for entry in entries):
            raise held.wrong(settings, "the sides of a Kronecker product")
        sides.append(tuple(entries))
    one, two = sides
    if len(held.tensors) != len(one) + len(two):
        raise held.wrong(settings, "the sides of a Kronecker product alone")
    scale = settings.scale(held.module, None)
    yield held.weight, Kronecker(two[-1], one[0], scale, transposed=False, one=one, two=two)


def _oft(held: Held, settings: AdapterSettings) -> Found:
    (numbers,) = held.matrices(settings, "oft_R")
    config = settings.config
    terms = int(config.get("num_cayley_neumann_terms", 5)) if config.get("use_cayley_neumann", True) else None
    bound = float(config.get("eps", 6e-5)) / numbers.shape[0] ** 0.5 if config.get("coft") else None
    turn = Rotation(numbers, terms=terms, bound=bound)
    if turn.block * (turn.block - 1) // 2 != numbers.shape[1]:
        raise held.wrong(settings, "the numbers above the diagonals of blocks")
    yield held.weight, turn


def _boft(held: Held, settings: AdapterSettings) -> Found:
    numbers, outputs = held.tensors.get("boft_R"), held.tensors.get("boft_s")
    if numbers is None or outputs is None or len(numbers.shape) != 4 or numbers.shape[0] != 1:
        raise held.wrong(settings, "the blocks of one rotation and a number for each output")
    if numbers.shape[2] != numbers.shape[3]:
        raise held.wrong(settings, "square blocks")
    yield held.weight, Rotation(numbers, outputs)


_KINDS: Mapping[str, Callable[[Held, AdapterSettings], Found]] = {
    "IA3": _ia3, "ADALORA": _adalora, "VERA": _vera, "LOHA": _loha, "LOKR": _lokr, "OFT": _oft, "BOFT": _boft,
}  # fmt: skip


class Model(Protocol):
    """The properties of a base that are used here."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    @property
    def transposed(self) -> frozenset[str]: ...


def changes_of_parameter(
    tensor: str,
    tensors: Mapping[str, TensorEntry],
    pieces: Sequence[tuple[str, Part]],
    base: Model,
    settings: AdapterSettings,
) -> Found:
    """The changes that the factors of a parameter make to tensors of a source.

    Args:
        tensor: the parameter's name in the model.
        tensors: the content of the file for it.
        pieces: the source's tensors that it is composed of.

    Raises:
        InputError: they do not fit the parameter.
    """
    held = Held(tensor, tensors, has_bias=False)
    down, up = held.matrices(settings, "lora_A", "lora_B")
    dimensions = {len(base.tensors[name].shape) + _taken(part) for name, part in pieces}
    experts = 1 if dimensions == {2} else _count(pieces, base)
    if down.shape[0] % experts or down.shape[0] != up.shape[1]:
        raise held.wrong(settings, f"factors of {experts} experts")
    scale = settings.scale(tensor, down.shape[0] // experts)
    for name, part in pieces:
        shape, transposed = base.tensors[name].shape, name in base.transposed
        if part.cuts and isinstance(part.cuts[0], int):
            rows = part.cuts[1] if len(part.cuts) > 1 and isinstance(part.cuts[1], tuple) else None
            change = OfExpert(down, up, scale, transposed, expert=part.cuts[0], experts=experts, rows=rows)
            made: tuple[int, ...] = change.made[::-1] if transposed else change.made
            yield name, change
        elif len(shape) == 3 and not part.cuts:
            outputs_inputs = (up.shape[0], down.shape[1])
            made = (experts, *(outputs_inputs[::-1] if transposed else outputs_inputs))
            yield name, OfExperts(down, up, scale, transposed)
        elif len(shape) == 2 and not part.cuts:
            made = (up.shape[0], down.shape[1])
            yield name, LowRank(down, up, scale, transposed=False)
        else:
            raise InputError(settings.place, f"{name} is stored as a part of {tensor} that has no factors", FOLD)
        if made != tuple(shape):
            problem = f"its factors for {tensor} are of the shape {list(made)}; {name} is {list(shape)}"
            raise InputError(settings.place, problem, "Name the base that it was trained on.")


def _taken(part: Part) -> int:
    """How many dimensions of the model's tensor a part lacks."""
    return sum(isinstance(cut, int) for cut in part.cuts)


def _count(pieces: Sequence[tuple[str, Part]], base: Model) -> int:
    """How many experts a three-dimensional tensor holds."""
    numbers = [part.cuts[0] for _, part in pieces if part.cuts and isinstance(part.cuts[0], int)]
    return max(numbers) + 1 if numbers else base.tensors[pieces[0][0]].shape[0]
