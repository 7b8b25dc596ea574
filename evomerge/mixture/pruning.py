"""Reduces the number of experts of an existing mixture: the most used are kept, the others dropped or merged into them.

An expert's use is the sum of its gates on some texts. When merging, each removed expert is added to the kept one whose
router logits correlate most with its own over the tokens, and the weights within a group are proportional to the use of
its experts; the router keeps the rows of the kept experts (M-SMoE, Li et al., "Merge, Then Compress", arXiv 2310.01334,
section 3.2, without the permutation of neurons, which is unnecessary for experts made from one dense model).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.calibration import Calibration
from evomerge.checkpoints.checks import check_written
from evomerge.checkpoints.placement import Devices
from evomerge.checkpoints.source import Source
from evomerge.checkpoints.writer import Layout
from evomerge.errors import InputError
from evomerge.merging.building.export import add_companions, writing
from evomerge.merging.measured.inputs import token_ids
from evomerge.mixture.architectures import ARCHITECTURES

_EXPERT = re.compile(r"(model\.layers\.(\d+)\.\w+)\.experts\.(\d+)\.(\w+\.weight)")


@dataclass(frozen=True)
class Use:
    """The use of a layer's experts.

    Attributes:
        gates: float64 [experts], the sum of each expert's gates over all tokens.
        alike: float64 [experts, experts], the correlation of their router logits over the tokens.
    """

    gates: Tensor
    alike: Tensor


Kept = Mapping[int, Mapping[int, float]]
"""For each kept expert, the experts that it is made of, and their weights, which sum to 1."""


def check_prunable(source: Source, keep: int) -> None:
    """Reject models other than mixtures of a known architecture, and an invalid number of experts.

    Raises:
        InputError: saying what it is.
    """
    kind = source.config["model_type"]
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(source.place, f"is a {kind}, whose experts cannot be pruned here", f"These can be: {known}.")
    if source.config.get("n_group") not in (None, 1):
        raise InputError(source.place, f"has its experts in {source.config['n_group']} groups, which would not be even")
    experts = expert_count(source)
    least = 2 if kind == "glm4_moe" else 1  # its router uses the best two of a group
    if not least <= keep < experts:
        raise InputError("--prune", f"is {keep}; of {experts} experts, {least} to {experts - 1} can be kept")


def expert_count(source: Source) -> int:
    """How many experts a layer of a mixture has."""
    numbers = [int(match[3]) for name in source.tensors if (match := _EXPERT.fullmatch(name))]
    return max(numbers) + 1


@torch.inference_mode()
def use_of_experts(source: Source, texts: Calibration, devices: Devices) -> dict[int, Use]:
    """The use of experts on some texts, for each layer that has experts.

    Raises:
        InputError: the texts cannot be read, or the model cannot be run.
    """
    from evomerge.checkpoints.live import check_live, live_model, load_weights

    live = live_model(source, devices)
    load_weights(live, ((name, source.read(name)) for name in source.tensors))
    check_live(live)
    gates = {layer: f"{block}.gate.weight" for block, layer in _blocks(source)}
    modules = {
        layer: live.model.get_submodule(source.parts[name].tensor.rpartition(".")[0]) for layer, name in gates.items()
    }
    counted = {layer: _Counts(expert_count(source)) for layer in modules}
    handles = [module.register_forward_hook(counted[layer].add) for layer, module in modules.items()]
    try:
        for ids in token_ids(live.tokenizer, texts, source.name):
            live.model(torch.tensor([ids], device=live.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: counts.use for layer, counts in counted.items()}


def _blocks(source: Source) -> list[tuple[str, int]]:
    """The name of each layer's mixture, and the layer's index."""
    found = {match[1]: int(match[2]) for name in source.tensors if (match := _EXPERT.fullmatch(name))}
    return list(found.items())


class _Counts:
    """Sums of a router's outputs over tokens."""

    def __init__(self, experts: int) -> None:
        self._gates = torch.zeros(experts, dtype=torch.float64)
        self._sum, self._tokens = torch.zeros(experts, dtype=torch.float64), 0
        self._products = torch.zeros(experts, experts, dtype=torch.float64)

    def add(self, module: Any, given: tuple[Tensor, ...], out: tuple[Tensor, Tensor, Tensor]) -> None:
        """A hook: ``out`` is logits [tokens, experts], gates [tokens, kept], and their experts [tokens, kept]."""
        logits, gates, indices = (tensor.detach().cpu() for tensor in out)
        self._gates.index_add_(0, indices.flatten(), gates.flatten().double())
        logits = logits.double().view(-1, len(self._sum))
        self._sum += logits.sum(dim=0)
        self._products += logits.T @ logits
        self._tokens += len(logits)

    @property
    def use(self) -> Use:
        """The use according to all sums."""
        mean = self._sum / self._tokens
        covariance = self._products / self._tokens - torch.outer(mean, mean)
        size = covariance.diagonal().clamp(min=1e-12).sqrt()
        return Use(self._gates, covariance / torch.outer(size, size))


