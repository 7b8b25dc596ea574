"""A LoRA adapter of the difference between two models, written as PEFT reads it."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints.adapter_settings import CONFIG
from evomerge.checkpoints.adapters import WEIGHTS
from evomerge.checkpoints.checks import check_compatible, check_tensor
from evomerge.checkpoints.folder import tokenizer_files
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.checkpoints.whole import whole_folder
from evomerge.errors import InputError
from evomerge.extraction.factors import Factors, RankRule, energy_of, factorised, lost_energy
from evomerge.extraction.targets import Target, find_targets, read_change, read_tensor, short_names

EmbeddingForm = Literal["full", "low_rank", "tokens", "none"]
Preset = Literal["peft", "vllm"]

REPORT = "extraction.json"
_PREFIX = "base_model.model."
_LEAST_MODULES = (nn.Linear, Conv1D, nn.Embedding)


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


@dataclass
class Extraction:
    """An adapter that was made.

    Attributes:
        losses: in the order of the model's modules.
        rank: the one that its configuration says.
        largest: the largest rank.
        size: bytes of its tensors.
    """

    losses: list[Loss]
    rank: int
    largest: int
    size: int

    @property
    def energy(self) -> float:
        """Of the whole change."""
        return sum(loss.energy for loss in self.losses)

    @property
    def lost(self) -> float:
        """The share of the change's energy that the adapter does not hold."""
        return sum(loss.lost for loss in self.losses) / self.energy


@dataclass
class _Parts:
    """What adapter_config.json says, as it comes together."""

    modules: dict[str, int] = field(default_factory=dict)  # rank by module
    parameters: dict[str, int] = field(default_factory=dict)  # rank by parameter of experts
    saved: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    has_bias: bool = False


def check_pair(model: Source, base: Source) -> None:
    """Refuse models whose difference is no adapter. Opens no tensor.

    Raises:
        InputError: they are of other shapes, or of one that was trained on another vocabulary.
    """
    sizes = model.settings["vocab_size"], base.settings["vocab_size"]
    if sizes[0] != sizes[1]:
        problem = f"has {sizes[0]:,} tokens and the base {sizes[1]:,}: an adapter adds no rows to its base"
        hint = "Give the base the model's vocabulary first, and name the result: `evomerge transplant BASE MODEL OUT`."
        raise InputError(model.place, problem, hint)
    check_compatible({"BASE": base, "MODEL": model}, same_tokens=False)


