"""The point of a space nearest to a recipe: carried from one granularity, method or range to another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_parameter_space import LAYERS, METHODS, build, weights_of

from evomerge.genome import Genome
from search_spaces.parameter_space import ParameterSpace


def drawn(space: ParameterSpace, random: np.random.RandomState) -> Genome:
    """Any point of a space."""
    values = [random.uniform(p.low, p.high) if p.kind == "real" else random.randint(p.low, p.high + 1)
              for p in space.parameters]  # fmt: skip
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize("granularity", ["model", "layer", "block", 2])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_of_its_own_recipe_it_is_the_same_recipe(method: str, granularity: str | int) -> None:
    spec = METHODS[method]
    base, mixed = "base" if spec.needs_base else None, ("a", "b")[: spec.max_sources]
    space = build(method=method, base=base, granularity=granularity, sources=(base, *mixed) if base else mixed)
    recipe = space.decode(drawn(space, np.random.RandomState(1)))
    genome = space.genome_of(recipe)
    assert genome is not None
    assert space.decode(genome).hash == recipe.hash


@given(seed=st.integers(0, 1000))
def test_of_its_own_recipe_with_steps_and_several_methods_too(seed: int) -> None:
    space = build(
        method=["task_arithmetic", "ties"], granularity="layer", steps={"activations": {}, "scale": {}, "iso": {}}
    )
    recipe = space.decode(drawn(space, np.random.RandomState(seed)))
    genome = space.genome_of(recipe)
    assert genome is not None
    assert space.decode(genome).hash == recipe.hash


@pytest.mark.parametrize("profile", ["lines", "tiers"])
@given(seed=st.integers(0, 1000))
def test_a_profile_is_found_again(profile: str, seed: int) -> None:
    space = build(method="ties", profile=profile)
    genome = drawn(space, np.random.RandomState(seed))
    nearest = space.genome_of(space.decode(genome))
    assert nearest == pytest.approx(genome, abs=1e-9)


@pytest.mark.parametrize("method", ["linear", ["ties", "dare_ties"]], ids=str)
@given(seed=st.integers(0, 1000))
def test_a_curve_is_found_again(method: str | list[str], seed: int) -> None:
    """One that no bound cuts off; of several methods, that of the one that is chosen."""
    space = build(method=method, profile={"cosines": 4}, **({"base": None} if method == "linear" else {}))
    random = np.random.RandomState(seed)
    genome = np.array([p.default if p.kind == "choice" else random.uniform(-0.1, 0.1) for p in space.parameters])
    genome += [0.5 * (p.kind == "real" and "cosine" not in p.name) for p in space.parameters]
    nearest = space.genome_of(space.decode(genome))
    assert nearest is not None
    chosen = [place for place, p in enumerate(space.parameters) if "dare_ties" not in p.name]
    assert nearest[chosen] == pytest.approx(genome[chosen], abs=1e-9)


def test_a_profile_of_lines_goes_to_curves() -> None:
    lines, curved = build(profile="lines"), build(profile={"cosines": LAYERS})
    genome = curved.genome_of(lines.decode(np.array([0.5, 0.25, 1.0, 1.5])))
    assert genome is not None
    layers = 0.5 * np.linspace(1.0, 1.5, LAYERS)
    mean = (15 * layers.mean() + 3 * 0.5) / 18  # of attention, mlp and norms of five layers and what is outside of them
    assert weights_of(curved.decode(genome)) == pytest.approx(layers - layers.mean() + mean)


def test_each_layer_has_the_numbers_of_the_model() -> None:
    coarse, fine = build(), build(granularity="block")
    genome = fine.genome_of(coarse.decode(np.array([0.3, 0.7])))
    assert genome is not None
    assert genome.reshape(-1, 2).tolist() == [[0.3, 0.7]] * (2 * LAYERS + 3)


def test_the_model_has_the_mean_of_its_layers() -> None:
    coarse, fine = build(), build(granularity="layer")
    numbers = np.linspace(0.0, 1.4, len(fine.parameters)).reshape(-1, 2)
    genome = coarse.genome_of(fine.decode(numbers.ravel()))
    # Each layer is an attention, an mlp and a norm; embedding, norm and head are one each.
    weights = np.array([1, *[3] * LAYERS, 1, 1])
    assert genome == pytest.approx((weights[:, None] * numbers).sum(axis=0) / weights.sum())


def test_bounds_clip() -> None:
    genome = build(bounds={"weight": (0.5, 0.6)}).genome_of(build().decode(np.array([0.2, 1.2])))
    assert genome is not None
    assert genome.tolist() == [0.5, 0.6]


def test_another_method_takes_what_both_have() -> None:
    space = build(method="ties")
    genome = space.genome_of(build().decode(np.array([0.2, 1.2])))
    assert genome is not None
    defaults = {p.name: p.default for p in space.parameters}
    assert dict(zip(defaults, genome.tolist(), strict=True)) == defaults | {
        "model.weight.maths": 0.2, "model.weight.japanese": 1.2,
    }  # fmt: skip


def test_a_profile_goes_to_the_weights_of_layers() -> None:
    lines, fine = build(profile="lines"), build(granularity="layer")
    genome = fine.genome_of(lines.decode(np.array([0.5, 0.25, 1.0, 2.0])))
    assert genome is not None
    factors = [1.0, *np.linspace(1.0, 2.0, LAYERS), 1.0, 1.0]
    assert genome.reshape(-1, 2) == pytest.approx(np.outer(factors, [0.5, 0.25]))


def test_what_says_nothing_alike_has_no_point() -> None:
    assert (
        build().genome_of(build(method="linear", base=None, sources=("maths", "japanese")).decode(np.ones(2))) is None
    )
    assert build().genome_of(build(sources=("base", "maths", "chat")).decode(np.ones(2))) is None
    slerp = build(method="slerp", base=None, sources=("maths", "japanese"))
    assert build(method="linear", base=None, sources=("maths", "japanese")).genome_of(slerp.decode(np.ones(1))) is None
