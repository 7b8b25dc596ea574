"""What people see of a search: the lines, the panel, the licence and the card."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import pytest
from rich.console import Console

from evomerge.report.basis import basis_text
from evomerge.report.comparing import Comparison
from evomerge.report.confirmed import Choice
from evomerge.report.entries import (
    ConfirmedEntry,
    ConfirmedEstimate,
    Constraint,
    Entry,
    Gap,
    gap_text,
    is_exact,
    measure_text,
)
from evomerge.report.fitting import heading
from evomerge.report.licences import licence_of, most_restrictive
from evomerge.report.lists import comparison_table
from evomerge.report.live import LiveScreen
from evomerge.report.screen import choice_text, duration, line, p_text, panel, screen_text, thrift_lines
from evomerge.report.search_status import (
    Budget,
    Counts,
    ProxyState,
    ScreenState,
    SearchStatus,
    Slow,
)
from evomerge.report.status import describe_space, slow_ones, status_of, unrecorded_s
from evomerge.search.driving.progress import Progress
from evomerge.search.work.jobs import PoolState
from evomerge.store import NewCandidate, Store, acquire
from evomerge.store.events import ItemErrors
from evomerge.store.record import Evaluator, Measure, Racing, SearchRecord
from evomerge.store.rows import Estimate


def status(**changes: object) -> SearchStatus:
    def entry(number: int, label: str, mean: float) -> Entry:
        return Entry(id=f"c{number:04d}", label=label, objectives={"maths": Estimate(mean=mean, stderr=0.02, n=200)})

    gaps = [Gap(to="base", mean=0.4, low=0.3, high=0.5, p=0.001), Gap(to="ja", mean=0.31, low=0.26, high=0.36, p=0.002)]
    choice = Choice(
        frozen_at=0.0, shortlist=1, shortlists=1, drawn=0, comparisons=2, confidence=0.95, luck=0.0123
    )  # fmt: skip
    confirmed = ConfirmedEstimate(mean=0.61, stderr=0.02, n=500, difference=gaps)
    content: dict[str, object] = {
        "name": "demo", "state": "running", "why": "", "space": "ties layer", "optimizer": "cma", "parameters": 18,
        "candidates": Counts(asked=50, done=40, eliminated=0, failed=3, cached=2, running=2), "items": 8000,
        "budget": Budget(candidates=100, hours=None, hours_spent=0.5),
        "directions": {"maths": "maximize"}, "wanted": {"maths": 200}, "sources": ["base", "ja"],
        "constraints": {}, "racing": None, "screen": None, "item_response": {},
        "best": entry(7, "", 0.63), "baselines": [entry(0, "base", 0.2), entry(1, "ja", 0.3)],
        "front": ["c0007"], "front_entries": [entry(7, "", 0.63)], "failures": {"not_finite": 2, "worker_died": 1},
        "seconds": {"merge": 0.25, "generate": 1.5}, "slow": [],
        "confirmed": [ConfirmedEntry(id="c0007", label="", objectives={"maths": confirmed})],
        "confirmed_baselines": [entry(0, "base", 0.21), entry(1, "ja", 0.3)], "winner": "c0007",
        "choice": choice,
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
        "gain over ja",
        "+0.310 [+0.260, +0.360]",
        "winner",
        "Intervals hold all at once with 95%: corrected for 2 comparisons (1 candidate with base, ja).",
        "The winner is the best of the 3 there (1 candidate and 2 baselines): of its maths 0.610, ",
        "about 0.012 may be luck of the choice.",
    ):
        assert words in text
    assert "shortlist" not in text


def test_a_minimised_objective_points_down_and_compares_with_the_lowest_source() -> None:
    text = drawn(status(directions={"maths": "minimize"}))
    assert "maths ↓" in text
    assert "gain over base" in text


def test_of_several_objectives_and_shortlists_it_says_so() -> None:
    found = status()
    assert found.choice is not None
    several = found.model_copy(
        update={
            "directions": {"maths": "maximize", "words": "maximize"},
            "choice": found.choice.model_copy(update={"shortlists": 2}),
        }
    )
    first, _, last = choice_text(several)
    assert first.endswith("(1 candidate with base, ja) in each objective.")
    assert "shortlist 2" in last


def test_before_there_is_a_winner_nothing_is_said_of_luck() -> None:
    assert len(choice_text(status(winner=None))) == 1
    assert choice_text(status(choice=None)) == []


@pytest.mark.parametrize(("p", "text"), [(0.0002, "< 0.001"), (0.0312, "0.031"), (1.0, "1.000")])
def test_p_is_not_finer_than_it_is_known(p: float, text: str) -> None:
    assert p_text(p) == text


def thrifty(**changes: object) -> SearchStatus:
    """The status of a search with racing, a screen and a constraint that the baseline "ja" misses."""
    plain = status()

    def limited(shown: Entry, mean: float) -> Entry:
        value = Estimate(mean=mean, stderr=0.01, n=100)
        return shown.model_copy(update={"constraints": {"english": value}, "feasible": mean >= 0.9})

    content: dict[str, object] = {
        "candidates": Counts(asked=60, done=20, eliminated=33, failed=1, cached=2, running=3), "items": 5400,
        "wanted": {"maths": 200, "english": 100}, "constraints": {"english": Constraint(threshold=0.9, at_least=True)},
        "racing": Racing(rungs=[25, 75], confidence=0.9, estimate="item_response"), "screen": SCREEN,
        "item_response": {"maths": ItemErrors(reference=0.034, item_response=0.021, p_irt=0.05, used=True)},
        "baselines": [limited(plain.baselines[0], 0.95), limited(plain.baselines[1], 0.4)],
        "front_entries": [limited(plain.front_entries[0], 0.93)],
        "confirmed": [limited(plain.confirmed[0], 0.92)],
        "confirmed_baselines": [limited(b, m) for b, m in zip(plain.confirmed_baselines, (0.94, 0.3), strict=True)],
    }  # fmt: skip
    return plain.model_copy(update=content | changes)


SCREEN = ScreenState(
    metric="log_likelihood", objective="maths", items=100, least_tau=0.5, tau=0.71, pairs=60, on=True, left_out=33
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "at rate 0.05; agreement with the objective not known yet"),
        ({"tau": 0.456, "points": 9}, "agreement with the objective tau 0.46 over 9 points"),
        ({"tau": -0.2, "points": 12, "on": False}, "tau -0.20 over 12 points; it rests"),
    ],
)
def test_how_far_the_proxy_is_trusted_is_told(changes: dict[str, object], words: str) -> None:
    proxy = ProxyState(step=7, rate=0.05, before=0.51, after=0.42).model_copy(update=changes)
    assert words in " ".join(thrift_lines(status(proxy=proxy)))


def test_the_panel_says_what_racing_the_screen_and_constraints_do() -> None:
    text = drawn(thrifty())
    for words in (
        "candidates 60 of 100: 20 scored, 33 eliminated, 2 cached, 1 failed, 3 running",
        "racing: rungs 25, 75; 5,400 items scored in all",
        "screen: log_likelihood agrees with maths, tau 0.71 over 60 candidates: on, 33 left out",
        "item response: used for maths (held-out error 0.021, by the best baseline 0.034)",
        "english ≥ 0.9",
        "0.400 ± 0.010 missed",
        "The winner is the best of the 2 there that keep english ≥ 0.9: of its maths 0.610",
    ):
        assert words in text
    assert "0.930 ± 0.010 missed" not in text
    assert text.count("missed") == 2  # the baseline on either split, and in words


def test_of_an_unconfirmed_candidate_it_says_what_its_scores_rest_on() -> None:
    def raced(items: int, english: int = 100) -> Entry:
        maths, kept = Estimate(mean=0.7, stderr=0.05, n=items), Estimate(mean=0.9, stderr=0.01, n=english)
        return Entry(id="c0009", label="", objectives={"maths": maths}, constraints={"english": kept})

    by_baseline = Racing(rungs=[25, 75], confidence=0.9, estimate="baseline")
    some = basis_text(raced(25), thrifty())
    assert "c0009 was never scored on held-out items" in some
    assert "its maths 0.700 ± 0.050 rests on 25 of 200 items; its english 0.900 ± 0.010 rests on all 100 items." in some
    assert "estimated by item response" in some
    assert "estimated by the best baseline's scores" in basis_text(raced(200, 75), thrifty(racing=by_baseline))
    assert "estimated" not in basis_text(raced(200), thrifty())


def test_a_winner_that_keeps_no_constraint_is_told() -> None:
    found = thrifty()
    assert found.choice is not None
    infeasible = found.model_copy(update={"choice": found.choice.model_copy(update={"feasible": False})})
    told = " ".join(choice_text(infeasible))
    assert "No model keeps every constraint there (english ≥ 0.9)" in told
    assert "luck" not in told
    assert "none scored on every item keeps all constraints yet" in drawn(thrifty(best=None, front_entries=[]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tau": None, "pairs": 0, "on": False, "left_out": 0}, "was not compared with maths yet: off"),
        (
            {"tau": 0.6, "pairs": 18, "on": False, "left_out": 0},
            "tau 0.60 over 18 candidates: off, too few to trust it",
        ),
        ({"tau": 0.31, "on": False}, "well enough, tau 0.31 over 60 candidates, 0.5 is asked for: off, 33 left out"),
    ],
)
def test_a_screen_that_is_off_says_why(changes: dict[str, object], words: str) -> None:
    assert words in screen_text(SCREEN.model_copy(update=changes))


def test_eliminated_candidates_are_finished_ones_for_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 of 100 are left after 60 in a minute: with the eliminated forgotten it would look longer."""
    moments = iter([0.0, 60.0])
    monkeypatch.setattr("evomerge.report.live.time.monotonic", lambda: next(moments))
    counts = iter([(0, 0), (1, 0), (20, 40)])
    screen = LiveScreen(Console(force_terminal=False), status)

    def eta() -> float | None:
        done, eliminated = next(counts)
        counted = Counts(asked=100, done=done, eliminated=eliminated, failed=0, cached=0, running=0)
        return screen._eta(status(candidates=counted))

    next(counts)
    assert eta() is None
    assert eta() == pytest.approx(40 * 60 / 59)


