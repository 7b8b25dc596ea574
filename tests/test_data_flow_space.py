"""Data-flow space: paths against plain readings of each encoding, scales, baselines, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.genome import Baseline, Genome, SearchSpace
from evomerge.merging.building.builders import check_recipe
from evomerge.method import check_blend, find_method, own_methods
from evomerge.optimizers import CmaSettings
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.search.settings.search_file import explain
from search_spaces.base import SpaceContext
from search_spaces.data_flow_space import DataFlowSpace, DataFlowSpaceSettings

METHODS = own_methods()
MINIATURES = Path(__file__).resolve().parents[1] / "examples" / "miniatures"
DEPTHS = {"a": 5, "b": 4, "c": 7}

Route = list[tuple[str, int]]


def build(depths: dict[str, int] | None = None, *, base: str | None = None, **settings: Any) -> DataFlowSpace:
    depths = depths or DEPTHS
    context = SpaceContext(
        sources={name: f"models/{name}" for name in depths},
        base=base,
        tokenizer="a",
        layers=depths["a"],
        depths=depths,
        tied=False,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=3,
        dtype=None,
    )
    return DataFlowSpaceSettings(**settings).build(context)


def route(recipe: StackRecipe) -> Route:
    """(source, layer) of each hop."""
    found = []
    for hop in recipe.hops:
        assert hop.attention == hop.mlp == hop.norm
        (source,) = recipe.blends[hop.attention].sources
        found.append((source, hop.layer_of(source)))
    return found


def scales(recipe: StackRecipe) -> list[float]:
    return [hop.scale for hop in recipe.hops]


def names(space: SearchSpace) -> list[str]:
    return [p.name for p in space.parameters]


def defaults(space: SearchSpace) -> Genome:
    return np.array([p.default for p in space.parameters])


def genome(space: SearchSpace, **changes: float) -> Genome:
    """The defaults, but for parameters whose names begin with a key (``__`` for a dot)."""
    numbers = defaults(space)
    for key, value in changes.items():
        matching = [i for i, name in enumerate(names(space)) if name.startswith(key.replace("__", "."))]
        assert matching
        numbers[matching] = value
    return numbers


@st.composite
def genomes(draw: st.DrawFn, space: SearchSpace) -> Genome:
    """Points of a space, some of their numbers at the bounds, in the middle (a threshold) or at the defaults."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = (np.array([getattr(p, side) for p in space.parameters]) for side in ("low", "high"))
    numbers = rng.uniform(low, high)
    for special in (low, high, (low + high) / 2, defaults(space)):
        share = draw(st.sampled_from([0.0, 0.0, 0.2, 1.0]))
        numbers = np.where(rng.random(len(numbers)) < share, special, numbers)
    return np.where([p.kind == "real" for p in space.parameters], numbers, np.round(numbers))


@st.composite
def all_settings(draw: st.DrawFn) -> dict[str, Any]:
    encoding = draw(st.sampled_from(["indicators", "integers", "blocks", "pruning"]))
    found: dict[str, Any] = {"encoding": encoding, "keep_ends": draw(st.booleans())}
    found["max_hops"] = draw(st.none() | (st.integers(3, 5) if encoding == "pruning" else st.integers(7, 20)))
    found["scale"] = draw(st.sampled_from(["none", "hop", "transition"]))
    found["scaling"] = draw(st.sampled_from(["stream", "update"]))
    if found["scaling"] == "update":
        found["scale_bounds"] = (draw(st.sampled_from([-1.0, 0.0, 0.5])), 1.5)
    if encoding == "indicators":
        found["repeats"] = draw(st.none() | st.integers(1, 4))
    if encoding == "blocks":
        found["segments"] = draw(st.none() | st.integers(1, 6))
    if encoding in ("indicators", "pruning"):
        found |= draw(st.sampled_from([{}, {"bits": True}, {"start": "paper"}]))
    if encoding != "pruning":
        found["others"] = draw(st.sampled_from([None, (), ("b",), ("c", "b")]))
    if found["max_hops"] is None and found.get("others") not in ((), ("b",)) and encoding != "pruning":
        found["max_hops"] = 10
    return found


