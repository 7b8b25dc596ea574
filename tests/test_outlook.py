"""What a budget buys: the formulas by hand, and that doing what is advised ends the advice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import evomerge, search_file

from evomerge.report.outlook import (
    Outlook,
    largest_error,
    learnable,
    least_difference,
    luck_of_the_best,
    outlook_lines,
    parameters_by_granularity,
    rungs_for,
)
from evomerge.report.plan import expected
from evomerge.search.preparing.prepare import prepare
from evomerge.search.settings.search_file import load_search_file


def test_the_largest_error_is_that_of_coins() -> None:
    assert largest_error(100) == pytest.approx(0.05)
    coins = np.random.RandomState(0).binomial(150, 0.5, 100_000) / 150
    assert largest_error(150) == pytest.approx(coins.std(), rel=0.01)


@pytest.mark.parametrize("candidates", [5, 20, 1000])
def test_the_luck_of_the_best_of_equals(candidates: int) -> None:
    drawn = np.random.RandomState(0).standard_normal((4000, candidates)).max(axis=1).mean()
    assert luck_of_the_best(candidates, 0.03) == pytest.approx(0.03 * drawn, rel=0.05)
    assert luck_of_the_best(1, 0.03) == 0.0


def test_a_difference_that_is_told_from_none() -> None:
    # 1.96 sqrt(0.4 / 500)
    assert least_difference(500, 0.4, 0.975) == pytest.approx(1.959964 * math.sqrt(0.0008), rel=1e-6)


@pytest.mark.parametrize(("candidates", "steps", "covariances"), [(9, 0, 1), (100, 10, 5), (1000, 100, 15)])
def test_what_so_many_candidates_learn(candidates: int, steps: int, covariances: int) -> None:
    assert learnable(candidates) == (steps, covariances)


def test_parameters_at_every_granularity_are_those_of_the_space() -> None:
    from test_parameter_space import LAYERS, build

    sizes = parameters_by_granularity(LAYERS, 3, 4)
    assert list(sizes) == ["block", "layer", "2", "model"]
    for name, count in sizes.items():
        granularity = int(name) if name.isdigit() else name
        assert len(build(method="ties", granularity=granularity).parameters) == count


@pytest.mark.parametrize(
    ("items", "rungs"), [(60, []), (99, []), (100, [25, 75]), (250, [25, 75]), (500, [50, 150]), (7000, [700, 2100])]
)
def test_rungs(items: int, rungs: list[int]) -> None:
    assert rungs_for(items) == rungs


def _outlook(folder: Path, *settings: str) -> Outlook:
    return expected(prepare(load_search_file(search_file(folder), settings)))


SHIPPED = Path(__file__).parents[1] / "evaluators" / "tasks" / "data"
LARGE = ("objectives.mini_translate_ja.search=validation[:200]", "budget.candidates=205")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (("space.granularity=block",), "space.granularity"),  # 28 parameters for 200 candidates
        (("space.granularity=model", "racing.rungs=[25, 75]"), "space.granularity"),  # 2
        (("space.granularity=model", "budget.candidates=15"), "budget.candidates"),
        (("optimizer.population=100", "racing.rungs=[25, 75]"), "optimizer.population"),
        (("space.granularity=layer",), "racing.rungs"),
        (("racing.rungs=[10, 75]", "space.granularity=layer"), "racing.rungs"),
    ],
)
def test_what_is_advised_ends_the_advice(settings: tuple[str, ...], key: str, tmp_path: Path) -> None:
    before = {advice.key: advice.value for advice in _outlook(tmp_path, *LARGE, *settings).advice}
    assert key in before
    after = _outlook(tmp_path, *LARGE, *settings, f"{key}={before[key]}")
    assert key not in {advice.key for advice in after.advice}


def test_a_proxy_is_advised_where_there_are_many_parameters_and_a_gradient(tmp_path: Path) -> None:
    def keys(*settings: str) -> set[str]:
        return {advice.key for advice in _outlook(tmp_path, *LARGE, "space.granularity=block", *settings).advice}

    assert keys() >= {"proxy", "space.granularity"}
    assert not keys(f"proxy={{file: {SHIPPED / 'mini_math_ja.search.jsonl'}}}") & {"proxy", "space.granularity"}
    assert "proxy" not in keys("space.method=gram")
    assert "proxy" not in keys("mode=asynchronous")


def test_numbers_stand_in_the_plan_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("validate", search_file(tmp_path), "--json") == 0
    content = json.loads(capsys.readouterr().out)
    outlook = Outlook.model_validate(content["outlook"])
    # 13 candidates, five of them baselines; 24 search items and 40 held out
    assert (outlook.candidates, outlook.population, outlook.generations) == (8, 4, 2)
    assert outlook.search_error == pytest.approx(0.5 / math.sqrt(24))
    rows = [(row["key"], row["text"]) for row in content["rows"]]
    setup = prepare(load_search_file(search_file(tmp_path))).setup
    assert set(outlook_lines(setup, outlook)) <= set(rows)
    assert sum(key in ("precision", "generations", "advice") for key, _ in rows) <= 6


def test_who_learns_no_steps_is_told_of_none(tmp_path: Path) -> None:
    outlook = _outlook(tmp_path, "optimizer={name: random}", "space.granularity=block")
    assert outlook.learns_steps is None
    assert [advice.key for advice in outlook.advice] == []


def test_counted_objectives_have_no_error(tmp_path: Path) -> None:
    layers = "objectives={size: {evaluator: cost, metric: layers}}"
    outlook = _outlook(tmp_path, layers, "space={kind: data_flow_space}", "optimizer={name: catcma}")
    assert outlook.search_error is None
    assert isinstance(outlook.candidates, int)


def test_without_candidates_nothing_is_said_of_generations(tmp_path: Path) -> None:
    outlook = _outlook(tmp_path, "budget={hours: 1}")
    assert (outlook.candidates, outlook.generations, outlook.learns_steps) == (None, None, None)


@pytest.mark.parametrize(
    ("candidates", "steps", "covariances", "words"),
    [
        (0, 0, 0, "none: the baselines use up the budget, and nothing is searched"),
        (1, 0, 0, "0 of 8: 1 candidate beyond the baselines, too few to learn a step size (a rule of thumb)"),
        (16, 1, 2, "2 of 8: 16 candidates beyond the baselines, enough to learn about 1 step size, or the covariances "
            "of 2 parameters (a rule of thumb)"),
        (16, None, None, "2 of 8: 16 candidates beyond the baselines"),
    ],
)  # fmt: skip
def test_generations_in_words(
    candidates: int, steps: int | None, covariances: int | None, words: str, tmp_path: Path
) -> None:
    setup = prepare(load_search_file(search_file(tmp_path))).setup
    outlook = Outlook(
        search_error=None, luck=None, held_out_difference=None, candidates=candidates, population=8,
        generations=candidates / 8, learns_steps=steps, learns_covariances=covariances, advice=[],
    )  # fmt: skip
    assert ("generations", words) in outlook_lines(setup, outlook)