def test_the_line_for_logs_is_one_line() -> None:
    text = line(status(), eta=60)
    assert text == ("[30m00s] 45/100 candidates, 3 failed; best c0007: maths 0.630 ± 0.020; ETA 1m00s")


def test_the_line_for_logs_counts_the_eliminated_and_shows_objectives_alone() -> None:
    assert line(thrifty()) == "[30m00s] 56/100 candidates, 33 eliminated, 1 failed; best c0007: maths 0.630 ± 0.020"


def paces(**seconds: list[float]) -> list[tuple[str, float]]:
    """Seconds an item by worker; a_0 is worker 0 of node a."""
    return [(f"ray-{n}@{node}", s) for name, all_ in seconds.items() for node, n in [name.split("_")] for s in all_]


def test_a_slow_node_is_named_by_its_median_and_its_workers_are_not() -> None:
    found = slow_ones(paces(a_0=[1.0] * 4 + [9.0] * 2, a_1=[1.1] * 5, b_2=[2.0] * 5, b_3=[2.2] * 6, c_4=[5.0] * 4))
    # 11 of node a, of which two took long for once; node c has finished too few to say anything.
    assert found == [
        Slow(kind="node", name="b", seconds=2.2, candidates=11, others_seconds=1.1, others_candidates=11)
    ]  # fmt: skip


