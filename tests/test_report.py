"""What people see of a search: the lines, the panel, the licence and the card."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from evomerge.report.licences import licence_of, most_restrictive
from evomerge.report.screen import Screen, duration, line, panel
from evomerge.report.status import Budget, ConfirmedEntry, ConfirmedValue, Counts, Entry, Gap, SearchStatus, Value
from evomerge.search.jobs import PoolState


def status(**changes: object) -> SearchStatus:
    def entry(number: int, label: str, mean: float) -> Entry:
        return Entry(id=f"c{number:04d}", label=label, objectives={"maths": Value(mean=mean, stderr=0.02, n=200)})

    gaps = [Gap(to="base", mean=0.4, low=0.3, high=0.5), Gap(to="ja", mean=0.31, low=0.26, high=0.36)]
    confirmed = ConfirmedValue(mean=0.61, stderr=0.02, n=500, difference=gaps)
    content: dict[str, object] = {
        "name": "demo", "state": "running", "why": "", "space": "ties layer", "optimizer": "cma", "parameters": 18,
        "candidates": Counts(asked=50, done=40, failed=3, cached=2, running=2),
        "budget": Budget(candidates=100, hours=None, hours_spent=0.5),
        "directions": {"maths": "maximize"}, "sources": ["base", "ja"],
        "best": entry(7, "", 0.63), "baselines": [entry(0, "base", 0.2), entry(1, "ja", 0.3)],
        "front": ["c0007"], "front_entries": [entry(7, "", 0.63)], "failures": {"not_finite": 2, "worker_died": 1},
        "seconds": {"merge": 0.25, "generate": 1.5},
        "confirmed": [ConfirmedEntry(id="c0007", label="", objectives={"maths": confirmed})],
        "confirmed_baselines": [entry(0, "base", 0.21), entry(1, "ja", 0.3)], "winner": "c0007",
    }  # fmt: skip
    return SearchStatus.model_validate(content | changes)


def drawn(found: SearchStatus, pool: PoolState | None = None, eta: float | None = None) -> str:
    console = Console(width=150, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(panel(found, pool, eta))
    return console.export_text()


def test_the_panel_says_what_a_person_wants_to_know() -> None:
    text = drawn(status(), PoolState(workers=4, busy=3, starting=1), eta=5400)
    for words in (
        "RUNNING 30m00s  ETA 1h30m",
        "candidates 50 of 100: 40 scored, 2 cached, 3 failed, 2 running",
        "1.75 s each (merge 0.25 s, generate 1.50 s)",
        "workers 3 busy of 4, 1 starting",
        "0.630 ± 0.020",
        "failures: 2 not_finite, 1 worker_died",
        "+0.310 [+0.260, +0.360] over ja",
        "winner",
    ):
        assert words in text


def test_a_minimised_objective_points_down_and_compares_with_the_lowest_source() -> None:
    text = drawn(status(directions={"maths": "minimize"}))
    assert "maths ↓" in text
    assert "over base" in text


def test_the_line_for_logs_is_one_line() -> None:
    text = line(status(), eta=60)
    assert text == ("[30m00s] 45/100 candidates, 3 failed; best c0007: maths 0.630 ± 0.020; ETA 1m00s")


def test_without_a_terminal_the_screen_prints_few_plain_lines() -> None:
    console = Console(force_terminal=False, record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    with Screen(console, status) as screen:
        for _ in range(50):
            screen.draw()
    text = console.export_text()
    assert text.count("candidates") == 1
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (200, "3m20s"), (7500, "2h05m"), (100800, "1d4h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("licences", "found"),
    [
        (["apache-2.0", "mit"], "apache-2.0"),
        (["apache-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["llama3.1", "mit"], "llama3.1"),
        (["apache-2.0", "unknown"], "other"),
        (["apache-2.0", "house-licence"], "other"),
    ],
)
def test_the_most_restrictive_licence(licences: list[str], found: str) -> None:
    assert most_restrictive(licences) == found


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: MIT\n---\n# m", "mit"),
        ("---\nlicense: [mit]\n---\n", "unknown"),
        ("---\n: [\n---\n", "unknown"),
        ("# no front matter", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_of_a_folder(tmp_path: Path, card: str | None, found: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == found
