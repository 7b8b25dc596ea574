"""Converts routed experts on a base to a plain mixture, which is equivalent if each token uses one expert.

A routed recipe adds the changes of experts in each linear layer, y = W0 x + sum_e g_e D_e x; a mixture adds the outputs
of whole mlps. With several experts at once these are different functions, even if all modules of a block have the same
gates, because of the nonlinearity in between. If a token uses one expert per block, its softmax gate is exactly 1, and
the block is the mlp with the weights W0 + gain D_e: a slot.

Logits with biases, R x + b, are represented by a glm4_moe, which selects the largest of sigmoid(w x) + c. With w = s R
and c = s b / 4 for a small s, the order is that of R x + b: sigmoid(u) = 1/2 + u/4 - u^3/48 + ..., and s is chosen such
that the cubic term and the float32 rounding of a score near 1/2 are each about 1e-5 of the largest logit. A token whose
two best logits are closer than that may be routed to the other one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from evomerge.checkpoints.source import Source
from evomerge.errors import InputError
from evomerge.mixture.routers import Rows
from evomerge.recipes.mixture import BIASED, MixtureRecipe, SlotGroup, SlotRouter
from evomerge.recipes.routed import LayerGroup, RoutedRecipe
from evomerge.recipes.stack import Blend

LinearRouter = tuple[Tensor, Tensor | None]
"""R, float32 [experts, width], and b, [experts]."""

_BASE = "base"
"""The slot of the base's own mlp, in layers without experts and if "no adapter" is an expert."""

_SMALL = 0.02
"""The largest argument of a sigmoid."""


def check_convertible(recipe: RoutedRecipe) -> None:
    """Reject a routed recipe that is not equivalent to a mixture.

    Raises:
        InputError: saying which part of it is the reason.
    """
    place, hint = "recipe", "Export it otherwise; its flattened merge is always plain."
    if recipe.where != "mlp":
        problem = f"routes {recipe.where} blocks, and a mixture routes only mlps"
        raise InputError(f"{place}.where", problem, hint)
    if recipe.router.per != "block":
        problem = "has a router for each module, and a mixture one for each layer"
        raise InputError(f"{place}.router.per", problem, hint)
    if recipe.router.gate != "softmax" or not recipe.router.renormalised:
        problem = "has gates that are not 1 for the one expert that is kept"
        raise InputError(f"{place}.router.gate", problem, hint)
    for number, group in enumerate(recipe.groups):
        there = len(group.experts) + recipe.router.base_expert
        if group.experts and there > 1 and group.top_k != 1:
            problem = "keeps several experts of a token: their changes are added module by module, not mlp by mlp"
            raise InputError(f"{place}.groups.{number}.top_k", problem, hint)


def mixture_of_routed(
    recipe: RoutedRecipe, routers: Mapping[str, LinearRouter], sources: Mapping[str, Source]
) -> tuple[MixtureRecipe, Rows]:
    """The mixture that is equivalent to a routed recipe, and its routers.

    Args:
        routers: for each mlp, by the block's name in the model, as returned by ``RoutedBuilder.routers``.

    Raises:
        InputError: there is none.
    """
    check_convertible(recipe)
    layers = sources[recipe.base].layers
    slots = _slots(recipe)
    blends: list[Blend] = [_copy(recipe.base)]
    rest = _number(blends, recipe.rest or _copy(recipe.base))
    groups, rows = [], []
    for layer in range(layers):
        group = recipe.group_of(layer)
        there = {name: _number(blends, _with_gain(recipe, name, group.mlp_gain)) for name in _present(recipe, group)}
        router = routers.get(f"model.layers.{layer}.mlp")
        weight, bias = _scaled(recipe, group, router, sources[recipe.base].config["hidden_size"], slots)
        groups.append(SlotGroup(layers=1, slots=there, bias={name: float(bias[slots.index(name)]) for name in there}))
        rows.append(weight)
    mixture = MixtureRecipe(
        sources=recipe.sources,
        tokenizer=recipe.tokenizer,
        seed=recipe.seed,
        dtype=recipe.dtype,
        architecture=BIASED,
        blends=tuple(blends),
        rest=rest,
        embedding=0,
        groups=tuple(groups),
        top_k=1,
        router=SlotRouter(kind="uniform", rest=rest, slots={name: _first(groups, name) for name in slots}),
    )
    return mixture, Rows(torch.stack(rows), torch.zeros(layers, len(slots)))


def _slots(recipe: RoutedRecipe) -> list[str]:
    """All slots in any layer; a glm4_moe has at least two, one of which may be absent everywhere."""
    found = dict.fromkeys(name for group in recipe.groups for name in _present(recipe, group))
    ordered = [name for name in (*recipe.experts, _BASE) if name in found]
    return ordered if len(ordered) > 1 else [*ordered, _BASE if _BASE not in ordered else recipe.experts[0]]


def _present(recipe: RoutedRecipe, group: LayerGroup) -> Iterator[str]:
    yield from (name for name in recipe.experts if name in group.experts)
    if recipe.router.base_expert or not group.experts:
        yield _BASE


def _first(groups: list[SlotGroup], name: str) -> int:
    return next((group.slots[name] for group in groups if name in group.slots), 0)


def _with_gain(recipe: RoutedRecipe, name: str, gain: float) -> Blend:
    """The mlp of an expert: the base plus ``gain`` times its change."""
    if name == _BASE and name not in recipe.experts:
        return _copy(recipe.base)
    parameters = {"weight": {name: gain}, "lambda": 1.0, "normalize": False}
    return Blend(method="task_arithmetic", sources=(name,), base=recipe.base, parameters=parameters)  # type: ignore[arg-type]


def _copy(source: str) -> Blend:
    return Blend(method="linear", sources=(source,), parameters={"weight": {source: 1.0}, "normalize": False})


def _number(blends: list[Blend], blend: Blend) -> int:
    if blend not in blends:
        blends.append(blend)
    return blends.index(blend)


def _scaled(
    recipe: RoutedRecipe, group: LayerGroup, router: LinearRouter | None, width: int, slots: list[str]
) -> tuple[Tensor, Tensor]:
    """A router's rows and biases for a glm4_moe, float32 [slots, width] and [slots]; see the module docstring."""
    weight, bias = torch.zeros(len(slots), width), torch.zeros(len(slots))
    if router is None or not group.experts:
        return weight, bias
    rows, offsets = router
    of_experts = (*recipe.experts, _BASE) if recipe.router.base_expert else recipe.experts
    for number, name in enumerate(of_experts):
        if name in slots:
            place = slots.index(name)
            weight[place] = rows[number] / group.temperature
            own = 0.0 if offsets is None else float(offsets[number]) / group.temperature
            bias[place] = own + group.bias.get(name, 0.0)
    largest = float(weight.norm(dim=1).max()) * math.sqrt(width) + float(bias.abs().max())
    scale = _SMALL / largest if largest > 0 else 1.0
    return weight * scale, bias * scale / 4
