"""Parameter space: the layout of genomes, decoding as a total function, and the baselines."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.genome import check_genome
from evomerge.method import AUTO_METHOD, check_blend, find_method, own_methods
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Role, StackRecipe, roles
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings

METHODS = own_methods()
LAYERS = 5


def build(
    *,
    method: str | list[str] = "task_arithmetic",
    base: str | None = "base",
    tied: bool = False,
    sources: tuple[str, ...] = ("base", "maths", "japanese"),
    **settings: object,
) -> ParameterSpace:
    context = SpaceContext(
        sources={name: f"models/{name}" for name in sources},
        base=base,
        tokenizer=sources[0],
        layers=LAYERS,
        tied=tied,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=3,
        dtype=None,
        calibration="0123456789abcdef",
        fit="fedcba9876543210" if method == "fitted" else None,
    )
    return ParameterSpaceSettings(method=method, **settings).build(context)  # type: ignore[arg-type]


def names(space: ParameterSpace) -> list[str]:
    return [p.name for p in space.parameters]


def test_what_is_fitted_is_a_baseline_of_every_search_that_has_items_for_it() -> None:
    context = SpaceContext(
        sources={"base": "", "maths": "", "japanese": ""},
        base="base",
        tokenizer="base",
        layers=LAYERS,
        tied=False,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=3,
        dtype=None,
        fit="fedcba9876543210",
    )
    space = ParameterSpaceSettings(method="ties").build(context)
    (mark,) = (mark for mark in space.baselines() if mark.kind == "fit")
    assert isinstance(mark.recipe, StackRecipe)
    assert (mark.label, mark.genome, mark.recipe.fit) == ("fitted", None, "fedcba9876543210")
    assert {blend.method for blend in mark.recipe.blends} == {"fitted"}
    assert {m.recipe.fit for m in space.baselines() if m.kind != "fit"} == {None}
    around = list(ParameterSpaceSettings(method="fitted").build(context).baselines())
    assert [m.label for m in around] == ["base", "maths", "japanese", "uniform average", "fitted defaults"]
    assert around[-1].recipe.hash == mark.recipe.hash  # once, and with its genome
    assert around[-1].genome is not None
    without = ParameterSpaceSettings(method="linear").build(replace(context, base=None))
    assert [m.kind for m in without.baselines()].count("fit") == 0


def test_one_group_for_the_model() -> None:
    assert names(build()) == ["model.weight.maths", "model.weight.japanese"]


def test_a_group_for_each_layer_and_what_stands_outside() -> None:
    groups = list(dict.fromkeys(p.group for p in build(granularity="layer").parameters))
    assert groups == ["embedding", *(f"layers.{i}" for i in range(LAYERS)), "norm", "head"]


def test_a_tied_head_has_no_genes_of_its_own() -> None:
    space = build(granularity="layer", tied=True)
    assert "head" not in {p.group for p in space.parameters}
    recipe = space.decode(np.arange(len(space.parameters)) / 100)
    assert recipe.blend_for(Role("head")) == recipe.blend_for(Role("embedding"))


def test_attention_and_mlp_apart() -> None:
    groups = {p.group for p in build(granularity="block").parameters}
    assert {"layers.0.attention", "layers.0.mlp", "layers.4.mlp"} <= groups
    assert len(groups) == 2 * LAYERS + 3


def test_groups_of_n_layers_with_a_shorter_last_one() -> None:
    groups = list(dict.fromkeys(p.group for p in build(granularity=2).parameters))
    assert groups == ["embedding", "layers.0-1", "layers.2-3", "layers.4-4", "norm", "head"]


def test_each_gene_moves_its_own_part_and_no_other() -> None:
    """Against a plain reading of the names: group, parameter, source."""
    space = build(granularity="block", method="ties")
    middle = np.array([(p.low + p.high) / 2 for p in space.parameters])
    before = space.decode(middle)
    for i, parameter in enumerate(space.parameters):
        moved = middle.copy()
        moved[i] = parameter.high
        after = space.decode(moved)
        for role in roles(LAYERS):
            part = role.kind if role.layer is None else f"layers.{role.layer}.{role.kind}".replace("norm", "attention")
            old, new = before.blend_for(role), after.blend_for(role)
            if part != parameter.group:
                assert old == new
                continue
            name, source = parameter.name.removeprefix(f"{parameter.group}.").split(".")
            assert new.value(name, source) == parameter.high
            assert new.model_copy(update={"parameters": {**new.parameters, name: old.parameters[name]}}) == old


@pytest.mark.parametrize("method", sorted(METHODS))
@given(data=st.data())
def test_decode_is_total_and_pure(method: str, data: st.DataObject) -> None:
    spec = METHODS[method]
    base, mixed = "base" if spec.needs_base else None, ("a", "b")[: spec.max_sources]
    space = build(method=method, base=base, granularity=2, sources=(base, *mixed) if base else mixed)
    drawn = [st.floats(p.low, p.high) if p.kind == "real" else st.integers(p.low, p.high) for p in space.parameters]
    genome = np.array([data.draw(value) for value in drawn], dtype=float)
    recipe = space.decode(genome)
    assert recipe == space.decode(genome.copy())
    assert len(recipe.hops) == LAYERS
    for blend in recipe.blends:
        check_blend(blend, METHODS[method], "test")
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe


def test_the_papers_optimum_is_inside_the_default_bounds() -> None:
    """Weights that sum to about 2 (arXiv 2403.13187): unreachable where weights are normalised."""
    for method in ("task_arithmetic", "ties", "dare_ties"):
        space = build(method=method)
        weights = [p for p in space.parameters if ".weight." in p.name]
        assert sum(p.high for p in weights) >= 2
        recipe = space.decode(np.array([p.high for p in space.parameters]))
        assert recipe.blends[0].parameters["normalize"] is False


def test_fixed_parameters_are_not_searched() -> None:
    space = build(method="dare_ties", fixed={"density": 0.5})
    assert names(space) == ["model.weight.maths", "model.weight.japanese"]
    assert space.decode(np.array([0.1, 0.2])).blends[0].parameters["density"] == {"maths": 0.5, "japanese": 0.5}


def test_baselines_are_sources_average_and_defaults() -> None:
    marks = list(build().baselines())
    labels = [(m.label, m.kind) for m in marks]
    assert labels == [
        ("base", "source"),
        ("maths", "source"),
        ("japanese", "source"),
        ("uniform average", "average"),
        ("task_arithmetic defaults", "default"),
    ]
    assert marks[0].genome is not None
    assert marks[0].genome.tolist() == [0.0, 0.0]
    assert marks[1].genome is not None
    assert marks[1].genome.tolist() == [1.0, 0.0]
    assert marks[3].genome is not None
    assert marks[3].genome.tolist() == [0.5, 0.5]


def test_a_baseline_outside_the_bounds_has_no_genome() -> None:
    marks = {m.label: m for m in build(bounds={"weight": (0.2, 0.9)}).baselines()}
    assert marks["maths"].genome is None
    assert marks["uniform average"].genome is not None


@pytest.mark.parametrize(
    ("settings", "place", "words"),
    [
        ({"method": "tie"}, "space.method", "Did you mean 'ties'?"),
        ({"bounds": {"weight": (1.0, 0.0)}}, "space.bounds.weight", "not below"),
        ({"bounds": {"weight": (1.0, 1.0)}}, "space.bounds.weight", "not below"),
        ({"bounds": {"density": (0.0, 1.0)}}, "space.bounds.density", "it has: lambda, weight"),
        ({"fixed": {"weight": 1.0}}, "space.fixed", "nothing to search"),
        ({"fixed": {"weight": 1.0}, "bounds": {"weight": (0.0, 1.0)}}, "space.fixed.weight", "bounds as well"),
        ({"switches": {"normalise": True}}, "space.switches.normalise", "normalize"),
        ({"base": None}, "base", "needs a base"),
        ({"granularity": 9}, "space.granularity", "5 layers"),
        ({"method": "slerp", "base": None}, "space", "2 sources"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], place: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        build(**settings)  # type: ignore[arg-type]
    assert caught.value.place == place
    assert words in str(caught.value)


# ---- several methods -------------------------------------------------------------------------------------------------

SEVERAL = ["task_arithmetic", "ties", "linear"]


def test_a_method_that_is_chosen_has_its_own_numbers() -> None:
    space = build(method=SEVERAL)
    assert names(space) == [
        "model.method",
        *(f"model.task_arithmetic.weight.{name}" for name in ("maths", "japanese")),
        *(f"model.ties.{what}.{name}" for what in ("weight", "density") for name in ("maths", "japanese")),
        *(f"model.linear.weight.{name}" for name in ("maths", "japanese")),
    ]
    assert space.parameters[0].choices == tuple(SEVERAL)
    genome = np.array([1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    (blend,) = space.decode(genome).blends
    assert blend == build(method="ties").decode(genome[3:7]).blends[0]
    others = genome.copy()
    others[[1, 2, 7, 8]] = 0.9
    assert space.decode(others) == space.decode(genome)


def test_each_layer_group_chooses_for_itself() -> None:
    space = build(method=SEVERAL, granularity="layer")
    chosen = [number for number, p in enumerate(space.parameters) if p.name.endswith(".method")]
    assert len(chosen) == LAYERS + 3  # and the embedding, the last norm and the head
    genome = np.array([p.default for p in space.parameters])
    genome[chosen] = np.arange(len(chosen)) % 3
    recipe = space.decode(genome)
    by_group = [recipe.blend_for(Role("embedding")), *(recipe.blend_for(Role("mlp", n)) for n in range(LAYERS))]
    assert {blend.method for blend in by_group} == set(SEVERAL)


def test_baselines_of_several_methods_are_points_of_the_first_that_has_them() -> None:
    space = build(method=["sce", "ties", "task_arithmetic"])
    baselines = {baseline.label: baseline for baseline in space.baselines()}
    assert list(baselines) == [
        "base", "maths", "japanese", "uniform average", "sce defaults", "ties defaults", "task_arithmetic defaults",
    ]  # fmt: skip
    for name in ("sce", "ties", "task_arithmetic"):
        genome = baselines[f"{name} defaults"].genome
        assert genome is not None
        assert {blend.method for blend in space.decode(genome).blends} == {name}
    genome = baselines["maths"].genome  # which sce, whose numbers are no weights, has nowhere
    assert genome is not None
    assert space.decode(genome).blends[0].method == "ties"


def test_ranges_of_one_of_several_methods() -> None:
    space = build(method=SEVERAL, bounds={"weight": (0.0, 1.0), "ties.weight": (0.2, 0.4)}, fixed={"density": 0.3})
    ranges = {p.name: (p.low, p.high) for p in space.parameters}
    assert ranges["model.task_arithmetic.weight.maths"] == ranges["model.linear.weight.maths"] == (0.0, 1.0)
    assert ranges["model.ties.weight.maths"] == (0.2, 0.4)
    assert not any("density" in name for name in ranges)
    assert space.decode(np.array([1.0, *[0.3] * 6])).blends[0].value("density", "maths") == 0.3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": ["ties", "linear", "ties"]}, "names ties twice"),
        ({"method": ["ties", "linaer"]}, "linear"),
        (
            {"method": SEVERAL, "bounds": {"linear.density": (0, 1)}},
            r"linear\.density: linear has no such .*: .*weight",
        ),
        ({"method": SEVERAL, "bounds": {"dare.weight": (0, 1)}}, "none of task_arithmetic, ties, linear has such"),
        ({"method": SEVERAL, "bounds": {"ties.density": (0, 2)}}, r"space\.bounds\.ties\.density: is 2"),
        ({"method": SEVERAL, "fixed": {"ties.density": 2}}, r"space\.fixed\.ties\.density: is 2"),
        (
            {"method": SEVERAL, "fixed": {"ties.density": 0.5}, "bounds": {"density": (0, 1)}},
            r"space\.fixed\.ties\.density: is given bounds",
        ),
        ({"method": SEVERAL, "switches": {"normalise": True}}, "ties.normalize"),
        ({"method": SEVERAL, "base": None}, "needs a base"),
        ({"method": SEVERAL, "bounds": {"weight": (1.0, 0.0)}}, "not below"),
    ],
)
def test_several_methods_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(**settings)


def test_auto_is_recorded_as_the_method_that_it_stands_for() -> None:
    settings = ParameterSpaceSettings(method="auto")  # type: ignore[arg-type]
    assert settings.model_dump(mode="json")["method"] == AUTO_METHOD
    assert find_method(AUTO_METHOD, "test").needs == ()  # which everybody can take who has a base
    assert names(build(method="auto")) == names(build(method=AUTO_METHOD))


# ---- curves over depth -----------------------------------------------------------------------------------------------

CURVED = [name for name, method in METHODS.items() if any(p.name == "weight" for p in method.parameters)]


def weights_of(recipe: StackRecipe, source: str = "maths") -> list[float]:
    """Of a source in each layer, all of whose tensors have it."""
    assert all(hop.attention == hop.mlp == hop.norm for hop in recipe.hops)
    return [recipe.blends[hop.mlp].value("weight", source) for hop in recipe.hops]


def test_a_curve_is_the_sum_of_its_cosines() -> None:
    """Against SciPy's inverse of the DCT-II; outside of the layers its mean."""
    found = build(profile={"cosines": 3})
    assert [p.name for p in found.parameters] == [
        "model.weight.maths",
        "model.weight.japanese",
        *(f"model.weight.{source}.cosine{order}" for source in ("maths", "japanese") for order in (1, 2)),
    ]
    assert [(p.low, p.high, p.default) for p in found.parameters] == [(0, 1.5, 0.4)] * 2 + [(-0.75, 0.75, 0.0)] * 4
    decoded = found.decode(np.array([0.7, 0.8, 0.4, -0.2, -0.1, 0.3]))
    for source, curve in (("maths", (0.7, 0.4, -0.2)), ("japanese", (0.8, -0.1, 0.3))):
        spectrum = np.array([2 * curve[0], *curve[1:], 0, 0]) * LAYERS
        assert weights_of(decoded, source) == pytest.approx(scipy.fft.idct(spectrum, type=2), abs=1e-12)
        for part in (decoded.embedding, decoded.norm, decoded.head):
            assert decoded.blends[part].value("weight", source) == curve[0]
        assert np.mean(weights_of(decoded, source)) == pytest.approx(curve[0])


