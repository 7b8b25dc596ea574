"""The cost of running a model: its layers, its parameters and, on request, its speed.

Layers and parameters are counted, so they are free and exact. Speed is measured, so it is noisy: it depends on the
machine and on what else is running there. It is only included with ``measure: true``.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from pydantic import Field

from evaluators.base import EvaluatorSettings, Graded, ImperativeEvaluator, Item, Split
from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints.live import LiveModel
    from evomerge.inference.requests import Engine


COUNTED = ("layers", "parameters")
"""The metrics that are counted, and so exact; the others are measured."""


class CostSettings(EvaluatorSettings):
    """The settings of the cost evaluator.

    Attributes:
        measure: also measure ``tokens_per_second``; the other keys apply to this measurement.
        tokens: length of the prompt, in tokens.
        answer: number of tokens that are decoded after it.
        batch_size: prompts per batch.
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
        """The evaluator; it needs no data."""
        return CostEvaluator(self)


class CostEvaluator(ImperativeEvaluator):
    """Scores a model by its cost. Each split has one item, which is the model itself.

    Imperative, because it asks nothing: it inspects the model and measures it.

    Attributes:
        name: "cost".
        version: hash of the settings.
        metrics: ``layers``, the hops of the path; ``parameters``, as exported: a layer that is used for several hops
            counts each time, a tied head once; and with ``measure``, ``tokens_per_second``: tokens of prompts and
            answers divided by the total time of prefill and greedy decoding with a KV cache. Counts above 2^24 are
            rounded to float32, like all scores.
    """

    def __init__(self, settings: CostSettings) -> None:
        self.name = "cost"
        self.version = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]
        self.metrics: Mapping[str, bool] = dict.fromkeys(COUNTED, False)
        if settings.measure:
            self.metrics = {**self.metrics, "tokens_per_second": True}
        self.measured = frozenset(self.metrics.keys() & {"tokens_per_second"})
        self._settings = settings
        # The two splits have different items, since they must not overlap; nothing can be learnt from either.
        self.splits = {
            split: [Item(hashlib.sha256(f"cost {split}".encode()).hexdigest()[:16])] for split in get_args(Split)
        }

    def score(self, live: LiveModel, engine: Engine, split: Split, indices: Sequence[int]) -> Graded:
        """The model's cost.

        Raises:
            InputError: prompt and answer are longer than the model's context.
        """
        started = time.perf_counter()
        costs = {
            "layers": float(live.model.config.get_text_config().num_hidden_layers),
            "parameters": float(_parameters(live)),
        }
        if self._settings.measure:
            costs["tokens_per_second"] = self._speed(live)
        scores = {metric: np.full(len(indices), value, dtype=np.float32) for metric, value in costs.items()}
        return Graded(scores, seconds={"score": time.perf_counter() - started})

    def _speed(self, live: LiveModel) -> float:
        """Tokens per second, the median of several measurements after one that warms up caches and allocators."""
        settings = self._settings
        length = settings.tokens + settings.answer
        context = getattr(live.model.config.get_text_config(), "max_position_embeddings", None)
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
    """Elements of all parameters; every layer of the path counts, even if hops share it."""
    from evomerge.checkpoints.structure import layer_stack

    _, layers = layer_stack(live.model, live.model.config.get_text_config().num_hidden_layers)
    inside = [parameter for layer in layers for parameter in layer.parameters()]
    in_layers = {id(parameter) for parameter in inside}
    outside = [parameter for parameter in live.model.parameters() if id(parameter) not in in_layers]
    return sum(parameter.numel() for parameter in inside + outside)


def _run(live: LiveModel, settings: CostSettings) -> None:
    """Prefill a made-up prompt, decode an answer, and wait for the device to finish."""
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
