"""The Pareto front against plain formulas: every pair compared, every unit cell counted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from evomerge.front import extend_front, hypervolume, knee, nondominated

# Few distinct values, so that ties and duplicates are common, as they are among scores of few items.
value = st.sampled_from([0.0, 0.25, 0.5, 1.0, -2.0, math.inf, math.nan])


@st.composite
def loss_tables(draw: st.DrawFn) -> NDArray[np.float64]:
    width = draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(value, min_size=width, max_size=width), max_size=12))
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def slow_front(losses: NDArray[np.float64]) -> list[bool]:
    """A row is kept when it is finite, no row beats it, and no earlier row equals it."""
    finite = [all(map(math.isfinite, row)) for row in losses.tolist()]

    def beaten(i: int, j: int) -> bool:
        a, b = losses[i], losses[j]
        return finite[j] and bool((b <= a).all() and ((b < a).any() or j < i))

    return [finite[i] and not any(beaten(i, j) for j in range(len(losses))) for i in range(len(losses))]


@given(loss_tables())
def test_front_equals_comparing_every_pair(losses: NDArray[np.float64]) -> None:
    assert nondominated(losses).tolist() == slow_front(losses)


@given(loss_tables(), st.randoms(use_true_random=False), st.integers(1, 4))
def test_front_grows_to_the_same_in_any_order(losses: NDArray[np.float64], random: Random, size: int) -> None:
    numbers = list(range(len(losses)))
    random.shuffle(numbers)
    front: dict[int, Sequence[float]] = {}
    for start in range(0, len(numbers), size):
        front = extend_front(front, {n: losses[n].tolist() for n in numbers[start : start + size]})
    assert list(front) == [number for number, kept in enumerate(slow_front(losses)) if kept]
    assert all(front[number] == losses[number].tolist() for number in front)


def test_nothing_has_an_empty_front() -> None:
    assert nondominated(np.empty((0, 2))).tolist() == []
    assert extend_front({}, {}) == {}
    assert extend_front({}, {3: [math.inf, math.inf]}) == {}
    assert hypervolume(np.empty((0, 2)), np.ones(2)) == 0.0


def test_knee_is_the_bend() -> None:
    # Two ends, a dominated row, two rows below the line between the ends, and a failed one.
    losses = np.array([[0.0, 10.0], [1.0, 0.0], [0.9, 11.0], [0.2, 3.0], [0.6, 2.5], [math.inf, math.inf]])
    assert knee(losses) == 3


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_knee_is_farthest_below_the_line_through_the_ends(points: list[tuple[float, float]]) -> None:
    losses = np.array(points)
    rows = [i for i, kept in enumerate(slow_front(losses)) if kept]
    first = min(rows, key=lambda i: float(losses[i][0]))
    last = min(rows, key=lambda i: float(losses[i][1]))
    (x0, y0), (x1, y1) = losses[first], losses[last]
    if first == last or (x1 - x0) * (y0 - y1) < 1e-9:
        return  # one best point, or a line that floats cannot tell from an axis

    def below(i: int) -> float:  # signed area, so independent of the scale of either objective
        x, y = losses[i]
        return float((x1 - x) * (y0 - y1) - (y - y1) * (x1 - x0))

    assert knee(losses) in rows
    assert below(knee(losses)) >= max(below(i) for i in rows) - 1e-9


def test_knee_of_one_objective_is_the_best() -> None:
    assert knee(np.array([[0.5], [math.nan], [0.1], [0.1]])) == 2


def test_knee_without_finite_losses_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        knee(np.full((2, 2), math.inf))


@given(st.integers(1, 3).flatmap(lambda m: st.lists(st.tuples(*[st.integers(0, 5)] * m), min_size=1, max_size=8)))
def test_hypervolume_counts_unit_cells(points: list[tuple[int, ...]]) -> None:
    width = len(points[0])
    cells = itertools.product(range(4), repeat=width)  # the reference is 4 in every objective
    covered = sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)
    losses = np.array([*points, (math.inf,) * width], dtype=np.float64)
    assert hypervolume(losses, np.full(width, 4.0)) == pytest.approx(covered)
