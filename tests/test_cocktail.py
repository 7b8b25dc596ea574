"""Mixes of sources by the losses of calibration texts: LM-Cocktail's and the greedy soup, as baselines of a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_miniature import MINIATURES, evomerge, short_search_file, write_texts
from helpers_search import Killed, killed_after, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.store import Store

TEXTS = 6


def cocktail_file(folder: Path, **changes: object) -> Path:
    write_texts(folder / "texts.jsonl", slice(0, TEXTS))
    texts = {"file": str(folder / "texts.jsonl"), "prompts": TEXTS, "tokens": 24}
    baselines = {"kappa": False, "soups": True}
    return short_search_file(folder, calibration=texts, baselines=baselines, budget={"candidates": 7}, **changes)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cocktail")
    assert evomerge("search", cocktail_file(folder), "--dir", folder / "search") == 0
    return folder / "search"


def plain_loss(name: str, texts: Path) -> float:
    """By transformers' own loss: the mean over texts of that over tokens."""
    model = AutoModelForCausalLM.from_pretrained(MINIATURES / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MINIATURES / name)
    losses = []
    for line in texts.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:24]])
        with torch.inference_mode():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(losses) / len(losses)


def test_weights_are_the_softmax_of_losses(searched: Path) -> None:
    losses = torch.tensor([plain_loss(name, searched.parent / "texts.jsonl") for name in ("maths", "japanese")])
    with Store.open(searched / "search.db") as store:
        said = [event.payload for event in store.events(kinds=("text loss",))]
        rows = {row.label: row for row in store.candidates(step=0)}
        sources = store.search().record.sources
    known = {" ".join(one["sources"]): one["loss"] for one in said}
    assert [known["maths"], known["japanese"]] == pytest.approx(losses.tolist(), rel=0.02)  # it computes in bfloat16
    recipe = read_recipe(rows["LM-Cocktail"].recipe, sources)
    assert isinstance(recipe, StackRecipe)
    (blend,) = recipe.blends
    expected = torch.softmax(-torch.tensor([known["maths"], known["japanese"]], dtype=torch.float64) / 5.0, 0)
    assert [blend.value("weight", name) for name in ("maths", "japanese")] == pytest.approx(expected.tolist())
    # Recipe 1 of the soups, by hand: the better one, and the other where the mean's loss is no higher.
    has_soup = known["maths japanese"] <= min(known["maths"], known["japanese"])
    assert ("greedy soup" in rows) == has_soup
    assert "uniform average" in rows


def test_a_killed_search_measures_nothing_twice(searched: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "search", cocktail_file(tmp_path)
    with killed_after(2, "text loss"), pytest.raises(Killed):
        evomerge("search", file, "--dir", folder)
    assert evomerge("resume", folder) == 0
    assert table(folder) == table(searched)
    with Store.open(folder / "search.db") as ours, Store.open(searched / "search.db") as theirs:
        said = [[event.payload for event in store.events(kinds=("text loss",))] for store in (ours, theirs)]
    assert said[0] == said[1]