def extract(
    model: Source,
    base: Source,
    out: Path,
    how: Extracting,
    *,
    texts: Callable[[Extraction], Mapping[str, str]] = lambda made: {},
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Extraction:
    """Make the folder ``out`` with the adapter that turns ``base`` into ``model``, or nothing.

    Everything is computed in float32 from the stored weights. Memory is that of the largest tensor, twice, and of its
    factors.

    Args:
        texts: further files by name, of what was made.
        progress: called with the number of tensors looked at and of all.

    Raises:
        InputError: the models do not fit each other, are equal, or hold NaN; ``out`` cannot be written.
    """
    check_pair(model, base)
    targets, classes = find_targets(base)
    with whole_folder(out, [model.folder, base.folder]) as folder:
        with TensorFile(folder / WEIGHTS) as file:
            maker = _Maker(model, base, how, file)
            for _, module in itertools.groupby(targets, lambda target: target.module):
                maker.add(list(module))
                progress(len(maker.losses), len(targets))
            size = file.size
        if not (maker.parts.modules or maker.parts.parameters):
            raise _nothing(model, base, maker.losses)
        made = Extraction(maker.losses, maker.rank, max(maker.ranks), size)
        for name, text in {
            CONFIG: json.dumps(_config(maker, base, classes), indent=2) + "\n",
            REPORT: report_text(made),
            **texts(made),
        }.items():
            (folder / name).write_text(text, encoding="utf-8")
        _add_tokenizer(folder, model, base)
    return made


def _nothing(model: Source, base: Source, losses: Sequence[Loss]) -> InputError:
    changed = [loss.tensor for loss in losses if loss.energy > 0]
    if not changed:
        return InputError(model.place, f"{model.reference} is {base.reference}: no weight differs")
    problem = f"differs from {base.reference} in no matrix that factors can hold, but in {', '.join(changed[:3])}"
    return InputError(model.place, problem, "PEFT reads no adapter without factors; keep the model.")


class _Maker:
    """Writes what an adapter holds of one tensor after the other."""

    def __init__(self, model: Source, base: Source, how: Extracting, file: TensorFile) -> None:
        self._model, self._base, self._how, self._file = model, base, how, file
        self.parts, self.losses = _Parts(), list[Loss]()
        self._nested: list[tuple[Tensor, Tensor]] = []

    @property
    def ranks(self) -> list[int]:
        """Those of all modules and parameters."""
        return [*self.parts.modules.values(), *self.parts.parameters.values()]

    @property
    def rank(self) -> int:
        """The rank that most modules have: others are named. vLLM, which reads no names, is told the largest."""
        if self._how.preset == "vllm":
            return max(self.ranks)
        ranks = Counter(self.ranks)
        return max(ranks, key=lambda rank: (ranks[rank], rank))

    def add(self, module: Sequence[Target]) -> None:
        """Write what is held of the changes of a module's own tensors."""
        ways = {target.tensor: self._way(target) for target in module}
        beside = "tokens" in ways.values() and len(module) > 1  # a bias, which PEFT loads beside no rows
        if "full" in ways.values() or beside or module[0].module in self.parts.saved:
            self._full(module)
            return
        for target in module:
            way = ways[target.tensor]
            if way == "experts":
                self._experts(target)
                continue
            change, energy = self._change(target)
            if energy == 0.0:
                self.losses.append(Loss(target.tensor, "unchanged", 0.0, 0.0))
            elif way == "factors":
                self._factors(target, change, energy)
            elif way == "tokens":
                self._rows(target, change, energy)
            elif way == "bias":
                self._bias(target, energy)
            else:
                self.losses.append(Loss(target.tensor, "left as in the base", energy, energy))
        self._write_experts(module[0].module)

    def _change(self, target: Target, expert: int | None = None) -> tuple[Tensor, float]:
        """What is added to a tensor, or to one expert's matrix of it, and the sum of its squares."""
        change = read_change(self._model, self._base, target, expert)
        energy = energy_of(change)
        if not math.isfinite(energy):
            for source, (name, _) in itertools.product((self._model, self._base), target.pieces):
                check_tensor(source, name, source.read(name))
            raise InputError(self._model.place, f"{target.tensor}: the change has numbers beyond those of float32")
        return change, energy

    def _way(self, target: Target) -> str:
        is_head = target.way == "factors" and any(self._base.roles[name].kind == "head" for name, _ in target.pieces)
        if self._how.preset == "vllm":
            return "factors" if target.way == "factors" and target.stacked and not self._in_experts(target) else "none"
        if target.way != "embedding" and not is_head:
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

    def _factors(self, target: Target, change: Tensor, energy: float) -> None:
        wanted = change.T if target.turned else change
        made = factorised(wanted, self._how.rule, name=target.tensor)
        embedded = target.way == "embedding"
        ends = ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A.weight", "lora_B.weight")
        for end, factor in zip(ends, (made.down, made.up), strict=True):
            self._file.add(f"{_PREFIX}{target.module}.{end}", factor)
        self.parts.modules[target.module] = made.rank
        lost = lost_energy(wanted, made)
        self.losses.append(Loss(target.tensor, f"rank {made.rank}", energy, lost))

    def _rows(self, target: Target, change: Tensor, energy: float) -> None:
        rows = change.abs().amax(dim=1).nonzero().flatten().tolist()
        wanted = read_tensor(self._model, target)[rows]
        self._file.add(f"{_PREFIX}{target.module}.token_adapter.trainable_tokens_delta", wanted)
        self.parts.rows[target.module] = rows
        self.losses.append(Loss(target.tensor, f"{len(rows):,} rows", energy, 0.0))

    def _bias(self, target: Target, energy: float) -> None:
        inside = ".base_layer" if target.module in self.parts.modules else ""
        wanted = read_tensor(self._model, target)
        self._file.add(f"{_PREFIX}{target.module}{inside}.{target.parameter}", wanted)
        self.parts.has_bias = True
        self.losses.append(Loss(target.tensor, "full", energy, 0.0))

    def _full(self, module: Sequence[Target]) -> None:
        """All tensors of a module, if one of them changed: PEFT wants all or none."""
        energies = [self._change(target)[1] for target in module]
        saved = module[0].module in self.parts.saved or any(energies)
        for target, energy in zip(module, energies, strict=True):
            self.losses.append(Loss(target.tensor, "full" if energy else "unchanged", energy, 0.0))
            holders = [target.tensor, *([target.also] if target.also else [])]
            for name in holders if saved else ():
                self._file.add(_PREFIX + name, read_tensor(self._model, target))
                if (holder := name.rpartition(".")[0]) not in self.parts.saved:
                    self.parts.saved.append(holder)

    def _experts(self, target: Target) -> None:
        """Factors of all experts of a layer, side by side as PEFT's ``target_parameters`` have them."""
        made: list[Factors] = []
        energy = lost = 0.0
        for expert in range(target.shape[0]):
            change, of_expert = self._change(target, expert)
            wanted = change.T if target.turned else change
            made.append(factorised(wanted, self._how.rule, name=target.tensor))
            energy += of_expert
            lost += lost_energy(wanted, made[-1])
        rank = max(factors.rank for factors in made)
        if rank == 0:
            self.losses.append(Loss(target.tensor, "unchanged", 0.0, 0.0))
            return
        experts, (outputs, inputs) = len(made), (made[0].up.shape[0], made[0].down.shape[1])
        downs, ups = torch.zeros(experts, rank, inputs), torch.zeros(outputs, rank, experts)
        for number, factors in enumerate(made):
            downs[number, : factors.rank] = factors.down
            ups[:, : factors.rank, number] = factors.up
        self.parts.parameters[target.tensor] = rank
        self._nested.append((downs.reshape(experts * rank, inputs), ups.reshape(outputs, rank * experts)))
        self.losses.append(Loss(target.tensor, f"rank {rank} x {experts}", energy, lost))

    def _write_experts(self, module: str) -> None:
        """Write the factors of a module's parameters.

        PEFT wraps a module once for each of its parameters, so that the first of them is the innermost.
        """
        for number, (down, up) in enumerate(self._nested):
            inside = _PREFIX + module + ".base_layer" * (len(self._nested) - 1 - number)
            self._file.add(f"{inside}.lora_A.weight", down)
            self._file.add(f"{inside}.lora_B.weight", up)
        self._nested.clear()


def _config(maker: _Maker, base: Source, classes: Mapping[str, type]) -> dict[str, Any]:
    """adapter_config.json. All scales are 1: alpha is the rank everywhere, whoever reads patterns or does not."""
    parts, rank = maker.parts, maker.rank
    others = {name: own for name, own in {**parts.modules, **parts.parameters}.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.reference,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if parts.has_bias else "none",
        "fan_in_fan_out": any(issubclass(classes[module], Conv1D) for module in parts.modules),
        "target_modules": short_names(list(parts.modules), classes, _LEAST_MODULES),
        "target_parameters": list(parts.parameters) or None,
        "modules_to_save": parts.saved or None,
        "trainable_token_indices": parts.rows or None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def report_text(made: Extraction) -> str:
    """``extraction.json``: what is held of every tensor."""
    content = {
        "lost_energy": made.lost,
        "tensors": [
            {"tensor": loss.tensor, "held": loss.form, "change": math.sqrt(loss.energy), "lost_energy": share_of(loss)}
            for loss in made.losses
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def share_of(loss: Loss) -> float:
    """The share of a tensor's change that is lost."""
    return loss.lost / loss.energy if loss.energy else 0.0


def _add_tokenizer(folder: Path, model: Source, base: Source) -> None:
    """The model's tokenizer, where it is another one than the base's."""
    mine, theirs = ({f.relative_to(s.folder): f.read_bytes() for f in tokenizer_files(s.folder)} for s in (model, base))
    if mine != theirs:
        for name, content in mine.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
