"""Recipes: numbering, canonical text and hash, roles, checks, and the files they are written to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evomerge.errors import InputError
from evomerge.mergekit import dump_recipe, load_recipe_file
from evomerge.method import check_blend, default_parameters, own_methods
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend, Hop, Role, StackRecipe, renumber, roles
from evomerge.yaml import dump_yaml, load_yaml

METHODS = own_methods()
SOURCES = {"base": "models/base", "maths": "models/maths", "ja": "org/ja@main"}


def mix(maths: float, ja: float, **more: bool | float) -> Blend:
    return Blend(
        method="task_arithmetic",
        sources=("maths", "ja"),
        base="base",
        parameters={"weight": {"maths": maths, "ja": ja}, **more},
    )


def layered(*weights: float, seed: int = 0) -> StackRecipe:
    """A recipe whose layer i mixes by weights[i], with the embedding, norm and head like layer 0."""
    first = mix(weights[0], 0.5)
    return StackRecipe.compose(
        sources=SOURCES,
        tokenizer="ja",
        embedding=first,
        hops=((i, mix(w, 0.5), mix(w, 0.5), first) for i, w in enumerate(weights)),
        norm=first,
        head=first,
        seed=seed,
        dtype="bfloat16",
    )


def never(reference: str) -> dict[str, Role]:
    raise AssertionError("our own files say how many layers there are")


# ---- numbering and hash ----------------------------------------------------------------------------------------------


def test_equal_blends_are_numbered_once_in_order_of_first_use() -> None:
    recipe = layered(0.1, 0.9, 0.1, 0.4)
    assert [b.value("weight", "maths") for b in recipe.blends] == [0.1, 0.9, 0.4]
    assert [(h.layer, h.attention, h.mlp, h.norm) for h in recipe.hops] == [
        (0, 0, 0, 0), (1, 1, 1, 0), (2, 0, 0, 0), (3, 2, 2, 0)
    ]  # fmt: skip
    assert (recipe.embedding, recipe.norm, recipe.head) == (0, 0, 0)


def test_uniform_is_one_blend() -> None:
    recipe = StackRecipe.uniform(mix(0.6, 0.6), sources=SOURCES, tokenizer="base", layers=3)
    assert len(recipe.blends) == 1
    assert [hop.layer for hop in recipe.hops] == [0, 1, 2]
    assert recipe.used_sources() == set(SOURCES)


def test_the_canonical_text_is_fixed_for_ever() -> None:
    recipe = StackRecipe.uniform(mix(0.1, -0.0, normalize=False), sources=SOURCES, tokenizer="ja", layers=1)
    text = (
        '{"blends":[{"base":"base","method":"task_arithmetic","parameters":{"normalize":false,'
        '"weight":{"ja":0.0,"maths":0.1}},"sources":["maths","ja"]}],"dtype":null,"embedding":0,"head":0,'
        '"hops":[{"attention":0,"layer":0,"mlp":0,"norm":0}],"norm":0,"seed":0,"sources":["base","ja","maths"],'
        '"tokenizer":"ja"}'
    )
    assert recipe.canonical() == text
    assert recipe.hash == hashlib.sha256(text.encode()).hexdigest()[:16] == "b90a0e1cb726ee0a"


def test_the_hash_leaves_out_where_models_lie_and_nothing_else() -> None:
    recipe = layered(0.1, 0.9)
    moved = recipe.model_copy(update={"sources": {name: f"/elsewhere/{name}" for name in SOURCES}})
    assert moved.hash == recipe.hash
    others = [
        layered(0.1, 0.8),
        layered(0.1, 0.9, seed=1),
        recipe.model_copy(update={"tokenizer": "maths"}),
        recipe.model_copy(update={"dtype": None}),
        recipe.model_copy(update={"head": 1}),
        recipe.model_copy(update={"sources": {**SOURCES, "more": "x"}}),
    ]
    assert len({each.hash for each in [recipe, *others]}) == 1 + len(others)


@given(st.permutations(["maths", "ja", "base"]))
def test_order_of_keys_does_not_matter(order: list[str]) -> None:
    blend = mix(0.3, 0.4)
    weights = {name: blend.value("weight", name) for name in order if name != "base"}
    turned = blend.model_copy(update={"parameters": {"weight": weights}})
    one = StackRecipe.uniform(blend, sources=SOURCES, tokenizer="ja", layers=2)
    other = StackRecipe.uniform(turned, sources={name: SOURCES[name] for name in order}, tokenizer="ja", layers=2)
    assert one.hash == other.hash


def test_a_switch_is_not_a_number() -> None:
    assert mix(1, 1, normalize=True).parameters["normalize"] is True
    assert isinstance(mix(1, 1).value("weight", "maths"), float)


# ---- what a recipe says ----------------------------------------------------------------------------------------------


def test_every_role_has_its_blend() -> None:
    blends = [mix(w, 0.5) for w in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    recipe = StackRecipe.compose(
        sources=SOURCES,
        tokenizer="ja",
        embedding=blends[0],
        hops=[(0, blends[1], blends[2], blends[3])],
        norm=blends[4],
        head=blends[5],
    )
    expected = [
        (Role("embedding"), 0), (Role("attention", 0), 1), (Role("mlp", 0), 2), (Role("norm", 0), 3),
        (Role("norm"), 4), (Role("head"), 5),
    ]  # fmt: skip
    assert [(role, recipe.blends.index(recipe.blend_for(role))) for role in roles(1)] == expected


# ---- paths, and tensors apart from their part ------------------------------------------------------------------------

UP = "model.layers.{}.mlp.up_proj.weight"


def path(*layers: int | dict[str, int], **tensors: Blend) -> StackRecipe:
    """A recipe whose hop i takes these layers; keyword l0 names the up projection of hop 0."""
    blend = mix(0.6, 0.6)
    return StackRecipe.compose(
        sources=SOURCES,
        tokenizer="ja",
        embedding=blend,
        hops=((layer, blend, blend, blend) for layer in layers),
        norm=blend,
        head=blend,
        tensors={UP.format(name.removeprefix("l")): other for name, other in tensors.items()},
    )


def test_a_hop_may_take_another_layer_of_each_source() -> None:
    recipe = path(3, {"maths": 2, "ja": 2, "base": 1}, {"maths": 5, "ja": 5, "base": 5})
    assert recipe.hops[1].layer == {"maths": 2, "ja": 2, "base": 1}
    assert [[hop.layer_of(name) for name in ("maths", "ja", "base")] for hop in recipe.hops] == [
        [3, 3, 3], [2, 2, 1], [5, 5, 5]
    ]  # fmt: skip
    assert recipe.hops[2].layer == 5
    assert recipe.hash == path(3, {"base": 1, "ja": 2, "maths": 2}, 5).hash
    assert recipe.hash != path(3, {"base": 2, "ja": 2, "maths": 1}, 5).hash


def test_tensors_may_be_made_apart_from_their_part() -> None:
    other = mix(0.9, 0.1)
    recipe = path(0, 0, l1=other)
    role = Role("mlp", 1)
    assert recipe.blend_for(role, UP.format(1)) == other
    assert recipe.blend_for(role) == recipe.blend_for(role, UP.format(0)) == mix(0.6, 0.6)
    assert recipe.tensors == {UP.format(1): 1}
    assert path(0, 0, l1=other, l0=mix(0.2, 0.2)).tensors == {UP.format(0): 1, UP.format(1): 2}  # by name, not as given
    assert path(0, 0).hash != recipe.hash
    assert '"tensors"' in recipe.canonical()
    assert '"tensors"' not in path(0, 0).canonical()  # so that recipes without any keep the text that they had
    assert recipe.used_sources() == set(SOURCES)


def test_blends_of_one_recipe_may_be_of_any_kind() -> None:
    copy = Blend(method="passthrough", sources=("ja",), parameters={"scale": {"ja": 1.0}})
    recipe = StackRecipe.compose(
        sources=SOURCES,
        tokenizer="ja",
        embedding=copy,
        hops=[({"ja": 4}, copy, copy, copy), (1, mix(1, 1), copy, copy)],
        norm=copy,
        head=mix(1, 1),
    )
    assert recipe.hops[0].layer == 4
    assert [blend.method for blend in recipe.blends] == ["passthrough", "task_arithmetic"]


@given(
    st.lists(
        st.integers(0, 9) | st.fixed_dictionaries({name: st.integers(0, 2) for name in SOURCES}), min_size=1, max_size=4
    ),
    st.dictionaries(st.sampled_from(["l0", "l1", "l7"]), st.floats(-2, 2)),
)
def test_texts_and_files_give_back_the_same_recipe(layers: list[int | dict[str, int]], apart: dict[str, float]) -> None:
    recipe = path(*layers, **{name: mix(weight, 0.1) for name, weight in apart.items()})
    again = read_recipe(recipe.canonical(), SOURCES)
    assert again == recipe
    assert again.canonical() == recipe.canonical()
    assert StackRecipe.model_validate(load_yaml(dump_recipe(recipe), "f")) == recipe


@pytest.mark.parametrize(
    ("name", "role", "layer", "expected"),
    [
        ("model.layers.3.mlp.experts.3.w1.weight", Role("mlp", 3), 11, "model.layers.11.mlp.experts.3.w1.weight"),
        ("h.0.attn.c_attn.bias", Role("attention", 0), 2, "h.2.attn.c_attn.bias"),
        ("model.norm.weight", Role("norm"), 2, "model.norm.weight"),
    ],
)
def test_a_tensor_is_named_in_another_layer(name: str, role: Role, layer: int, expected: str) -> None:
    assert renumber(name, role, layer) == expected


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        ({"maths": 1, "ja": 2}, "hop 0 mixes 'base', but does not say which layer of it"),
        ({"maths": 1, "ja": 2, "base": 1, "more": 3}, "hop 0 names a layer of 'more', but does not mix it"),
        ({}, "names no source"),
        ({"maths": -1, "ja": 2, "base": 1}, "greater than or equal to 0"),
        (-1, "greater than or equal to 0"),
    ],
)
def test_a_hop_says_the_layer_of_each_source_that_it_mixes(layer: object, problem: str) -> None:
    content = layered(0.1).model_dump()
    content["hops"][0]["layer"] = layer
    with pytest.raises(ValidationError, match=problem):
        StackRecipe.model_validate(content)


def test_a_hop_of_its_own_has_one_form() -> None:
    assert Hop(layer={"a": 2, "b": 2}, attention=0, mlp=0, norm=0) == Hop(layer=2, attention=0, mlp=0, norm=0)
    with pytest.raises(KeyError):
        Hop(layer={"a": 1, "b": 2}, attention=0, mlp=0, norm=0).layer_of("c")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"head": 7}, "uses blend 7"),
        ({"tensors": {"x": 7}}, "uses blend 7"),
        ({"tensors": {"x": -1}}, "blend"),
        ({"tokenizer": "nobody"}, "unknown source 'nobody'"),
        ({"sources": {"base": "x", "ja": "y"}}, "unknown source 'maths'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_recipe_refers_to_what_exists(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        StackRecipe.model_validate(layered(0.1).model_dump() | change)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValidationError):
        mix(value, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_defaults_are_let_through_and_anything_else_is_not(name: str) -> None:
    spec = METHODS[name]
    base = "base" if spec.needs_base else None
    sources = ("maths", "ja")[: spec.max_sources]
    good = Blend(method=name, sources=sources, base=base, parameters=default_parameters(spec, sources))
    check_blend(good, spec, "blend")
    wrong = [({**good.parameters, "densty": 1.0}, "densty")]
    for p in spec.parameters:
        left = {other: value for other, value in good.parameters.items() if other != p.name}
        if p.scope == "source":
            wrong += [(left, "needs a value"), ({**left, p.name: {"base": 1.0}}, "one value for each")]
        else:  # and then is the default
            check_blend(good.model_copy(update={"parameters": left}), spec, "blend")
    for parameters, problem in wrong:
        with pytest.raises(InputError, match=problem):
            check_blend(good.model_copy(update={"parameters": parameters}), spec, "blend")
    if spec.needs_base:
        with pytest.raises(InputError, match="needs a base"):
            check_blend(good.model_copy(update={"base": None}), spec, "blend")
    if spec.max_sources is not None:
        with pytest.raises(InputError, match=f"mixes {spec.max_sources} sources"):
            check_blend(good.model_copy(update={"sources": ("maths", "ja", "base")}), spec, "blend")


# ---- files -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=4),
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8),
    st.sampled_from(["1e5", "on", "null", "0x1F", "2024-01-01", "models/日本語", "a: b #c", "~", "1_000"]),
)
def test_yaml_gives_back_the_same_recipe(weights: list[float], name: str, reference: str) -> None:
    blend = Blend(method="linear", sources=(name,), parameters={"weight": {name: weights[0]}})
    recipe = StackRecipe.compose(
        sources={name: reference},
        tokenizer=name,
        embedding=blend,
        hops=((i, b, b, blend) for i, w in enumerate(weights) for b in [_weighted(blend, w)]),
        norm=blend,
        head=blend,
        seed=3,
    )
    assert StackRecipe.model_validate(load_yaml(dump_recipe(recipe), "r.yaml")) == recipe


def _weighted(blend: Blend, weight: float) -> Blend:
    return blend.model_copy(update={"parameters": {"weight": {blend.sources[0]: weight}}})


def test_a_written_recipe_is_made_for_reading(tmp_path: Path) -> None:
    recipe = layered(0.1, 0.9)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe_file(file, never) == recipe
    lines = file.read_text().splitlines()
    assert lines[0] == f"# Evomerge recipe {recipe.hash}"
    assert "- {layer: 1, attention: 1, mlp: 1, norm: 0}" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {a: x\n", "line 2: expected"),
        ("seed: 1\nblends: []\nseed: 2\n", "line 3: the key 'seed' appears here again; it is on line 1"),
        ("- a\n- b\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("blends: []\nsources: {}\n", "recipe.yaml: tokenizer: Field required"),
        ("blends: []\nbelnds: []\n", "belnds: is not a key of a recipe"),
        ("blends: !!python/object/apply:os.getcwd []\n", "line 1: could not determine a constructor"),
    ],
)
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe_file(file, never)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe_file(tmp_path / "none.yaml", never)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe_file(tmp_path / "binary.yaml", never)


# ---- YAML ------------------------------------------------------------------------------------------------------------


def test_numbers_without_a_point_are_numbers() -> None:
    assert load_yaml("[1e-3, 2.5E+4, -1e5, 12, e3, 1e, '1e3']", "f") == [0.001, 25000.0, -1e5, 12, "e3", "1e", "1e3"]
    assert load_yaml(dump_yaml({"a": "1e3", "b": 1e300}), "f") == {"a": "1e3", "b": 1e300}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1, b: 2}", "f, line 1: the key 'b'"),
        ("- x: 1\n  y: 2\n  x: 3", "f, line 3: the key 'x' appears here again; it is on line 1"),
        ("1: a\n1: b", "f, line 1: YAML reads the key 1 as a number; put it in quotes"),
        ("? [a]\n: b", "f, line 1: a key must be a plain value"),
        ("a: b: c", "f, line 1: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "f, line 2"),
        ("a: \x07", "f: cannot be read as YAML"),
        ("a: 2024-99-99", "f: cannot be read as YAML"),
        ("[" * 5000, "f: is nested too deeply"),
        ("x: " + "{a: " * 3000 + "1" + "}" * 3000, "f: is nested too deeply"),
        ("\n".join(" " * i + f"a{i}:" for i in range(3000)), "f: is nested too deeply"),
        ("a: &a [*a]", "f: holds an alias of itself"),
        ("a: &a {<<: *a, b: 1}", "f: holds an alias of itself"),
        ("[" + "1, " * 300_000 + "1]", "f: holds more than 200,000 values"),
        ("- " + "x" * 2_000_000, "f, line 1: is a text of 2,000,000 characters"),
        ('a: "\\ud83d"', "f, line 1: holds half of a surrogate pair"),
        ('"\\udc00": 1', "f, line 1: holds half of a surrogate pair"),
        ("a: \ud83d", "f: holds half of a surrogate pair"),
        ("a: " + "9" * 5000, "f, line 1: a whole number of 5,000 digits"),
        ("a: 010", "f, line 1: 010 may be meant in tens or in eights"),
        ("no: x", "f, line 1: YAML reads the key no as true or false; put it in quotes"),
        ("2024-01-01: x", "f, line 1: YAML reads the key 2024-01-01 as a date"),
        ("~: x", "f, line 1: YAML reads the key ~ as nothing"),
        ("a: !!binary aGVsbG8=", "f, line 1: could not determine a constructor"),
        ("a: !!set {a, b}", "f, line 1: could not determine a constructor"),
        ('"' + "x" * 200_000 + '": 1', "f, line 1: mapping values are not allowed"),
        ("a: !!python/name:os.system", "f, line 1: could not determine a constructor"),
    ],
)
def test_what_yaml_would_let_through_or_crash_on(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_yaml(text, "f")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("first", "next_"),
    [
        ("[x]", "[" + "*a{0}, " * 9 + "]"),
        ("{k: v}", "{{<<: [" + "*a{0}, " * 9 + "]}}"),
        ("{k: [v]}", "{{" + ", ".join(f"k{i}: *a{{0}}" for i in range(9)) + "}}"),
    ],
)
def test_aliases_that_stand_for_billions_of_values(first: str, next_: str) -> None:
    lines = [f"a0: &a0 {first}", *(f"a{i}: &a{i} {next_.format(i - 1)}" for i in range(1, 10))]
    with pytest.raises(InputError, match="values once its aliases are written out"):
        load_yaml("\n".join(lines), "f")
    with pytest.raises(InputError, match="values once its aliases are written out"):  # behind what libyaml refuses
        load_yaml("\n".join(['x: "\\ud800"', *lines]), "f")


def test_sixties_are_text_and_numbers_are_numbers() -> None:
    assert load_yaml("[1:30, -1:30:20, 1:30.5, 12, 0x10, 1_000, 0, +3]", "f") == [
        "1:30", "-1:30:20", "1:30.5", 12, 16, 1000, 0, 3
    ]  # fmt: skip
    assert load_yaml(dump_yaml({"a": "1:30", "no": "010"}), "f") == {"a": "1:30", "no": "010"}


def test_merge_keys_may_be_overridden() -> None:
    assert load_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}", "f")["d"] == {"b": 3, "c": 2}
