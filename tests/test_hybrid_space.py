"""Hybrid space: a winner in the pool of a search over data flow, and hops that are merges themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.genome import Genome, SearchSpace
from evomerge.mergekit import dump_recipe
from evomerge.method import check_blend, find_method, own_methods
from evomerge.recipes.base import DType, read_recipe
from evomerge.recipes.stack import Blend, StackRecipe
from evomerge.vocabulary import Vocabulary
from search_spaces.base import SpaceContext
from search_spaces.data_flow_space import DataFlowSpace
from search_spaces.hybrid_space import HybridSpaceSettings, JointSpace
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings

METHODS = own_methods()
LAYERS = 5
SOURCES = {name: f"models/{name}" for name in ("base", "maths", "japanese")}


def context(
    *,
    sources: dict[str, str] = SOURCES,
    base: str | None = "base",
    tied: bool = False,
    dtype: DType | None = None,
    tokenizer: str = "base",
    vocabulary: Vocabulary | None = None,
) -> SpaceContext:
    return SpaceContext(
        sources=sources,
        base=base,
        tokenizer=tokenizer,
        layers=LAYERS,
        depths=dict.fromkeys(sources, LAYERS),
        tied=tied,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=3,
        dtype=dtype,
        vocabulary=vocabulary or Vocabulary(),
    )


def parameter_space(granularity: str = "block", method: str = "dare_ties", **changes: Any) -> ParameterSpace:
    return ParameterSpaceSettings(method=method, granularity=granularity).build(context(**changes))  # type: ignore[arg-type]


def merged(**changes: Any) -> StackRecipe:
    """What a search over parameters may have found: every part of the model made otherwise."""
    space = parameter_space()
    numbers = np.random.default_rng(0).uniform([p.low for p in space.parameters], [p.high for p in space.parameters])
    recipe = space.decode(numbers)
    return recipe.model_copy(update=changes)


@pytest.fixture
def winner(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(merged()))
    return path


def after(winner: Path, **settings: Any) -> DataFlowSpace:
    space = HybridSpaceSettings(winner=winner, **settings).build(context())
    assert isinstance(space, DataFlowSpace)
    return space


def joint(method: str = "task_arithmetic", *, tied: bool = False, **settings: Any) -> JointSpace:
    space = HybridSpaceSettings(method=method, **settings).build(context(tied=tied))  # type: ignore[arg-type]
    assert isinstance(space, JointSpace)
    return space


@st.composite
def genomes(draw: st.DrawFn, space: SearchSpace) -> Genome:
    """Points of a space, some of their numbers at the bounds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = (np.array([getattr(p, side) for p in space.parameters]) for side in ("low", "high"))
    numbers = rng.uniform(low, high)
    for special in (low, high):
        numbers = np.where(rng.random(len(numbers)) < draw(st.sampled_from([0.0, 0.2, 1.0])), special, numbers)
    return np.where([p.kind == "real" for p in space.parameters], numbers, np.round(numbers))


def check_path(recipe: StackRecipe, most: int) -> None:
    assert 2 <= len(recipe.hops) <= most
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe
    for blend in recipe.blends:
        check_blend(blend, METHODS[blend.method], "test")


# ---- one after the other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["indicators", "integers", "blocks", "pruning"])
def test_the_winner_is_a_baseline_and_a_point_of_the_space(winner: Path, encoding: str) -> None:
    space = after(winner, encoding=encoding)
    mark, *others = space.baselines()
    assert (mark.label, mark.kind) == ("merged", "source")
    assert mark.recipe == merged()
    assert mark.genome is not None
    assert space.decode(mark.genome) == merged()
    sources = [other.label for other in others if other.kind == "source"]
    assert sources == ([] if encoding == "pruning" else ["base", "maths", "japanese"])


@given(data=st.data())
@settings(suppress_health_check=list(HealthCheck))
def test_hops_of_the_winner_are_made_by_its_own_blends(winner: Path, data: st.DataObject) -> None:
    space = after(winner, max_hops=9, others=("maths",))
    recipe = space.decode(data.draw(genomes(space)))
    check_path(recipe, 9)
    found = merged()
    own = {
        tuple(found.blends[index].model_dump_json() for index in (hop.attention, hop.mlp, hop.norm)): hop.layer
        for hop in found.hops
    }
    for hop in recipe.hops:
        blends = [recipe.blends[index] for index in (hop.attention, hop.mlp, hop.norm)]
        if blends[0].method == "passthrough":
            assert blends[0].sources == ("maths",)
        else:
            assert own[tuple(blend.model_dump_json() for blend in blends)] == hop.layer
    assert recipe.blends[recipe.embedding] == found.blends[found.embedding]
    assert recipe.blends[recipe.norm] == found.blends[found.norm]
    assert recipe.blends[recipe.head] == found.blends[found.head]
    assert recipe.seed == found.seed


def test_the_winners_seed_and_dtype_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(merged(seed=77, dtype="bfloat16")))
    space = after(path)
    recipe = space.decode(np.array([p.default for p in space.parameters]))
    assert (recipe.seed, recipe.dtype) == (77, "bfloat16")


