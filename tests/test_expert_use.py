"""The use of experts: by hand, over several passes, and in the store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.recipes.use import BASE, ExpertUse, together, variation
from evomerge.report.experts import uses_of
from evomerge.routed.sites import Place
from evomerge.routed.use import UseMeter
from evomerge.store.lease import acquire
from evomerge.testing.store_fixtures import candidate, create, estimate, scores

PLACES = {
    "q": Place("q", 0, "attention", False, 4),
    "up": Place("up", 0, "mlp", False, 4),
    "k": Place("k", 2, "attention", False, 4, True, 2),
}


def test_use_by_hand() -> None:
    meter = UseMeter(["a", "b"], PLACES, 3)
    meter.tokens(torch.tensor([[False, True, True]]))  # the first token is padding
    meter.routed("q", torch.zeros(1, 3, 2), torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.5, 0.5]]]))
    meter.routed("up", torch.zeros(1, 3, 2), torch.tensor([[[9.0, 9.0], [0.0, 2.0], [0.0, 2.0]]]))
    heads = torch.tensor([[[[9.0, 9.0]] * 2, [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]])
    meter.routed("k", torch.zeros(1, 3, 2, 2), heads)
    meter.done()
    assert meter.means["q"] == pytest.approx([0.75, 0.25])
    assert meter.means["up"] == pytest.approx([0.0, 2.0])
    assert meter.means["k"] == pytest.approx([0.75, 0.25])
    use = meter.take()
    assert use is not None
    assert use.tokens == 2
    assert use.shares == ((0.375, 0.625), (), (0.75, 0.25))
    assert use.entropy == (pytest.approx(0.6931 / 4, abs=1e-4), None, 0.0)
    assert use.mean_shares == pytest.approx((0.5625, 0.4375))
    assert meter.take() is None


def test_several_passes_are_one() -> None:
    meter = UseMeter(["a", "b"], {"q": PLACES["q"]}, 1)
    gates = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)

    def used(some: torch.Tensor) -> ExpertUse:
        meter.tokens(None)
        meter.routed("q", some, some)
        meter.done()
        use = meter.take()
        assert use is not None
        return use

    whole, parts = used(gates), [used(gates[:, :2]), used(gates[:, 2:])]
    found = together(parts)
    assert found is not None
    assert found.tokens == whole.tokens == 10
    assert found.shares[0] == pytest.approx(whole.shares[0], abs=2e-4)
    assert found.entropy[0] == pytest.approx(whole.entropy[0], abs=2e-4)
    assert together([]) is None


def test_variation_within_and_between_halves_by_hand() -> None:
    use = ExpertUse(experts=("a", "b", "c", "d", BASE), tokens=1, shares=((0.1, 0.3, 0.2, 0.2, 0.2),), entropy=(1.0,))
    assert use.variation_within == pytest.approx((0.5 + 0.0) / 2)
    assert use.variation_between == pytest.approx(0.0)
    assert variation([1.0, 3.0]) == pytest.approx(0.5)
    assert variation([0.0, 0.0]) == 0.0
    nothing = ExpertUse(experts=("a",), tokens=1, shares=((),), entropy=(None,))
    assert nothing.variation_within is nothing.variation_between is None


def test_use_is_kept_beside_scores(tmp_path: Path) -> None:
    half, all_b = (
        ExpertUse(experts=("a", "b"), tokens=tokens, shares=(shares, ()), entropy=(0.5, None))
        for tokens, shares in ((10, (0.5, 0.5)), (30, (0.0, 1.0)))
    )
    with create(tmp_path / "search.db") as store, acquire(store):
        store.record_ask(0, [candidate(0), candidate(1)])
        store.record_dispatch(0, 1, "w")
        assert store.record_rung(0, 1, [scores()], {}, "w", uses={"task": half})
        store.record_dispatch(0, 2, "w")
        assert store.record_result(0, 2, [scores()], {}, {"acc": estimate(0.5)}, "w", uses={"task": all_b})
        store.record_dispatch(1, 1, "w")
        assert store.record_result(1, 1, [scores()], {}, {"acc": estimate(0.5)}, "w")
        found = uses_of(store, store.candidate(0))
        assert found["task"].tokens == 40
        assert found["task"].shares == ((0.125, 0.875), ())
        assert uses_of(store, store.candidate(1)) == {}
