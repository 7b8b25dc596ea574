"""What counts as rounding between scores recorded and scores of the exported model, and what does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_miniature import ROOT, evomerge, search_file

from evomerge.commands.changed import _Rescoring
from evomerge.commands.verifying import Tolerance, difference, measures_of

BF16 = Tolerance.of(torch.bfloat16)
RNG = np.random.default_rng(0)
LIKELIHOODS = -np.abs(RNG.normal(1.0, 0.3, 60)).astype(np.float32)
RIGHT = (RNG.random(60) < 0.6).astype(np.float32)


def moved(values: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    return (values + by).astype(np.float32)


def flipped(values: np.ndarray, items: list[int]) -> np.ndarray:
    found = values.copy()
    found[items] = 1 - found[items]
    return found


@pytest.mark.parametrize(
    ("measures", "number", "words"),
    [
        ([("maths", 0), ("json", 1)], 1, "json (my_score)"),  # two functions of one name
        ([("maths", 0), ("short", 0)], 0, "maths, short (my_score)"),
        ([("my_score", 0), ("short", 0)], 0, "my_score, short"),
        ([("maths", 0)], 1, "my_score"),  # a screen measures nothing
    ],
)
def test_what_was_verified_is_called_by_its_objectives(
    measures: list[tuple[str, int]], number: int, words: str
) -> None:
    setup = SimpleNamespace(measures=[SimpleNamespace(name=name, evaluator=at) for name, at in measures])
    prepared: Any = SimpleNamespace(setup=setup, evaluators=[SimpleNamespace(name="my_score")] * 2)
    assert measures_of(prepared, number) == words


def test_equal_scores_differ_nowhere() -> None:
    found = difference(LIKELIHOODS, LIKELIHOODS, BF16)
    assert (found.items, found.beyond, found.largest, found.shift, found.is_rounding) == (0, 0, 0.0, 0.0, True)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0], ids=["per token", "sums", "rewards"])
def test_noise_of_the_dtype_is_rounding_in_any_unit(scale: float) -> None:
    noise = RNG.normal(0, 0.006, 60) * scale
    assert difference(moved(scale * LIKELIHOODS, noise), scale * LIKELIHOODS, BF16).is_rounding
    assert not difference(
        moved(scale * LIKELIHOODS, noise), scale * LIKELIHOODS, Tolerance.of(torch.float32)
    ).is_rounding


@pytest.mark.parametrize("shift", [-0.05, 0.02, 0.2])
def test_a_shift_of_the_mean_is_another_model(shift: float) -> None:
    assert not difference(moved(LIKELIHOODS, shift + RNG.normal(0, 0.006, 60)), LIKELIHOODS, BF16).is_rounding


def test_large_differences_of_many_items_are_another_model() -> None:
    noise = RNG.normal(0, 0.2, 60)
    assert not difference(moved(LIKELIHOODS, noise - noise.mean()), LIKELIHOODS, BF16).is_rounding


def test_few_items_right_or_wrong_may_flip() -> None:
    wrong, right = np.flatnonzero(RIGHT == 0).tolist(), np.flatnonzero(RIGHT == 1).tolist()
    assert difference(flipped(RIGHT, [wrong[0], right[0], right[1]]), RIGHT, BF16).is_rounding
    assert not difference(flipped(RIGHT, [*wrong[:2], *right[:2]]), RIGHT, BF16).is_rounding


def test_flips_to_one_side_are_another_model() -> None:
    before = np.tile(np.float32([0, 1]), 150)
    assert not difference(flipped(before, list(range(1, 27, 2))), before, BF16).is_rounding


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_items_may_round_too(count: int) -> None:
    before = LIKELIHOODS[:count]
    assert difference(moved(before, 0.003), before, BF16).is_rounding
    assert not difference(moved(before, 0.3), before, BF16).is_rounding


def test_the_winner_of_a_raced_likelihood_in_bfloat16_is_exported_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ROOT / "evaluators" / "tasks" / "data"
    file = search_file(
        tmp_path,
        objectives={
            "likely": {
                "evaluator": "likelihood", "metric": "log_likelihood", "items": 24,
                "file": str(data / "mini_math_ja.search.jsonl"), "held_out": 0.05,
            }
        },
        racing={"rungs": [10]}, dtype="bfloat16", budget={"candidates": 8}, confirm={"top": 1},
    )  # fmt: skip
    assert evomerge("search", file, "--dir", tmp_path / "out") == 0
    assert evomerge("export", tmp_path / "out", tmp_path / "model") == 0
    assert "24 search items score exactly as recorded" in capsys.readouterr().out
    assert "score exactly as recorded" in (tmp_path / "model" / "README.md").read_text()
    assert evomerge("export", tmp_path / "out", tmp_path / "unseen", "--no-verify") == 0
    assert "Not verified" in (tmp_path / "unseen" / "README.md").read_text()


@pytest.mark.parametrize(
    ("together", "dtype", "computed"),
    [
        (1, None, torch.bfloat16),
        (1, "float32", torch.float32),
        (4, None, torch.float32),
        (4, "bfloat16", torch.float32),
    ],
)
def test_what_is_scored_again_is_held_to_the_dtype_that_it_is_computed_in(
    together: int, dtype: str | None, computed: torch.dtype
) -> None:
    file = SimpleNamespace(together=together, dtype=dtype, tokenizer_source="a")
    prepared: Any = SimpleNamespace(file=file, sources={"a": SimpleNamespace(dtype=torch.bfloat16)})
    store: Any = None
    assert _Rescoring(Path(), prepared, store)._tolerance == Tolerance.of(computed)
