"""How strongly to merge before anything is scored: the law, the norms that it needs, and its baseline in a search."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_miniature import MINIATURES, evomerge, short_search_file

from evomerge.checkpoints.source import Source, open_source
from evomerge.merging.measured.amplitude import EVEN, UNEVEN, dispersion, kappa, relative_norms
from evomerge.merging.measured.evidence import Evidence
from evomerge.method import find_method
from evomerge.store import Store
from search_spaces.base import Measures, SpaceContext
from search_spaces.parameter_space import ParameterSpaceSettings


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {name: open_source(name, str(MINIATURES / name), place=name) for name in ("base", "maths", "japanese")}


def test_the_law_takes_the_smaller_factor_where_norms_are_uneven() -> None:
    assert (kappa([0.02, 0.03]), kappa([0.01, 0.03]), kappa([0.01, 0.05, 0.02])) == (EVEN, UNEVEN, UNEVEN)
    assert dispersion([0.1, 0.0, 0.2]) == 2.0  # a copy of the base says nothing of how far the others are
    assert dispersion([0.0]) == dispersion([]) == 1.0


def test_norms_are_those_of_the_plain_formula_and_read_once(sources: dict[str, Source], tmp_path: Path) -> None:
    evidence = Evidence(tmp_path, {name: name for name in sources})
    norms = relative_norms(sources, "base", evidence)
    assert list(norms) == ["maths", "japanese"]
    base = torch.cat([sources["base"].read(name).double().flatten() for name in sources["base"].tensors])
    for name, norm in norms.items():
        other = torch.cat([sources[name].read(tensor).double().flatten() for tensor in sources["base"].tensors])
        assert norm == pytest.approx(float((other - base).norm() / base.norm()), rel=1e-6)
    closed = {name: replace(source, tensors={}) for name, source in sources.items()}
    again = Evidence(tmp_path, {name: name for name in sources})
    assert relative_norms(closed, "base", again) == norms


def context(*names: str, factor: float | None = 1.15) -> SpaceContext:
    return SpaceContext(
        sources=dict.fromkeys(("base", *names), ""), base="base", tokenizer="base", layers=2, tied=False,
        method=lambda name: find_method(name, "space.method"), recipe_seed=0, dtype=None,
        measures=Measures(kappa=factor),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "task_arithmetic"}, True),
        ({"method": "task_arithmetic", "granularity": "layer"}, True),
        ({"method": "dare_linear"}, True),
        ({"method": "dare_linear", "fixed": {"density": 0.5}}, False),
        ({"method": "task_arithmetic", "bounds": {"weight": [0, 0.5]}}, False),
        ({"method": "task_arithmetic", "switches": {"normalize": True}}, False),
        ({"method": "ties"}, False),
        ({"method": "model_stock"}, False),
    ],
)
def test_its_baseline_is_told_where_the_space_holds_the_point(settings: dict[str, object], told: bool) -> None:
    space = ParameterSpaceSettings.model_validate(settings).build(context("a", "b", "c"))
    mark = list(space.baselines())[-1]
    assert (mark.label, mark.kind, mark.genome is not None) == ("kappa sqrt(N), kappa 1.15", "default", told)
    (blend,) = mark.recipe.blends  # type: ignore[attr-defined]
    weight = 1.15 / math.sqrt(3)
    assert {name: blend.value("weight", name) for name in "abc"} == dict.fromkeys("abc", weight)
    assert blend.method == (settings["method"] if told else "task_arithmetic")
    if mark.genome is not None:
        assert space.decode(mark.genome).hash == mark.recipe.hash


@pytest.mark.parametrize(
    ("method", "names", "factor"),
    [("task_arithmetic", "ab", None), ("task_arithmetic", "a", 1.15), ("linear", "ab", 1.15), ("sce", "ab", 1.15)],
)
def test_spaces_without_a_strength_have_none(method: str, names: str, factor: float | None) -> None:
    space = ParameterSpaceSettings(method=method).build(context(*names, factor=factor))
    assert not any(mark.label.startswith("kappa") for mark in space.baselines())


def rows_of(folder: Path) -> list[tuple[str, str, bytes]]:
    with Store.open(folder / "search.db") as store:
        return [(row.label, row.recipe_hash, np.asarray(row.genome).tobytes()) for row in store.candidates()]


@pytest.mark.parametrize("has_it", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_search_has_it_and_goes_on_with_what_it_began_with(has_it: bool, tmp_path: Path) -> None:
    """With the baseline or without, a search goes on as if it had never stopped."""
    own: dict[str, Any] = {"baselines": {"kappa": has_it}, "optimizer": {"name": "cma", "population": 3}}
    first = 6 + 3 if has_it else 5 + 3  # baselines and a generation
    file = short_search_file(tmp_path, **own, budget={"candidates": first})
    assert evomerge("search", file, "--dir", tmp_path / "s") == 0
    labels = [label for label, *_ in rows_of(tmp_path / "s")]
    assert ("kappa sqrt(N), kappa 0.5" in labels) is has_it  # maths is ten times as far as japanese
    assert evomerge("resume", tmp_path / "s", "--set", f"budget.candidates={first + 3}") == 0
    whole = short_search_file(tmp_path, **own, budget={"candidates": first + 3})
    assert evomerge("search", whole, "--dir", tmp_path / "whole") == 0
    assert rows_of(tmp_path / "s") == rows_of(tmp_path / "whole")
