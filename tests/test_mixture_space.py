"""The search space of mixtures: its genome, its baselines, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.errors import InputError
from evomerge.method import find_method
from evomerge.recipes.mixture import MixtureRecipe
from evomerge.recipes.stack import StackRecipe
from search_spaces.base import SpaceContext
from search_spaces.mixture_space import MixtureSpace, MixtureSpaceSettings


def space(context: dict[str, Any] | None = None, **settings: Any) -> MixtureSpace:
    given: dict[str, Any] = {
        "sources": {name: f"/models/{name}" for name in ("base", "maths", "japanese")},
        "base": "base", "tokenizer": "base", "layers": 4, "tied": True, "recipe_seed": 0, "dtype": None,
        "fit": "of the items", "method": lambda name: find_method(name, "space.method"),
    }  # fmt: skip
    asked = {"kind": "mixture", "architecture": "mixtral", **settings}
    return MixtureSpaceSettings.model_validate(asked).build(SpaceContext(**given | (context or {})))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 3 * 2 + 1 + 1),
        ({"top_k": 2}, 7),  # two slots of two sources, the rest, one temperature
        ({"groups": 2, "embedding": True}, 4 * 2 + 2 + 1),
        (
            {"architecture": "glm4_moe", "bias": True, "groups": 2, "slots": ["base", "maths", "japanese"]},
            4 * 2 + 6 + 1,
        ),
    ],
)
def test_how_many_numbers_there_are(settings: dict[str, Any], count: int) -> None:
    found = space(**settings)
    assert len(found.parameters) == count
    assert len({parameter.name for parameter in found.parameters}) == count


def test_a_genome_says_blends_temperatures_biases_and_top_k() -> None:
    found = space(architecture="glm4_moe", bias=True, groups=3, embedding=True)
    values = {
        "experts.maths.weight.maths": 0.9, "experts.maths.weight.japanese": 0.1, "experts.japanese.weight.maths": 0.2,
        "experts.japanese.weight.japanese": 0.8, "rest.weight.maths": 0.5, "rest.weight.japanese": 0.6,
        "embedding.weight.maths": 0.3, "embedding.weight.japanese": 0.4, "router.0.log_temperature": 1.0,
        "router.1.log_temperature": 0.0, "router.2.log_temperature": -1.0, "router.0.bias.japanese": 0.25,
        "router.1.bias.japanese": 0.0, "router.2.bias.japanese": -0.5, "router.top_k": 1.0,
    }  # fmt: skip
    genome = np.array([values[parameter.name] for parameter in found.parameters])
    recipe = found.decode(genome)
    assert [group.layers for group in recipe.groups] == [2, 1, 1]
    assert [group.temperature for group in recipe.groups] == [10.0, 1.0, 0.1]
    assert [group.bias["japanese"] for group in recipe.groups] == [0.25, 0.0, -0.5]
    assert recipe.top_k == 1
    slot = recipe.blends[recipe.groups[1].slots["japanese"]]
    assert slot.parameters["weight"] == {"maths": 0.2, "japanese": 0.8}
    assert recipe.blends[recipe.rest].parameters["weight"] == {"maths": 0.5, "japanese": 0.6}
    assert recipe.blends[recipe.embedding].parameters["weight"] == {"maths": 0.3, "japanese": 0.4}
    again = found.genome_of(recipe)
    assert again is not None
    assert again == pytest.approx(genome)
    assert found.decode(again).hash == recipe.hash


def test_all_candidates_share_the_rows_of_one_router() -> None:
    found = space()
    random = np.random.default_rng(0)
    low, high = (np.array([getattr(p, end) for p in found.parameters]) for end in ("low", "high"))
    said = set()
    for _ in range(20):
        genome = low + random.random(len(low)) * (high - low)
        genome[-1] = round(genome[-1])
        reference = found.decode(genome).reference_mixture()
        router = reference.router
        blends = [reference.blends[number].model_dump_json() for number in (router.rest, *router.slots.values())]
        said.add((tuple(router.slots), *blends, reference.top_k, reference.fit))
    assert len(said) == 1


def test_baselines_are_sources_their_average_and_pure_experts() -> None:
    found = space()
    marks = list(found.baselines())
    labels = [mark.label for mark in marks]
    assert labels == [
        "base",
        "maths",
        "japanese",
        "uniform average",
        "pure experts, top 1",
        "pure experts, all of them",
    ]
    assert all(isinstance(mark.recipe, StackRecipe) for mark in marks[:4])
    for mark in marks[4:]:
        assert mark.genome is not None
        assert isinstance(mark.recipe, MixtureRecipe)
        assert mark.recipe.hash == found.decode(mark.genome).hash
        slots = mark.recipe.groups[0].slots
        weights = [mark.recipe.blends[slots[name]].parameters["weight"] for name in ("maths", "japanese")]
        assert weights == [{"maths": 1.0, "japanese": 0.0}, {"maths": 0.0, "japanese": 1.0}]


def test_pure_experts_are_there_where_the_method_has_no_such_point() -> None:
    marks = list(space(method="ties", fixed={"density": 0.2}).baselines())
    pure = marks[-1]
    assert pure.genome is None
    assert isinstance(pure.recipe, MixtureRecipe)
    assert {blend.method for blend in pure.recipe.blends} == {"linear"}


def test_without_a_base_blends_are_sums() -> None:
    sources = {"maths": "/m", "japanese": "/j"}
    found = space({"sources": sources, "base": None, "tokenizer": "maths"})
    recipe = found.decode(np.array([parameter.default for parameter in found.parameters]))
    assert {blend.method for blend in recipe.blends} == {"linear"}


@pytest.mark.parametrize(
    ("context", "settings", "said"),
    [
        ({"fit": None}, {}, "is fitted, and there is nothing to fit it to"),
        ({}, {"router": "prototypes"}, "there are no texts to take them from"),
        ({}, {"top_k": 3}, "is 3, but there are 2 slots"),
        ({}, {"slots": ["maths", "kanji"]}, "there is no source 'kanji'"),
        ({}, {"slots": ["maths", "maths"]}, "names a source twice"),
        ({}, {"slots": ["maths"]}, "a mixture has 2 to 8 experts"),
        ({}, {"bias": True}, "routers of a mixtral have none"),
        ({}, {"groups": 5}, "is 5, but the sources have 4 layers"),
        ({}, {"bounds": {"wieght": [0, 1]}}, "wieght"),
        ({"base": None}, {"method": "task_arithmetic"}, "needs a base"),
        ({}, {"method": "fitted"}, "is fitted to whole models"),
    ],
)
def test_what_cannot_be_searched(context: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        space(context, **settings)
