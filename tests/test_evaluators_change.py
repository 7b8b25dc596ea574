"""How far a model is from another: the plain formula, and what is left out of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_miniature import MINIATURES

from evaluators import change
from evaluators.base import EvaluatorSettings
from evaluators.change import ChangeSettings
from evaluators.scoring import score
from evomerge.checkpoints.live import LiveModel, live_model
from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.testing.evaluators import EvaluatorContract


def miniature(name: str, dtype: torch.dtype | None = None) -> LiveModel:
    source = open_source(name, str(MINIATURES / name), place=name)
    live = live_model(source, torch.device("cpu"), dtype)
    held = live.model.state_dict()
    for tensor, part in source.parts.items():
        part.of(held[part.tensor]).copy_(source.read(tensor))
    return live


def change_of(live: LiveModel, model: str = "base") -> float:
    evaluator = ChangeSettings(model=str(MINIATURES / model)).build()
    return float(score(evaluator, live, "search", [0]).scores["change"][0])


class TestContract(EvaluatorContract):
    @pytest.fixture
    def settings(self) -> EvaluatorSettings:
        return ChangeSettings(model=str(MINIATURES / "base"))

    @pytest.fixture
    def live(self) -> LiveModel:
        return miniature("maths", torch.float32)


def test_a_model_is_nowhere_from_itself_and_as_far_from_another_as_the_formula_says() -> None:
    base, maths = ({n: t.double() for n, t in miniature(name).model.state_dict().items()} for name in ("base", "maths"))
    size, gone = (sum(float((x**2).sum()) for x in each) for each in (
        [base[name] for name in _stored()], [maths[name] - base[name] for name in _stored()]
    ))  # fmt: skip
    assert change_of(miniature("base")) == 0.0
    assert change_of(miniature("maths")) == pytest.approx((gone / size) ** 0.5, rel=1e-6)


def _stored() -> list[str]:
    return list(open_source("base", str(MINIATURES / "base"), place="base").names.values())


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = change_of(miniature("japanese"))
    monkeypatch.setattr(change, "_ELEMENTS", 1000)
    assert change_of(miniature("japanese")) == pytest.approx(whole, rel=1e-6)


def test_it_grows_with_the_step() -> None:
    live, base = miniature("base", torch.float32), miniature("base", torch.float32)
    found = []
    for step in (0.01, 0.02, 0.04):
        with torch.no_grad():
            for name, tensor in live.model.state_dict().items():
                tensor.copy_(base.model.state_dict()[name] * (1 + step))
        found.append(change_of(live))
    np.testing.assert_allclose(found, [0.01, 0.02, 0.04], rtol=1e-4)


def test_tensors_of_another_shape_are_left_out_and_all_of_them_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    live = miniature("maths")
    plain = dict(live.model.state_dict())
    wider: Any = {n: torch.cat([t, t]) if "embed" in n or "lm_head" in n else t for n, t in plain.items()}
    monkeypatch.setattr(live.model, "state_dict", lambda: wider)
    assert change_of(live) > 0.0
    monkeypatch.setattr(live.model, "state_dict", lambda: {})
    with pytest.raises(InputError, match="no weights in common"):
        change_of(live)
