"""Where answers of the best alone are kept, they are those of the best, however a search is interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers_search import drive, drive_dying, make_setup, scores_of, simulate

from evomerge.errors import InputError
from evomerge.optimizers import CmaSettings, OptunaSettings
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.search_file import parse_search_file
from evomerge.search.settings.sections import BestKept
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.store import Answers, Store, acquire

NSGA2 = OptunaSettings(name="nsga2", population=8)


def answering(job: Job) -> tuple[float, Measured | Failed]:
    """A model that says its number to every item."""
    seconds, _ = simulate(job)
    answers = [dict.fromkeys(task.indices, f"c{job.candidate}") for task in job.tasks]
    return seconds, replace(scores_of(job), answers=answers)


def keeping(best: int, *, objectives: int = 1, candidates: int = 40) -> Setup:
    optimizer = CmaSettings(name="cma", population=6) if objectives == 1 else NSGA2
    setup = make_setup(objectives=objectives, optimizer=optimizer, candidates=candidates)
    return replace(setup, answers=BestKept(best=best))


def answered(folder: Path) -> list[int]:
    with Store.open(folder / "search.db") as store:
        return store.answered()


def expected(folder: Path, best: int) -> list[int]:
    """The baselines, the front, and the first by each objective, of those with scores of their own."""
    with Store.open(folder / "search.db") as store:
        rows = [row for row in store.candidates() if row.losses is not None and row.status == "done"]
        found = {row.number for row in rows if row.step == 0 or row.on_front}
        for objective in range(len(rows[0].losses or ())):
            found |= {row.number for row in sorted(rows, key=lambda row: (row.losses or [])[objective])[:best]}
    return sorted(found)


@pytest.mark.parametrize(("best", "objectives"), [(1, 1), (5, 1), (1000, 1), (3, 2)])
def test_the_best_keep_their_answers_and_no_others(tmp_path: Path, best: int, objectives: int) -> None:
    drive(tmp_path, keeping(best, objectives=objectives), simulation=answering)
    kept = answered(tmp_path)
    assert kept == expected(tmp_path, best)
    assert (len(kept) < 40) == (best < 40)
    with Store.open(tmp_path / "search.db") as store:
        assert set(store.answers(kept[-1], "search")["v0"].values()) == {f"c{kept[-1]}"}
        assert all(store.scores(row.number, "search") for row in store.candidates())  # of items, all are kept


def test_it_is_the_same_however_often_the_driver_dies(tmp_path: Path) -> None:
    drive(tmp_path / "whole", keeping(4), simulation=answering)
    assert drive_dying(tmp_path / "killed", keeping(4), lives=(3, 7), simulation=answering) > 4
    assert answered(tmp_path / "killed") == answered(tmp_path / "whole")


def test_a_search_that_kept_all_keeps_the_best_once_that_is_asked_for(tmp_path: Path) -> None:
    drive(tmp_path, replace(keeping(4, candidates=20), answers="all"), simulation=answering)
    assert len(answered(tmp_path)) == 20
    drive(tmp_path, keeping(4, candidates=30), simulation=answering)
    assert answered(tmp_path) == expected(tmp_path, 4)


def test_answers_to_held_out_items_are_never_dropped(tmp_path: Path) -> None:
    drive(tmp_path, keeping(1, candidates=10), simulation=answering)
    with Store.open(tmp_path / "search.db") as store, acquire(store):
        number = next(row.number for row in store.candidates() if row.number not in store.answered())
        store.record_scores(number, 9, [], answers=[Answers("v0", "held_out", [0], ["said later"])])
        store.drop_answers([number])
        assert store.answers(number, "held_out") == {"v0": {0: "said later"}}


@pytest.mark.parametrize("value", [{"best": -1}, {"best": 0}, {"best": float("nan")}, {"best": "few"}, {}, "best", 7])
def test_what_is_no_rule_is_refused(value: object) -> None:
    content = {
        "name": "kept", "sources": {"base": "org/base", "one": "org/one"}, "base": "base", "answers": value,
        "space": {"kind": "parameter_space", "method": "task_arithmetic"}, "budget": {"candidates": 40},
        "objectives": {"maths": {"task": "mini_math_ja", "metric": "acc_ja"}},
    }  # fmt: skip
    with pytest.raises(InputError) as refused:
        parse_search_file(content, place="s.yaml", root=Path("/"))
    assert refused.value.place.startswith("s.yaml: answers")
