"""Steps after a merge method: their contract, slow formulas written apart from them, and how a search has them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.blends import check_whole, shares_of
from evomerge.errors import InputError
from evomerge.mergekit.writing import to_mergekit
from evomerge.merging.arithmetic.changes import ChangeFunction, Rescale
from evomerge.merging.arithmetic.passes import Combine, Pass, Sparsify
from evomerge.merging.measured.facts import Facts
from evomerge.method import MethodParameter, find_method
from evomerge.plugins import OWN
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import Blend, BlendStep, StackRecipe
from evomerge.step import GROUP, Step, Values, find_step
from evomerge.testing.methods import tensors
from evomerge.testing.steps import MADE, StepContract, plan, run
from search_spaces.base import SpaceContext
from search_spaces.parameter_space import ParameterSpace, ParameterSpaceSettings

STEPS = {name: find_step(name, name) for name in OWN[GROUP]}
SCALE = STEPS["scale"]

# ---- the contract ----------------------------------------------------------------------------------------------------


class TestScale(StepContract):
    step = SCALE
    values: ClassVar = {"factor": 0.4}


def _channels(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """Factors for columns, and then for rows; one for all of what has neither."""
    base, share = str(blend.base), float(values["share"])
    if not facts.site.shape:
        return Rescale(base, made, share)
    length = facts.site.shape[-1]
    columns, rows = torch.linspace(0.1, 2.0, length), torch.linspace(0.5, 1.5, facts.size // length)[:, None]
    return Rescale(base, Rescale(base, made, columns), share * rows)


def _clipped(facts: Facts, blend: Blend, values: Values, made: Pass) -> Pass:
    """No element of the change larger than a share of the largest."""

    def clip(change: Tensor) -> Tensor:
        most = float(values["share"]) * float(change.abs().max())
        return change.clamp_(-most, most)

    return ChangeFunction(str(blend.base), made, clip)


class TestActivations(StepContract):
    step = STEPS["activations"]


class TestFactorsOfChannels(StepContract):
    step = Step("channels", _channels, (MethodParameter("share", "blend", default=0.5),))

    @pytest.mark.parametrize("kind", MADE)
    @pytest.mark.parametrize("shape", [(6, 8), (9, 5)])
    def test_multiply_rows_and_columns(self, kind: str, shape: tuple[int, int]) -> None:
        held = tensors(3, shape)
        by_name = dict(zip(("b", "s0", "s1"), held, strict=True))
        made = run(MADE[kind], [by_name[name] for name in MADE[kind].inputs])
        columns, rows = torch.linspace(0.1, 2.0, shape[1]), torch.linspace(0.5, 1.5, shape[0])[:, None]
        wanted = held[0].double() + 0.5 * rows.double() * columns.double() * (made - held[0]).double()
        assert self.near(self.merge(MADE[kind], held).double(), wanted)


class TestFunctionsOfTheWholeChange(StepContract):
    step = Step("clipped", _clipped, (MethodParameter("share", "blend", default=0.5),), neutral={"share": 1.0})


# ---- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7, 40.0, 1e4])
@pytest.mark.parametrize("kind", MADE)
def test_scale_multiplies_the_change(kind: str, factor: float) -> None:
    """Against the plain formula in float64."""
    held = [tensor / 3 for tensor in tensors(3, (6, 8))]
    by_name = dict(zip(("b", "s0", "s1"), held, strict=True))
    made = run(MADE[kind], [by_name[name] for name in MADE[kind].inputs]).double()
    scaled = run(*plan(SCALE, MADE[kind], held, {"factor": factor})).double()
    wanted = held[0].double() + factor * (made - held[0].double())
    assert torch.allclose(scaled, wanted, rtol=0, atol=2e-6 * max(1.0, factor))


@pytest.mark.parametrize("kind", MADE)
def test_scale_is_no_pass_of_its_own_where_numbers_do(kind: str) -> None:
    made = MADE[kind]
    planned, _ = plan(SCALE, made, tensors(3), {"factor": 0.3})
    assert type(planned) is (type(made) if isinstance(made, Combine | Sparsify) else Rescale)
    again, _ = plan(SCALE, planned, tensors(3), {"factor": 0.5})
    assert not isinstance(again, Rescale) or again.made is made


# ---- in recipes ------------------------------------------------------------------------------------------------------


def blend(*steps: BlendStep, base: str | None = "base") -> Blend:
    return Blend(method="task_arithmetic", sources=("a",), base=base, parameters={"weight": {"a": 0.5}}, steps=steps)


def recipe(*steps: BlendStep) -> StackRecipe:
    sources = {"base": "models/base", "a": "models/a"}
    return StackRecipe.uniform(blend(*steps), sources=sources, tokenizer="base", layers=2)


def test_a_recipe_with_steps_is_written_and_read_again() -> None:
    with_steps = recipe(BlendStep(name="scale", parameters={"factor": 0.5}), BlendStep(name="other"))
    assert read_recipe(with_steps.canonical(), with_steps.sources) == with_steps
    assert with_steps.hash != recipe().hash
    assert "steps" not in recipe().canonical()
    assert with_steps.lines() == [
        "the whole model: task_arithmetic of a on base; weight a 0.5; then scale by factor 0.5; then other"
    ]


@pytest.mark.parametrize(
    ("step", "base", "place", "words"),
    [
        (BlendStep(name="scail"), "base", "b.steps[1].name", "'scail'.*Did you mean 'scale'"),
        (BlendStep(name="scale"), None, "b", "needs a base"),
        (BlendStep(name="scale", parameters={"fctor": 1.0}), "base", "b.steps[1].fctor", "takes: factor"),
        (BlendStep(name="scale", parameters={"factor": -1.0}), "base", "b.steps[1].factor", "from 0 to 10000"),
        (BlendStep(name="scale", parameters={"factor": "much"}), "base", "b.steps[1].factor", "must be a number"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused_with_its_place(
    step: BlendStep, base: str | None, place: str, words: str
) -> None:
    with pytest.raises(InputError, match=words) as refused:
        check_whole(blend(BlendStep(name="scale"), step, base=base), "b", has_texts=True, has_fit=False)
    assert refused.value.place == place


def test_a_step_needs_a_base_even_after_a_method_that_needs_none() -> None:
    mean = Blend(method="linear", sources=("a", "b"), parameters={"weight": {"a": 1.0, "b": 1.0}})
    with pytest.raises(InputError, match="scale changes what is added to a base"):
        check_whole(mean.model_copy(update={"steps": (BlendStep(name="scale"),)}), "b", has_texts=True, has_fit=False)


def test_shares_of_a_source_are_scaled_with_the_change() -> None:
    assert shares_of(blend(BlendStep(name="scale", parameters={"factor": 0.5}))) == {"a": 0.25}
    assert shares_of(blend(BlendStep(name="of_somebody_else"))) == {"a": 0.5}


def test_mergekit_is_told_nothing_of_a_recipe_with_steps() -> None:
    with pytest.raises(InputError, match="mergekit cannot do") as refused:
        to_mergekit(recipe(BlendStep(name="scale", parameters={"factor": 0.5})), lambda _: {})
    assert refused.value.place == "recipe.blends[0].steps"


# ---- in a search space -----------------------------------------------------------------------------------------------

LAYERS = 5


def space(*, base: str | None = "base", **settings: object) -> ParameterSpace:
    context = SpaceContext(
        sources={name: f"models/{name}" for name in ("base", "maths", "japanese")},
        base=base,
        tokenizer="base",
        layers=LAYERS,
        tied=False,
        method=lambda name: find_method(name, "space.method"),
        recipe_seed=3,
        dtype=None,
    )
    settings = {"method": "task_arithmetic"} | settings
    return ParameterSpaceSettings.model_validate(settings).build(context)


def test_genes_of_steps_stand_after_those_of_the_method_in_every_group() -> None:
    found = space(granularity="layer", steps={"scale": {"bounds": {"factor": [0.5, 1.5]}}})
    assert [p.name for p in found.parameters[:3]] == [
        "embedding.weight.maths",
        "embedding.weight.japanese",
        "embedding.scale.factor",
    ]
    assert (found.parameters[2].low, found.parameters[2].high, found.parameters[2].default) == (0.5, 1.5, 1.0)
    genome = np.array([p.default for p in found.parameters])
    genome[2] = 0.75
    decoded = found.decode(genome)
    assert decoded.blends[decoded.embedding].steps == (BlendStep(name="scale", parameters={"factor": 0.75}),)
    assert decoded.blends[decoded.head].steps == ()  # a factor of 1 is no step


def test_a_step_may_be_fixed() -> None:
    found = space(steps={"scale": {"fixed": {"factor": 0.5}}})
    assert [p.name for p in found.parameters] == ["model.weight.maths", "model.weight.japanese"]
    assert found.decode(np.array([1.0, 1.0])).blends[0].steps == (BlendStep(name="scale", parameters={"factor": 0.5}),)
    assert [mark.genome for mark in found.baselines()][:-1] == [None] * 4  # a change that is halved is no source


def test_baselines_have_no_steps_and_are_points_where_steps_change_nothing() -> None:
    plain, stepped = list(space().baselines()), list(space(steps={"scale": {}}, profile="lines").baselines())
    assert [mark.recipe for mark in stepped] == [mark.recipe for mark in plain]
    for mark, without in zip(stepped, plain, strict=True):
        assert mark.genome is not None
        assert without.genome is not None
        assert mark.genome.tolist() == [*without.genome, 1.0, 1.0, 1.0]
    out_of_reach = space(steps={"scale": {"bounds": {"factor": [0.1, 0.9]}}}).baselines()
    assert [mark.genome for mark in out_of_reach][:-1] == [None] * 4


def test_a_method_without_a_base_has_it_for_its_steps_alone() -> None:
    found = space(method="linear", steps={"scale": {}})
    with_step, without = found.decode(np.array([1.0, 1.0, 0.5])), found.decode(np.array([1.0, 1.0, 1.0]))
    assert with_step.blends[0].base == "base"
    assert without.hash == space(method="linear").decode(np.array([1.0, 1.0])).hash


@pytest.mark.parametrize(
    ("settings", "place", "words"),
    [
        ({"steps": {"scal": {}}}, "space.steps.scal", "Did you mean 'scale'"),
        ({"steps": {"scale": {"bounds": {"size": [0, 1]}}}}, "space.steps.scale.bounds.size", "it has: factor"),
        ({"steps": {"scale": {"bounds": {"factor": [1, 0]}}}}, "space.steps.scale.bounds.factor", "not below"),
        ({"steps": {"scale": {"fixed": {"factor": -1}}}}, "space.steps.scale.fixed.factor", "from 0 to 10000"),
        (
            {"steps": {"scale": {"fixed": {"factor": 1}, "bounds": {"factor": [0, 1]}}}},
            "space.steps.scale.fixed.factor",
            "given bounds as well",
        ),
        ({"profile": "lines", "granularity": "layer"}, "space.profile", "granularity layer there are several"),
        ({"steps": {"scale": {}}, "method": "linear", "base": None}, "base", "step scale changes what is added"),
        ({"profile": "lines", "method": "linear", "base": None}, "base", "a profile scales what layers add"),
        ({"fixed": {"weight": 1.0}}, "space.fixed", "nothing to search"),
        ({"profile": {"cosines": 3}, "granularity": 2}, "space.profile", "granularity 2 there are several"),
        ({"profile": {"cosines": 6}}, "space.profile.cosines", "is 6, but the sources have 5 layers"),
        (
            {"profile": {"cosines": 3}, "method": "model_stock"},
            "space.profile.cosines",
            "model_stock has none for each",
        ),
        ({"profile": {"cosines": 3}, "method": "slerp"}, "space.profile.cosines", "slerp has none for each source"),
        (
            {"profile": {"cosines": 3}, "method": ["ties", "model_stock"]},
            "space.profile.cosines",
            "model_stock has none for each source",
        ),
        ({"profile": {"cosines": 3}, "fixed": {"weight": 1.0}}, "space.fixed.weight", "whose curves are searched"),
    ],
)
def test_what_is_wrong_with_steps_is_told_with_its_place(settings: dict[str, object], place: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        space(**settings)  # type: ignore[arg-type]
    assert refused.value.place == place


def test_steps_alone_may_be_searched() -> None:
    assert [p.name for p in space(fixed={"weight": 1.0}, profile="lines").parameters] == [
        "profile.first",
        "profile.last",
    ]


# ---- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0.2, 1.8), (1.5, 0.5), (0.7, 0.7), (1.0, 1.0)])
def test_a_profile_of_lines_is_linear_over_depth(first: float, last: float) -> None:
    """Against LiNeS's formula: alpha + beta l / (L - 1), and alpha outside of the layers."""
    decoded = space(profile="lines").decode(np.array([0.4, 0.6, first, last]))
    alpha, beta = first, last - first

    def factor(number: int) -> float:
        steps = decoded.blends[number].steps
        return float(steps[-1].parameters["factor"]) if steps else 1.0

    for number, hop in enumerate(decoded.hops):
        assert factor(hop.attention) == pytest.approx(alpha + beta * number / (LAYERS - 1), abs=1e-12)
        assert hop.attention == hop.mlp == hop.norm
    assert {factor(decoded.embedding), factor(decoded.norm), factor(decoded.head)} == {alpha}


def test_a_profile_of_ones_is_no_profile() -> None:
    with_profile = space(profile="lines").decode(np.array([0.4, 0.6, 1.0, 1.0]))
    assert with_profile == space().decode(np.array([0.4, 0.6]))


def test_a_profile_scales_after_all_steps() -> None:
    decoded = space(profile="lines", steps={"scale": {}}).decode(np.array([0.4, 0.6, 0.9, 0.5, 0.5]))
    assert [step.parameters["factor"] for step in decoded.blends[0].steps] == [0.9, 0.5]


def test_a_profile_is_told_in_one_line() -> None:
    decoded = space(profile="lines").decode(np.array([0.4, 0.6, 0.5, 1.5]))
    assert decoded.lines() == [
        "the whole model: task_arithmetic of maths, japanese on base; weight maths 0.4, japanese 0.6; lambda 1; "
        "then scale by factor 0.5 (embedding; norm; head; layer 0), 0.75 (layer 1), 1 (layer 2), 1.25 (layer 3), "
        "1.5 (layer 4)"
    ]