def test_shelves_are_for_the_winner_and_the_sources(winner: Path) -> None:
    assert after(winner).layer_buffers == 4 * LAYERS
    assert after(winner, others=()).layer_buffers == LAYERS


def test_a_path_is_taken_from_the_folder_of_the_search_file(tmp_path: Path) -> None:
    assert HybridSpaceSettings(winner=Path("found/recipe.yaml")).at(tmp_path).winner == tmp_path / "found/recipe.yaml"
    assert HybridSpaceSettings(winner=Path("/there/recipe.yaml")).at(tmp_path).winner == Path("/there/recipe.yaml")
    assert HybridSpaceSettings(method="linear").at(tmp_path).winner is None


def scaled() -> dict[str, Any]:
    first, *rest = merged().hops
    return {"hops": (first.model_copy(update={"scale": 0.9}), *rest)}


def too_deep() -> dict[str, Any]:
    return {"hops": tuple(hop.model_copy(update={"layer": 9}) for hop in merged().hops)}


@pytest.mark.parametrize(
    ("changes", "around", "place", "words"),
    [
        (scaled(), {}, "space.winner", "scales hops"),
        ({"tensors": {"model.norm.weight": 0}}, {}, "space.winner", "single tensors"),
        ({}, {"sources": {"base": "models/base", "maths": "models/maths"}}, "space.winner", "`sources.japanese`"),
        ({}, {"sources": SOURCES | {"maths": "elsewhere"}}, "space.winner", "models/maths as maths"),
        ({}, {"sources": SOURCES | {"merged": "models/w"}}, "sources.merged", "another name"),
        ({}, {"tokenizer": "maths"}, "tokenizer", "base"),
        ({}, {"dtype": "float16"}, "dtype", "winner"),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}, "dtype", "bfloat16"),
        ({}, {"vocabulary": Vocabulary(kind="union")}, "vocabulary", "winner"),
        (too_deep(), {}, "space.winner: hops[0]", "has 5 layers"),
        ({"blends": (Blend(method="ties", sources=("base",)),) * 20}, {}, "space.winner: blends[0]", "base"),
    ],
)
def test_winners_that_this_search_cannot_make(
    tmp_path: Path, changes: dict[str, Any], around: dict[str, Any], place: str, words: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(merged(**changes)))
    with pytest.raises(InputError) as caught:
        HybridSpaceSettings(winner=path).build(context(**around))
    assert caught.value.place == place
    assert words in str(caught.value)


def test_a_winner_that_cannot_be_read(tmp_path: Path) -> None:
    mergekit = tmp_path / "mergekit.yaml"
    mergekit.write_text("{merge_method: linear, models: [{model: one, parameters: {weight: 1.0}}]}")
    for path, words in ((tmp_path / "none.yaml", "cannot be read"), (mergekit, "evomerge merge")):
        with pytest.raises(InputError) as caught:
            HybridSpaceSettings(winner=path).build(context())
        assert caught.value.place.startswith("space.winner: ")
        assert words in str(caught.value)


# ---- at once --------------------------------------------------------------------------------------------------------


@given(
    data=st.data(),
    method=st.sampled_from(["linear", "task_arithmetic"]),
    granularity=st.sampled_from([None, "hop", "model"]),
    encoding=st.sampled_from(["integers", "indicators", "blocks", "pruning"]),
    tied=st.booleans(),
)
def test_every_genome_is_a_path_of_merges(
    data: st.DataObject, method: str, granularity: str | None, encoding: str, tied: bool
) -> None:
    space = joint(method, granularity=granularity, encoding=encoding, tied=tied)
    found = data.draw(genomes(space))
    recipe = space.decode(found)
    assert recipe == space.decode(found.copy())
    check_path(recipe, 5 if encoding == "pruning" else 10)
    assert {blend.method for blend in recipe.blends} == {method}
    assert (recipe.hops[0].layer, recipe.hops[-1].layer) == (0, LAYERS - 1)
    assert len({(hop.layer, hop.attention) for hop in recipe.hops}) <= space.layer_buffers
    assert not tied or recipe.head == recipe.embedding
    assert granularity != "model" or len(recipe.blends) == 1
    for mark in space.baselines():
        assert len(mark.recipe.hops) <= space.layer_buffers


@given(data=st.data(), method=st.sampled_from(["linear", "task_arithmetic"]), tied=st.booleans())
def test_every_layer_once_is_the_parameter_space(data: st.DataObject, method: str, tied: bool) -> None:
    """Slots first, 1, 2, 3, last hold the layers; weights go to the same parts as in the space of weights alone."""
    alone = parameter_space("layer", method, tied=tied)
    space = joint(method, tied=tied)
    weights = dict(zip((p.name for p in alone.parameters), data.draw(genomes(alone)).tolist(), strict=True))
    parts = {"first": "layers.0", "last": f"layers.{LAYERS - 1}"} | {f"slots.{i}": f"layers.{i}" for i in range(1, 4)}
    numbers = []
    for p in space.parameters:
        part = parts.get(p.group, p.group)
        name = p.name.replace(p.group, part, 1)
        numbers.append(weights[name] if ".weight." in p.name and name in weights else p.default)
    assert space.decode(np.array(numbers)) == alone.decode(np.array(list(weights.values())))