def test_layers_that_are_told_alike_are_told_once() -> None:
    """As at mirrored depths of a symmetric curve, where cosines differ in their last digit."""
    space = build(granularity="layer")
    genome = np.full(len(space.parameters), 0.5)
    genome[names(space).index("layers.3.weight.maths")] += 1e-9
    (line,) = space.decode(genome).lines()
    assert line.startswith("the whole model: task_arithmetic of maths, japanese on base")
    assert "scale" not in line


@given(st.lists(st.floats(0.25, 1.25), min_size=LAYERS, max_size=LAYERS))
def test_as_many_cosines_as_layers_make_any_weights(wanted: list[float]) -> None:
    """By linear algebra: the coefficients of the curve through all weights, decoded, are these."""
    found = build(
        profile={"cosines": LAYERS},
        method="linear",
        base=None,
        sources=("maths", "japanese"),
        bounds={"weight": [0.0, 1.5]},
    )
    layers, orders = np.arange(LAYERS)[:, None], np.arange(LAYERS)[None]
    curve = np.linalg.solve(np.cos(np.pi * orders * (layers + 0.5) / LAYERS), wanted)
    sources = [name.split(".")[2] for name in (p.name for p in found.parameters)]
    genome = np.zeros(len(sources))
    genome[[place for place, source in enumerate(sources) if source == "maths"]] = curve
    check_genome(genome, found.parameters, "the curve")
    assert weights_of(found.decode(genome)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("method", CURVED)
def test_a_flat_curve_is_no_curve(method: str) -> None:
    plain, curved = build(method=method), build(method=method, profile={"cosines": 4})
    genome = np.array([(p.low + 2 * p.high) / 3 for p in plain.parameters])
    flat = [0.0] * (len(curved.parameters) - len(genome))
    assert curved.decode(np.array([*genome, *flat])).hash == plain.decode(genome).hash
    for without, mark in zip(plain.baselines(), curved.baselines(), strict=True):
        assert (mark.label, mark.recipe) == (without.label, without.recipe)
        assert (mark.genome is None) == (without.genome is None)
        if mark.genome is not None:
            assert without.genome is not None
            assert mark.genome.tolist() == [*without.genome, *flat]


@pytest.mark.parametrize("method", [*CURVED, ["task_arithmetic", "ties"]], ids=str)
@given(data=st.data())
def test_a_curve_stays_within_the_bounds_and_is_what_layers_make(method: str | list[str], data: st.DataObject) -> None:
    """A recipe of a curve is that of the same weights with numbers for every layer."""
    curved, of_layers = build(method=method, profile={"cosines": 3}), build(method=method, granularity="layer")
    drawn = [st.floats(p.low, p.high) if p.kind == "real" else st.integers(p.low, p.high) for p in curved.parameters]
    genome = np.array([data.draw(value) for value in drawn], dtype=float)
    decoded = curved.decode(genome)
    assert decoded == curved.decode(genome.copy())
    assert read_recipe(decoded.canonical(), decoded.sources) == decoded
    for blend in decoded.blends:
        check_blend(blend, find_method(blend.method, "test"), "test")
    given_values = dict(zip((p.name for p in curved.parameters), genome.tolist(), strict=True))
    again = np.zeros(len(of_layers.parameters))
    for place, p in enumerate(of_layers.parameters):
        name = f"model.{p.name.removeprefix(f'{p.group}.')}"
        number, layer = given_values[name], p.group.removeprefix("layers.")
        for order in (1, 2) if layer != p.group else ():
            wave = math.cos(math.pi * order * ((int(layer) + 0.5) / LAYERS))
            number += given_values.get(f"{name}.cosine{order}", 0.0) * wave
        again[place] = min(max(number, p.low), p.high)
    assert of_layers.decode(again) == decoded


def seeing(**vision: list[str]) -> ParameterSpace:
    return build(sources=("base", "maths", "japanese"), vision=vision)


def test_what_reads_images_is_mixed_or_chosen_by_one_number() -> None:
    mixed, chosen = seeing(mix=["base", "maths"]), seeing(choose=["base", "maths"])
    plain = build(sources=("base", "maths", "japanese"))
    for space, number, weights in ((mixed, 0.25, {"base": 0.75, "maths": 0.25}), (chosen, 1.0, {"maths": 1.0})):
        assert names(space) == [*names(plain), "vision"]
        genome = np.array([*[p.default for p in plain.parameters], number])
        recipe = space.decode(genome)
        assert recipe.vision is not None
        blend = recipe.blends[recipe.vision]
        assert dict.fromkeys(blend.sources) == dict.fromkeys(weights)
        assert blend.method == "passthrough" or blend.parameters["weight"] == weights
        back = space.genome_of(recipe)
        assert back is not None
        assert back[-1] == number


def test_what_reads_images_is_the_tokenizers_unless_a_source_alone_has_its_own() -> None:
    for space in (seeing(mix=["base", "maths"]), seeing(choose=["base", "maths"])):
        found = {mark.label: mark.recipe for mark in space.baselines()}
        marks = {name: recipe.vision for name, recipe in found.items() if isinstance(recipe, StackRecipe)}
        assert [name for name, vision in marks.items() if vision is not None] == ["maths"]
        for mark in space.baselines():
            if mark.genome is not None:
                check_genome(mark.genome, space.parameters, mark.label)
                assert isinstance(mark.recipe, StackRecipe)
                decoded = space.decode(mark.genome)
                seen = decoded.vision is None or decoded.blends[decoded.vision].sources == ("maths",)
                assert seen
                assert (decoded.vision is None) == (mark.recipe.vision is None)


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({}, "takes one of"),
        ({"mix": ["base", "base"]}, "twice"),
        ({"mix": ["base", "maths"], "choose": ["base", "maths"]}, "takes one of"),
    ],
)
def test_what_reads_images_is_said_in_one_way(vision: dict[str, list[str]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        seeing(**vision)


@pytest.mark.parametrize(("named", "said"), [(["base", "other"], "names other"), (["maths", "japanese"], "leaves out")])
def test_what_reads_images_is_of_sources_with_the_tokenizers_among_them(named: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        seeing(mix=named)
