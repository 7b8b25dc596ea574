"""TSV-Merge: against its formula by singular value decompositions in float64, and what is computed once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_miniature import evomerge, export_of, kept_in, newest_scored, planned_evidence, short_search_file
from helpers_search import table
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging.arithmetic.jobs import TensorJob, WorkerThreads
from evomerge.merging.measured.evidence import Evidence
from evomerge.merging.measured.facts import Facts, Weights
from evomerge.merging.site import Site
from evomerge.method import find_method
from evomerge.recipes.stack import Blend, Role
from evomerge.testing.methods import merge, tensors

TSV = find_method("tsv", "m")
WEIGHTS = (0.7, 1.2, 0.4)


def blend(weights: Sequence[float], factor: float = 1.0, halvings: int = 0) -> Blend:
    of_sources = {f"s{i}": w for i, w in enumerate(weights)}
    parameters = {"weight": of_sources, "lambda": factor, "halvings": float(halvings)}
    return Blend(method="tsv", sources=tuple(of_sources), base="b", parameters=parameters)


def change(base: Tensor, sources: Sequence[Tensor], weights: Sequence[float], halvings: int = 0) -> Any:
    """Equations 1, 5 and 6 of the paper, by numpy's decompositions in float64."""
    k = min(base.shape) // len(sources) >> halvings
    parts = [np.linalg.svd((source.double() - base.double()).numpy(), full_matrices=False) for source in sources]
    sides = np.hstack([u[:, :k] for u, _, _ in parts]), np.vstack([v[:k] for _, _, v in parts])
    left, right = (p @ q for p, _, q in (np.linalg.svd(side, full_matrices=False) for side in sides))
    return (left * np.concatenate([w * s[:k] for w, (_, s, _) in zip(weights, parts, strict=True)])) @ right


def random(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("shape", "halvings"),
    [((40, 60), 0), ((60, 40), 0), ((40, 40), 0), ((40, 60), 1), ((40, 60), 3), ((1000, 530), 0), ((530, 1000), 1)],
)
def test_is_the_papers_formula(shape: tuple[int, int], halvings: int) -> None:
    count = 2 if max(shape) > 500 else 3
    base, *sources = random(1 + count, *shape)
    wanted = 0.8 * change(base, sources, WEIGHTS[:count], halvings)
    merged = merge(TSV, base, sources, blend(WEIGHTS[:count], 0.8, halvings))
    off = (merged.double() - base.double()).numpy() - wanted
    assert np.linalg.norm(off) < 1e-6 * np.linalg.norm(base)  # what float32 rounds where it is added


def test_experts_in_one_tensor_are_matrices_of_their_own() -> None:
    base, *sources = random(3, 4, 10, 12)
    merged = merge(TSV, base, sources, blend((0.7, 1.2)))
    for expert in range(4):
        alone = merge(TSV, base[expert], [source[expert] for source in sources], blend((0.7, 1.2)))
        assert torch.allclose(merged[expert], alone, atol=1e-6)


def test_one_source_with_all_of_its_vectors_is_that_source() -> None:
    base, source = tensors(2, (40, 60))
    assert torch.equal(merge(TSV, base, [source], blend((1.0,))), source)


def test_changes_of_low_rank_are_not_given_directions_that_they_have_not() -> None:
    """Of two adapters, each a half of the joint rank, all is kept; halved, each keeps its own larger half."""
    base, one, other = random(1, 40, 60)[0], random(1, 40, 4)[0], random(1, 40, 4)[0].flip(0)
    rows = random(1, 8, 60)[0]
    added = [one @ rows[:4], other @ rows[4:]]
    sources = [base + x for x in added]
    merged = merge(TSV, base, sources, blend((1.0, 1.0)))
    assert torch.linalg.matrix_rank(merged - base, tol=1e-3) == 8
    halved = merge(TSV, base, sources, blend((1.0, 1.0), halvings=1))
    assert torch.linalg.matrix_rank(halved - base, tol=1e-3) == 4
    single = merge(TSV, base, sources[:1], blend((1.0,), halvings=1)) - base
    u, s, v = torch.linalg.svd(added[0])
    assert torch.allclose(single, (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)


def test_two_sources_that_are_the_same_are_averaged() -> None:
    """Their vectors have no directions beside the shared ones, and none are made up."""
    base, source = random(2, 40, 60)
    merged = merge(TSV, base, [source, source], blend((1.0, 0.5)))
    u, s, v = torch.linalg.svd(source - base, full_matrices=False)
    assert torch.allclose(merged - base, 0.75 * (u[:, :20] * s[:20]) @ v[:20], atol=1e-4)


def test_more_sources_than_rows_keep_one_vector_each() -> None:
    base, *sources = random(6, 3, 50)
    merged = merge(TSV, base, sources, blend((1.0,) * 5))
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, base)