def test_a_slow_worker_of_an_ordinary_node_is_named() -> None:
    (found,) = slow_ones(paces(a_0=[1.0] * 9, a_1=[1.6] * 5, b_2=[1.0] * 9))
    assert (found.kind, found.name, found.seconds, found.candidates) == ("worker", "ray-1@a", 1.6, 5)
    assert (found.others_seconds, found.others_candidates) == (1.0, 18)
    assert slow_ones(paces(a_0=[1.0] * 9, a_1=[1.5] * 9)) == [], "not more than half as long again"
    assert slow_ones(paces(a_0=[1.0] * 9)) == [], "there is nobody to compare with"


def test_the_status_names_slow_workers_from_what_is_recorded(tmp_path: Path) -> None:
    """Seconds are of the 40 items that both measures share, and of candidates that were scored on all of them."""
    told: dict[str, object] = {"evaluator": 0, "metric": "acc", "maximise": True, "items": 40, "version": "v"}
    fingerprints = {
        "objectives": [told | {"name": "maths"}],
        "constraints": [told | {"name": "easy", "items": 30, "threshold": 0.1}],
        "parameters": [], "screen": None, "sources": {}, "evaluators": [],
    }  # fmt: skip
    settings = {
        "seed": 0, "confirm": {},
        "space": {"kind": "made_up"}, "optimizer": {"name": "cma"}, "budget": {"candidates": 60, "hours": None},
        "sources": {}, "racing": None,
    }  # fmt: skip
    create = {"name": "s", "settings": settings, "fingerprints": fingerprints, "environment": {}}
    with Store.create(tmp_path / "search.db", **create) as store, acquire(store):  # type: ignore[arg-type]
        store.record_ask(1, [NewCandidate(n, "cma", "{}", f"hash {n}") for n in range(24)])
        for n in range(24):
            worker, seconds = ("ray-1@b", 20.0) if n % 2 else ("ray-0@a", 8.0)
            items, seconds = (39, 1e6) if n >= 20 else (40, seconds)
            known = {name: Estimate(mean=0.5, stderr=0.1, n=n) for name, n in (("maths", items), ("easy", 30))}
            store.record_dispatch(n, 1, "")
            assert store.record_result(n, 1, [], {"merge": 2.0, "score": seconds - 2.0}, known, worker)
        found = status_of(store)
    assert found.slow == [
        Slow(kind="node", name="b", seconds=0.5, candidates=10, others_seconds=0.2, others_candidates=10)
    ]  # fmt: skip
    assert "slow: node b takes 0.5 s an item, the others 0.2 s (medians of 10 and 10 candidates)" in drawn(found)
    assert line(found).endswith("; slow: b")


