"""A LoRA adapter of the difference between two models, written as PEFT reads it."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints.adapter_settings import CONFIG
from evomerge.checkpoints.adapters import WEIGHTS
from evomerge.checkpoints.checks import check_compatible
from evomerge.checkpoints.folder import tokenizer_files
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.tensor_file import TensorFile
from evomerge.checkpoints.whole import whole_folder
from evomerge.errors import InputError
from evomerge.extraction.held import Extracting, Held, Holder, Loss, check_vllm_rank, is_table
from evomerge.extraction.targets import Target, find_targets, short_names
from evomerge.merging.arithmetic.jobs import WorkerThreads

REPORT = "extraction.json"
_MIN_MODULES = (nn.Linear, Conv1D, nn.Embedding)


@dataclass
class Extraction:
    """An adapter that was made.

    Attributes:
        losses: in the order of the model's modules.
        rank: the one that its configuration says.
        largest: the largest rank.
        size: bytes of its tensors.
        tables: of these, of embeddings and heads that are held as the model has them.
    """

    losses: list[Loss]
    rank: int
    largest: int
    size: int
    tables: int

    @property
    def energy(self) -> float:
        """Of the whole change."""
        return sum(loss.energy for loss in self.losses)

    @property
    def lost(self) -> float:
        """The share of the change's energy that the adapter does not hold."""
        return sum(loss.lost for loss in self.losses) / self.energy


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

    Everything is computed in float32 from the stored weights, in as many threads as torch is set to use. Memory is that
    of as many of the largest tensors, twice, and of their factors.

    Args:
        texts: further files by name, of what was made.
        progress: called with the number of tensors looked at and of all.

    Raises:
        InputError: the models do not fit each other, are equal, or hold NaN; a rank is larger than the preset allows;
            ``out`` cannot be written.
    """
    check_pair(model, base)
    targets, classes = find_targets(base)
    with whole_folder(out, [model.folder, base.folder]) as folder:
        with TensorFile(folder / WEIGHTS) as file:
            held = _write_factors(file, model, base, how, targets, progress)
            tables = 0
            for copy in sorted(held.copies, key=lambda copy: -copy.dtype(model).itemsize):  # those in wide dtypes first
                before = file.size
                file.add(copy.name, copy.read(model))
                tables += file.size - before if is_table(base, copy.target) else 0
            size = file.size
        if not held.ranks:
            raise _nothing(model, base, held.losses)
        if how.preset == "vllm":
            check_vllm_rank(max(held.ranks))
        made = Extraction(held.losses, _rank(held, how), max(held.ranks), size, tables)
        for name, text in {
            CONFIG: json.dumps(_config(held, made.rank, base, classes), indent=2) + "\n",
            REPORT: report_text(made),
            **texts(made),
        }.items():
            (folder / name).write_text(text, encoding="utf-8")
        _add_tokenizer(folder, model, base)
    return made


def _write_factors(
    file: TensorFile, model: Source, base: Source, how: Extracting, targets: Sequence[Target],
    progress: Callable[[int, int], None],
) -> Held:  # fmt: skip
    """Write all tensors that are computed, and say what the adapter holds."""

    def made(module: list[Target]) -> Holder:
        holder = Holder(model, base, how)
        holder.add(module)
        return holder

    held = Held()
    # Decompositions of torch's own threads wait for each other: of a thin matrix they take a hundred times as long.
    for holder in WorkerThreads().in_order(made, _by_module(targets)):
        for name, tensor in holder.tensors.items():
            file.add(name, tensor)
        held.add(holder.held)
        progress(len(held.losses), len(targets))
    return held


def _by_module(targets: Sequence[Target]) -> list[list[Target]]:
    """The tensors of each module; of two that share one, as a tied head does, those of both."""
    shared = {target.also.rpartition(".")[0]: target.module for target in targets if target.also}
    modules: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        modules[shared.get(target.module, target.module)].append(target)
    return list(modules.values())


def _rank(held: Held, how: Extracting) -> int:
    """The rank that most modules have: others are named. vLLM, which reads no names, is told the largest."""
    if how.preset == "vllm":
        return max(held.ranks)
    ranks = Counter(held.ranks)
    return max(ranks, key=lambda rank: (ranks[rank], rank))


def _nothing(model: Source, base: Source, losses: Sequence[Loss]) -> InputError:
    changed = [loss.tensor for loss in losses if loss.energy > 0]
    if not changed:
        return InputError(model.place, f"{model.reference} is {base.reference}: no weight differs")
    problem = f"differs from {base.reference} in no matrix that factors can hold, but in {', '.join(changed[:3])}"
    return InputError(model.place, problem, "PEFT reads no adapter without factors; keep the model.")


def _config(held: Held, rank: int, base: Source, classes: Mapping[str, type]) -> dict[str, Any]:
    """adapter_config.json. All scales are 1: alpha is the rank everywhere, whoever reads patterns or does not."""
    others = {name: own for name, own in {**held.modules, **held.parameters}.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.reference,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if held.has_bias else "none",
        "fan_in_fan_out": any(issubclass(classes[module], Conv1D) for module in held.modules),
        "target_modules": short_names(list(held.modules), classes, _MIN_MODULES),
        "target_parameters": list(held.parameters) or None,
        "modules_to_save": held.saved or None,
        "trainable_token_indices": held.rows or None,
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
            {"tensor": loss.tensor, "held": loss.form, "change": math.sqrt(loss.energy), "lost_energy": loss.share}
            for loss in made.losses
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def _add_tokenizer(folder: Path, model: Source, base: Source) -> None:
    """The model's tokenizer, where it is another one than the base's."""
    mine, theirs = ({f.relative_to(s.folder): f.read_bytes() for f in tokenizer_files(s.folder)} for s in (model, base))
    if mine != theirs:
        for name, content in mine.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