# ---- every space ----------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_every_genome_is_a_path_within_the_limits(data: st.DataObject) -> None:
    settings = data.draw(all_settings())
    space = build(**settings)
    found = data.draw(genomes(space))
    recipe = space.decode(found)
    assert recipe == space.decode(found.copy())
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe
    most = settings["max_hops"] or (5 if settings["encoding"] == "pruning" else 10)
    assert 1 <= len(recipe.hops) <= most
    path = route(recipe)
    assert all(layer < DEPTHS[source] for source, layer in path)
    if settings["keep_ends"]:
        assert (path[0], path[-1]) == (("a", 0), ("a", 4))
    assert {source for source, _ in path} <= {"a", *(settings.get("others") or DEPTHS)}
    assert len(set(path)) <= space.layer_buffers
    for blend in recipe.blends:
        check_blend(blend, METHODS[blend.method], "test")
    low, high = settings.get("scale_bounds", (0.5, 1.5))
    assert all(low <= scale <= high for scale in scales(recipe))
    assert recipe.scaling == (settings["scaling"] if recipe.is_scaled else "stream")
    assert all(source == ("a",) for source in (recipe.blends[i].sources for i in (recipe.embedding, recipe.norm)))


@given(data=st.data())
def test_baselines_with_genomes_are_what_these_decode_to(data: st.DataObject) -> None:
    space = build(**data.draw(all_settings()))
    marks = list(space.baselines())
    for mark in marks:
        if mark.genome is not None:
            assert space.decode(mark.genome).hash == mark.recipe.hash
            assert all(p.low <= value <= p.high for p, value in zip(space.parameters, mark.genome, strict=True))
    assert len({mark.recipe.hash for mark in marks}) == len(marks)


@given(settings=all_settings())
def test_it_starts_at_a_once(settings: dict[str, Any]) -> None:
    if settings["encoding"] == "pruning":
        settings["max_hops"] = None  # room for A
    space = build(**settings)
    (mark, *_) = space.baselines()
    assert route(mark.recipe) == [("a", layer) for layer in range(5)]
    assert space.decode(defaults(space)).hash == mark.recipe.hash
    assert mark.genome is not None
    assert mark.genome.tolist() == defaults(space).tolist()


@given(settings=all_settings())
def test_parameters_are_named_once_and_hold_their_defaults(settings: dict[str, Any]) -> None:
    space = build(**settings)
    assert len(set(names(space))) == len(names(space))
    for p in space.parameters:
        assert p.low <= p.default <= p.high
        assert p.low < p.high
        if p.kind != "real":
            assert p.default == round(p.default)
        if p.kind == "choice":
            assert (p.low, p.high) == (0, len(p.choices) - 1)


def test_sources_in_the_order_of_the_file_the_base_among_them() -> None:
    assert [name for name in names(build(base="c")) if name.startswith("1.") and name.endswith(".0.on")] == [
        "1.b.0.on",
        "1.c.0.on",
    ]
    assert build(others=("c",)).layer_buffers == 12


# ---- the paper's encoding -------------------------------------------------------------------------------------------


def test_two_models_of_32_layers_make_the_papers_4288_parameters() -> None:
    space = build({"a": 32, "b": 32}, keep_ends=False, scale="transition", start="paper")
    slots = [p for p in space.parameters if p.name.endswith(".on")]
    assert len(slots) == 192
    assert len(space.parameters) == 192 + 64**2
    assert {(p.low, p.high) for p in slots} == {(-1, 1)}
    assert [p.default for p in slots] == [2 * 2 / 6] * 32 + [0.0] * 160  # two steps of a sixth of the range


def plain_indicators(numbers: Sequence[float], repeats: int, room: int | None) -> Route:
    """The path between the ends by counting, slot by slot, how many stronger ones there are."""
    row = [(source, layer) for _ in range(repeats) for source, depth in DEPTHS.items() for layer in range(depth)][1:]
    found = []
    for i, slot in enumerate(row):
        stronger = sum(other > numbers[i] or (other == numbers[i] and j < i) for j, other in enumerate(numbers))
        if numbers[i] > 0 and (room is None or stronger < room):
            found.append(slot)
    return found


@given(data=st.data(), repeats=st.integers(1, 3), most=st.integers(7, 12))
def test_slots_above_zero_are_used_and_the_strongest_where_there_are_too_many(
    data: st.DataObject, repeats: int, most: int
) -> None:
    space = build(repeats=repeats, max_hops=most, scale="none")
    found = data.draw(genomes(space))
    assert route(space.decode(found))[1:-1] == plain_indicators(found.tolist(), repeats, most - 2)


