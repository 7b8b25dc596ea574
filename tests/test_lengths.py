"""The length of answers in tokens as a metric: counted of what models wrote, by one evaluator with the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import MINIATURES, evomerge, short_search_file
from transformers import AutoTokenizer

from evaluators.lengths import CountedEvaluator
from evaluators.likelihood import LikelihoodSettings
from evaluators.lm_eval import LmEvalSettings
from evomerge.checkpoints.source import open_source
from evomerge.errors import InputError
from evomerge.search.preparing.asking import reader_of
from evomerge.search.preparing.evaluators import distinct
from evomerge.search.settings.early import check_early
from evomerge.search.settings.search_file import load_search_file
from evomerge.store import Store

ITEMS = {"task": "mini_math_ja", "search": "validation[:4]", "held_out": "test[:4]"}
BOTH = {"acc": {**ITEMS, "metric": "acc_ja"}, "tokens": {**ITEMS, "metric": "answer_tokens"}}


def test_a_search_counts_the_tokens_of_the_answers_that_it_grades(tmp_path: Path) -> None:
    file = short_search_file(
        tmp_path, objectives=BOTH, optimizer={"name": "nsga2", "population": 4}, budget={"candidates": 5}
    )
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    tokenizer = AutoTokenizer.from_pretrained(MINIATURES / "base")
    with Store.open(tmp_path / "search" / "search.db") as store:
        record = store.search().record
        accuracy, tokens = record.objectives
        assert accuracy.evaluator == tokens.evaluator
        assert (accuracy.maximise, tokens.maximise) == (True, False)
        for row in store.candidates(step=0):
            (scores,) = store.scores(row.number, "search")
            (written,) = store.answers(row.number, "search").values()
            expected = [
                len(tokenizer.encode(written.get(item, ""), add_special_tokens=False)) for item in scores.items.tolist()
            ]
            assert scores.metrics["answer_tokens"].tolist() == expected
            assert max(expected) > 0
            assert row.objectives["tokens"].mean == pytest.approx(np.mean(expected))


def test_one_evaluator_serves_both_measures(tmp_path: Path) -> None:
    file = load_search_file(short_search_file(tmp_path, objectives=BOTH, optimizer={"name": "nsga2"}))
    check_early(file)
    (settings,) = distinct(file.evaluators())
    assert isinstance(settings, LmEvalSettings)
    assert settings.count_tokens
    alone = load_search_file(short_search_file(tmp_path))
    assert [s.count_tokens for s in alone.evaluators().values() if isinstance(s, LmEvalSettings)] == [False]


def test_refuses_lengths_of_what_is_not_written(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text("".join(f'{{"prompt": "{i} + 1 =", "answer": " {i + 1}"}}\n' for i in range(20)))
    settings = LikelihoodSettings(file=items)
    reader = reader_of(open_source("base", str(MINIATURES / "base"), place="base"))
    with pytest.raises(InputError, match="nothing is written whose tokens could be counted"):
        CountedEvaluator(settings.build()).requests(reader, "search", [0])
    objective = {"evaluator": "likelihood", "metric": "answer_tokens", "file": str(items)}
    with pytest.raises(InputError, match="answer_tokens"):
        check_early(load_search_file(short_search_file(tmp_path, objectives={"length": objective})))
