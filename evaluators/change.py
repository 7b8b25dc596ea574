"""How far a model is from another, such as its base: the norm of what merging changed in its weights.

Losses of merged models follow this norm more than the direction of the change: a merge that went far is mostly broken,
and one that went nowhere is its base. It is known exactly, without a prompt.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from evaluators.base import EvaluatorSettings, Graded, ImperativeEvaluator, Item, ModelReference, Split
from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel
    from evomerge.checkpoints.source import Source
    from evomerge.inference.requests import Engine

_ELEMENTS = 2**22  # of a tensor at once: what float32 copies of it take is bounded


class ChangeSettings(EvaluatorSettings):
    """What the search file says of the model that others are measured from.

    Attributes:
        model: a folder, ``org/name`` on the hub, or either with adapters behind a "+".
    """

    kind: Literal["change"] = "change"
    model: ModelReference

    def known_metrics(self) -> Collection[str]:
        return ("change",)

    def build(self) -> ChangeEvaluator:
        """Open the model, headers only, and take its fingerprint.

        Raises:
            InputError: it cannot be opened.
        """
        return ChangeEvaluator(self)


class ChangeEvaluator(ImperativeEvaluator):
    """Scores a model by ``change``: norm(W - W0) / norm(W0) over all weights, W0 those of the other model.

    Tensors are compared with those of the same name, of a path those of each hop with the layer of its number; a tensor
    that the other model has not, or in another shape, as of another vocabulary, is left out. Each split has one item,
    which is the model itself. Less counts as better, where it counts.
    """

    def __init__(self, settings: ChangeSettings) -> None:
        from evomerge.checkpoints.fingerprints import content_digest, fingerprint
        from evomerge.checkpoints.source import open_source

        self.name = "change"
        self._from: Source = open_source("model", settings.model, place="model")
        digest = content_digest(fingerprint(self._from))
        self.version = hashlib.sha256(f"change 1 {digest}".encode()).hexdigest()[:16]
        self.metrics: Mapping[str, bool] = {"change": False}
        # One item for each split, another one each: nobody could learn anything from it.
        self.splits = {
            split: [Item(hashlib.sha256(f"change {split}".encode()).hexdigest()[:16])] for split in get_args(Split)
        }

    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        """The model's change.

        Raises:
            InputError: the two models have no tensor in common.
        """
        started = time.perf_counter()
        scores = {"change": np.full(len(indices), self._change(live), dtype=np.float32)}
        return Graded(scores, seconds={"score": time.perf_counter() - started})

    def _change(self, live: LiveModel) -> float:
        change = size = 0.0
        for now, before in self._pairs(live):
            base = before.to(now.device).float()
            size += _squares(base)
            change += _squares(now.float() - base)
        if not size:
            raise InputError("change", f"the model has no weights in common with {self._from.reference}")
        return math.sqrt(change / size)

    def _pairs(self, live: LiveModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of both models' tensors, the live one's first."""
        import torch

        held = live.model.state_dict()
        for name, part in self._from.parts.items():
            before = self._from.read(name)
            now = part.of(held[part.tensor]) if part.tensor in held else None
            if now is not None and now.shape == before.shape:
                pieces = [torch.split(tensor.reshape(-1), _ELEMENTS) for tensor in (now, before)]
                yield from zip(*pieces, strict=True)
            self._from.release(name)


def _squares(values: torch.Tensor) -> float:
    """The sum of squares of float32 values, added up in float64."""
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
