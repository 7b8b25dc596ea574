"""The rows of routers: what each token's input is multiplied by, so that each slot gets a logit.

Found once for a landmark, a mixture of which all candidates of a search share the rows (``MixtureRecipe.landmark``),
and kept as evidence.

Prototypes (as mergekit-moe's hidden mode, "made right"): the router of a layer multiplies what the norm behind the
attention gives, so that is what is observed, not the layer's own input; every token of a text counts, but for its
first, which is the same in all texts; a slot's texts are run through that slot's own mlps, as a router that sends them
there has it. With m_e the mean over the tokens of slot e, and m that of the m_e,

    r_e = (m_e - m) / mean_e |m_e - m|^2,

so that a slot's average token has a logit of about 1 above that of the average of all. Only glm4_moe can hold the
constant r_e m, as a bias of the choice; of others it stays in the logits.
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
"""The bias of a slot that a layer does not have."""

_ALIKE = 1e-12
"""Mean square of the differences of prototypes, under which they are the same."""


@dataclass(frozen=True)
class Rows:
    """The routers of all layers.

    Attributes:
        rows: float32 [layers, slots, width].
        middle: float32 [layers, slots], the logits of what is given on average; zero where nobody measured it.
    """

    rows: Tensor
    middle: Tensor

    def weight(self, layer: int, group: SlotGroup, slots: Sequence[str]) -> Tensor:
        """A router's weight, float32 [slots, width]: rows over the temperature, zero of slots that are not there."""
        there = torch.tensor([float(slot in group.slots) for slot in slots])
        return self.rows[layer] / group.temperature * there[:, None]

    def bias(self, layer: int, group: SlotGroup, slots: Sequence[str]) -> Tensor:
        """The bias of a glm4_moe's choice, float32 [slots].

        With it, what is given on average is as likely to go to one slot as to another: the choice is by
        sigmoid(r x / t) + bias, and that is 1/2 there.
        """
        centred = 0.5 - torch.sigmoid(self.middle[layer] / group.temperature)
        given = torch.tensor([group.bias.get(slot, 0.0) for slot in slots])
        there = torch.tensor([slot in group.slots for slot in slots])
        return torch.where(there, centred + given, torch.tensor(_ABSENT))


@dataclass(frozen=True)
class Landmark:
    """The mixture that rows are found with, live.

    Attributes:
        recipe: see ``MixtureRecipe.landmark``.
        live: its model.
        gates: the module of each layer's router.
        write: writes a recipe of this very form into the model, with routers that are zero.
        tokens_of: the texts of a name as the model reads them, int64 [1, tokens] each.
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
    landmark: Callable[[], Landmark],
) -> Rows:
    """The rows of a recipe's routers, from the evidence or found now.

    Args:
        width: of what routers are given.
        follows_from: all that they follow from beside what the recipe says of routers.
        landmark: the live mixture, asked for where it is needed.

    Raises:
        InputError: texts of different slots are the same.
    """
    router, slots, layers = recipe.router, recipe.slots, recipe.layers
    if router.kind == "uniform":
        return Rows(torch.zeros(layers, len(slots), width), torch.zeros(layers, len(slots)))
    if router.kind == "random":
        drawn = torch.randn(layers, len(slots), width, generator=torch.Generator().manual_seed(recipe.seed))
        return Rows(drawn / math.sqrt(width), torch.zeros(layers, len(slots)))

    def compute() -> Tensors:
        if router.kind == "prototypes":
            return _prototypes(landmark())
        assert fit is not None  # looked at by the builder
        return _fitted(landmark(), fit)

    found = evidence.get(_KIND, (*follows_from, _said(recipe)), compute)
    return Rows(found["rows"], found["middle"])


def _said(recipe: MixtureRecipe) -> str:
    """What a recipe says of its routers' rows, with the blends in place of their numbers."""
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


def _prototypes(landmark: Landmark) -> Tensors:
    """See the module's text."""
    recipe, means, opposite = landmark.recipe, {}, {}
    for slot, blend in recipe.router.slots.items():
        alone = SlotGroup(layers=recipe.layers, slots=dict.fromkeys(recipe.slots, blend))
        landmark.write(recipe.model_copy(update={"groups": (alone,), "top_k": 1, "normalised": True}))
        means[slot] = _mean_given(landmark, slot)
        if slot in recipe.router.against:
            opposite[slot] = _mean_given(landmark, f"not {slot}")
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
def _mean_given(landmark: Landmark, name: str) -> Tensor:
    """What routers are given on average over the tokens of some texts but the first of each, float64 [layers, width].

    Texts are run one by one, so that there is no padding.
    """
    sums, count = [torch.zeros(()).double()] * len(landmark.gates), 0
    for tokens in landmark.tokens_of(name):
        with observed_inputs(landmark.gates) as given:
            landmark.live.model(tokens.to(landmark.live.device), use_cache=False)
        first = 1 if tokens.shape[1] > 1 else 0
        sums = [total + x[first:].double().sum(dim=0).cpu() for total, x in zip(sums, given, strict=True)]
        count += tokens.shape[1] - first
    return torch.stack(sums) / count


@contextmanager
def observed_inputs(gates: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Collect what routers are given in a forward pass: [tokens, width] each, in the order of the layers."""
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


def _fitted(landmark: Landmark, fit: Fit) -> Tensors:
    """Rows by AdamW from zero, with all slots kept, in float32 beside what the model computes with.

    A number of a row meets an input of about 1, and they are as many as the input is wide: a step of the fit's rate
    over the root of that changes logits about as much as a step of the rate changes a number that stands alone.
    """
    landmark.write(landmark.recipe)
    weights = [gate.weight for gate in landmark.gates]
    masters = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    rate = fit.rate / math.sqrt(masters[0].shape[1])
    optimizer = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for step in range(fit.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / fit.steps))
            _step(landmark.live, fit, step, masters, weights)
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
    """Put the gradient of a step's loss beside the masters, computed with what they are in the model's dtype."""
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
