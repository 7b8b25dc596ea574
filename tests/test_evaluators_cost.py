"""The cost of a model: exact counts, and a speed that is measured only when asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_miniature import MINIATURES

from evaluators import cost
from evaluators.base import EvaluatorSettings
from evaluators.cost import CostSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel, live_model
from evomerge.checkpoints.source import open_source
from evomerge.checkpoints.stack import Step
from evomerge.errors import InputError
from evomerge.inference.transformers_engine import TransformersEngine
from evomerge.testing.evaluators import EvaluatorContract
from evomerge.testing.models import tiny_live

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def miniature() -> LiveModel:
    return live_model(open_source("base", str(MINIATURES / "base"), place="base"), torch.device("cpu"))


def one(live: LiveModel, **changes: Any) -> dict[str, float]:
    scores = score(CostSettings(**changes).build(), live, "search", [0]).scores
    return {name: float(values[0]) for name, values in scores.items()}


class TestContract(EvaluatorContract):
    @pytest.fixture
    def settings(self) -> EvaluatorSettings:
        return CostSettings()

    @pytest.fixture
    def live(self) -> LiveModel:
        return tiny_live()

    def test_answers_are_of_the_model_at_hand(self, evaluator: Any, live: LiveModel) -> None:
        """What a model costs is not in its weights, but it is in its layers."""
        before = score(evaluator, live, "search", [0]).scores
        with torch.no_grad():
            live.model.get_input_embeddings().weight.zero_()
        assert score(evaluator, live, "search", [0]).scores == before
        other = tiny_live()
        other.model.model.layers.append(other.model.model.layers[0])
        other.model.config.num_hidden_layers = 3
        after = score(evaluator, other, "search", [0]).scores
        assert all(after[metric] > before[metric] for metric in evaluator.metrics)


def test_counts_are_those_of_the_export(miniature: LiveModel) -> None:
    """A repeated layer is stored again for each hop; a tied head is not stored."""
    weights = {name: tensor.numel() for name, tensor in miniature.tensors.items()}
    assert miniature.model.config.tie_word_embeddings
    assert "lm_head.weight" not in weights
    layer = sum(count for name, count in weights.items() if ".layers.0." in name)
    assert one(miniature) == {"layers": 6, "parameters": sum(weights.values())}
    assert miniature.stack is not None
    miniature.stack.lay([Step(layer_buffer, layer_buffer) for layer_buffer in (0, 1, 2, 1, 2, 3, 4, 5)])
    found = one(miniature)
    assert found == {"layers": 8, "parameters": sum(weights.values()) + 2 * layer}
    assert found["parameters"] == sum(tensor.numel() for tensor in miniature.tensors.values())
    miniature.stack.lay([Step(0, 0)])
    assert one(miniature) == {"layers": 1, "parameters": sum(weights.values()) - 5 * layer}


def test_what_hops_share_counts_as_in_a_plain_model() -> None:
    """An exported model has no stack of layer buffers; its count is the same."""
    live = tiny_live()
    assert live.stack is None
    assert one(live)["parameters"] == sum(parameter.numel() for parameter in live.model.parameters())


def test_speed_is_the_median_of_measured_runs(monkeypatch: pytest.MonkeyPatch, miniature: LiveModel) -> None:
    """A clock of its own: runs of 4, 1 and 2 seconds, which a warm-up comes before."""
    ticks = iter([0.0, *(10.0, 14.0), *(20.0, 21.0), *(30.0, 32.0), 40.0])
    runs = []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(cost, "_run", lambda live, settings: runs.append(settings))
    evaluator = CostSettings(measure=True, tokens=30, answer=10, batch_size=2, repeats=3).build()
    assert evaluator.metrics == {"layers": False, "parameters": False, "tokens_per_second": True}
    graded = evaluator.score(miniature, TransformersEngine(miniature), "held_out", [0])
    assert graded.scores["tokens_per_second"].tolist() == [2 * (30 + 10) / 2]
    assert len(runs) == 4
    assert graded.seconds == {"score": 40.0}


def test_a_run_prefills_once_and_decodes_with_the_cache() -> None:
    live = tiny_live()
    shapes = []
    live.model.model.layers[0].register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[:2])))
    found = one(live, measure=True, tokens=7, answer=3, batch_size=2, repeats=1)
    assert shapes == 2 * [(2, 7), (2, 1), (2, 1)]
    assert found["tokens_per_second"] > 0


def test_a_path_of_hops_can_be_measured(miniature: LiveModel) -> None:
    with torch.no_grad():
        for tensor in miniature.tensors.values():
            tensor.fill_(0.01)
    assert miniature.stack is not None
    miniature.stack.lay([Step(layer_buffer, layer_buffer) for layer_buffer in (0, 1, 1, 2)])
    assert np.isfinite(one(miniature, measure=True, tokens=4, answer=2, repeats=1)["tokens_per_second"])


def test_without_measuring_the_model_is_not_run() -> None:
    live = tiny_live()
    live.model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    assert set(one(live)) == {"layers", "parameters"}


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(InputError, match=r"cost: tokens: 500 and answer 16 are more than the model's context of 512"):
        one(tiny_live(context=512), measure=True, tokens=500)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        CostSettings(tokens=0)
