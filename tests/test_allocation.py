"""Which experts live where and what tokens are given of them, as text and as a picture."""

from __future__ import annotations

import math

import pytest

from evomerge.recipes.routed import LayerGroup, RoutedRecipe, Router
from evomerge.recipes.use import BASE, ExpertUse
from evomerge.report.allocation import allocation_lines, entropy_at, share_at
from evomerge.service.figures.experts import experts
from evomerge.service.figures.style import words_of

RECIPE = RoutedRecipe(
    sources={"base": "b", "maths": "b+m", "ja": "b+j"},
    tokenizer="base",
    fit="f" * 16,
    base="base",
    experts=("maths", "ja"),
    groups=(
        LayerGroup(layers=2, experts=("maths", "ja"), top_k=1),
        LayerGroup(layers=1, experts=("ja",)),
        LayerGroup(layers=1, experts=()),
    ),
)
USES = {
    "sums": ExpertUse(
        experts=("maths", "ja"), tokens=40, shares=((0.9, 0.1), (0.7, 0.3), (0.0, 1.0), ()),
        entropy=(0.2, 0.4, 0.0, None),
    ),
    "words": ExpertUse(
        experts=("maths", "ja"), tokens=60, shares=((0.1, 0.9), (0.5, 0.5), (0.0, 1.0), ()),
        entropy=(0.0, 0.6, 0.0, None),
    ),
}  # fmt: skip


def test_a_layer_has_the_mean_of_the_tasks() -> None:
    assert share_at(USES, 0, 0) == pytest.approx(0.5)
    assert share_at(USES, 1, 1) == pytest.approx(0.4)
    assert share_at(USES, 3, 0) is None
    assert entropy_at(USES, 1) == pytest.approx(0.5)
    assert entropy_at(USES, 3) is None


def test_the_terminal_draws_layers_by_experts_and_then_tasks() -> None:
    title, head, *rows = allocation_lines(RECIPE, USES)
    assert "share" in title
    assert head.split() == ["maths", "ja", "entropy"]
    assert [row.split() for row in rows] == [
        ["layer", "0", "50%", "50%", "0.10"],
        ["layer", "1", "60%", "40%", "0.50"],
        ["layer", "2", "·", "100%", "0.00"],
        ["layer", "3", "·", "·"],
        ["sums", "53%", "47%", "0.20"],
        ["words", "20%", "80%", "0.20"],
    ]
    ends = {row.index("%") for row in rows[:2]}
    assert len(ends) == 1  # one column under the other
    assert all(len(line) <= 100 for line in rows)


def test_what_was_not_scored_yet_shows_where_experts_live() -> None:
    _, head, *rows = allocation_lines(RECIPE, {})
    assert head.split() == ["maths", "ja"]
    assert [row.split()[2:] for row in rows] == [["lives", "lives"], ["lives", "lives"], ["·", "lives"], ["·", "·"]]


def test_abstaining_is_a_column_of_its_own() -> None:
    recipe = RECIPE.model_copy(update={"router": Router(base_expert=True)})
    _, head, first, *_, last = allocation_lines(recipe, {})
    assert BASE in head
    assert first.split()[2:] == ["lives"] * 3
    assert last.split()[2:] == ["·"] * 3


def test_the_picture_has_a_cell_for_each_layer_and_expert() -> None:
    drawn = experts(RECIPE, USES)
    (cells,) = drawn.data
    assert list(cells.y) == ["layer 0", "layer 1", "layer 2", "layer 3", "sums", "words"]
    assert list(cells.x) == ["maths", "ja"]
    assert list(cells.z[0]) == pytest.approx([0.5, 0.5])
    assert math.isnan(cells.z[2][0])
    assert all(map(math.isnan, cells.z[3]))
    assert list(cells.z[4]) == pytest.approx(USES["sums"].mean_shares)
    assert "top 1" in cells.text[0][0]
    words = words_of(drawn)
    assert "entropy of 0.20; 0.69 would be even" in words
    assert "Shares vary by 0.00 within" in words


def test_the_picture_of_what_was_not_scored_says_so() -> None:
    (cells,) = experts(RECIPE, {}).data
    assert list(cells.z[0]) == [0.5, 0.5]
    assert list(cells.z[2])[1] == 1.0
    assert "not measured yet" in words_of(experts(RECIPE, {}))
