"""What an adapter holds of a model's change, module by module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from evomerge.checkpoints.checks import check_tensor
from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.extraction.factors import Factors, RankRule, energy_of, factorised, lost_energy
from evomerge.extraction.targets import Target, read_change, read_tensor, row_changes, stored_dtype

EmbeddingForm = Literal["full", "low_rank", "tokens", "none"]
Preset = Literal["peft", "vllm"]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""

_PREFIX = "base_model.model."


def check_vllm_rank(rank: int) -> None:
    """Raise InputError if vLLM cannot load factors of this rank."""
    if rank > VLLM_RANKS[-1]:
        hint = f"Give `--rank {VLLM_RANKS[-1]}`, or a lower one; with --energy it is the largest."
        raise InputError("--preset", f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this has {rank}", hint)


@dataclass(frozen=True)
class Extracting:
    """How an adapter is made.

    Attributes:
        rule: of the ranks.
        embeddings: how changed embeddings and untied heads are held: in full, as factors, by the rows that changed, or
            not at all.
        preset: who must be able to load it: PEFT; or vLLM, whose loader refuses all but factors of the linear layers.
    """

    rule: RankRule
    embeddings: EmbeddingForm = "full"
    preset: Preset = "peft"


@dataclass(frozen=True)
class Loss:
    """What an adapter holds of a tensor's change.

    Attributes:
        tensor: its name in the model.
        form: how it is held: "rank 16", "full", "12 rows", or "left as in the base".
        energy: the sum of the squares of the change.
        lost: of what is not held.
    """

    tensor: str
    form: str
    energy: float
    lost: float

    @property
    def share(self) -> float:
        """The share of the tensor's change that is lost."""
        return self.lost / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class Copy:
    """A tensor of the model that is held as it is.

    Attributes:
        name: in the adapter's file.
        target: what it is a copy of.
        rows: those that are copied; None for all.
    """

    name: str
    target: Target
    rows: list[int] | None = None

    def dtype(self, model: Source) -> torch.dtype:
        """As the model stores it, where that is one dtype; else float32."""
        return stored_dtype(model, self.target)

    def read(self, model: Source) -> Tensor:
        """The tensor in that dtype."""
        tensor = model.read(self.target.pieces[0][0]) if self.target.is_whole else read_tensor(model, self.target)
        return (tensor if self.rows is None else tensor[self.rows]).to(self.dtype(model))


def is_table(base: Source, target: Target) -> bool:
    """Whether a tensor has a row for each token: it is an embedding's or a head's weight."""
    is_head = target.way == "factors" and any(base.roles[name].kind == "head" for name, _ in target.pieces)
    return is_head or target.way == "embedding"


@dataclass
class Held:
    """What an adapter holds of some modules, or of all.

    Attributes:
        losses: in the order of the model's modules.
        modules: the ranks of those that have factors.
        parameters: the same of parameters of experts.
        saved: modules that are held in full.
        copies: of tensors that are held as the model has them.
        rows: of embeddings of which single rows are held, which.
        has_bias: a bias is held.
    """

    losses: list[Loss] = field(default_factory=list)
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    has_bias: bool = False

    @property
    def ranks(self) -> list[int]:
        """Those of all modules and parameters."""
        return [*self.modules.values(), *self.parameters.values()]

    def add(self, more: Held) -> None:
        """What is held of further modules."""
        self.losses += more.losses
        self.modules |= more.modules
        self.parameters |= more.parameters
        self.saved += more.saved
        self.copies += more.copies
        self.rows |= more.rows
        self.has_bias |= more.has_bias


