"""Gates, the losses of their use by hand, and how routers are found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.routed.computing import Router
from evomerge.routed.factors import LowRankFactors
from evomerge.routed.gates import Gating, gates_of
from evomerge.routed.losses import halves, localized_balance, switch_balance, z_loss
from evomerge.routed.prototypes import prototype_router
from evomerge.routed.spectra import right_singular
from evomerge.routed.spectral import normalised

LOGITS = torch.tensor([[0.0, math.log(2), math.log(5)], [3.0, 1.0, 1.0]])


def test_softmax_gates_by_hand() -> None:
    assert torch.allclose(gates_of(LOGITS, Gating())[0], torch.tensor([1 / 8, 2 / 8, 5 / 8]))
    assert torch.allclose(gates_of(LOGITS, Gating(top_k=2))[0], torch.tensor([0, 2 / 7, 5 / 7]))
    assert torch.allclose(gates_of(LOGITS, Gating(top_k=2, renormalised=False))[0], torch.tensor([0, 2 / 8, 5 / 8]))
    assert torch.allclose(gates_of(LOGITS, Gating(temperature=0.5))[0], torch.tensor([1 / 30, 4 / 30, 25 / 30]))
    assert torch.allclose(gates_of(LOGITS, Gating(gain=2.0))[0], torch.tensor([2 / 8, 4 / 8, 10 / 8]))


def test_sigmoid_gates_by_hand() -> None:
    expected = torch.tensor([1.5 / 2, 1.5 * 2 / 3, 1.5 * 5 / 6])
    assert torch.allclose(gates_of(LOGITS, Gating("sigmoid"))[0], expected)
    kept = gates_of(LOGITS, Gating("sigmoid", top_k=1))[0]
    assert torch.allclose(kept, torch.tensor([0, 0, 1.5 * 5 / 6]))


def test_biases_come_after_the_temperature() -> None:
    bias = torch.tensor([math.log(4), 0.0, 0.0])
    found = gates_of(LOGITS, Gating(temperature=0.5), bias)[0]
    assert torch.allclose(found, torch.tensor([4 / 33, 4 / 33, 25 / 33]))


def test_what_is_not_present_has_no_gate() -> None:
    present = torch.tensor([True, True, False])
    for how in (Gating(), Gating("sigmoid"), Gating(top_k=2), Gating(renormalised=False, top_k=1)):
        found = gates_of(LOGITS, how, present=present)
        assert (found[:, 2] == 0).all()
        assert (found[:, :2].sum(-1) > 0).all()
    assert torch.allclose(gates_of(LOGITS, Gating(), present=present)[0], torch.tensor([1 / 3, 2 / 3, 0]))


def test_of_equals_the_first_is_kept() -> None:
    assert gates_of(LOGITS, Gating(top_k=2))[1].tolist()[2] == 0.0
    assert gates_of(torch.zeros(5, 4), Gating(top_k=1)).argmax(-1).tolist() == [0] * 5


def test_gates_are_float32_and_heads_are_one_more_dimension() -> None:
    narrow = LOGITS.to(torch.bfloat16)
    assert gates_of(narrow, Gating()).dtype == torch.float32
    heads = torch.stack([LOGITS, LOGITS.flip(0)])
    assert torch.equal(gates_of(heads, Gating(top_k=2))[1].flip(0), gates_of(LOGITS, Gating(top_k=2)))


def test_switch_balance_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7], [0.1, 0.6, 0.3]])
    means = [1.6 / 4, 1.2 / 4, 1.2 / 4]
    first = 3 * (2 / 4 * means[0] + 1 / 4 * means[1] + 1 / 4 * means[2])
    assert switch_balance(probabilities).item() == pytest.approx(first)
    assert switch_balance(probabilities, 3).item() == pytest.approx(first)  # of all that are kept, the first choice
    second = 3 * (3 / 4 * means[0] + 3 / 4 * means[1] + 2 / 4 * means[2])
    assert switch_balance(probabilities, 2).item() == pytest.approx(second)


def mixtral(logits: Tensor, top_k: int) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func((logits,), logits.shape[-1], top_k)  # type: ignore[no-any-return]


def test_switch_balance_is_that_of_transformers() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    for top_k in (1, 2, 4):
        assert torch.allclose(switch_balance(logits.softmax(-1), top_k), mixtral(logits, top_k), atol=1e-6)


def test_localized_balance_by_hand() -> None:
    """Two texts, one of each group, and four experts, the first two of group 0; the second text ends in padding."""
    gates = torch.tensor(
        [
            [[0.4, 0.3, 0.2, 0.1], [0.2, 0.3, 0.4, 0.1]],
            [[0.1, 0.1, 0.5, 0.3], [0.0, 0.0, 0.0, 0.0]],
        ]
    )
    delta = 0.25
    z = [0.6 * 1.25, 0.6 * 1.25, 0.6 * 0.75, 0.2 * 0.75, 0.1 * 0.75, 0.1 * 0.75, 0.5 * 1.25, 0.3 * 1.25]
    mean = sum(z) / 8
    variance = sum((one - mean) ** 2 for one in z) / 7
    found = localized_balance(gates, [0, 1], halves(4), delta)
    assert found.item() == pytest.approx(variance / mean**2, rel=1e-5)


def test_localized_balance_is_least_where_groups_keep_to_themselves() -> None:
    apart = torch.tensor([[[0.4, 0.4, 0.1, 0.1]], [[0.1, 0.1, 0.4, 0.4]]])
    even = torch.full((2, 1, 4), 0.25)
    crossed = apart.flip(0)
    for delta in (0.1, 0.5):
        assert localized_balance(even, [0, 1], halves(4), 0.0).item() == 0.0
        losses = [localized_balance(g, [1, 0], halves(4), delta).item() for g in (crossed, apart)]
        assert losses[0] > losses[1]  # within the like group more gates are weighed up
    assert halves(5) == [0, 0, 1, 1, 1]


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(5)]])
    assert z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(8) ** 2) / 2)


def factors(rank: int = 3, wide: int = 9, high: int = 7, seed: int = 0) -> LowRankFactors:
    numbers = torch.Generator().manual_seed(seed)
    return LowRankFactors(torch.randn(rank, wide, generator=numbers), torch.randn(high, rank, generator=numbers))


def test_singular_vectors_are_those_of_the_whole_matrix() -> None:
    of = factors()
    values, rows = right_singular(of)
    _, expected, right = torch.linalg.svd(of.up @ of.down)
    assert torch.allclose(values, expected[:3], atol=1e-5)
    assert torch.allclose((rows @ right[:3].T).abs(), torch.eye(3), atol=1e-5)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_rank_above_the_width_does_no_harm() -> None:
    of = factors(rank=12)
    values, rows = right_singular(of)
    assert torch.allclose(values, torch.linalg.svdvals(of.up @ of.down)[: len(values)], atol=1e-4)
    assert rows.shape[1] == 9


def test_spectral_logits_are_lengths_of_changes_beside_their_mean() -> None:
    of = factors()
    values, rows = right_singular(of)
    weights = {"m": torch.stack([values[:, None] * rows, torch.zeros(3, 9)])}
    seen = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    length = (seen @ (of.up @ of.down).T).norm(dim=1)
    found = Router("norm", normalised(weights, {"m": torch.tensor([2.0, 0.0])})["m"]).logits(seen)
    assert torch.allclose(found[:, 0], length / 2, atol=1e-4)
    assert (found[:, 1] == 0).all()


def test_prototypes_by_hand() -> None:
    rows, bias = prototype_router(torch.tensor([[3.0, 0.0], [1.0, 2.0], [2.0, 1.0]]))
    half = math.sqrt(0.5)
    assert torch.allclose(rows, torch.tensor([[half, -half], [-half, half], [0.0, 0.0]]), atol=1e-6)
    assert torch.allclose(bias, torch.tensor([-half, half, 0.0]), atol=1e-6)