def test_seconds_of_pauses_startups_and_earlier_drivers_are_not_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = [1000.0]
    monkeypatch.setattr(time, "time", lambda: moment[0])

    def after(seconds: float) -> None:
        moment[0] += seconds

    create = {"name": "s", "settings": {}, "fingerprints": {}, "environment": {}}
    with Store.create(tmp_path / "search.db", **create) as store:  # type: ignore[arg-type]
        assert unrecorded_s(store) == 0.0
        for _ in range(2):  # drivers, of which the first is killed
            with acquire(store):
                after(7)  # while models are opened
                assert unrecorded_s(store) == 0.0
                store.set_state("running")
                after(3)
                assert unrecorded_s(store) == 3.0
                store.set_state("paused")
                after(50)
                store.record_tell(0, {}, front=[], spent_s=3.0)  # what ran then has finished
                after(50)
                assert unrecorded_s(store) == 0.0
                store.set_state("running")
                after(2)
                store.set_state("paused")
                after(50)
                assert unrecorded_s(store) == 2.0
                store.set_state("running")
                after(4)
                assert unrecorded_s(store) == 6.0
            after(1000)
        with acquire(store):
            store.set_state("running")
            after(5)
            store.set_state("cancelled", spent_s=14.0)
            after(5)
            assert unrecorded_s(store) == 0.0


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_table_is_cut_on_a_narrow_screen(width: int) -> None:
    """Two objectives with long names: every number is there whole, and the gains in both where there is room."""
    names = ("mini_translate_from_japanese", "mini_math_in_japanese")

    def entry(number: int, label: str = "") -> dict[str, object]:
        gap = {"to": "japanese", "mean": 0.31, "low": 0.26, "high": 0.36, "p": 0.002}
        value = {"mean": 0.5 + number / 1000, "stderr": 0.02, "n": 200, "difference": [gap]}
        return {"id": f"c{number:04d}", "label": label, "objectives": dict.fromkeys(names, value)}

    baselines = [entry(0, "japanese"), entry(1, "task_arithmetic defaults")]
    found = status(
        directions=dict.fromkeys(names, "maximize"), wanted=dict.fromkeys(names, 200), sources=["japanese"],
        best=entry(9), baselines=baselines, confirmed_baselines=baselines, confirmed=[entry(8), entry(9)],
        front=["c0009"], front_entries=[entry(9)], winner="c0009",
    )  # fmt: skip
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(panel(found))
    text = console.export_text()
    assert "…" not in text
    assert text.count("+0.310 [+0.260, +0.360]") == (2 if width == 80 else 4)
    assert text.count("0.509") >= 4  # of each objective, on each split
    assert text.count("gain over japanese") == 2  # a column that found no room is named below
    assert all(len(line) <= width for line in text.splitlines())


def test_a_title_is_broken_after_spaces_and_signs_alone() -> None:
    assert heading("mini_translate_ja ≥ 0.9", 13) == "mini_\ntranslate_ja\n≥ 0.9"
    assert heading("unbroken", 3) == "unbroken"


@pytest.mark.parametrize("height", [24, 40, 100])
def test_a_live_screen_is_no_taller_than_the_terminal_and_keeps_the_caveats(height: int) -> None:
    one = status().confirmed[0]
    many = [one.model_copy(update={"id": f"c{i:04d}"}) for i in range(7, 37)]
    marks = [status().baselines[0].model_copy(update={"id": f"c{i:04d}", "label": f"mark {i}"}) for i in range(5)]
    found = status(
        confirmed=many, front_entries=many, baselines=marks, confirmed_baselines=[*marks, *status().baselines]
    )
    file = io.StringIO()
    console = Console(width=120, height=height, force_terminal=True, file=file)
    with LiveScreen(console, lambda: found) as screen:
        screen.draw()
        drawn = file.getvalue()
    assert drawn.count("\n") < height
    assert "The winner is the best of" in drawn
    assert "more confirmed" in drawn or height == 100