class Holder:
    """Makes what is held of some modules, and keeps it. Different holders may do so in different threads.

    Attributes:
        held: of the modules so far.
        tensors: what was computed of them, float32, as the adapter's file has it.
    """

    def __init__(self, model: Source, base: Source, how: Extracting) -> None:
        self._model, self._base, self._how = model, base, how
        self.held, self.tensors = Held(), dict[str, Tensor]()
        self._nested: list[tuple[Tensor, Tensor]] = []

    def add(self, module: Sequence[Target]) -> None:
        """Make what is held of the changes of a module's own tensors, or of those of modules that share one."""
        ways = {target.tensor: self._way(target) for target in module}
        beside = "tokens" in ways.values() and len(module) > 1  # a bias, which PEFT loads beside no rows
        if "full" in ways.values() or beside:
            self._full(module)
            return
        for target in module:
            way = ways[target.tensor]
            if way == "experts":
                self._experts(target)
                continue
            if way == "factors":
                self._factors(target)
                continue
            energy = self._energy(target)
            if energy == 0.0:
                self.held.losses.append(Loss(target.tensor, "unchanged", 0.0, 0.0))
            elif way == "tokens":
                self._rows(target, energy)
            elif way == "bias":
                self._bias(target, energy)
            else:
                self.held.losses.append(Loss(target.tensor, "left as in the base", energy, energy))
        self._write_experts(module[0].module)

    def _change(self, target: Target, expert: int | None = None) -> tuple[Tensor, float]:
        """What is added to a tensor, or to one expert's matrix of it, and the sum of its squares."""
        change = read_change(self._model, self._base, target, expert)
        return change, self._checked(target, energy_of(change))

    def _energy(self, target: Target) -> float:
        """The sum of the squares of what is added to a tensor."""
        parts = map(energy_of, row_changes(self._model, self._base, target))
        return self._checked(target, math.fsum(parts))

    def _checked(self, target: Target, energy: float) -> float:
        if not math.isfinite(energy):
            for source, (name, _) in itertools.product((self._model, self._base), target.pieces):
                check_tensor(source, name, source.read(name))
            raise InputError(self._model.place, f"{target.tensor}: the change has numbers beyond those of float32")
        return energy

    def _way(self, target: Target) -> str:
        if self._how.preset == "vllm":
            return "factors" if target.way == "factors" and target.stacked and not self._in_experts(target) else "none"
        if not is_table(self._base, target):
            return "full" if target.renames else target.way
        if self._how.embeddings == "low_rank":
            if target.also:
                problem = f"{target.tensor} is also the head, and factors of one are not factors of the other"
                raise InputError("--embeddings low_rank", problem, "Take `full`, `tokens` or `none`.")
            return "factors"
        return self._how.embeddings

    def _in_experts(self, target: Target) -> bool:
        """Whether it is part of a mixture of experts, whose layers vLLM joins in its own way."""
        return target.routed and any(self._base.roles[name].kind == "mlp" for name, _ in target.pieces)

    def _factors(self, target: Target) -> None:
        change, energy = self._change(target)
        if energy == 0.0:
            self.held.losses.append(Loss(target.tensor, "unchanged", 0.0, 0.0))
            return
        wanted = change.T if target.transposed else change
        made = factorised(wanted, self._how.rule, name=target.tensor)
        embedded = target.way == "embedding"
        ends = ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A.weight", "lora_B.weight")
        for end, factor in zip(ends, (made.down, made.up), strict=True):
            self.tensors[f"{_PREFIX}{target.module}.{end}"] = factor
        self.held.modules[target.module] = made.rank
        lost = lost_energy(wanted, made)
        self.held.losses.append(Loss(target.tensor, f"rank {made.rank}", energy, lost))

    def _rows(self, target: Target, energy: float) -> None:
        sizes = [part.abs().amax(dim=1) for part in row_changes(self._model, self._base, target)]
        rows = torch.cat(sizes).nonzero().flatten().tolist()
        self.held.copies.append(Copy(f"{_PREFIX}{target.module}.token_adapter.trainable_tokens_delta", target, rows))
        self.held.rows[target.module] = rows
        self.held.losses.append(Loss(target.tensor, f"{len(rows):,} rows", energy, 0.0))

    def _bias(self, target: Target, energy: float) -> None:
        inside = ".base_layer" if target.module in self.held.modules else ""
        self.held.copies.append(Copy(f"{_PREFIX}{target.module}{inside}.{target.parameter}", target))
        self.held.has_bias = True
        self.held.losses.append(Loss(target.tensor, "full", energy, 0.0))

    def _full(self, module: Sequence[Target]) -> None:
        """All tensors of a module, or of modules that share one, if one of them changed: PEFT wants all or none."""
        energies = [self._energy(target) for target in module]
        for target, energy in zip(module, energies, strict=True):
            self.held.losses.append(Loss(target.tensor, "full" if energy else "unchanged", energy, 0.0))
            holders = [target.tensor, *([target.also] if target.also else [])]
            for name in holders if any(energies) else ():
                self.held.copies.append(Copy(_PREFIX + name, target))
                if (holder := name.rpartition(".")[0]) not in self.held.saved:
                    self.held.saved.append(holder)

    def _experts(self, target: Target) -> None:
        """Factors of all experts of a layer, side by side as PEFT's ``target_parameters`` have them."""
        made: list[Factors] = []
        energy = lost = 0.0
        for expert in range(target.shape[0]):
            change, of_expert = self._change(target, expert)
            wanted = change.T if target.transposed else change
            made.append(factorised(wanted, self._how.rule, name=target.tensor))
            energy += of_expert
            lost += lost_energy(wanted, made[-1])
        rank = max(factors.rank for factors in made)
        if rank == 0:
            self.held.losses.append(Loss(target.tensor, "unchanged", 0.0, 0.0))
            return
        experts, (outputs, inputs) = len(made), (made[0].up.shape[0], made[0].down.shape[1])
        downs, ups = torch.zeros(experts, rank, inputs), torch.zeros(outputs, rank, experts)
        for number, factors in enumerate(made):
            downs[number, : factors.rank] = factors.down
            ups[:, : factors.rank, number] = factors.up
        self.held.parameters[target.tensor] = rank
        self._nested.append((downs.reshape(experts * rank, inputs), ups.reshape(outputs, rank * experts)))
        self.held.losses.append(Loss(target.tensor, f"rank {rank} x {experts}", energy, lost))

    def _write_experts(self, module: str) -> None:
        """Write the factors of a module's parameters.

        PEFT wraps a module once for each of its parameters, so that the first of them is the innermost.
        """
        for number, (down, up) in enumerate(self._nested):
            inside = _PREFIX + module + ".base_layer" * (len(self._nested) - 1 - number)
            self.tensors[f"{inside}.lora_A.weight"], self.tensors[f"{inside}.lora_B.weight"] = down, up
        self._nested.clear()
