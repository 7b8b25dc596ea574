"""Measures how far a model is from its search's base, or from another model: the norm of the weight change.

Losses of merged models depend more on this norm than on the direction of the change: a merge that went far is mostly
broken, and one that went nowhere equals its base. The norm is exact and needs no prompt.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from evaluators.base import EvaluatorSettings, Graded, ImperativeEvaluator, Item, OptionalModel, Split
from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel
    from evomerge.checkpoints.source import Source
    from evomerge.inference.requests import Engine

_ELEMENTS = 2**22  # per piece of a tensor, which bounds the memory of float32 copies


class ChangeSettings(EvaluatorSettings):
    """The settings of the model that distances are measured from.

    Attributes:
        model: a folder, ``org/name`` on the hub, or either with adapters after a "+"; None means the search's base.
    """

    kind: Literal["change"] = "change"
    model: OptionalModel = None

    def known_metrics(self) -> Collection[str]:
        return ("change",)

    def build(self) -> BaseChangeEvaluator:
        """The evaluator; a model other than the base is opened, headers only, and its fingerprint taken.

        Raises:
            InputError: the model cannot be opened.
        """
        return BaseChangeEvaluator() if self.model is None else ChangeEvaluator(self.model)


class BaseChangeEvaluator(ImperativeEvaluator):
    """Scores a model by its ``change``, measured when the model was made (``evomerge.merging.measured.change``).

    Each split has one item, which is the model itself. As an objective, less is better.
    """

    def __init__(self) -> None:
        self.name = "change"
        self.version = _version("base")  # the contents of a search's base do not change during the search
        self.metrics: Mapping[str, bool] = {"change": False}
        # The two splits have different items, since they must not overlap; nothing can be learnt from either.
        self.splits = {
            split: [Item(hashlib.sha256(f"change {split}".encode()).hexdigest()[:16])] for split in get_args(Split)
        }

    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        """The model's change.

        Raises:
            InputError: it was not measured.
        """
        if live.change is None:
            problem = "is not known of this model: it was not measured from a base"
            raise InputError("change", problem, "Name the model to measure from: `model: MODEL`.")
        return _graded(live.change, len(indices), 0.0)


class ChangeEvaluator(BaseChangeEvaluator):
    """Scores a model by ``change``: norm(W - W0) / norm(W0) over all weights, where W0 is a model other than the base.

    Tensors are compared with those of the same name; in a path, each hop with the layer at its index. Tensors that the
    other model lacks, or has in another shape (because of another vocabulary), are ignored.

    Args:
        model: a reference to the other model.
    """

    def __init__(self, model: str) -> None:
        from evomerge.checkpoints.fingerprints import content_digest, fingerprint
        from evomerge.checkpoints.source import open_source

        super().__init__()
        self._from: Source = open_source("model", model, place="model")
        self.version = _version(content_digest(fingerprint(self._from)))

    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        """The model's change.

        Raises:
            InputError: the two models have no tensor in common.
        """
        started = time.perf_counter()
        change = self._change(live)
        return _graded(change, len(indices), time.perf_counter() - started)

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
        """Corresponding pieces of both models' tensors, the live one's first."""
        import torch

        held = live.model.state_dict()
        for name, part in self._from.parts.items():
            before = self._from.read(name)
            now = part.of(held[part.tensor]) if part.tensor in held else None
            if now is not None and now.shape == before.shape:
                pieces = [torch.split(tensor.reshape(-1), _ELEMENTS) for tensor in (now, before)]
                yield from zip(*pieces, strict=True)
            self._from.release(name)


def _version(measured_from: str) -> str:
    return hashlib.sha256(f"change 1 {measured_from}".encode()).hexdigest()[:16]


def _graded(change: float, items: int, seconds: float) -> Graded:
    return Graded({"change": np.full(items, change, dtype=np.float32)}, seconds={"score": seconds})


def _squares(values: torch.Tensor) -> float:
    """The sum of squares of float32 values, accumulated in float64."""
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