def test_sparse_starts_near_a_and_the_papers_start_as_long_as_may_be() -> None:
    """What the text of ``start`` promises, by the first generation of CMA-ES."""
    lengths = {}
    for start in ("sparse", "paper"):
        space = build({"a": 32, "b": 32}, start=start, scale="none")
        optimizer = CmaSettings(name="cma", x0="default", population=20).build(space.parameters, 1, seed=0)
        lengths[start] = [len(space.decode(each).hops) for each in optimizer.ask(20)]
    assert set(lengths["paper"]) == {64}
    assert 32 <= float(np.mean(lengths["sparse"])) <= 38


def test_without_fixed_ends_a_path_of_nothing_is_the_slot_nearest_to_being_on() -> None:
    space = build(keep_ends=False, scale="none")
    numbers = np.full(len(space.parameters), -0.5)
    numbers[names(space).index("2.b.3.on")] = -0.25
    assert route(space.decode(numbers)) == [("b", 3)]


def test_bits_are_choices() -> None:
    space = build(bits=True, scale="none", max_hops=7)
    assert {(p.kind, p.choices) for p in space.parameters} == {("choice", ("off", "on"))}
    everything = space.decode(np.ones(len(space.parameters)))
    assert route(everything) == [("a", layer) for layer in range(5)] + [("b", 0), ("a", 4)]


# ---- the other encodings --------------------------------------------------------------------------------------------


@given(data=st.data(), ends=st.booleans())
def test_integers_name_layers_and_skip(data: st.DataObject, ends: bool) -> None:
    space = build(encoding="integers", max_hops=9, scale="none", keep_ends=ends)
    layers = [(source, layer) for source, depth in DEPTHS.items() for layer in range(depth)]
    found = data.draw(genomes(space))
    inner = [layers[int(number) - 1] for number in found if number > 0]
    whole = [("a", 0), *inner, ("a", 4)] if ends else inner or [("a", 0)]
    assert route(space.decode(found)) == whole


@given(data=st.data(), ends=st.booleans())
def test_blocks_are_runs_of_one_model(data: st.DataObject, ends: bool) -> None:
    space = build(encoding="blocks", segments=3, max_hops=9, scale="none", keep_ends=ends)
    found = data.draw(genomes(space))
    inner: Route = []
    for choice, start, length in found.reshape(3, 3).astype(int).tolist():
        source = list(DEPTHS)[choice]
        first = min(start, DEPTHS[source] - 1)
        inner += [(source, layer) for layer in range(first, first + length) if layer < DEPTHS[source]]
    first_start = (source := list(DEPTHS)[int(found[0])], min(int(found[1]), DEPTHS[source] - 1))
    whole = [("a", 0), *inner[:7], ("a", 4)] if ends else inner[:9] or [first_start]
    assert route(space.decode(found)) == whole


def test_segments_that_are_not_needed_split_the_longest_runs() -> None:
    space = build({"a": 12, "b": 12}, encoding="blocks", scale="none")
    starts = [p.default for p in space.parameters if p.name.endswith(".start")]
    assert starts == [1, 3, 6, 8]  # layers 1 to 10 lie between the ends


def test_blocks_of_one_model_choose_none() -> None:
    space = build(encoding="blocks", others=(), segments=2, scale="none")
    assert names(space) == ["segments.1.start", "segments.1.length", "segments.2.start", "segments.2.length"]


@given(data=st.data(), most=st.integers(3, 5))
def test_pruning_takes_layers_of_a_away(data: st.DataObject, most: int) -> None:
    space = build(encoding="pruning", max_hops=most)
    assert space.layer_buffers == 5
    path = route(space.decode(data.draw(genomes(space))))
    assert len(path) <= most
    assert path == sorted(set(path))
    assert {source for source, _ in path} == {"a"}


def test_pruning_to_fewer_layers_keeps_a_as_a_baseline_that_is_no_point() -> None:
    (mark,) = build(encoding="pruning", max_hops=4).baselines()
    assert (mark.label, mark.genome) == ("a", None)
    assert len(mark.recipe.hops) == 5


