"""Search space over routed experts: what a genome says, the papers' forms, baselines, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.genome import Genome, check_genome
from evomerge.method import find_method
from evomerge.recipes.base import read_recipe
from evomerge.recipes.routed import Balance, LayerGroup, RoutedRecipe, Router
from evomerge.recipes.stack import StackRecipe
from search_spaces.base import SpaceContext
from search_spaces.routed_space import RoutedSpace, RoutedSpaceSettings

LAYERS = 5
EXPERTS = ("maths", "japanese", "extraction", "kanji")
SOURCES = {"base": "models/base"} | {name: f"models/base+models/{name}" for name in EXPERTS}
KINDS = dict.fromkeys(EXPERTS, ("LORA",)) | {"base": ()}


def context(**changes: Any) -> SpaceContext:
    usual = SpaceContext(
        sources=SOURCES,
        base="base",
        tokenizer="base",
        layers=LAYERS,
        tied=False,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=3,
        dtype=None,
        fit="f" * 16,
        adapters=lambda name: KINDS.get(name, ()),
    )
    return replace(usual, **changes)


VECTORS = {"adapters": lambda name: () if name == "base" else ("IA3",)}


def space(changes: dict[str, Any] | None = None, **settings: Any) -> RoutedSpace:
    return RoutedSpaceSettings(**settings).build(context(**(changes or {})))


def default(one: RoutedSpace, **numbers: float) -> Genome:
    """The defaults, with some numbers by the ends of their names."""
    genome = np.array([parameter.default for parameter in one.parameters])
    for end, value in numbers.items():
        for place, parameter in enumerate(one.parameters):
            if parameter.name.endswith(end.replace("__", ".")):
                genome[place] = value
    return genome


def names(one: RoutedSpace) -> list[str]:
    return [parameter.name for parameter in one.parameters]


def test_a_group_has_a_bit_for_each_expert_and_four_numbers_more() -> None:
    one = space()
    assert len(one.parameters) == 4 * (len(EXPERTS) + 4)
    assert names(one)[:8] == [
        "layers.0.present.maths", "layers.0.present.japanese", "layers.0.present.extraction", "layers.0.present.kanji",
        "layers.0.top_k", "layers.0.log10_temperature", "layers.0.log2_gain.attention", "layers.0.log2_gain.mlp",
    ]  # fmt: skip
    assert [p.name for p in one.parameters if p.name.endswith("top_k")][-1] == "layers.3-4.top_k"
    assert len(space(granularity="model").parameters) == len(EXPERTS) + 4
    assert len(space(groups="layer", where="mlp").parameters) == LAYERS * (len(EXPERTS) + 3)
    assert len(space(bounds={"bias": (-1, 1)}, groups=1).parameters) == 2 * len(EXPERTS) + 4


def test_the_default_is_every_expert_everywhere_by_gates_as_they_are() -> None:
    recipe = space().decode(default(space()))
    assert recipe.groups == (LayerGroup(layers=LAYERS, experts=EXPERTS),)
    assert (recipe.base, recipe.experts, recipe.router) == ("base", EXPERTS, Router(kind="fitted"))
    assert (recipe.fit, recipe.calibration, recipe.seed) == ("f" * 16, None, 3)


def test_a_genome_says_what_the_numbers_are_named() -> None:
    one = space(groups=2, bounds={"bias": (-2, 2)})
    genome = default(
        one, **{"layers.0-1.present.kanji": 0, "1.top_k": 1, "1.log10_temperature": -1, "1.log2_gain.mlp": 1,
                "4.present.maths": 0, "4.bias.kanji": -0.5, "1.log2_gain.attention": -1},
    )  # fmt: skip
    first, second = one.decode(genome).groups
    biases = dict.fromkeys(EXPERTS[:3], 0.0)
    assert first == LayerGroup(
        layers=2, experts=EXPERTS[:3], top_k=2, temperature=0.1, attention_gain=0.5, mlp_gain=2.0, bias=biases
    )
    assert second.experts == EXPERTS[1:]
    assert second.bias == {"japanese": 0.0, "extraction": 0.0, "kanji": -0.5}
    assert (second.layers, second.top_k) == (3, None)


def test_a_layer_may_have_no_expert_and_keeps_no_more_than_live_there() -> None:
    one = space(groups=1)
    genome = default(one, top_k=2, present__maths=0)  # the best three, and three are there
    (group,) = one.decode(genome).groups
    assert (group.experts, group.top_k) == (EXPERTS[1:], None)
    (group,) = one.decode(default(one, **{f"present.{name}": 0 for name in EXPERTS}, top_k=0)).groups
    assert (group.experts, group.top_k) == ((), None)


def test_an_allocation_takes_those_of_the_highest_priority() -> None:
    one = space(presence="allocation", groups=2)
    assert len(one.parameters) == len(EXPERTS) + 2 * 5
    genome = default(one, **{"layers.0-1.experts": 2, "layers.2-4.experts": 3})
    first, second = one.decode(genome).groups
    assert (first.experts, second.experts) == (EXPERTS[:2], EXPERTS[:3])
    genome = default(one, **{"layers.0-1.experts": 2, "priority.kanji": 1.0})
    assert one.decode(genome).groups[0].experts == ("maths", "kanji")  # in the order of the file


@pytest.mark.parametrize(
    "settings",
    [{}, {"presence": "allocation"}, {"groups": "layer", "where": "mlp"}, {"bounds": {"bias": (-2, 2)}, "groups": 2}],
)
@given(data=st.data())
def test_every_genome_is_a_recipe_and_comes_back_from_it(settings: dict[str, Any], data: st.DataObject) -> None:
    one = space(**settings)
    genome = np.array(
        [
            data.draw(st.floats(p.low, p.high) if p.kind == "real" else st.integers(int(p.low), int(p.high)))
            for p in one.parameters
        ],
        dtype=np.float64,
    )
    recipe = one.decode(genome)
    assert isinstance(read_recipe(recipe.canonical(), SOURCES), RoutedRecipe)
    assert read_recipe(recipe.canonical(), SOURCES) == recipe
    assert sum(group.layers for group in recipe.groups) == LAYERS
    back = one.genome_of(recipe)
    assert back is not None
    check_genome(back, one.parameters, "genome_of")
    if settings.get("presence") == "allocation":
        return  # which live where is nested; which priorities say so is not written down
    again = one.decode(back)
    for group, same in zip(recipe.groups, again.groups, strict=True):
        assert (group.layers, group.experts, group.top_k) == (same.layers, same.experts, same.top_k)
        for name in ("temperature", "attention_gain", "mlp_gain"):
            assert getattr(group, name) == pytest.approx(getattr(same, name), rel=1e-9)
        assert group.bias == pytest.approx(same.bias)


def test_what_another_search_found_is_near_in_coarser_groups() -> None:
    fine, coarse = space(groups="layer"), space(granularity="model")
    genome = default(fine, **{f"layers.{layer}.present.kanji": 0 for layer in (0, 1, 2)}, log10_temperature=0.5)
    back = coarse.genome_of(fine.decode(genome))
    assert back is not None
    (group,) = coarse.decode(back).groups
    assert group.experts == EXPERTS[:3]
    assert group.temperature == pytest.approx(10**0.5)
    other = context(sources={"base": "b", "x": "b+x", "y": "b+y"}, adapters=lambda name: ("LORA",) * (name != "base"))
    assert RoutedSpaceSettings().build(other).genome_of(fine.decode(genome)) is None
    assert coarse.genome_of(next(iter(coarse.baselines())).recipe) is None


# ---- the papers' forms ----


def form(like: str, changes: dict[str, Any] | None = None, **settings: Any) -> RoutedRecipe:
    one = space(changes, like=like, **settings)
    return one.decode(default(one))


def test_mov_mixes_vectors_for_every_head_by_a_dense_softmax() -> None:
    recipe = form("mov", VECTORS)
    assert recipe.router == Router(kind="fitted", gate="softmax", per="module", heads=True)
    assert (recipe.where, recipe.groups[0].top_k, recipe.groups[0].temperature) == ("all", None, 1.0)
    assert all(".present." in name for name in names(space(VECTORS, like="mov")))


def test_molora_mixes_adapters_by_a_dense_softmax() -> None:
    recipe = form("molora")
    assert recipe.router == Router(kind="fitted", gate="softmax", per="module")
    assert (recipe.where, recipe.groups[0].top_k, recipe.groups[0].mlp_gain) == ("all", None, 1.0)


def test_loramoe_routes_the_mlp_alone_and_balances_groups_where_asked() -> None:
    recipe = form("loramoe")
    assert (recipe.where, recipe.rest, recipe.router.balance) == ("mlp", None, Balance())
    balanced = form("loramoe", balance={"localized": 0.1})
    assert balanced.router.balance == Balance(localized=0.1)


def test_mola_keeps_two_and_searches_how_many_live_in_each_quarter() -> None:
    one = space(like="mola")
    assert [name for name in names(one) if name.endswith(".experts")] == [
        "layers.0.experts", "layers.1.experts", "layers.2.experts", "layers.3-4.experts",
    ]  # fmt: skip
    assert len(one.parameters) == len(EXPERTS) + 4
    recipe = one.decode(default(one))
    assert recipe.groups == (LayerGroup(layers=LAYERS, experts=EXPERTS, top_k=2),)
    assert recipe.router == Router(kind="fitted", renormalised=True, balance=Balance(switch=0.001))


def test_a_form_may_have_the_routers_that_were_trained_with_its_experts() -> None:
    recipe = form("mola", router="stored")
    assert recipe.router == Router(kind="stored")
    assert recipe.groups[0].top_k == 2


def test_a_form_leaves_open_what_is_given_bounds() -> None:
    one = space(like="mola", bounds={"gain": (0.5, 4)}, groups=2)
    assert [name for name in names(one) if "gain" in name][:2] == [
        "layers.0-1.log2_gain.attention", "layers.0-1.log2_gain.mlp",
    ]  # fmt: skip
    settings = RoutedSpaceSettings(like="mola", groups=2)
    assert RoutedSpaceSettings.model_validate(settings.model_dump(mode="json")) == settings  # as it is recorded


# ---- baselines ----


def test_baselines_are_what_people_would_try_first() -> None:
    marks = {mark.label: mark for mark in space().baselines()}
    assert list(marks) == [
        "base", *EXPERTS, "uniform average", "sum", "fitted", "Arrow", "fitted soft", "fitted top 1",
        "MoLA 8-6-4-2", "MoLA 2-4-6-8", "MoLA 8-2-2-8", "MoLA 5-5-5-5",
    ]  # fmt: skip
    assert [mark.kind for mark in marks.values()] == ["source"] * 5 + ["average", "default", "fit"] + ["default"] * 7
    merged = marks["fitted"].recipe
    assert isinstance(merged, StackRecipe)
    assert (merged.fit, merged.blends[0].method, merged.blends[0].sources) == ("f" * 16, "fitted", EXPERTS)
    alone = marks["kanji"].recipe
    assert isinstance(alone, StackRecipe)
    assert alone.mixed_sources() == {"kanji"}
    soft, hard = marks["fitted soft"], marks["fitted top 1"]
    assert soft.genome is not None
    assert hard.genome is not None
    assert space().decode(soft.genome) == soft.recipe
    assert space().decode(hard.genome) == hard.recipe
    arrow = marks["Arrow"].recipe
    assert isinstance(arrow, RoutedRecipe)
    assert (arrow.router, arrow.groups[0].top_k) == (Router(kind="arrow"), 3)
    assert marks["Arrow"].genome is None


def test_shapes_of_mola_are_scaled_to_the_experts_there_are() -> None:
    def living(label: str, **changes: Any) -> list[tuple[int, int]]:
        recipe = next(mark.recipe for mark in space(changes).baselines() if mark.label == label)
        assert isinstance(recipe, RoutedRecipe)
        assert all(group.top_k in (None, 2) for group in recipe.groups)
        return [(group.layers, len(group.experts)) for group in recipe.groups]

    assert living("MoLA 8-6-4-2") == [(1, 4), (1, 3), (1, 2), (2, 1)]
    assert living("MoLA 2-4-6-8", layers=8) == [(2, 1), (2, 2), (2, 3), (2, 4)]
    assert living("MoLA 8-2-2-8", layers=8) == [(2, 4), (4, 1), (2, 4)]
    assert living("MoLA 5-5-5-5") == [(5, 2)]


def test_the_sum_is_of_whole_changes() -> None:
    (total,) = (mark.recipe for mark in space().baselines() if mark.label == "sum")
    assert isinstance(total, StackRecipe)
    assert total.blends[0].base == "base"
    assert total.blends[0].parameters["weight"] == dict.fromkeys(EXPERTS, 1.0)


def test_baselines_that_need_what_is_not_there_are_left_out_and_it_is_said() -> None:
    one = space({"fit": None, "calibration": "c" * 16}, router="arrow")
    labels = [mark.label for mark in one.baselines()]
    assert "arrow soft" in labels
    assert "fitted" not in labels
    assert len(one.left_out) == 1
    assert "`fit:`" in one.left_out[0]
    vectors = space(VECTORS)
    assert "Arrow" not in [mark.label for mark in vectors.baselines()]
    assert "Arrow" in vectors.left_out[0]
    assert "MoLA" in space({"layers": 3}, groups=3).left_out[0]
    assert not [mark for mark in space({"layers": 3}, groups=3).baselines() if "MoLA" in mark.label]
    assert space().left_out == ()


def test_texts_make_prototypes_and_right_answers_the_rest() -> None:
    one = space({"calibration": "c" * 16}, router="prototypes")
    by_label = {mark.label: mark.recipe for mark in one.baselines()}
    recipe = one.decode(default(one))
    assert (recipe.calibration, recipe.fit) == ("c" * 16, None)
    assert (by_label["fitted soft"].calibration, by_label["fitted soft"].fit) == (None, "f" * 16)
    assert by_label["Arrow"].fit == "f" * 16


def test_attention_that_is_not_routed_may_be_the_mean() -> None:
    one = space(where="mlp", rest="mean")
    rest = one.decode(default(one)).rest
    assert rest is not None
    assert (rest.base, rest.parameters["weight"]) == ("base", dict.fromkeys(EXPERTS, 0.25))


def test_what_is_only_measured_on_the_items_of_a_fit_is_not_fitted() -> None:
    recipes = {mark.label: mark.recipe for mark in space().baselines()}
    assert recipes["Arrow"].fit == recipes["fitted soft"].fit
    is_fitted = {label for label, recipe in recipes.items() if recipe.is_fitted}
    assert is_fitted.isdisjoint({"base", "uniform average", "sum", "Arrow"})
    assert {"fitted", "fitted soft", "fitted top 1", "MoLA 8-6-4-2"} <= is_fitted


def test_what_has_other_groups_than_all_experts_everywhere_can_be_fitted_anew() -> None:
    one = space(refits=2, groups=2)
    anew = one.refitted(one.decode(default(one, present__maths=0)))
    assert one.refits == 2
    assert anew is not None
    assert anew.router.refitted
    assert anew.groups == one.decode(default(one, present__maths=0)).groups
    assert one.refitted(anew) is None
    assert one.refitted(one.decode(default(one))) is None  # as they are fitted for all
    plain, *_ = one.baselines()
    assert one.refitted(plain.recipe) is None


# ---- refusals ----

BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "no base": ({}, {"base": None}, "base", "there is none"),
    "one adapter": ({"experts": ["maths"]}, {}, "space.experts", "one adapter alone, maths"),
    "no adapter": ({"experts": []}, {}, "space.experts", "has no adapter"),
    "a whole model": (
        {}, {"adapters": lambda name: ("LORA",) * (name != "maths")}, "sources.maths", "is a whole model",
    ),
    "unknown": ({"experts": ["maths", "math"]}, {}, "space.experts", "no source 'math'"),
    "the base": ({"experts": ["maths", "base"]}, {}, "space.experts", "which is the base"),
    "twice": ({"experts": ["maths", "maths"]}, {}, "space.experts", "maths twice"),
    "empty groups": ({"groups": 6}, {}, "space.groups", "groups would be empty: the base has 5 layers"),
    "no fit": ({}, {"fit": None}, "fit", "none to fit to"),
    "no texts": ({"router": "prototypes"}, {}, "space.router", "there are none"),
    "nothing to measure on": ({"router": "arrow"}, {"fit": None}, "space.router", "measured on texts"),
    "arrow of blocks": ({"router": "arrow", "per": "block"}, {}, "space.per", "single modules"),
    "balance of arrow": ({"router": "arrow", "balance": {"z": 1}}, {}, "space.balance", "have none"),
    "refits of arrow": ({"router": "arrow", "refits": 1}, {}, "space.refits", "are not fitted"),
    "heads of LoRA": ({"heads": True}, {}, "space.heads", "applies only to"),
    "mov of LoRA": ({"like": "mov"}, {}, "space.like", "applies only to"),
    "arrow of vectors": ({"router": "arrow"}, VECTORS, "space.router", "vectors have none"),
    "too many kept": ({"fixed": {"top_k": 5}}, {}, "space.fixed.top_k", "is 5, and there are 4 experts"),
    "half an expert": ({"fixed": {"top_k": 1.5}}, {}, "space.fixed.top_k", "is 1.5"),
    "fixed and searched": (
        {"fixed": {"gain": 1}, "bounds": {"gain": (0.5, 1)}}, {}, "space.fixed.gain", "bounds as well",
    ),
    "bounds turned": ({"bounds": {"gain": (2, 1)}}, {}, "space.bounds.gain", "not below"),
    "cold": ({"bounds": {"temperature": (0, 1)}}, {}, "space.bounds.temperature", "range of a factor"),
    "no gain": ({"fixed": {"gain": 0}}, {}, "space.fixed.gain", "above 0"),
    "rest of nothing": ({"rest": "mean"}, {}, "space.rest", "all are"),
    "too many numbers": ({"groups": "layer"}, {"layers": 1300}, "space.groups", "is the limit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_routed_is_refused_by_its_place(case: str) -> None:
    settings, changes, place, words = BAD[case]
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        space(changes, **settings)
    assert caught.value.place == place
    assert caught.value.hint or case in {"bounds turned", "no gain", "unknown"}


def test_a_form_is_not_half_of_another() -> None:
    with pytest.raises(ValueError, match="gate: is softmax in `like: mola`"):
        RoutedSpaceSettings(like="mola", gate="sigmoid")
    with pytest.raises(ValueError, match=r"fixed.top_k: is 2 in `like: mola`"):
        RoutedSpaceSettings(like="mola", fixed={"top_k": 1})
    assert RoutedSpaceSettings(like="mola", presence="allocation").like == "mola"
