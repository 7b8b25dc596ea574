"""Teams: the greedy choice, what it covers, and the command."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import evomerge, json_of, short_search_file

from evomerge.errors import InputError
from evomerge.report.team import choose_team, team_of
from evomerge.search.estimation.team import coverage, greedy_team, majority
from evomerge.store import Store


def test_a_team_is_whoever_adds_most() -> None:
    scores = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0.0]])
    assert greedy_team(scores, 3) == [0, 2]  # nobody adds anything to these
    assert coverage(scores[[0, 2]]).tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_a_greedy_team_covers_what_it_must(seed: int) -> None:
    """At least 1 - 1/e of what the best of all teams covers, found by trying them all."""
    scores = (np.random.RandomState(seed).random_sample((9, 40)) < 0.2).astype(np.float64)
    best = max(scores[list(team)].max(axis=0).mean() for team in itertools.combinations(range(9), 3))
    assert (1 - np.exp(-1)) * best <= coverage(scores[greedy_team(scores, 3)]).mean() <= best


def test_a_compromise_is_exchanged_when_the_others_leave_it_nothing() -> None:
    """The first solves most, and the two that follow all that it does and more."""
    scores = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1.0]])
    assert sorted(greedy_team(scores, 3)) == [1, 2, 3]


@pytest.mark.parametrize("seed", range(10))
def test_no_exchange_of_one_member_covers_more(seed: int) -> None:
    scores = (np.random.RandomState(seed).random_sample((12, 30)) < 0.25).astype(np.float64)
    team = greedy_team(scores, 4)
    covered = scores[team].max(axis=0).mean()
    for place, other in itertools.product(range(len(team)), range(12)):
        changed = [*team[:place], other, *team[place + 1 :]]
        assert scores[changed].max(axis=0).mean() <= covered + 1e-9


def test_more_than_half_must_solve_an_item() -> None:
    scores = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0.0]])
    assert majority(scores).tolist() == [1, 1, 0, 0]
    assert majority(scores[:2]).tolist() == [1, 0, 0, 0]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team")
    task = {"task": "mini_math_ja", "search": "validation[:12]", "held_out": "test[:16]"}
    objectives = {"japanese": task | {"metric": "acc_ja"}, "right": task | {"metric": "acc"}}
    file = short_search_file(
        folder, objectives=objectives, budget={"candidates": 12}, optimizer={"name": "random"}, confirm={"top": 1}
    )
    assert evomerge("search", file, "--dir", folder / "search") == 0
    return folder / "search"


def test_a_team_is_chosen_and_scored_on_held_out_items(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    told = json_of(capsys, "team", searched, "-k", "2", "--json")
    with Store.open(searched / "search.db") as store:
        team = team_of(store)
        assert team is not None
        assert team.model_dump() == told
        numbers = choose_team(store, 2).candidates
        assert [store.candidate(number).id for number in numbers] == [member["id"] for member in told["members"]]
        held = [
            np.concatenate(
                [store.scores(n, "held_out")[0].metrics[metric].astype(np.float64) for metric in ("acc_ja", "acc")]
            )
            for n in numbers
        ]
    assert told["items"] == 32
    assert told["coverage"] == pytest.approx(np.max(held, axis=0).mean())
    assert told["against"]["its best member"]["share"] == pytest.approx(max(one.mean() for one in held))
    assert all(share["low"] <= share["difference"] <= share["high"] for share in told["against"].values())
    assert [len(solved) for solved in told["solved"]] == [32] * len(numbers)
    assert evomerge("team", searched, "-k", "2") == 0  # once more, with nothing to score
    printed = capsys.readouterr().out
    assert "solved by at least one member" in printed
    assert "the best source" in printed


def test_what_the_first_candidates_offer_is_written_down(searched: Path) -> None:
    """By the scores of the search split alone: the best pair among the first so many, as far as greed finds it."""
    with Store.open(searched / "search.db") as store:
        chosen = choose_team(store, 2)
        rows = [row for row in store.candidates() if row.status == "done"]
        items = [
            np.concatenate(
                [store.scores(row.number, "search")[0].metrics[m].astype(np.float64) for m in ("acc_ja", "acc")]
            )
            for row in rows
        ]
    sizes = [size for size, _, _ in chosen.curve]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == len(rows)
    for size, covered, best in chosen.curve:
        pairs = [np.maximum(one, other).mean() for one, other in itertools.combinations(items[:size], 2)]
        assert best == pytest.approx(max(one.mean() for one in items[:size]))
        assert best <= covered <= max(pairs) + 1e-12
        assert covered >= (1 - np.exp(-1)) * max(pairs)


def test_the_members_of_a_team_are_exported(searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is verified, and its card says what it adds to the others."""
    team = json_of(capsys, "team", searched, "-k", "2", "--json")
    out = tmp_path / "models"
    assert evomerge("export", searched, out, "--team") == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(member["id"] for member in team["members"])
    solved = [np.array([int(letter) for letter in text]) / 9 for text in team["solved"]]
    for place, member in enumerate(team["members"]):
        card = (out / member["id"] / "README.md").read_text("utf-8")
        alone = np.maximum(solved[place] - solved[1 - place], 0).mean()
        assert f"it solves {solved[place].mean():.1%}, and {alone:.1%} no other member does" in card
        assert f"| **{member['id']}, this model** |" in card
        assert "## Verification" in card
        assert "Not verified" not in card
    assert evomerge("export", searched, out, "--team") == 2  # they are there already
    assert team["members"][0]["id"] in capsys.readouterr().err


def test_a_team_is_exported_as_it_is(searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evomerge("export", searched, tmp_path / "out", "--team", "--candidate", "c0001") == 2
    assert "--team" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "problem"), [(1, "2 to 8 members"), (9, "2 to 8 members")])
def test_a_team_of_another_size_is_refused(
    searched: Path, count: int, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evomerge("team", searched, "-k", count) == 2
    assert problem in capsys.readouterr().err


def test_more_members_than_candidates_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = short_search_file(tmp_path, budget={"candidates": 6}, optimizer={"name": "random"}, confirm={"top": 1})
    assert evomerge("search", file, "--dir", tmp_path / "search") == 0
    with Store.open(tmp_path / "search" / "search.db") as store, pytest.raises(InputError, match="fewer than 8"):
        choose_team(store, 8)
    assert evomerge("export", tmp_path / "search", tmp_path / "out", "--team") == 2
    assert "evomerge team" in capsys.readouterr().err