# ---- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["stream", "update"])
def test_the_scale_of_a_slot_is_that_of_its_hop(scaling: str) -> None:
    space = build(encoding="integers", max_hops=8, scaling=scaling)
    assert scales(space.decode(genome(space, slots__2__scale=0.75))) == [1, 1, 0.75, 1, 1]
    assert scales(space.decode(genome(space, first__scale=0.75, last__scale=1.25))) == [0.75, 1, 1, 1, 1.25]
    assert space.decode(genome(space, first__scale=0.75)).scaling == scaling


@pytest.mark.parametrize("encoding", ["indicators", "integers", "blocks"])
def test_the_scale_of_a_slot_that_is_not_used_changes_nothing(encoding: str) -> None:
    space = build(encoding=encoding, max_hops=10, others=("b",))
    unused = {"indicators": "1__b", "integers": "slots__4__scale", "blocks": "segments__4__scale"}[encoding]
    moved = genome(space, **{unused: 0.6}) if encoding != "indicators" else defaults(space)
    if encoding == "indicators":
        moved[[i for i, name in enumerate(names(space)) if ".b." in name and name.endswith(".scale")]] = 0.6
    assert not np.array_equal(moved, defaults(space))
    assert space.decode(moved).hash == space.decode(defaults(space)).hash


def test_a_segments_scale_is_for_the_stream_that_enters_or_for_all_that_it_adds() -> None:
    for scaling, wanted in (("stream", [1, 0.75, 1, 1, 1]), ("update", [1, 0.75, 0.75, 0.75, 1])):
        space = build(encoding="blocks", segments=1, max_hops=10, scaling=scaling)
        assert scales(space.decode(genome(space, segments__1__scale=0.75))) == wanted


@given(data=st.data())
def test_transitions_follow_the_matrix(data: st.DataObject) -> None:
    space = build(encoding="integers", max_hops=9, others=("b",), scale="transition")
    found = data.draw(genomes(space))
    recipe = space.decode(found)
    by_name = dict(zip(names(space), found.tolist(), strict=True))
    path = [f"{source}.{layer}" for source, layer in route(recipe)]
    assert scales(recipe) == [1, *(by_name[f"{one}>{other}.scale"] for one, other in pairwise(path))]


def test_none_leaves_every_hop_as_it_is() -> None:
    assert not any(name.endswith(".scale") for name in names(build(scale="none")))


# ---- baselines ------------------------------------------------------------------------------------------------------


def marks_of(**settings: Any) -> dict[str, Baseline]:
    return {mark.label: mark for mark in build({"a": 8, "b": 8, "c": 6}, **settings).baselines()}


def test_baselines_are_sources_and_paths_by_hand() -> None:
    marks = marks_of(keep_ends=False)
    a, b, c = ([(source, layer) for layer in range(depth)] for source, depth in (("a", 8), ("b", 8), ("c", 6)))
    assert {label: route(mark.recipe) for label, mark in marks.items()} == {
        "a": a,
        "b": b,
        "c": c,
        "a then b": a[:4] + b[4:],
        "a then c": a[:4] + c[3:],
        "b inside a": a[:2] + b[2:6] + a[6:],
        "c inside a": a[:2] + c[1:5] + a[6:],
        "a up-scaled": a[:6] + a[2:],
    }
    assert [mark.kind for mark in marks.values()] == ["source"] * 3 + ["default"] * 5
    assert not any(mark.recipe.is_scaled for mark in marks.values())


def test_a_source_alone_brings_what_stands_outside_its_layers() -> None:
    recipe = marks_of()["b"].recipe
    assert [recipe.blends[i].sources for i in (recipe.embedding, recipe.norm, recipe.head)] == [("b",)] * 3
    assert recipe.tokenizer == "a"


def test_paths_by_hand_keep_the_ends_of_a() -> None:
    path = route(marks_of()["a then b"].recipe)
    assert path == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5), ("b", 6), ("a", 7)]


@pytest.mark.parametrize("encoding", ["indicators", "integers", "blocks"])
def test_paths_by_hand_are_points_of_every_encoding(encoding: str) -> None:
    without = [label for label, mark in marks_of(encoding=encoding).items() if mark.genome is None]
    assert without == ["b", "c"]


def test_a_path_that_an_encoding_cannot_say_has_no_genome() -> None:
    assert marks_of(repeats=1)["a up-scaled"].genome is None
    assert marks_of(encoding="blocks", segments=1)["a up-scaled"].genome is None


