"""The coefficient of each source in each tensor, fitted to right answers.

With W0 the base and tau_k the change of source k, the merge is

    W = W0 + sum_k c_k tau_k,

as in task arithmetic, with separate numbers c_k for every tensor. They are found by gradient descent on a loss of right
answers (``Fit``). "AdaMerging" (Yang et al., arXiv 2310.02575, layer-wise) finds them in this way without any answers,
from the entropy of a model's output. The gradient is exact (``gradient``), steps are those of Adam, and the learning
rate decays to zero along a cosine.

The numbers are evidence: the same sources and items give the same numbers, which are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from evomerge.genome import Genome, Parameter
from evomerge.merging.fitting.adam import Adam
from evomerge.merging.fitting.gradient import GenomeGradients
from evomerge.merging.path import merged_tensors
from evomerge.recipes.stack import Blend, StackRecipe

if TYPE_CHECKING:
    from evomerge.checkpoints.live import LiveModel
    from evomerge.checkpoints.source import Source
    from evomerge.merging.fitting.fit import Fit
    from evomerge.merging.materialise import Materialiser
    from evomerge.merging.measured.evidence import Evidence

_KIND = "coefficients 1"
_LOSSES = "losses"
"""The name of the losses before each step, among the names of tensors; no tensor has this name."""

LOW, HIGH = -1.0, 3.0
"""The bounds of a coefficient: no good merge was seen to need more."""


class Coefficients:
    """Coefficients of some sources, fitted to right answers; see ``FittedTo``.

    Args:
        fit: what they are fitted to.
        sources: opened, by the names that recipes use.
        tokenizer: the source that gives tokenizer and configuration.
        dtype: of the live model; None means that of the tokenizer's source.
        evidence: where they are kept.
        materialiser: returns what writes recipes.
        write: writes one into the live model.
    """

    def __init__(
        self,
        fit: Fit,
        sources: Mapping[str, Source],
        tokenizer: str,
        dtype: torch.dtype | None,
        evidence: Evidence,
        materialiser: Callable[[], Materialiser],
        write: Callable[[StackRecipe], LiveModel],
    ) -> None:
        self.fit, self._sources, self._tokenizer, self._dtype = fit, sources, tokenizer, dtype
        self._evidence, self._materialiser, self._write = evidence, materialiser, write
        self._known: dict[tuple[str, ...], Mapping[str, Tensor]] = {}

    @property
    def digest(self) -> str:
        """The digest of the items and of the settings of the fit."""
        return self.fit.digest

    def of(self, base: str, sources: Sequence[str], tensor: str) -> list[float]:
        """The coefficient of each source's change to a tensor; 0 for sources that do not change it."""
        found = self.found(base, sources).get(tensor)
        return [0.0] * len(sources) if found is None else found.tolist()

    def found(self, base: str, sources: Sequence[str]) -> Mapping[str, Tensor]:
        """By tensor name, float64 [sources]; and under "losses" the loss before each step, float64 [steps].

        Computed if it is not kept yet; the live model then holds another recipe than before.

        Raises:
            NotFiniteError: the loss or its gradient is NaN or Inf.
            InputError: an item cannot be put to the model.
        """
        key = (base, *sources)
        if key not in self._known:
            content, model = self._evidence.content_of, self._sources[self._tokenizer]
            follows = tuple(map(content, key)), content(model.name), str(self._dtype or model.dtype)
            compute = partial(self._fitted, base, sources)
            self._known[key] = self._evidence.get(_KIND, (*follows, self.digest), compute)
        return self._known[key]

    def _fitted(self, base: str, sources: Sequence[str]) -> dict[str, Tensor]:
        from evomerge.checkpoints.live import NotFiniteError  # imports transformers

        space = TensorSpace(self._sources, self._tokenizer, base, sources)
        gradients, adam = GenomeGradients(self._materialiser(), space), Adam(space.parameters, self._rate)
        genome, losses = np.array([parameter.default for parameter in space.parameters]), list[float]()
        for step in range(self.fit.steps):
            point = gradients.at(genome)
            live = self._write(point.recipe)
            loss = 0.0
            with closing(self.fit.passes(live, step, partial(point.listening, live))) as parts:
                for part in parts:
                    part.backward()  # type: ignore[no-untyped-call]
                    loss += float(part.detach())
            if not (math.isfinite(loss) and np.isfinite(point.gradient).all()):
                raise NotFiniteError(f"the loss of step {step} of the fit, or its gradient")
            losses.append(loss)
            genome = adam.step(genome, point.gradient, share(step, self.fit.steps))
        return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in space.by_tensor(genome)} | {
            _LOSSES: torch.tensor(losses, dtype=torch.float64)
        }

    @property
    def _rate(self) -> float:
        return self.fit.rate / (HIGH - LOW)  # Adam's rate is a fraction of the range