def test_each_slot_has_weights_of_its_own() -> None:
    space = joint("linear")
    names = [p.name for p in space.parameters]
    numbers = np.array([p.default for p in space.parameters])
    numbers[names.index("slots.4.layer")] = 3  # layer 2 again
    numbers[names.index("slots.4.weight.maths")] = 0.25
    recipe = space.decode(numbers)
    assert [hop.layer for hop in recipe.hops] == [0, 1, 2, 3, 2, 4]
    found = [recipe.blends[hop.mlp].value("weight", "maths") for hop in recipe.hops]
    assert found == [1, 1, 1, 1, 0.25, 1]
    assert recipe.blends[recipe.hops[4].mlp].value("weight", "japanese") == 1


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("granularity", ["hop", "model"])
def test_baselines_are_those_of_the_parameter_space(method: str, granularity: str) -> None:
    """Their genomes say the model that the parameter space's genomes say."""
    space, alone = joint(method, granularity=granularity), parameter_space("model", method)
    marks, others = list(space.baselines()), list(alone.baselines())
    assert [(m.label, m.kind, m.recipe.hash) for m in marks] == [(m.label, m.kind, m.recipe.hash) for m in others]
    for mark, other in zip(marks, others, strict=True):
        assert (mark.genome is None) == (other.genome is None)
        if mark.genome is not None and other.genome is not None:
            assert space.decode(mark.genome) == alone.decode(other.genome)


def test_the_defaults_are_the_methods_usual_ones() -> None:
    space = joint()
    (*_, usual) = space.baselines()
    assert space.decode(np.array([p.default for p in space.parameters])).hash == usual.recipe.hash


def test_baselines_that_are_too_long_for_paths_are_no_points() -> None:
    space = joint(encoding="pruning", max_hops=4)
    assert {mark.genome is None for mark in space.baselines()} == {True}
    assert space.layer_buffers == LAYERS


def test_shelves_of_a_joint_search() -> None:
    assert joint(max_hops=8).layer_buffers == 8
    assert joint(max_hops=8, granularity="model").layer_buffers == LAYERS


@pytest.mark.parametrize(
    ("given_settings", "base", "place", "words"),
    [
        ({}, "base", "space", "`method: linear`"),
        ({"winner": Path("recipe.yaml"), "method": "linear"}, "base", "space.method", "already merged"),
        ({"winner": Path("recipe.yaml"), "granularity": "hop"}, "base", "space.granularity", "Leave it out"),
        ({"method": "linear", "others": ("maths",)}, "base", "space.others", "merges all"),
        ({"method": "task_arithmetic"}, None, "base", "needs a base"),
        ({"method": "linear", "max_hops": 4}, "base", "space.max_hops", "merged alone is 5 hops"),
        ({"method": "linear", "segments": 3}, "base", "space.segments", "belongs to blocks"),
        ({"method": "linear", "max_hops": 3000}, "base", "space.granularity", "Set it to model"),
    ],
)
def test_settings_that_do_not_fit(given_settings: dict[str, Any], base: str | None, place: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        HybridSpaceSettings(**given_settings).build(context(base=base))
    assert caught.value.place == place
    assert words in str(caught.value)


@pytest.mark.parametrize("method", ["ties", "della", "slerp", "karcher"])
@pytest.mark.parametrize("granularity", ["hop", "model"])
def test_hops_are_merged_by_any_method_with_all_that_it_searches(method: str, granularity: str) -> None:
    pair = HybridSpaceSettings(method=method, granularity=granularity).build(context())
    of_model = ParameterSpaceSettings(method=method).build(context())
    mine = [p.name.partition(".")[2] for p in of_model.parameters]
    names = [p.name for p in pair.parameters]
    assert all(any(name.endswith(f".{end}") for name in names) for end in mine)
    marks, plain = list(pair.baselines()), list(of_model.baselines())
    assert [mark.recipe for mark in marks] == [mark.recipe for mark in plain]
    defaults = marks[-1]
    assert defaults.genome is not None
    assert pair.decode(defaults.genome) == defaults.recipe
    random = np.random.default_rng(0)
    for _ in range(5):
        genome = random.uniform([p.low for p in pair.parameters], [p.high for p in pair.parameters])
        rounded = np.where([p.kind == "real" for p in pair.parameters], genome, np.round(genome))
        check_path(pair.decode(rounded), 2 * LAYERS)


def test_a_method_that_cannot_mix_the_sources_is_refused() -> None:
    with pytest.raises(InputError, match="nearswap mixes 1 sources"):
        HybridSpaceSettings(method="nearswap").build(context())
    with pytest.raises(InputError, match="no merge method 'tie'"):
        HybridSpaceSettings(method="tie").build(context())
