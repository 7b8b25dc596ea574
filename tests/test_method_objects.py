"""What is asked of the merge methods of this project, as it was before each of them was one object, and their kinds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.mergekit import grammar
from evomerge.mergekit.grammar import Grammar
from evomerge.merging.arithmetic.passes import Combine, Pass, RowFunction, TensorFunction
from evomerge.method import (
    Method,
    MethodParameter,
    check_blend,
    check_needs,
    default_parameters,
    find_method,
    is_copy,
    method_shares,
    own_methods,
)
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend
from evomerge.testing.methods import merge
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings

METHODS = own_methods()
GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "methods.json").read_text())


def context(
    method: Method | None = None, mixed: tuple[str, ...] = ("a", "b", "c"), fit: str | None = None
) -> SpaceContext:
    """Of a search with texts, where ``method`` is none of its own."""
    return SpaceContext(
        sources=dict.fromkeys(("base", *mixed), ""),
        base="base",
        tokenizer="base",
        layers=2,
        tied=False,
        method=lambda name: method or METHODS[name],
        recipe_seed=3,
        dtype=None,
        calibration=None if method else "digest of texts",
        fit=fit,
    )


def space(method: str | Method, mixed: tuple[str, ...] = ("a", "b", "c"), **settings: Any) -> ParameterSpace:
    own = None if isinstance(method, str) else method
    name = method if isinstance(method, str) else method.name
    fit = "digest of items" if "fit" in (own or METHODS[name]).needs else None
    built = ParameterSpaceSettings.model_validate({"method": name, **settings}).build(context(own, mixed, fit))
    assert isinstance(built, ParameterSpace)
    return built


# ---- as before -------------------------------------------------------------------------------------------------------


def test_every_method_is_held() -> None:
    assert GOLDEN.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_space_has_the_parameters_and_baselines_and_makes_the_recipes_that_it_did(name: str) -> None:
    golden = GOLDEN[name]
    made = space(name, tuple(golden["sources"]), granularity="block")
    found = [[p.name, p.low, p.high, p.default, p.kind, p.group, list(p.choices)] for p in made.parameters]
    assert found == golden["parameters"]
    marks = [
        [m.label, m.kind, m.recipe.hash, None if m.genome is None else m.genome.tolist()] for m in made.baselines()
    ]
    assert marks == golden["baselines"]
    random = np.random.default_rng(0)
    genomes = [np.array([random.uniform(p.low, p.high) for p in made.parameters]) for _ in range(3)]
    assert [made.decode(genome).hash for genome in genomes] == golden["hashes"]


@pytest.mark.parametrize("name", METHODS)
def test_shares_are_what_they_were(name: str) -> None:
    for content, shares in GOLDEN[name]["shares"]:
        assert method_shares(Blend.model_validate(content)) == pytest.approx(shares, abs=0)


def test_a_method_that_is_not_installed_takes_all_alike() -> None:
    blend = Blend(method="of_somebody_else", sources=("a", "b"), parameters={"weight": {"a": 1.0, "b": 3.0}})
    assert method_shares(blend) == {"a": 0.5, "b": 0.5}
    assert not is_copy(blend.model_copy(update={"sources": ("a",), "parameters": {"weight": {"a": 1.0}}}))


@pytest.mark.parametrize(
    ("method", "number", "copy"),
    [("linear", "weight", True), ("passthrough", "scale", True), ("karcher", "weight", True), ("ram", "r", False)],
)
def test_a_copy_is_told_by_the_method(method: str, number: str, copy: bool) -> None:
    blend = Blend(method=method, sources=("a",), parameters={number: {"a": 1.0}})
    assert is_copy(blend) is copy
    assert not is_copy(blend.model_copy(update={"parameters": {number: {"a": 0.5}}}))


def test_looking_methods_up_imports_neither_torch_nor_numba() -> None:
    """A search file is checked by them within a moment."""
    asked = "import sys; from evomerge.method import own_methods; print(len(own_methods()), *sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) == len(METHODS)
    assert not {"torch", "numba", "transformers", "scipy"} & set(said)


# ---- baselines -------------------------------------------------------------------------------------------------------


def alone(made: ParameterSpace, label: str) -> list[float] | None:
    genome = next(mark.genome for mark in made.baselines() if mark.label == label)
    return None if genome is None else genome.tolist()


def test_what_is_fixed_elsewhere_forbids_a_baseline() -> None:
    """A factor of one half on the sum of task vectors makes a source alone another model than the source."""
    two = ("a", "b")
    assert alone(space("task_arithmetic", two), "a") == [1.0, 0.0]
    assert alone(space("task_arithmetic", two, fixed={"lambda": 0.5}), "a") is None
    assert alone(space("task_arithmetic", two, fixed={"lambda": 1.0}), "a") == [1.0, 0.0]
    assert alone(space("dare_linear", two, fixed={"density": 0.5}), "uniform average") is None
    assert alone(space("dare_linear", two, fixed={"density": 1.0}), "uniform average") == [0.5, 0.5]


def test_a_baseline_has_a_point_where_a_factor_is_searched_too() -> None:
    made = space("task_arithmetic", ("a", "b"), bounds={"lambda": [0.5, 2.0]})
    assert alone(made, "b") == [0.0, 1.0, 1.0]
    assert alone(space("task_arithmetic", ("a", "b"), bounds={"lambda": [1.5, 2.0]}), "b") is None


# ---- limits and needs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "place"),
    [
        ("ties", {"bounds": {"density": [0.5, 1.2]}}, "space.bounds.density"),
        ("ties", {"fixed": {"density": -0.1}}, "space.fixed.density"),
        ("della", {"bounds": {"epsilon": [0.0, 2.0]}}, "space.bounds.epsilon"),
        ("ties", {"fixed": {"weight": "large"}}, "space.fixed.weight"),
    ],
)
def test_what_a_parameter_can_never_be_is_refused_beforehand(method: str, settings: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError) as refused:
        space(method, **settings)
    assert refused.value.place == place


def test_a_method_that_needs_what_is_not_there_is_refused() -> None:
    needy = Method("needy", _plan, needs=("calibration",))
    with pytest.raises(InputError, match=r"^space.method: needy needs calibration"):
        space(needy)
    with pytest.raises(InputError):
        check_needs(needy, "m", has_texts=False, has_fit=True)
    check_needs(needy, "m", has_texts=True, has_fit=False)
    fitted = Method("wants", _plan, needs=("fit",))
    with pytest.raises(InputError, match=r"^m: wants is fitted to right answers, and there are none"):
        check_needs(fitted, "m", has_texts=True, has_fit=False)
    check_needs(fitted, "m", has_texts=False, has_fit=True)


# ---- kinds of parameters ---------------------------------------------------------------------------------------------


def _plan(facts: object, blend: Blend) -> Pass:
    return Combine({blend.sources[0]: 1.0})


KINDS = Method(
    "kinds",
    _plan,
    (
        MethodParameter("rank", "source", 1, 8, 2, kind="int", limits=(1, 64)),
        MethodParameter("rule", "blend", default="sum", kind="choice", choices=("mean", "sum", "largest")),
        MethodParameter("start", "source", default="left", kind="choice", choices=("left", "right")),
        MethodParameter("weight", "source", default=0.5, share=True),
    ),
)


def test_genes_of_all_kinds_are_decoded_into_what_they_say() -> None:
    made = space(KINDS, ("a", "b"))
    assert [(p.name, p.kind, p.low, p.high, p.default) for p in made.parameters] == [
        ("model.rank.a", "int", 1, 8, 2), ("model.rank.b", "int", 1, 8, 2),
        ("model.rule", "choice", 0, 2, 1),
        ("model.start.a", "choice", 0, 1, 0), ("model.start.b", "choice", 0, 1, 0),
        ("model.weight.a", "real", 0, 1, 0.5), ("model.weight.b", "real", 0, 1, 0.5),
    ]  # fmt: skip
    assert [p.share_of for p in made.parameters] == [""] * 5 + ["a", "b"]
    recipe = made.decode(np.array([3.0, 8.0, 2.0, 1.0, 0.0, 0.25, 1.0]))
    (blend,) = recipe.blends
    assert blend.parameters == {
        "rank": {"a": 3.0, "b": 8.0}, "rule": "largest", "start": {"a": "right", "b": "left"},
        "weight": {"a": 0.25, "b": 1.0},
    }  # fmt: skip
    assert blend.choice("rule") == "largest"
    assert blend.choice("start", "a") == "right"
    assert blend.value("rank", "b") == 8
    check_blend(blend, KINDS, "blend")
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe
    (line,) = recipe.lines()
    assert "rank a 3, b 8; rule largest; start a right, b left; weight a 0.25, b 1" in line


def test_defaults_of_all_kinds_are_let_through() -> None:
    blend = Blend(method="kinds", sources=("a",), parameters=default_parameters(KINDS, ("a",)))
    check_blend(blend, KINDS, "blend")


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"rank": {"a": 1.5}}, "blend.rank"),
        ({"rank": {"a": 65}}, "blend.rank"),
        ({"rank": {"a": "two"}}, "blend.rank"),
        ({"rule": "means"}, "blend.rule"),
        ({"rule": 1.0}, "blend.rule"),
        ({"start": {"a": "up"}}, "blend.start"),
        ({"weight": {"a": "much"}}, "blend.weight"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(parameters: dict[str, Any], place: str) -> None:
    good = default_parameters(KINDS, ("a",))
    with pytest.raises(InputError) as refused:
        check_blend(Blend(method="kinds", sources=("a",), parameters={**good, **parameters}), KINDS, "blend")
    assert refused.value.place == place


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"bounds": {"rule": [0, 1]}}, "space.bounds.rule"),
        ({"bounds": {"rank": [1, 2.5]}}, "space.bounds.rank"),
        ({"bounds": {"rank": [0, 4]}}, "space.bounds.rank"),
        ({"fixed": {"rule": "any"}}, "space.fixed.rule"),
        ({"fixed": {"rank": 2.5}}, "space.fixed.rank"),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(settings: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError) as refused:
        space(KINDS, **settings)
    assert refused.value.place == place


def test_choices_and_whole_numbers_can_be_fixed_and_bounded() -> None:
    made = space(KINDS, ("a",), fixed={"rule": "mean", "start": "right"}, bounds={"rank": [2, 3]})
    assert [(p.name, p.low, p.high) for p in made.parameters] == [("model.rank.a", 2, 3), ("model.weight.a", 0, 1)]
    (blend,) = made.decode(np.array([3.0, 0.5])).blends
    assert blend.parameters == {"rank": {"a": 3.0}, "rule": "mean", "start": {"a": "right"}, "weight": {"a": 0.5}}


def test_a_number_in_quotes_is_a_number_still() -> None:
    blend = Blend.model_validate({"method": "linear", "sources": ["a"], "parameters": {"weight": {"a": "0.5"}}})
    assert blend.parameters == {"weight": {"a": 0.5}}


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "choice", "default": "a"},
        {"kind": "real", "choices": ("a",), "default": 0.0},
        {"kind": "choice", "choices": ("a",), "default": 0.0},
        {"kind": "int", "default": 0.5},
        {"kind": "real", "default": "a"},
    ],
)
def test_a_parameter_that_contradicts_itself_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^p: "):
        MethodParameter("p", "blend", **wrong)


# ---- mergekit --------------------------------------------------------------------------------------------------------


def test_a_method_of_a_package_has_a_grammar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"mine": Method("mine", _plan, mergekit=Grammar("source", (grammar.WEIGHT,))), "other": KINDS}
    monkeypatch.setattr(grammar, "plugins", lambda group: methods)
    monkeypatch.setattr(grammar, "find_method", lambda name, place: methods[name])
    assert grammar.find_grammar("mine", "m").names == ["weight"]
    for name in ("other", "nobody's"):
        with pytest.raises(InputError, match=r"^m: there is no merge method .* There are: mine\.$"):
            grammar.find_grammar(name, "m")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_called(name: str) -> None:
    assert METHODS[name].title
    assert find_method(name, "m") is METHODS[name]


# ---- what the docs show ----------------------------------------------------------------------------------------------


def test_the_method_of_the_docs_is_searched() -> None:
    page = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MEDIAN = Method(" in block)
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # of this project
    made = space(namespace["MEDIAN"], ("a", "b"))
    assert [(p.name, p.kind) for p in made.parameters] == [("model.weight", "real"), ("model.middle", "choice")]
    assert made.decode(np.array([1.0, 1.0])).blends[0].parameters == {"weight": 1.0, "middle": "mean"}


# ---- methods of packages that are wrong ------------------------------------------------------------------------------


def merged_by(plan: Any, scope: Literal["blend", "source"] = "blend", **of_method: Any) -> Tensor:
    """A tensor of two sources and a base, by a method with a number that the blend leaves out where it may."""
    method = Method("mine", plan, (MethodParameter("weight", scope, default=0.5),), **{"needs_base": True, **of_method})
    base = "b" if method.needs_base else None
    parameters: dict[str, Any] = {} if scope == "blend" else {"weight": {"s0": 1.0, "s1": 1.0}}
    return merge(method, *_ORIGIN, Blend(method="mine", sources=("s0", "s1"), base=base, parameters=parameters))


_ORIGIN = torch.zeros(4, 3), [torch.ones(4, 3), torch.full((4, 3), 2.0)]


def test_what_a_blend_leaves_out_is_at_its_default() -> None:
    made = merged_by(lambda facts, blend: Combine({"s1": blend.value("weight")}))
    assert torch.equal(made, torch.ones(4, 3))
    made = merged_by(lambda facts, blend: Combine({"s1": blend.value("half")}), switches={"half": True})
    assert torch.equal(made, torch.full((4, 3), 2.0))


@pytest.mark.parametrize(
    ("plan", "of_method", "said"),
    [
        (lambda facts, blend: torch.zeros(4, 3), {}, "mine planned a Tensor, not a pass"),
        (
            lambda facts, blend: Combine({blend.base: 1.0}),
            {"needs_base": False},
            "there is none: let it say needs_base",
        ),
        (lambda facts, blend: Combine({"s2": 1.0}), {}, "mine reads 's2'; the blend has s0, s1, b"),
        (
            lambda facts, blend: Combine({"s0": blend.value("wieght")}),
            {},
            "mine has no parameter wieght; it has: weight",
        ),
        (lambda facts, blend: Combine({"s0": blend.value("weight")}), {"scope": "source"}, "say which"),
        (
            lambda facts, blend: RowFunction(("s0",), lambda t, first: t[0].sum(0)),
            {},
            r"returned \[3\] for tensors \[4, 3\]",
        ),
        (lambda facts, blend: TensorFunction(("s0",), lambda t: t[0].sum()), {}, r"returned \[\] for tensors \[4, 3\]"),
    ],
)
def test_a_method_that_is_wrong_says_what_is(plan: Any, of_method: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError, KeyError), match=said):
        merged_by(plan, **of_method)
