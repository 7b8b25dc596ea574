"""What PEFT can hold of each tensor of a model, from the model's own modules rather than from a list of names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import conversion_mapping
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints.parts import Part
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.structure import empty_model, parse_config, stored_tensors, tied_names

Way = Literal["factors", "experts", "embedding", "bias", "full", "none"]
"""As what PEFT can hold a tensor's change: the weight of a layer, or of all experts of one, as factors; an embedding;
the bias of a layer; a module's tensors in full; or not at all."""


_AT_ONCE = 1 << 20
"""Numbers of rows that are read together."""

_KEPT = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Target:
    """A tensor of the model as transformers builds it.

    Attributes:
        tensor: its name there.
        shape: its shape there.
        way: as what PEFT can hold its change.
        transposed: a matrix of it is inputs by outputs: of GPT-2's layers, of embeddings, of some experts.
        pieces: the source's tensors that it is made of, and where they lie in it.
        also: where the same tensor stands a second time: a tied head.
        stacked: it is in a layer of the stack.
        routed: it is in a layer that has experts.
        renames: PEFT takes its module for an old name of the experts' own, and finds it no more.
    """

    tensor: str
    shape: tuple[int, ...]
    way: Way
    transposed: bool
    pieces: tuple[tuple[str, Part], ...]
    also: str = ""
    stacked: bool = False
    routed: bool = False
    renames: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether one tensor of the source is all of it."""
        return len(self.pieces) == 1 and not self.pieces[0][1].cuts

    @property
    def module(self) -> str:
        """The module that it is a parameter of."""
        return self.tensor.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """Its name in that module."""
        return self.tensor.rpartition(".")[2]


def find_targets(base: Source) -> tuple[list[Target], dict[str, type]]:
    """All tensors of a model in the order of its modules, and the class of every module by its name."""
    model = empty_model(parse_config(base.config, base.place), base.place)
    stored, tied = stored_tensors(model), {other: copy for copy, other in tied_names(model).items()}
    pieces: dict[str, list[tuple[str, Part]]] = defaultdict(list)
    for name, part in base.parts.items():
        pieces[part.tensor].append((name, part))
    modules = dict(model.named_modules())
    routed = {base.roles[pieces[name][0][0]].layer for name, tensor in stored.items() if tensor.dim() == 3}
    renamed = _names_of_experts(base)
    found = []
    for name, tensor in stored.items():
        owner = modules[name.rpartition(".")[0]]
        layer = base.roles[pieces[name][0][0]].layer
        transposed = isinstance(owner, Conv1D | nn.Embedding) or getattr(owner, "is_transposed", False) is True
        way = _way(owner, name, tensor, name in tied)
        renames = way == "factors" and name.rsplit(".", 2)[1] in renamed
        also, is_routed = tied.get(name, ""), layer is not None and layer in routed
        shape = tuple(tensor.shape)
        found.append(
            Target(name, shape, way, transposed, tuple(pieces[name]), also, layer is not None, is_routed, renames)
        )
    return found, {name: type(module) for name, module in modules.items()}


def _names_of_experts(base: Source) -> set[str]:
    """The names that single experts' layers had before they were one tensor, where PEFT renames them in a target list.

    It does so in all of the model, though a dense layer has the same names.
    """
    if base.config["model_type"] not in getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}):
        return set()
    return {name.rsplit(".", 2)[1] for name, part in base.parts.items() if part.cuts}


def _way(owner: nn.Module, name: str, tensor: Tensor, is_tied: bool) -> Way:
    parameter = name.rpartition(".")[2]
    if isinstance(owner, nn.Embedding):
        return "embedding" if is_tied or parameter == "weight" else "full"
    if isinstance(owner, nn.Linear | Conv1D) and parameter in ("weight", "bias"):
        return "factors" if parameter == "weight" else "bias"
    if any(True for child in owner.children() for _ in child.parameters()):
        return "none"  # a parameter beside modules that PEFT would wrap as well
    return "experts" if tensor.dim() == 3 else "full"


def read_change(model: Source, base: Source, target: Target, expert: int | None = None) -> Tensor:
    """What a model adds to its base's tensor, or to one expert's matrix of it: float32, in memory of its own."""
    change = read_tensor(model, target, expert)
    for piece, whole in _pieces(base, target, change, expert):
        whole.sub_(piece)
    return change


def row_changes(model: Source, base: Source, target: Target) -> Iterator[Tensor]:
    """The same, some rows at a time where files hold the tensor in one piece: an embedding is larger than all else."""
    if not target.is_whole or not target.shape:
        yield read_change(model, base, target)
        return
    name, _ = target.pieces[0]
    tensors = model.read(name), base.read(name)
    rows = max(1, _AT_ONCE * target.shape[0] // max(1, tensors[0].numel()))
    for own, theirs in zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True):
        yield own.float() - theirs.float()
    for source in (model, base):
        source.release(name)


def read_tensor(source: Source, target: Target, expert: int | None = None) -> Tensor:
    """A tensor as transformers builds it, float32, or one expert's matrix of it; in memory of its own."""
    tensor = torch.empty(target.shape if expert is None else target.shape[1:])
    for piece, whole in _pieces(source, target, tensor, expert):
        whole.copy_(piece)
    return tensor


def stored_dtype(source: Source, target: Target) -> torch.dtype:
    """The dtype of 16 or 32 bits that files hold a tensor in; float32 of several, of others, and under an adapter."""
    found = {source.read_stored(name).dtype if source.is_mapped(name) else torch.float32 for name, _ in target.pieces}
    return found.pop() if len(found) == 1 and found <= _KEPT else torch.float32


def _pieces(source: Source, target: Target, tensor: Tensor, expert: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """What a source holds of a tensor, or of one expert's matrix of it, and the part of that which each is."""
    for name, part in target.pieces:
        piece, cuts = source.read(name), part.cuts
        if expert is not None:
            first, cuts = (cuts[0] if cuts else 0), cuts[1:]
            if isinstance(first, int) and part.cuts:
                if first != expert:
                    continue
            else:
                start = 0 if isinstance(first, int) else first[0]
                if not start <= expert < start + len(piece):
                    continue
                piece = piece[expert - start]
        yield piece, Part("", cuts).of(tensor)
        source.release(name)


def short_names(modules: Sequence[str], classes: Mapping[str, type], kinds: tuple[type, ...]) -> list[str]:
    """The ends of modules' names by which PEFT finds these and no other that it would adapt; else their whole names.

    Args:
        classes: of all modules of the model.
        kinds: those that an adapter can stand on.
    """
    ends: dict[str, set[str]] = defaultdict(set)
    for name in modules:
        ends[name.rpartition(".")[2]].add(name)
    short: list[str] = []
    for end, wanted in ends.items():
        alike = {n for n, kind in classes.items() if n.rpartition(".")[2] == end and issubclass(kind, kinds)}
        short.extend([end] if alike == wanted else sorted(wanted))
    return short
