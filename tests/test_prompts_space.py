"""The space of prompts: which genomes mean what, its baselines, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.method import find_method
from evomerge.recipes.base import read_recipe
from evomerge.recipes.prompts import PromptFacts, PromptRun
from search_spaces.base import SpaceContext
from search_spaces.prompts_space import PromptsSpace, PromptsSpaceSettings

SOFT = {
    "one": PromptFacts("tokens", "PROMPT_TUNING", 6, "begin"),
    "two": PromptFacts("tokens", "PROMPT_TUNING", 4, "begin"),
}


def space(prompts: dict[str, PromptFacts] = SOFT, *, context: dict[str, Any] | None = None, **settings: Any) -> Any:
    sources = {"base": "b", **{name: f"b+{name}" for name in prompts}}
    made = SpaceContext(
        **{
            "sources": sources, "base": "base", "tokenizer": "base", "layers": 2, "tied": True, "recipe_seed": 3,
            "method": lambda name: find_method(name, "space"), "dtype": None, "prompts": prompts, **(context or {}),
        }
    )  # fmt: skip
    return PromptsSpaceSettings(kind="prompts", **settings).build(made)


def run(name: str, first: int, rows: int) -> PromptRun:
    return PromptRun(weights={name: 1.0}, first=first, rows=rows)


def decoded(made: PromptsSpace, *choices: str, weights: tuple[float, ...] = ()) -> tuple[PromptRun, ...]:
    names = list(made.parameters[0].choices)
    blocks = sum(parameter.kind == "choice" for parameter in made.parameters)
    filled = [*choices, *["none"] * (blocks - len(choices))]
    return made.decode(np.array([*(float(names.index(choice)) for choice in filled), *weights])).runs


def test_a_prompt_goes_on_where_it_was_left_and_then_ends() -> None:
    made = space(block=2)
    assert decoded(made, "one", "two", "none", "one", "one") == (run("one", 0, 2), run("two", 0, 2), run("one", 2, 4))
    assert decoded(made, "two", "two", "two") == (run("two", 0, 4),)
    assert decoded(made) == ()
    assert decoded(space(block=4), "one", "one") == (run("one", 0, 6),)  # the last block is shorter


def test_mixed_rows_have_a_weight_of_each_and_as_many_rows_as_all_have() -> None:
    made = space(block=4, arithmetic=True)
    mixed = PromptRun(weights={"one": 0.75, "two": 0.25}, first=0, rows=4)
    assert decoded(made, "mixed", "mixed", "one", weights=(0.75, 0.25)) == (mixed, run("one", 0, 4))
    assert [p.name for p in made.parameters if p.kind == "real"] == ["weight.one", "weight.two"]


def test_baselines_are_points_of_the_space_where_the_budget_holds_them() -> None:
    for settings, inside in (({}, 5), ({"tokens": 8}, 4)):
        made = space(arithmetic=True, **settings)
        marks = list(made.baselines())
        assert [(mark.label, mark.kind) for mark in marks] == [
            ("base", "source"), ("one", "source"), ("two", "source"), ("all prompts", "default"),
            ("mean of the prompts", "average"),
        ]  # fmt: skip
        assert sum(mark.genome is not None for mark in marks) == inside
        for mark in marks:
            assert mark.genome is None or made.decode(mark.genome).hash == mark.recipe.hash
        assert [mark.recipe.rows for mark in marks] == [0, 6, 4, 10, 4]  # type: ignore[attr-defined]
    assert [mark.label for mark in space({"one": SOFT["one"]}).baselines()] == ["base", "one"]


@given(st.data())
def test_every_genome_is_a_recipe_that_reads_back(data: st.DataObject) -> None:
    made = space(block=data.draw(st.integers(1, 5)), arithmetic=True)
    values = [
        float(data.draw(st.integers(0, int(p.high)))) if p.kind == "choice" else data.draw(st.floats(p.low, p.high))
        for p in made.parameters
    ]
    recipe = made.decode(np.array(values))
    assert read_recipe(recipe.canonical(), recipe.sources) == recipe
    assert recipe.rows <= made._blocks * made._block
    taken: dict[str, list[int]] = {}
    for part in recipe.runs:  # every row at most once, in its order
        taken.setdefault(",".join(part.weights), []).extend(range(part.first, part.first + part.rows))
    for name, rows in taken.items():
        assert rows == list(range(len(rows)))
        assert len(rows) <= (SOFT[name].rows if name in SOFT else 4)
    assert recipe.lines()


PREFIX = {"one": PromptFacts("prefix", "PREFIX_TUNING", 4), "two": PromptFacts("prefix", "PREFIX_TUNING", 4)}
RANDOM = {**SOFT, "two": PromptFacts("tokens", "PROMPT_TUNING", 4)}
BAD: dict[str, tuple[dict[str, PromptFacts], dict[str, Any], dict[str, Any], str, str]] = {
    "prefixes mixed": (PREFIX, {"arithmetic": True}, {}, "space.arithmetic", "whose rows do not correspond"),
    "began at random": (RANDOM, {"arithmetic": True}, {}, "space.arithmetic", "that of two is not known"),
    "began otherwise": (
        {**SOFT, "two": PromptFacts("tokens", "PROMPT_TUNING", 4, "end")}, {"arithmetic": True}, {},
        "space.arithmetic", "one as 'begin'; two as 'end'",
    ),
    "one alone mixed": ({"one": SOFT["one"]}, {"arithmetic": True}, {}, "space.arithmetic", "several prompts"),
    "both kinds": ({**SOFT, "two": PREFIX["two"]}, {}, {}, "space", "there are both"),
    "no base": (SOFT, {}, {"base": None}, "space", "there is none"),
    "other tokenizer": (SOFT, {}, {"tokenizer": "one"}, "space", "`base: NAME`"),
    "no prompts": ({}, {}, {}, "sources", "are no prompts"),
    "weights": (SOFT, {}, {"sources": {"base": "b", "one": "b+one", "lora": "b+l"}}, "sources.lora", "has no prompt"),
    "base with a prompt": (SOFT, {}, {"base": "one", "tokenizer": "one"}, "sources.base", "has no prompt"),
    "bad name": ({"none": SOFT["one"]}, {}, {}, "sources.none", "has another meaning"),
    "fewer than a block": (SOFT, {"tokens": 2}, {}, "space.tokens", "less than a block of 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_searched_is_refused(case: str) -> None:
    prompts, settings, context, place, words = BAD[case]
    with pytest.raises(InputError) as caught:
        space(prompts, context=context, **settings)
    assert caught.value.place == place
    assert words in str(caught.value)
