"""The rows of routers, which map each token's input to a logit for each slot.

They are found once, with a reference mixture (``MixtureRecipe.reference_mixture``) that all candidates of a search
share, and cached as evidence.

Prototypes (like mergekit-moe's hidden mode, corrected): the router of a layer reads the output of the norm after the
attention, so this is observed instead of the layer's own input; every token of a text counts except the first, which is
the same in all texts; a slot's texts are run through that slot's own mlps, as if a router had sent them there. With m_e
the mean over the tokens of slot e, and m the mean of the m_e,

    r_e = (m_e - m) / mean_e |m_e - m|^2,

so that a slot's average token has a logit about 1 above that of the overall average. Only glm4_moe can represent the
constant r_e m, as a selection bias; in other architectures it remains part of the logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging.fitting.fit import Fit
from evomerge.merging.measured.evidence import Evidence, Tensors
from evomerge.recipes.mixture import MixtureRecipe, SlotGroup

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel

_KIND = "rows of routers 1"
_ABSENT = -1e9
"""The bias of a slot that is absent from a layer."""

_ALIKE = 1e-12
"""Prototypes count as equal if the mean square of their differences is below this."""


@dataclass(frozen=True)
class Rows:
    """The routers of all layers.

    Attributes:
        rows: float32 [layers, slots, width].
        middle: float32 [layers, slots], the logits of the average input; zero if not measured.
    """

    rows: Tensor
    middle: Tensor

    def weight(self, layer: int, group: SlotGroup, slots: Sequence[str]) -> Tensor:
        """A router's weight, float32 [slots, width]: rows over the temperature, zero for absent slots."""
        there = torch.tensor([float(slot in group.slots) for slot in slots])
        return self.rows[layer] / group.temperature * there[:, None]

    def bias(self, layer: int, group: SlotGroup, slots: Sequence[str]) -> Tensor:
        """The selection bias of a glm4_moe, float32 [slots].

        With it, the average input is equally likely to be routed to any slot: the selection is by sigmoid(r x / t) +
        bias, which is 1/2 there.
        """
        centred = 0.5 - torch.sigmoid(self.middle[layer] / group.temperature)
        given = torch.tensor([group.bias.get(slot, 0.0) for slot in slots])
        there = torch.tensor([slot in group.slots for slot in slots])
        return torch.where(there, centred + given, torch.tensor(_ABSENT))


@dataclass(frozen=True)
class ReferenceMixture:
    """The live reference mixture with which rows are found.

    Attributes:
        recipe: see ``MixtureRecipe.reference_mixture``.
        live: its model.
        gates: the module of each layer's router.
        write: writes a recipe of this form into the model, with zero routers.
        tokens_of: the tokenized texts with a given name, int64 [1, tokens] each.
    """

    recipe: MixtureRecipe
    live: LiveModel
    gates: Sequence[Any]
    write: Callable[[MixtureRecipe], None]
    tokens_of: Callable[[str], Sequence[Tensor]]


def rows_of(
    recipe: MixtureRecipe,
    width: int,
    evidence: Evidence,
    follows_from: tuple[Any, ...],
    fit: Fit | None,
    reference: Callable[[], ReferenceMixture],
) -> Rows:
    """The rows of a recipe's routers, from the cached evidence or computed now.

    Args:
        width: the width of the routers' inputs.
        follows_from: everything that determines them in addition to the recipe's description of routers.
        reference: returns the live reference mixture, if needed.

    Raises:
        InputError: texts of different slots are equal.
    """
    router, slots, layers = recipe.router, recipe.slots, recipe.layers
    if router.kind == "uniform":
        return Rows(torch.zeros(layers, len(slots), width), torch.zeros(layers, len(slots)))
    if router.kind == "random":
        drawn = torch.randn(layers, len(slots), width, generator=torch.Generator().manual_seed(recipe.seed))
        return Rows(drawn / math.sqrt(width), torch.zeros(layers, len(slots)))

    def compute() -> Tensors:
        if router.kind == "prototypes":
            return _prototypes(reference())
        assert fit is not None  # checked by the builder
        return _fitted(reference(), fit)

    found = evidence.get(_KIND, (*follows_from, _said(recipe)), compute)
    return Rows(found["rows"], found["middle"])


def _said(recipe: MixtureRecipe) -> str:
    """A recipe's description of its router rows, with blends instead of their numbers."""
    router = recipe.router
    said = {
        "architecture": recipe.architecture,
        "layers": recipe.layers,
        "kind": router.kind,
        "slots": [[name, recipe.blends[number].model_dump_json()] for name, number in router.slots.items()],
        "rest": recipe.blends[router.rest].model_dump_json(),
        "against": router.against,
        "texts": recipe.fit if router.kind == "fitted" else recipe.calibration,
        "normalised": recipe.normalised,
        "seed": recipe.seed,
    }
    return json.dumps(said)