def share(step: int, steps: int) -> float:
    """The share of the learning rate at a step: from 1 to nearly 0 along a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


class TensorSpace:
    """Merges by task arithmetic with a separate weight for each source in each tensor that this source changes.

    Args:
        sources: opened, by the names that recipes use.
        tokenizer: the source that gives tokenizer and configuration.
        base: the source that changes are differences from.
        mixed: the sources whose changes are mixed.

    Attributes:
        parameters: tensor by tensor, for each the sources that change it; all start at 1 / n.
    """

    def __init__(self, sources: Mapping[str, Source], tokenizer: str, base: str, mixed: Sequence[str]) -> None:
        self._base, self._mixed = base, tuple(mixed)
        references = {name: sources[name].reference for name in dict.fromkeys((base, *mixed, tokenizer))}
        alone = Blend(method="linear", sources=(base,), parameters={"weight": {base: 1.0}, "normalize": False})
        self._bare = StackRecipe.uniform(
            alone, sources=references, tokenizer=tokenizer, layers=sources[tokenizer].layers
        )
        changing = {
            one.name: tuple(name for name in mixed if _changes(sources[name], sources[base], one.stored))
            for one in merged_tensors(self._bare, sources)
        }
        self._changing = {tensor: names for tensor, names in changing.items() if names}
        start = 1.0 / len(self._mixed)
        self.parameters = [
            Parameter(f"{tensor}.{name}", LOW, HIGH, start, differentiable=True)
            for tensor, names in self._changing.items()
            for name in names
        ]

    def decode(self, genome: Genome) -> StackRecipe:
        """The base, with a separate blend for every changed tensor."""
        bare, base = self._bare, self._bare.blends[0]
        return StackRecipe.compose(
            sources=bare.sources,
            tokenizer=bare.tokenizer,
            embedding=base,
            hops=((layer, base, base, base) for layer in range(len(bare.hops))),
            norm=base,
            head=base,
            tensors={tensor: self._blend(weights) for tensor, weights in self._weights(genome)},
        )

    def by_tensor(self, genome: Genome) -> Iterator[tuple[str, list[float]]]:
        """The weights of every changed tensor, one for each source: 0 for those that do not change it."""
        for tensor, weights in self._weights(genome):
            yield tensor, [weights.get(name, 0.0) for name in self._mixed]

    def _weights(self, genome: Genome) -> Iterator[tuple[str, dict[str, float]]]:
        numbers = iter(genome.tolist())
        for tensor, names in self._changing.items():
            yield tensor, {name: next(numbers) for name in names}

    def _blend(self, weights: Mapping[str, float]) -> Blend:
        return Blend(
            method="task_arithmetic",
            sources=tuple(weights),
            base=self._base,
            parameters={"weight": dict(weights), "lambda": 1.0, "normalize": False},
        )


def _changes(source: Source, base: Source, tensor: str) -> bool:
    """Whether a source changes a tensor of the base, as far as that can be told without reading it."""
    return tensor in source.changes or source.tensors[tensor] != base.tensors[tensor]