def test_up_scaling_needs_room() -> None:
    assert "a up-scaled" in marks_of(max_hops=12)
    assert "a up-scaled" not in marks_of(max_hops=11)


def test_models_too_small_for_a_path_by_hand_have_it_not_twice() -> None:
    assert [mark.label for mark in build({"a": 2, "b": 2}).baselines()] == ["a", "b"]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "place", "words"),
    [
        ({"first": "d"}, "space.first", "there is no source 'd'"),
        ({"first": "b"}, "space.first", "Write `tokenizer: b`."),
        ({"others": ("bb",)}, "space.others", "Did you mean 'b'?"),
        ({"others": ("b", "b")}, "space.others", "twice"),
        ({"others": ("a",)}, "space.others", "is model A"),
        ({"encoding": "pruning", "others": ("b",)}, "space.others", "only model A"),
        ({"encoding": "pruning", "max_hops": 6}, "space.max_hops", "5 layers of a"),
        ({"max_hops": 4}, "space.max_hops", "a alone is 5 hops"),
        ({"max_hops": 6}, "space.max_hops", "c alone is 7 hops"),
        ({"encoding": "pruning", "max_hops": 2}, "space.max_hops", "the ends of a alone are 2 hops"),
        ({"depths": {"a": 1, "b": 2}}, "space.keep_ends", "has only one"),
        ({"depths": {"a": 2, "b": 2}, "max_hops": 2}, "space.max_hops", "the ends of a"),
        ({"depths": {"a": 2, "b": 2}, "encoding": "pruning", "keep_ends": True}, "space.max_hops", "the ends of a"),
        ({"encoding": "integers", "repeats": 2}, "space.repeats", "belongs to indicators"),
        ({"segments": 2}, "space.segments", "belongs to blocks"),
        ({"encoding": "blocks", "bits": True}, "space.bits", "belongs to indicators and pruning"),
        ({"encoding": "blocks", "start": "paper"}, "space.start", "belongs to indicators and pruning"),
        ({"bits": True, "start": "paper"}, "space.start", "bits are on or off"),
        ({"scale_bounds": (1.1, 1.5)}, "space.scale_bounds", "1, which changes nothing"),
        ({"scale_bounds": (1.5, 0.5)}, "space.scale_bounds", "1, which changes nothing"),
        ({"scale_bounds": (1.0, 1.0)}, "space.scale_bounds", "1, which changes nothing"),
        ({"scale_bounds": (0.0, 1.5)}, "space.scale_bounds", "`scaling: update`"),
        ({"depths": {"a": 60, "b": 60}, "scale": "transition"}, "space.scale", "Use `scale: hop`."),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        build(**settings)
    assert caught.value.place == place
    assert words in str(caught.value)


@pytest.mark.parametrize("count", [0, 10_001, 10**9])
@pytest.mark.parametrize("key", ["repeats", "segments", "max_hops"])
def test_counts_are_from_one_to_ten_thousand(key: str, count: int) -> None:
    with pytest.raises(ValidationError) as caught:
        DataFlowSpaceSettings(**{key: count})
    assert explain(caught.value, "space", DataFlowSpaceSettings, {key: count}).place == f"space: {key}"


def test_scales_of_updates_may_take_a_hop_out() -> None:
    space = build(encoding="integers", max_hops=8, scaling="update", scale_bounds=(-0.5, 1.5))
    assert scales(space.decode(genome(space, slots__1__scale=-0.5)))[1] == -0.5


# ---- real models ----------------------------------------------------------------------------------------------------


def test_paths_through_the_miniatures_can_be_made() -> None:
    sources = {name: open_source(name, str(MINIATURES / name), place=name) for name in ("maths", "japanese")}
    context = SpaceContext(
        sources={name: source.reference for name, source in sources.items()},
        base=None,
        tokenizer="maths",
        layers=sources["maths"].layers,
        depths={name: source.layers for name, source in sources.items()},
        tied=sources["maths"].tied,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=0,
        dtype=None,
    )
    space = DataFlowSpaceSettings().build(context)
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers = [rng.uniform(p.low, p.high) for p in space.parameters]
        check_recipe(space.decode(np.array(numbers)), sources)
    for mark in space.baselines():
        check_recipe(mark.recipe, sources)