def kept_experts(use: Use, keep: int, *, merged: bool) -> Kept:
    """The experts of a layer that are kept, in order, and the experts that each is made of.

    Args:
        merged: removed experts are added to the kept ones.
    """
    by_use = sorted(range(len(use.gates)), key=lambda expert: (-float(use.gates[expert]), expert))
    kept = sorted(by_use[:keep])
    groups: dict[int, list[int]] = {expert: [expert] for expert in kept}
    for expert in sorted(by_use[keep:]) if merged else ():
        if use.gates[expert] > 0:  # an unused expert has nothing to add
            groups[max(kept, key=lambda other: float(use.alike[expert, other]))].append(expert)
    made: dict[int, dict[int, float]] = {}
    for expert, group in groups.items():
        total = float(use.gates[group].sum())
        made[expert] = {one: float(use.gates[one]) / total for one in group} if total > 0 else {expert: 1.0}
    return made


def write_pruned(
    source: Source,
    kept: Mapping[int, Kept],
    out: Path,
    *,
    texts: Mapping[str, str],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Create a plain model folder of a mixture with fewer experts.

    Args:
        kept: for each layer with experts, the kept ones, the same number in each.
        texts: additional files, by name.

    Raises:
        InputError: ``out`` cannot be written.
    """
    keep = len(next(iter(kept.values())))
    config = dict(source.config)
    config[ARCHITECTURES[config["model_type"]].count] = keep
    config["num_experts_per_tok"] = min(keep, config["num_experts_per_tok"])
    planned = list(_planned(source, kept))
    layout: Layout = [(name, shape, source.dtype_of(stored, None, source.dtype)) for name, stored, shape, _ in planned]
    check_written(config, {name: tuple(shape) for name, shape, _ in layout}, source.place)

    def tensors(without: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name, stored, _, make in planned:
            if name not in without:
                yield name, make().to(source.dtype_of(stored, None, source.dtype)).contiguous()
                source.release(stored)

    with writing(out, layout, tensors, sources={source.name: source}, key=None, progress=progress) as folder:
        add_companions(folder, source, {"config.json": json.dumps(config, indent=2) + "\n", **texts})


Planned = tuple[str, str, Sequence[int], Callable[[], Tensor]]
"""A tensor's new name, the name of a stored tensor with its dtype, its shape, and a function that computes it."""


def _planned(source: Source, kept: Mapping[int, Kept]) -> Iterator[Planned]:
    """The tensors of the mixture with fewer experts, in the order of the source."""
    for name, entry in source.tensors.items():
        layer = source.roles[name].layer
        of_layer = {} if layer is None else kept.get(layer, {})
        if match := _EXPERT.fullmatch(name):
            expert = int(match[3])
            if expert in of_layer:
                number = list(of_layer).index(expert)
                made = partial(_blended, source, match, of_layer[expert])
                yield f"{match[1]}.experts.{number}.{match[4]}", name, entry.shape, made
        elif of_layer and name.endswith((".gate.weight", ".gate.e_score_correction_bias")):
            yield name, name, (len(of_layer), *entry.shape[1:]), partial(_rows, source, name, list(of_layer))
        else:
            yield name, name, entry.shape, partial(source.read, name)


def _blended(source: Source, match: re.Match[str], weights: Mapping[int, float]) -> Tensor:
    """A tensor of an expert that is made from several, summed in float32."""
    if len(weights) == 1:
        return source.read(match[0])
    read = {expert: source.read(f"{match[1]}.experts.{expert}.{match[4]}").float() for expert in weights}
    return torch.stack([weight * read[expert] for expert, weight in weights.items()]).sum(dim=0)


def _rows(source: Source, name: str, experts: Sequence[int]) -> Tensor:
    return source.read(name)[list(experts)]