def test_what_is_no_matrix_of_a_layer_is_a_mean() -> None:
    base, *sources = tensors(3, (12,))
    merged = merge(TSV, base, sources, blend((1.0, 0.5), 0.5))
    assert torch.allclose(merged, base + 0.25 * (sources[0] - base) + 0.125 * (sources[1] - base), atol=1e-6)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_source_is_refused_by_the_tensors_name(broken: float) -> None:
    base, *sources = tensors(3, (6, 8))
    sources[1][2, 3] = broken
    with pytest.raises(InputError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: its changes have NaN"):
        merge(TSV, base, sources, blend((1.0, 1.0)))


# ---- what is computed once -------------------------------------------------------------------------------------------


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what was decomposed."""
    sizes: list[int] = []
    eigh: Callable[[Tensor], Any] = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (sizes.append(len(gram)), eigh(gram))[1])
    return sizes


def test_weights_alone_decompose_nothing_again(tmp_path: Path, decompositions: list[int]) -> None:
    """Not a second candidate, not a second worker; fewer vectors take their own two sides, and no task vector again."""
    names = ("b", "s0", "s1")
    held = dict(zip(names, random(3, 40, 30), strict=True))
    site = Site("w", Role("mlp", 0), (40, 30), {name: (name, "w") for name in names})
    weights, contents = Weights(lambda ref: held[ref[0]], WorkerThreads(1)), dict.fromkeys(names, "digest")
    made = {}
    for weight, halvings in ((0.5, 0), (1.0, 0), (0.5, 0), (0.5, 1), (1.0, 1)):
        facts = Facts(site, weights, Evidence(tmp_path, contents), seed=0)
        plan = TSV.plan(facts, blend((weight, 1.0), halvings=halvings))
        out = torch.empty(40, 30)
        WorkerThreads(1).run([TensorJob(plan, [held[name] for name in plan.inputs], out)])
        assert torch.equal(out, made.setdefault((weight, halvings), out))
    assert decompositions == [30, 30, 30, 30, 14, 14]  # two task vectors, the two sides of all and of half the vectors
    assert len(made) == 4


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
def test_it_keeps_as_much_as_it_says(shape: tuple[int, int], tmp_path: Path) -> None:
    names = ("b", "s0", "s1", "s2")
    held = dict(zip(names, random(4, *shape), strict=True))
    site = Site("w", Role("mlp", 0), shape, {name: (name, "w") for name in names})
    weights = Weights(lambda ref: held[ref[0]], WorkerThreads(1))
    TSV.plan(Facts(site, weights, Evidence(tmp_path, dict.fromkeys(names, "digest")), seed=0), blend(WEIGHTS))
    assert TSV.kept is not None
    assert TSV.kept(*shape, 3) == kept_in(tmp_path) - 8  # the norm of the base


def test_is_searched_resumed_and_exported_and_decomposes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = short_search_file(tmp_path, space={"method": "tsv"})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    assert kept_in(tmp_path / "search/evidence") == pytest.approx(planned_evidence(tmp_path / "search"), rel=0.1)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: pytest.fail("decomposed again"))
    assert evomerge("resume", tmp_path / "search", "--set", "budget.candidates=10") == 0
    assert export_of(newest_scored(tmp_path / "search"), tmp_path / "search", tmp_path / "out") == 0


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["tsv", "gram"])
def test_a_search_goes_on_alike_where_evidence_was_damaged(method: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert evomerge("search", short_search_file(tmp_path, space={"method": method}), "--dir", whole) == 0
    shutil.copytree(whole, cut)
    files = sorted((cut / "evidence").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    for file, left in ((files[-1], -100), (files[-2], 0), (files[-3], 9)):
        file.write_bytes(file.read_bytes()[:left])
    for search in (whole, cut):
        assert evomerge("resume", search, "--set", "budget.candidates=12") == 0
    assert table(cut) == table(whole)
    for file in files:
        made, again = load_file(whole / "evidence" / file.name), load_file(file)
        assert made.keys() == again.keys()
        assert all(torch.equal(made[name], again[name]) for name in made)


def test_torch_uses_one_thread_in_each_that_merges() -> None:
    """Else what is computed hangs in its last bit on their number, and they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen: list[int] = []
        WorkerThreads(2).each(lambda item: seen.append(torch.get_num_threads()), range(4))
        assert seen == [1, 1, 1, 1]
        with ThreadPoolExecutor(1) as others:
            assert {torch.get_num_threads(), others.submit(torch.get_num_threads).result()} == {3}
    finally:
        torch.set_num_threads(before)


def test_what_threads_make_comes_in_order_and_never_much_of_it_waits() -> None:
    begun: list[int] = []

    def made(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        if item == 7:
            raise InputError("x", "no seventh")
        return item * item

    def read() -> None:
        for result in threads.in_order(made, range(50)):
            seen.append(result)
            assert max(begun) <= len(seen) - 1 + 2

    threads, seen = WorkerThreads(2), list[int]()
    with pytest.raises(InputError, match="no seventh"):
        read()
    assert seen == [0, 1, 4, 9, 16, 25, 36]
    assert len(begun) <= 10
    assert list(threads.in_order(str, [])) == []
