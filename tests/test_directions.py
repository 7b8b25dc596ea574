"""Effective ranks and overlaps of changes: against singular value decompositions, and what `inspect` makes of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_checkpoints import edit_tensors, save_model, tiny_config
from helpers_miniature import MINIATURES, evomerge, json_of
from torch import Tensor

from evomerge.merging.measured.directions import Directions, of_matrices, work
from evomerge.report.advice import MANY_SOURCES, advice_on, dispersion_of
from evomerge.report.inspected import Distance, SourceDistance
from evomerge.report.inspection import inspect_models


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank_of(*matrices: Tensor) -> float:
    """exp of the entropy of the squares of all singular values."""
    squares = torch.cat([torch.linalg.svdvals(matrix.double()) ** 2 for matrix in matrices])
    shares = squares / squares.sum()
    return math.exp(float(-torch.xlogy(shares, shares).sum()))


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (1, 5)])
def test_effective_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    one, other = random(*shape), random(*shape, seed=1)
    found = of_matrices([one, other]) + of_matrices([3 * other, one])
    assert found.rank(0) == pytest.approx(rank_of(one, 3 * other), rel=1e-10)
    assert found.rank(1) == pytest.approx(rank_of(other, one), rel=1e-10)


def test_ranks_of_what_is_known() -> None:
    turned = torch.linalg.qr(random(8, 8).double())[0]
    assert of_matrices([5 * turned]).rank(0) == pytest.approx(8)
    assert of_matrices([random(8, 1) @ random(1, 30, seed=1)]).rank(0) == pytest.approx(1, abs=1e-6)
    assert of_matrices([torch.zeros(4, 6)]).rank(0) is None
    assert Directions.none(2).overlap(0, 1) is None


@pytest.mark.parametrize(("rows", "columns"), [(10, 24), (24, 10), (13, 13)])
def test_factors_say_the_same_as_the_matrix(rows: int, columns: int) -> None:
    up, down, dense = random(rows, 3), random(3, columns, seed=1), random(rows, columns, seed=2)
    by_factors, whole = of_matrices([(up, down), dense]), of_matrices([up @ down, dense])
    np.testing.assert_allclose(by_factors.shared, whole.shared, rtol=1e-4)
    assert by_factors.rank(0) == pytest.approx(whole.rank(0), rel=1e-4)
    empty = of_matrices([(torch.zeros(rows, 0), torch.zeros(0, columns)), dense])
    assert empty.rank(0) is None
    assert empty.overlap(0, 1) is None


def test_stacked_matrices_count_one_by_one() -> None:
    stacked = random(3, 6, 11)
    apart = sum((of_matrices([matrix]) for matrix in stacked), Directions.none(1))
    found = of_matrices([stacked])
    assert found.rank(0) == pytest.approx(apart.rank(0), rel=1e-12)
    assert work((3, 6, 11)) == 3 * work((6, 11)) == 3 * work((11, 6))


def test_overlap_is_of_directions_and_not_of_signs() -> None:
    side, long = torch.linalg.qr(random(40, 40).double())[0], random(40, 400, seed=1).double()
    first, second = side[:, :8] @ long[:8], side[:, 20:28] @ long[8:16]
    assert of_matrices([first, side[:, :8] @ long[20:28]]).overlap(0, 1) == pytest.approx(0.98, abs=0.02)
    assert of_matrices([first, -first]).overlap(0, 1) == pytest.approx(1)
    assert of_matrices([first, second]).overlap(0, 1) < -0.1  # type: ignore[operator]
    by_chance = [of_matrices([random(40, 400, seed=n), random(40, 400, seed=50 + n)]).overlap(0, 1) for n in range(8)]
    assert abs(np.mean([each or 0.0 for each in by_chance])) < 0.05


# --- inspect


def test_inspection_has_them_by_part(tmp_path: Path) -> None:
    base = save_model(tiny_config(hidden_size=16, intermediate_size=20, num_hidden_layers=2), tmp_path / "base")
    deltas: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    for number, (name, kept) in enumerate(deltas.items()):
        save_model(tiny_config(hidden_size=16, intermediate_size=20, num_hidden_layers=2), tmp_path / name)

        def move(tensors: dict[str, Tensor], number: int = number, kept: dict[str, Tensor] = kept) -> None:
            for at, (key, tensor) in enumerate(sorted(tensors.items())):
                before = tensor.clone()
                tensor.add_(0.02 * (number + 1) * random(*tensor.shape, seed=100 * number + at))
                kept[key] = tensor.double() - before.double()

        edit_tensors(tmp_path / name, move)
    found = inspect_models([str(base), str(tmp_path / "a"), str(tmp_path / "b")], None)
    for source in found.sources:
        matrices = {key: delta for key, delta in deltas[source.name].items() if delta.ndim == 2}
        assert source.whole.effective_rank == pytest.approx(rank_of(*matrices.values()), rel=1e-6)
        first = [delta for key, delta in matrices.items() if ".layers.1." in key]
        assert source.parts[found.parts.index("layer 1")].effective_rank == pytest.approx(rank_of(*first), rel=1e-6)
        assert source.parts[found.parts.index("norm")].effective_rank is None
    assert found.pairs[0].whole.overlap is not None
    assert found.dispersion == pytest.approx(2.0, rel=0.05)


def test_what_is_printed_fits_and_gives_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [MINIATURES / name for name in ("base", "maths", "japanese")]
    found = json_of(capsys, "inspect", *models, "--json")
    assert found["dispersion"] > 3
    assert [advice["source"] for advice in found["advice"]] == ["arXiv 2608.17366", "arXiv 2508.01148"]
    assert "weights of 0.35, lambda = 0.5 sqrt(2)" in found["advice"][0]["text"]
    assert evomerge("inspect", *models) == 0
    assert "maths is 10.9 times as far from the base as japanese" in capsys.readouterr().out


def source(name: str, norm: float) -> SourceDistance:
    return SourceDistance(name=name, whole=Distance(relative_norm=norm, mean_change=0.001, changed=1.0), parts=[])


def advised(*norms: float, cosine: float = 0.0) -> list[str]:
    """Where the evidence of each advice stands, for sources of these norms with this cosine to each other."""
    count = len(norms)
    products = np.outer((1.0, *norms), (1.0, *norms)) * (np.eye(count + 1) * (1 - cosine) + cosine)
    return [place for _, place in advice_on([source(f"s{n}", norm) for n, norm in enumerate(norms)], products)]


def test_advice_is_what_evidence_supports_and_no_other() -> None:
    law, uneven, far, many = "arXiv 2608.17366", "arXiv 2508.01148", "arXiv 2511.21437", "arXiv 2509.24244, 2511.21437"
    assert advised(0.1) == advised(0.1, 0.0) == []
    assert advised(0.1, 0.12) == [law]
    assert advised(0.1, 0.12, cosine=0.9) == [law]  # how alike they are is shown, and decides nothing
    assert advised(0.02, 0.12) == [law, uneven]
    assert advised(*[0.1] * 5) == [law, far]
    assert advised(*[0.1] * (MANY_SOURCES + 1)) == [law, far, many]
    assert dispersion_of([source("a", 0.1)]) is None
