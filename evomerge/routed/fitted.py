"""Fits routers by gradient descent: only their weights are fitted to right answers.

Each starts at zero, which gives every expert the same gate, and AdamW (without weight decay) decays its learning rate
to 0 along a cosine. Fitting is done once for all experts in every layer; what a candidate omits, sharpens or scales is
applied to the result, so that candidates need no gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing

import torch
from torch import Tensor

from evomerge.checkpoints.backward import gradients
from evomerge.checkpoints.live import LiveModel, NotFiniteError
from evomerge.errors import InputError
from evomerge.merging.fitting.fit import Fit
from evomerge.recipes.routed import RoutedRecipe
from evomerge.routed.computing import Router, Routing
from evomerge.routed.live import LiveExperts
from evomerge.routed.losses import halves, localized_balance, switch_balance, z_loss
from evomerge.routed.sites import Place
from evomerge.routed.use import of_tokens

RATE = 0.1
"""Relative to the learning rate of a fit, which suits numbers of about 1: a router's input has hundreds of channels of
that size. On held-out answers (``scripts/bench/experts.py tune``) half of it is worse, and twice of it as good."""

Routings = Callable[[Mapping[str, Router]], Mapping[str, Routing]]
"""(the router of each place) -> how they gate."""


def fit_routers(
    live: LiveModel,
    experts: LiveExperts,
    recipe: RoutedRecipe,
    places: Mapping[str, Place],
    routings: Routings,
    fit: Fit,
) -> dict[str, Router]:
    """Fit the routers of all places.

    Args:
        live: the live model of the base.
        recipe: says which experts are where, and gives the balancing losses.
        routings: how logits become gates during the fit.

    Raises:
        InputError: items lack the groups that a balancing loss needs.
        NotFiniteError: a loss is NaN or Inf.
    """
    rows = len(recipe.experts) + recipe.router.base_expert
    routers = {
        name: Router(
            "linear",
            torch.zeros(rows, place.width, device=_home(live, name), requires_grad=True),
            torch.zeros(rows, device=_home(live, name), requires_grad=True),
        )
        for name, place in places.items()
    }
    numbers = [tensor for router in routers.values() for tensor in (router.weight, router.bias) if tensor is not None]
    optimizer = torch.optim.AdamW(numbers, lr=RATE * fit.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / fit.steps)) / 2)
    use = _Use(recipe, places)

    def listening(recomputed: bool) -> AbstractContextManager[None]:
        return gradients(live, {}, recomputed=recomputed)

    # The graph is built by the loss's own forward pass; earlier computations are not differentiated.
    undo = experts.install(recipe, places, routings(routers), use, apart=True)
    with undo:
        for step in range(fit.steps):
            optimizer.zero_grad()
            with closing(fit.passes(live, step, listening)) as parts:
                for part in parts:
                    loss = part + use.loss(fit.kinds).to(part.device)
                    if not bool(torch.isfinite(loss)):
                        raise NotFiniteError(f"the loss of step {step + 1} of a fit")
                    loss.backward()  # type: ignore[no-untyped-call]
                    use.forget()
            optimizer.step()
            schedule.step()
    return {name: _settled(router) for name, router in routers.items()}


def _settled(router: Router) -> Router:
    assert router.bias is not None
    return Router(router.kind, router.weight.detach(), router.bias.detach())


def _home(live: LiveModel, name: str) -> torch.device:
    """The device of the weights of a module or block."""
    device: torch.device = next(live.model.get_submodule(name).parameters()).device
    return device


class _Use:
    """A listener that collects the routers' outputs in the forward pass of one part, and computes losses on them."""

    def __init__(self, recipe: RoutedRecipe, places: Mapping[str, Place]) -> None:
        self._recipe, self._places, self._balance = recipe, places, recipe.router.balance
        self._mask: Tensor | None = None
        self._said: dict[str, tuple[Tensor, Tensor]] = {}
        self._open = False

    def tokens(self, mask: Tensor | None) -> None:
        self._mask, self._open = mask, True
        self._said.clear()

    def routed(self, place: str, logits: Tensor, gates: Tensor) -> None:
        if self._open:  # not when a layer is recomputed
            self._said[place] = logits, gates

    def done(self) -> None:
        self._open = False

    def forget(self) -> None:
        """Release the graph."""
        self._said.clear()

    def loss(self, kinds: Sequence[int] | None) -> Tensor:
        """The balancing loss of the pass, weighted as in the recipe: a scalar.

        Args:
            kinds: the group of each text, 0 or 1, if they have groups.
        """
        balance, total = self._balance, torch.zeros(())
        if balance.switch:
            total = total + balance.switch * sum(self._switch(), start=torch.zeros(()))
        if balance.z:
            found = [z_loss(self._kept(logits)) for logits, _ in self._said.values()]
            total = total + balance.z * torch.stack([loss.cpu() for loss in found]).mean()
        if balance.localized:
            if kinds is None:
                problem = "balances the use of experts by the groups of texts, and the items of `fit` have none"
                raise InputError("recipe.router.balance.localized", problem, "Give each item a `group`.")
            total = total + balance.localized * self._localized(kinds)
        return total

    def _switch(self) -> Iterator[Tensor]:
        """For each layer, with the tokens of all its places as one batch (MoLA)."""
        layers: dict[int, list[Tensor]] = defaultdict(list)
        for name, (logits, _) in self._said.items():
            layers[self._places[name].layer].append(self._kept(logits).softmax(-1).cpu())
        for layer, probabilities in layers.items():
            yield switch_balance(torch.cat(probabilities), self._recipe.group_of(layer).top_k)

    def _localized(self, kinds: Sequence[int]) -> Tensor:
        """The mean over places. Texts of group 0 belong to the first half of the experts."""
        if max(kinds) > 1:
            problem = "knows two groups of texts, and the items of `fit` have more"
            raise InputError("recipe.router.balance.localized", problem)
        owners = halves(len(self._recipe.experts))
        found = []
        for _, gates in self._said.values():
            flat = gates.reshape(-1, gates.shape[-1])[:, : len(owners)]
            flat = flat * of_tokens(self._mask, len(flat), flat.device)[:, None]
            own = flat.view(len(kinds), -1, len(owners))
            found.append(localized_balance(own, kinds, owners, self._balance.delta).cpu())
        return torch.stack(found).mean()

    def _kept(self, logits: Tensor) -> Tensor:
        """The logits of all tokens without padding, [tokens, experts]."""
        flat = logits.reshape(-1, logits.shape[-1])
        return flat[of_tokens(self._mask, len(flat), flat.device) > 0]
