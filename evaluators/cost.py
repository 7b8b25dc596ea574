"""What a model costs to run: its layers, its parameters and, where asked for, its speed.

Layers and parameters are read off the model, so they cost nothing and are exact. Speed is measured, and so it is noisy:
it depends on the machine, and on what else the machine does. So it is left out unless ``measure: true`` asks for it.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evaluators.base import EvaluatorSettings, Split
from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

    from evaluators.prompts import Asked, Reader
    from evomerge.checkpoints.live import LiveModel


COUNTED = ("layers", "parameters")
"""The metrics that are counted, and so exact; the others are measured."""


class CostSettings(EvaluatorSettings):
    """What the search file says of the cost of a model.

    Attributes:
        measure: measure ``tokens_per_second`` as well; the other keys are for that.
        tokens: length of the prompt, in tokens.
        answer: tokens that are decoded after it, one by one.
        batch_size: prompts at once.
        repeats: how many measurements the score is the median of.
    """

    kind: Literal["cost"] = "cost"
    measure: bool = False
    tokens: int = Field(default=128, ge=1)
    answer: int = Field(default=16, ge=1)
    batch_size: int = Field(default=1, ge=1)
    repeats: int = Field(default=5, ge=1)

    def known_metrics(self) -> Collection[str]:
        return ("layers", "parameters", *(("tokens_per_second",) if self.measure else ()))

    def build(self) -> CostEvaluator:
        """The evaluator; there is nothing to read."""
        return CostEvaluator(self)


class CostEvaluator:
    """Scores a model by what it costs to run. Each split has one item, which is the model itself.

    Attributes:
        name: "cost".
        version: hash of the settings.
        metrics: ``layers``, the hops of the path; ``parameters``, as the model is exported: a layer that is several
            hops counts each time, a tied head once; and with ``measure``, ``tokens_per_second``: tokens of prompts and
            answers by the time that a prefill and greedy decoding with a cache take together. Counts above 2^24 are
            rounded to float32, as all scores.
    """

    def __init__(self, settings: CostSettings) -> None:
        self.name = "cost"
        self.version = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]
        self.metrics: Mapping[str, bool] = dict.fromkeys(COUNTED, False)
        if settings.measure:
            self.metrics = {**self.metrics, "tokens_per_second": True}
        self.measured = frozenset(self.metrics.keys() & {"tokens_per_second"})
        self.seconds: Mapping[str, float] = {}
        self.answers: Mapping[int, str] = {}
        self._settings = settings

    def items(self, split: Split) -> Sequence[str]:
        """One item; another for each split, since nobody could learn anything from it."""
        return [hashlib.sha256(f"cost {split}".encode()).hexdigest()[:16]]

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
        """The model's cost: float32 [len(indices)] for each metric, the same at every place.

        Raises:
            InputError: prompt and answer are longer than the model's context.
        """
        if outside := [index for index in indices if index != 0]:
            raise IndexError(f"{self.name} has 1 item in its {split} split; there is no item {outside[0]}")
        found = {}
        self.seconds = {}
        if indices:
            started = time.perf_counter()
            found = {"layers": float(model.model.config.num_hidden_layers), "parameters": float(_parameters(model))}
            if self._settings.measure:
                found["tokens_per_second"] = self._speed(model)
            self.seconds = {"score": time.perf_counter() - started}
        return {name: np.full(len(indices), found.get(name, 0.0), dtype=np.float32) for name in self.metrics}

    def _speed(self, live: LiveModel) -> float:
        """Tokens a second, the median of several measurements after one that warms caches and allocators up."""
        settings = self._settings
        length = settings.tokens + settings.answer
        context = getattr(live.model.config, "max_position_embeddings", None)
        if context is not None and length > context:
            problem = f"{settings.tokens} and answer {settings.answer} are more than the model's context of {context}"
            raise InputError("cost: tokens", problem, "Lower one of them.")
        _run(live, settings)
        seconds = []
        for _ in range(settings.repeats):
            started = time.perf_counter()
            _run(live, settings)
            seconds.append(time.perf_counter() - started)
        return settings.batch_size * length / statistics.median(seconds)


def _parameters(live: LiveModel) -> int:
    """Elements of all parameters, those of each layer of the path, though hops may share them."""
    from evomerge.checkpoints.structure import layer_stack

    _, layers = layer_stack(live.model, live.model.config.num_hidden_layers)
    inside = [parameter for layer in layers for parameter in layer.parameters()]
    in_layers = {id(parameter) for parameter in inside}
    outside = [parameter for parameter in live.model.parameters() if id(parameter) not in in_layers]
    return sum(parameter.numel() for parameter in inside + outside)


def _run(live: LiveModel, settings: CostSettings) -> None:
    """Prefill a made-up prompt and decode an answer, and wait until the device has done so."""
    import torch

    rows = live.model.get_input_embeddings().weight.shape[0]
    prompt = torch.arange(settings.batch_size * settings.tokens, device=live.device) % rows
    tokens: torch.Tensor = prompt.view(settings.batch_size, settings.tokens)
    cache: Any = None
    with torch.inference_mode():
        for _ in range(settings.answer):
            output = live.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
    if live.device.type != "cpu":
        torch.accelerator.synchronize(live.device)
