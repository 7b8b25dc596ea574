"""How far a model is from another, such as its base: the norm of what merging changed in its weights.

Losses of merged models follow this norm more than the direction of the change: a merge that went far is mostly broken,
and one that went nowhere is its base. It is known exactly, without a prompt.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from evaluators.base import EvaluatorSettings, ModelReference, Split
from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

    from evaluators.prompts import Asked, Reader
    from evomerge.checkpoints.live import LiveModel
    from evomerge.checkpoints.source import Source

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


class ChangeEvaluator:
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
        self.measured: frozenset[str] = frozenset()
        self.seconds: Mapping[str, float] = {}
        self.answers: Mapping[int, str] = {}

    def items(self, split: Split) -> Sequence[str]:
        """One item; another for each split, since nobody could learn anything from it."""
        return [hashlib.sha256(f"change {split}".encode()).hexdigest()[:16]]

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """One item that asks nothing."""
        return [("", "")]

    def asked(self, reader: Reader, split: Split, index: int) -> list[Asked]:
        """Nothing."""
        return []

    def test_items(self, split: Split) -> dict[str, int]:
        """None: a model is no question."""
        return {}

    def score(self, model: LiveModel, split: Split, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """The model's change: float32 [len(indices)], the same at every place.

        Raises:
            InputError: the two models have no tensor in common.
        """
        if outside := [index for index in indices if index != 0]:
            raise IndexError(f"{self.name} has 1 item in its {split} split; there is no item {outside[0]}")
        started = time.perf_counter()
        value = self._change(model) if indices else 0.0
        self.seconds = {"score": time.perf_counter() - started} if indices else {}
        return {"change": np.full(len(indices), value, dtype=np.float32)}

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