def test_without_a_terminal_the_screen_prints_few_plain_lines() -> None:
    console = Console(force_terminal=False, record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    with LiveScreen(console, status) as screen:
        for _ in range(50):
            screen.draw()
    text = console.export_text()
    assert text.count("candidates") == 1
    assert "\x1b" not in text


def test_without_a_terminal_a_candidate_that_takes_long_is_told_of_every_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, progress = [0.0], Progress(lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(force_terminal=False, record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    screen = LiveScreen(console, status, progress=progress)
    for second in range(200):
        now[0] = float(second)
        if second == 30:
            progress.work(lambda: ([3], 360))
        progress.answers += second >= 100
        screen.draw()
    lines = console.export_text().splitlines()
    assert len(lines) == 4
    assert "scoring" not in lines[0]
    assert "; scoring c0003: 360 items" in lines[1]
    assert "; scoring c0003: 21 answers, 360 items" in lines[2]


def test_the_line_names_few_candidates_and_counts_many() -> None:
    progress = Progress()
    progress.work(lambda: ([3, 4], 20))
    assert "; scoring c0003, c0004: 20 items" in line(status(), progress=progress)
    progress.work(lambda: ([-1], 0))
    progress.answers = 12
    assert "; following the proxy: 12 answers read" in line(status(), progress=progress)
    progress.work(lambda: (range(8), 80))
    progress.answers = 1
    assert "; scoring 8 candidates: 1 answer, 80 items" in line(status(), progress=progress)
    progress.begin(lambda: None, models=7, items=700)
    progress.work(lambda: ([5], 100))
    confirming = line(status(state="confirming"), progress=progress)
    assert "0 of 7 models, 0 of 700 items; scoring c0005: 100 items" in confirming


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


# ---- what numbers look like ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (0.62, 0.024, "0.620 ± 0.024"),
        (0.352, math.nan, "0.352 ± -"),  # one item
        (1.0, None, "1.000 ± -"),  # one right answer is no count
        (30.0, None, "30"),  # layers
        (1_404_928.0, math.nan, "1,404,928"),  # parameters
        (123.4567, None, "123.457 ± -"),  # tokens a second, measured once
        (-5.8, 0.05, "-5.800 ± 0.050"),
    ],
)
def test_a_mean_has_the_error_that_is_known(mean: float, error: float | None, text: str) -> None:
    assert measure_text(mean, error) == text


def test_a_difference_of_one_item_has_no_interval() -> None:
    def gap(mean: float, reach: float) -> Gap:
        return Gap(to="base", mean=mean, low=mean - reach, high=mean + reach, p=reach)

    assert gap_text(gap(0.3, 0.1)) == "+0.300 [+0.200, +0.400]"
    assert gap_text(gap(2.0, math.nan)) == "+2"
    assert gap_text(gap(-0.25, math.nan)) == "-0.250"
    assert p_text(gap(2.0, math.nan).p) == "-"
    assert '"low":null' in gap(2.0, math.nan).model_dump_json()


@pytest.mark.parametrize(
    ("evaluator", "metric", "exact"),
    [
        ("cost", "layers", True),
        ("cost", "parameters", True),
        ("cost", "tokens_per_second", False),
        ("change", "change", True),
        ("a", "layers", False),
    ],
)
def test_layers_and_parameters_are_counted_and_nothing_else(evaluator: str, metric: str, exact: bool) -> None:
    measure = Measure(name="o", evaluator=0, metric=metric, maximise=True, items=1, version="v")
    told = Evaluator(name=evaluator, version="v", search_items=1, held_out_items=1)
    assert is_exact(measure, SearchRecord.model_construct(evaluators=(told,))) == exact


def test_a_source_and_an_objective_of_one_name_are_told_apart() -> None:
    found = Comparison(
        objective="maths", split="search", n=9, wanted=9, a=0.5, b=0.4, difference=0.1, confidence=0.95, low=0.0,
        high=0.2, better_a=2, better_b=1, p=0.5,
    )  # fmt: skip
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table([found], "maths", "c0011"))
    rows = [line.split("  ")[0].strip() or line.strip().split("  ")[0] for line in console.export_text().splitlines()]
    assert [row for row in rows if row == "maths"] == ["maths"]
    assert "candidate maths" in rows


@pytest.mark.parametrize(
    ("profile", "words"),
    [({}, ""), ({"profile": "lines"}, " profile of lines"), ({"profile": {"cosines": 3}}, " profile of 3 cosines")],
)
def test_a_space_is_told_with_its_profile(profile: dict[str, object], words: str) -> None:
    space = {"kind": "parameter_space", "method": "ties", "granularity": "model", **profile}
    assert describe_space(space) == f"ties model{words}"
