"""Layers in tiers: LARV's measure against its plain formulas, and what a search makes of the tiers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_miniature import MINIATURES, evomerge, short_search_file
from torch import Tensor

from evomerge.checkpoints.source import open_source
from evomerge.merging.adapters.tiers import conflict, scores, thirds, tiers_of
from evomerge.merging.measured.evidence import Evidence
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.store import Store


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (8, 8)])
def test_conflict_is_that_of_the_plain_commutators(shape: tuple[int, int]) -> None:
    base, change = random(*shape), random(*shape, seed=1)
    along, across = base @ change.T - change @ base.T, base.T @ change - change.T @ base
    wanted = float(along.norm() + across.norm()) / 2 / float(base.norm() * change.norm())
    assert conflict(base, change) == pytest.approx(wanted, rel=1e-9)
    assert conflict(base, 3 * base) == pytest.approx(0, abs=1e-7)
    assert conflict(base, torch.zeros(shape)) == 0
    left, right = random(shape[0], 2, seed=2), random(2, shape[1], seed=3)
    assert conflict(base, (left, right)) == pytest.approx(conflict(base, left @ right), rel=1e-9)


def test_scores_are_those_of_the_formula() -> None:
    contrasts, conflicts = np.array([3.0, 5.0, 2.0, 4.0]), np.array([0.1, 0.4, 0.2, 0.5])
    standard = (conflicts - conflicts.mean()) / conflicts.std()
    wanted = [
        contrast * math.sqrt((layer + 1) / 4) / (1 + math.log(1 + math.exp(z)))
        for layer, (contrast, z) in enumerate(zip(contrasts, standard, strict=True))
    ]
    np.testing.assert_allclose(scores(contrasts, conflicts), wanted, rtol=1e-12)
    assert np.isfinite(scores(contrasts, np.full(4, 0.3))).all()


def test_tiers_are_thirds_of_the_scores() -> None:
    assert thirds(np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.0])) == (2, 0, 1, 1, 2, 0)
    assert thirds(np.array([1.0, 1.0, 1.0])) == (0, 1, 2)
    assert thirds(np.array([2.0, 1.0])) == (1, 0)


NAMES = ("base", "maths", "japanese")


def rank_of(matrices: list[Tensor]) -> float:
    squares = torch.cat([torch.linalg.svdvals(matrix) ** 2 for matrix in matrices])
    shares = squares / squares.sum()
    return math.exp(float(-torch.xlogy(shares, shares).sum()))


def plain_tiers() -> tuple[int, ...]:
    """Those of the miniatures by singular value decompositions."""
    sources = {name: open_source(name, str(MINIATURES / name), place=name) for name in NAMES}
    contrasts, conflicts = [], []
    for layer in range(sources["base"].layers):
        roles = sources["base"].roles.items()
        names = [n for n, role in roles if role.layer == layer and len(sources["base"].tensors[n].shape) == 2]
        base = [sources["base"].read(name).double() for name in names]
        deltas = [[sources[s].read(n).double() - b for n, b in zip(names, base, strict=True)] for s in NAMES[1:]]
        contrasts.append(np.mean([rank_of(base) / rank_of(own) for own in deltas]))
        pairs = [(b, d) for own in deltas for b, d in zip(base, own, strict=True)]
        norms = [
            ((b @ d.T - d @ b.T).norm() + (b.T @ d - d.T @ b).norm()) / (2 * b.norm() * d.norm()) for b, d in pairs
        ]
        conflicts.append(float(torch.stack(norms).mean()))
    return thirds(scores(np.array(contrasts), np.array(conflicts)))


def test_a_search_gives_each_tier_a_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As measured once when it began, and so when it goes on."""
    tiers = plain_tiers()
    assert tiers != (0, 0, 1, 1, 2, 2)  # what a space says of which no weights are read
    file = short_search_file(
        tmp_path, space={"method": "task_arithmetic", "profile": "tiers"}, budget={"candidates": 9}
    )
    assert evomerge("search", file, "--dir", tmp_path / "s") == 0
    monkeypatch.setattr("evomerge.merging.adapters.tiers._scores", None)
    assert evomerge("resume", tmp_path / "s", "--set", "budget.candidates=11") == 0
    with Store.open(tmp_path / "s" / "search.db") as store:
        names = [p.name for p in store.search().record.parameters]
        rows = store.candidates()
    assert names[2:] == ["profile.low", "profile.middle", "profile.high"]
    assert len(rows) == 11
    for row in rows[5:]:
        recipe = read_recipe(row.recipe, dict.fromkeys(NAMES, ""))
        assert isinstance(recipe, StackRecipe)
        assert row.genome is not None
        for tier, hop in zip(tiers, recipe.hops, strict=True):
            (step,) = recipe.blends[hop.mlp].steps
            assert (step.name, step.parameters) == ("scale", {"factor": row.genome[2 + tier]})
        assert recipe.blends[recipe.embedding].steps == ()


def test_evidence_is_by_the_sources(tmp_path: Path) -> None:
    sources = {name: open_source(name, str(MINIATURES / name), place=name) for name in NAMES}
    assert tiers_of(sources, "base", Evidence(tmp_path, dict(zip(NAMES, NAMES, strict=True)))) == plain_tiers()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