def _prototypes(reference: ReferenceMixture) -> Tensors:
    """See the module docstring."""
    recipe, means, opposite = reference.recipe, {}, {}
    for slot, blend in recipe.router.slots.items():
        alone = SlotGroup(layers=recipe.layers, slots=dict.fromkeys(recipe.slots, blend))
        reference.write(recipe.model_copy(update={"groups": (alone,), "top_k": 1, "normalised": True}))
        means[slot] = _mean_given(reference, slot)
        if slot in recipe.router.against:
            opposite[slot] = _mean_given(reference, f"not {slot}")
    middle = torch.stack(list(means.values())).mean(dim=0)  # [layers, width]
    apart = torch.stack([mean - opposite.get(slot, middle) for slot, mean in means.items()], dim=1)
    size = apart.square().sum(dim=-1).mean(dim=-1)  # [layers]
    if float(size.min()) < _ALIKE:
        layer = int(size.argmin())
        problem = f"gives the router of layer {layer} the same for each of {', '.join(recipe.slots)}"
        raise InputError("calibration", problem, "Give each its own texts: `calibration: {NAME: FILE, ...}`.")
    rows = apart / size[:, None, None]
    return {"rows": rows.float().contiguous(), "middle": torch.einsum("lsw,lw->ls", rows, middle).float().contiguous()}


@torch.inference_mode()
def _mean_given(reference: ReferenceMixture, name: str) -> Tensor:
    """The mean input of routers over the tokens of some texts except the first of each, float64 [layers, width].

    Texts are run one by one, so that there is no padding.
    """
    sums, count = [torch.zeros(()).double()] * len(reference.gates), 0
    for tokens in reference.tokens_of(name):
        with observed_inputs(reference.gates) as given:
            reference.live.model(tokens.to(reference.live.device), use_cache=False)
        first = 1 if tokens.shape[1] > 1 else 0
        sums = [total + x[first:].double().sum(dim=0).cpu() for total, x in zip(sums, given, strict=True)]
        count += tokens.shape[1] - first
    return torch.stack(sums) / count


@contextmanager
def observed_inputs(gates: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Collect the routers' inputs in a forward pass: [tokens, width] each, in the order of the layers."""
    given: dict[int, Tensor] = {}
    collected: list[Tensor] = []

    def keep(number: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, inputs: given.update({number: inputs[0].reshape(-1, inputs[0].shape[-1])})

    handles = [gate.register_forward_pre_hook(keep(number)) for number, gate in enumerate(gates)]
    try:
        yield collected
        collected += [given[number] for number in range(len(gates))]
    finally:
        for handle in handles:
            handle.remove()


def _fitted(reference: ReferenceMixture, fit: Fit) -> Tensors:
    """Fit rows with AdamW, starting from zero, with all slots selected; master weights are float32.

    Each number of a row is multiplied by an input of about 1, and there are as many as the input is wide: a step of the
    learning rate divided by the square root of the width changes logits about as much as a step of the learning rate
    changes a single number.
    """
    reference.write(reference.recipe)
    weights = [gate.weight for gate in reference.gates]
    masters = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    rate = fit.rate / math.sqrt(masters[0].shape[1])
    optimizer = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for step in range(fit.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / fit.steps))
            _step(reference.live, fit, step, masters, weights)
            optimizer.step()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    rows = torch.stack([master.detach().cpu() for master in masters])
    if not bool(torch.isfinite(rows).all()):
        raise InputError("fit", "ends in NaN or Inf", "Lower its rate, or store the models in float32.")
    return {"rows": rows.contiguous(), "middle": torch.zeros(rows.shape[:2])}


def _step(live: LiveModel, fit: Fit, step: int, masters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Store the gradient of a step's loss with the master weights, computed with their values in the model's dtype."""
    with torch.no_grad():
        for master, weight in zip(masters, weights, strict=True):
            weight.copy_(master)
            weight.grad = None
    with torch.enable_grad(), closing(fit.passes(live, step)) as parts:
        for loss in parts:
            torch.autograd.backward(loss)
    for master, weight in zip(masters, weights, strict=True):
        master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()


def gate_modules(live: LiveModel, tensors: Mapping[int, str]) -> list[Any]:
    """The modules of the routers, by the names of their weights in the model, layer by layer."""
    return [live.model.get_submodule(tensors[layer].rpartition(".")[0]) for layer in sorted(tensors)]
