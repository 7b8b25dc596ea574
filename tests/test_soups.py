"""The greedy soup: the contract of optimizers, recipe 1 of the paper written out, and a search from its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import MINIATURES, evomerge, json_of, search_file
from hypothesis import given, strategies

from evomerge.errors import InputError
from evomerge.genome import Genome, Parameter
from evomerge.optimizers import Observation, SoupSettings
from evomerge.optimizers.base import Optimizer, Settings
from evomerge.optimizers.soups import GreedySoup
from evomerge.testing.optimizers import OptimizerContract, bits, inside

SETTINGS = SoupSettings(name="greedy_soup")
Members = tuple[int, ...]


def weights(count: int, low: float = 0.0, high: float = 1.5, group: str = "model") -> list[Parameter]:
    return [Parameter(f"{group}.weight.s{i}", low, high, 1.0, group=group, share_of=f"s{i}") for i in range(count)]


class TestGreedySoup(OptimizerContract):
    space = weights(5)

    @pytest.fixture
    def settings(self) -> Settings:
        return SETTINGS

    def test_stays_inside_the_bounds(self, settings: Settings) -> None:
        for count in range(2, 7):
            optimizer = settings.build(weights(count, 0.0, 1.0), 1, 0)
            while optimizer.stopped is None:
                genomes = optimizer.ask(optimizer.population)
                assert all(inside(genome, weights(count, 0.0, 1.0)) for genome in genomes)
                optimizer.tell([Observation(g, [float(g[0])]) for g in genomes])

    def test_reaches_every_value_of_int_and_choice(self, make: Callable[..., Optimizer]) -> None:
        with pytest.raises(InputError, match=r"model\.weight\.s0 is something else"):
            SETTINGS.check([Parameter("model.weight.s0", 0, 1, 0, kind="int", group="model")], 1, "optimizer")

    def test_the_seed_decides(self, make: Callable[..., Optimizer]) -> None:
        """Nothing: there is one greedy soup."""
        assert bits(self._drive(make(5))) == bits(self._drive(make(6)))

    def test_survives_generations_that_all_failed(self, make: Callable[..., Optimizer]) -> None:
        optimizer = make()
        optimizer.tell([Observation(genome, [np.inf]) for genome in optimizer.ask(optimizer.population)])
        assert optimizer.stopped == "greedy_soup has no source that could be scored"
        assert all(inside(genome, self.space) for genome in optimizer.ask(3))

    def test_survives_generations_that_are_all_equal(self, make: Callable[..., Optimizer]) -> None:
        """A score that does not fall is enough to stay, so all are in."""
        optimizer = make()
        while optimizer.stopped is None:
            optimizer.tell([Observation(genome, [0.25]) for genome in optimizer.ask(optimizer.population)])
        assert optimizer.ask(1)[0].tolist() == [0.2] * 5


# --- recipe 1


def members(genome: Genome) -> Members:
    """The sources of a soup; it is the mean of them."""
    found = tuple(np.flatnonzero(genome).tolist())
    assert genome[list(found)].tolist() == [1 / len(found)] * len(found)
    return found


def recipe_1(count: int, accuracy: Callable[[Members], float]) -> tuple[set[int], set[Members]]:
    """Wortsman et al., recipe 1, line by line: the soup, and all that was scored on the way."""
    scored = {(i,) for i in range(count)}
    order = sorted(range(count), key=lambda i: -accuracy((i,)))
    ingredients: set[int] = set()
    for i in order:
        trial = tuple(sorted(ingredients | {i}))
        scored.add(trial)
        if not ingredients or accuracy(trial) >= accuracy(tuple(sorted(ingredients))):
            ingredients.add(i)
    return ingredients, scored


def finished(optimizer: GreedySoup, accuracy: Callable[[Members], float], at_once: int = 0) -> list[Members]:
    """Search to the end; what was asked for. ``at_once``: so many a time, whatever the optimizer wants."""
    asked: list[Members] = []
    for _ in range(100):
        if optimizer.stopped is not None:
            return asked
        genomes = optimizer.ask(at_once or optimizer.population)
        asked += [members(genome) for genome in genomes]
        optimizer.tell([Observation(genome, [-accuracy(members(genome))]) for genome in reversed(genomes)])
    raise AssertionError("does not end")


def table(count: int, values: Sequence[int]) -> Callable[[Members], float]:
    """Accuracies in tenths, so that many are equal, one for each soup of ``count`` sources."""
    return lambda soup: values[sum(1 << i for i in soup) - 1] / 10


@given(
    count=strategies.integers(2, 5),
    values=strategies.lists(strategies.integers(0, 9), min_size=31, max_size=31),
    at_once=strategies.integers(0, 3),
)
def test_finds_the_soup_of_the_paper(count: int, values: list[int], at_once: int) -> None:
    accuracy = table(count, values)
    soup, scored = recipe_1(count, accuracy)
    optimizer = SETTINGS.build(weights(count), 1, 0)
    asked = finished(optimizer, accuracy, at_once)
    assert set(members(optimizer.ask(1)[0])) == soup
    assert scored <= set(asked)
    if not at_once:
        assert sorted(asked) == sorted(scored)  # each once, and nothing else


def test_baselines_are_not_asked_for_again() -> None:
    accuracy = table(3, [5, 7, 8, 3, 1, 6, 9])  # 0: 5, 1: 7, 01: 8, 2: 3, 02: 1, 12: 6, 012: 9
    optimizer = SETTINGS.build(weights(3), 1, 0)
    known = [(0,), (1,), (2,), (0, 1, 2)]
    told = [Observation(np.array([(i in soup) / len(soup) for i in range(3)]), [-accuracy(soup)]) for soup in known]
    optimizer.tell(told)
    assert optimizer.population == 1
    assert finished(optimizer, accuracy) == [(0, 1)]
    assert optimizer.stopped == "greedy_soup has tried every source; in the soup, in this order: s1, s0, s2"


def test_a_failed_source_or_mean_is_left_out() -> None:
    values = [5, 7, 8, 6, 0, 9, 9]
    failed = {(0,), (1, 2)}
    optimizer = SETTINGS.build(weights(3), 1, 0)
    asked = finished(optimizer, lambda soup: -np.inf if soup in failed else table(3, values)(soup))
    assert asked == [(0,), (1,), (2,), (1, 2)]
    assert optimizer.ask(1)[0].tolist() == [0, 1, 0]


# --- settings


@pytest.mark.parametrize(
    ("parameters", "objectives", "words"),
    [
        (weights(3), 2, "takes one objective, and the search has 2. Use an optimizer for several: nsga2"),
        (weights(3, low=0.1), 1, "weights from 0 to 1, and model.weight.s0 goes from 0.1 to 1.5. Widen"),
        (weights(3, high=0.9), 1, "goes from 0 to 0.9"),
        (weights(1), 1, "needs two sources"),
        ([*weights(2), Parameter("model.density.s0", 0, 1, 1, group="model")], 1, "model.density.s0 is something else"),
        ([*weights(2), *weights(2, group="layers.1")], 1, "layers.1.weight.s0 is something else.*granularity: model"),
        ([Parameter("model.t", 0, 1, 0.5, group="model")], 1, "model.t is something else.*method: linear"),
    ],
)
def test_refuses_what_is_no_soup(parameters: list[Parameter], objectives: int, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        SETTINGS.check(parameters, objectives, "optimizer")
    assert caught.value.place == "optimizer"


# --- a search


def test_a_search_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the miniatures, interrupted by its budget and resumed: recipe 1 over the scores that it recorded."""
    file = search_file(
        tmp_path, optimizer={"name": "greedy_soup"}, space={"method": "linear"}, budget={"candidates": 6}
    )
    text = file.read_text().replace("base: base\n", "")  # the base is a source like any other
    file.write_text(text)
    assert str(MINIATURES / "base") in text
    folder = tmp_path / "search"
    assert evomerge("search", file, "--dir", folder) == 0
    assert "--set budget.candidates=N" in capsys.readouterr().out
    assert evomerge("resume", folder, "--set", "budget.candidates=20") == 0
    out = capsys.readouterr().out
    assert "greedy_soup has tried every source" in out
    assert "--set" not in out  # no budget makes it go on
    rows = json_of(capsys, "top", folder, "--all", "--json")
    scores: dict[Members, float] = {}
    for row in rows:
        if row["genome"] is not None:
            weight = np.array(list(row["genome"].values()))
            if row["origin"] == "greedy_soup" or row["label"] != "linear defaults":
                scores.setdefault(members(weight), row["scores"]["mini_translate_ja"]["mean"])
    soup, scored = recipe_1(3, scores.__getitem__)
    assert scored <= scores.keys()
    names = [name.removeprefix("model.weight.") for name in rows[0]["genome"]]
    status = json_of(capsys, "status", folder, "--json")
    assert {names[i] for i in soup} == set(status["why"].rpartition(": ")[2].split(", "))
    assert len(rows) <= 8
