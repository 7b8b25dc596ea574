"""What a search says it chose: by its objective, by its scalarisation, along a front, and in every place alike."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers_figures import create, search
from helpers_miniature import MINIATURES
from helpers_search import ITEMS, SOURCES, FakeSpace, drive, make_setup, weights_of
from helpers_service import TOKEN, client_of, make_app, serving
from rich.console import Console

from evomerge.checkpoints.source import Source, open_source
from evomerge.cli import main
from evomerge.errors import InputError
from evomerge.genome import Baseline
from evomerge.optimizers import CmaSettings
from evomerge.optimizers.scalarisation import Chebyshev, WeightedSum
from evomerge.recipes.base import read_recipe
from evomerge.report.card import Provenance, card
from evomerge.report.comparing import compared
from evomerge.report.conclusions import conclusions
from evomerge.report.curse import curse_of
from evomerge.report.curse_picture import curse_svg
from evomerge.report.entries import ConfirmedEntry
from evomerge.report.lists import origin_text, top_table
from evomerge.report.naming import chosen, exported
from evomerge.report.screen import headline, line, panel
from evomerge.report.search_status import SearchStatus
from evomerge.report.status import status_of
from evomerge.search.estimation.preference import Preference, ranked
from evomerge.search.pools.simulated import Simulation
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Budget, Confirm
from evomerge.search.work.jobs import Failed, Job, Measured
from evomerge.service.drivers import Drivers
from evomerge.service.figures import FigureOptions, draw
from evomerge.service.report import report_html
from evomerge.service.root import Root
from evomerge.service.summary import candidate_summaries, summaries_of
from evomerge.store import Store, acquire, summaries
from evomerge.store.events import Shortlist

SUM, DISTANCE = WeightedSum(name="weighted_sum", weights=(1, 1)), Chebyshev(name="chebyshev", weights=(1, 1))


def skills(*, of_sources: float, between: float) -> Simulation:
    """Two skills, both maximised: source "one" has the first, "two" the second, a merge of halves both in part.

    Args:
        of_sources: what a source scores in its own skill.
        between: what a merge of halves scores in each.
    """

    def simulation(job: Job) -> tuple[float, Measured | Failed]:
        share = float(np.mean(weights_of(job.recipe)))  # of source one
        reach = 1 - abs(share - 0.5) * 2  # 0 of a source alone, 1 of halves
        found = []
        for task in job.tasks:
            own = share if task.evaluator == 0 else 1 - share
            value = of_sources if own == 1.0 else between * reach + 0.8 * of_sources * max(0.0, 2 * own - 1)
            noise = np.random.default_rng(int(1e6 * share) + task.evaluator).normal(0.0, 0.02, ITEMS)
            found.append({"acc": (value + noise).astype(np.float32)[list(task.indices)]})
        return 1.0, Measured(found, {"score": 1.0})

    return simulation


def setup_of(mix: WeightedSum | Chebyshev | None = None, objectives: int = 2) -> Setup:
    plain = make_setup(
        space=FakeSpace(1), objectives=objectives, candidates=40,
        optimizer=CmaSettings(name="cma", scalarisation=mix),
    )  # fmt: skip
    return replace(plain, objectives=tuple(replace(each, maximise=True) for each in plain.objectives))


def searched(root: Path, setup: Setup, simulation: Simulation) -> tuple[SearchStatus, Store]:
    store = Store.open(search(root, "made", setup, simulation) / "search.db")
    return status_of(store), store


def drawn(status: SearchStatus, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(panel(status))
    return console.export_text()


BOTH_SKILLS = skills(of_sources=0.8, between=0.7)
NO_USE = skills(of_sources=0.8, between=0.1)


@pytest.mark.parametrize("mix", [SUM, DISTANCE])
def test_a_scalarisation_decides_and_not_the_first_objective(tmp_path: Path, mix: WeightedSum | Chebyshev) -> None:
    """The merge with both skills wins, though source one is better in the first."""
    status, store = searched(tmp_path, setup_of(mix), BOTH_SKILLS)
    with store:
        assert status.winner is not None
        winner = status.confirmed_values(status.winner)
        assert min(value.mean for value in winner.values()) > 0.5
        assert [pick.role for pick in status.picks] == ["best"]
        assert status.best is not None
        assert {status.best.id, status.winner}.isdisjoint(entry.id for entry in status.baselines[:2])
        (pick,) = status.picks
        assert set(pick.gains) == {"o0", "o1"}, "gains in every objective"
        assert (pick.gains["o0"].to, pick.gains["o1"].to) == ("one", "two")
        assert chosen(store, "best") == exported(store, "best") == int(status.winner[1:])
        best, *_ = ranked(store, Preference.of_search(store.search()), 3)
        assert best.number == int(status.best.id[1:])
        assert f"c{best.number:04d}" in line(status)
    text = drawn(status)
    assert mix.name.replace("_", " ") in text
    assert "gain over one in o0" in text
    assert "gain over two in o1" in text
    (listed,) = summaries_of(Root(tmp_path), Drivers(Root(tmp_path)))
    assert listed.best is not None
    assert (listed.best_role, listed.best.id) == ("best", status.best.id)


@pytest.mark.parametrize("mix", [SUM, DISTANCE])
def test_between_the_shortlist_and_its_first_score_a_search_can_be_looked_at(
    tmp_path: Path, mix: WeightedSum | Chebyshev
) -> None:
    status, store = searched(tmp_path, setup_of(mix), BOTH_SKILLS)
    with store:
        assert status.winner is not None
        with mock.patch("evomerge.report.confirmed.held_out", return_value={}):
            between = status_of(store)
        assert (between.confirmed, between.confirmed_baselines) == ([], [])


def test_a_table_of_candidates_has_the_number_that_decides(tmp_path: Path) -> None:
    status, store = searched(tmp_path, setup_of(SUM), BOTH_SKILLS)
    with store:
        assert status.best is not None
        rows = {row.id: row for row in candidate_summaries(store, summaries.page(store, summaries.Order(), 100))}
        assert rows[status.best.id].scalar == pytest.approx(sum(v.mean for v in status.best.objectives.values()))
        assert all(row.scalar is not None for row in rows.values())


def test_a_front_has_no_winner_but_the_best_at_each_and_the_knee(tmp_path: Path) -> None:
    status, store = searched(tmp_path, setup_of(), BOTH_SKILLS)
    with store:
        picks = {pick.role: pick for pick in status.picks}
        assert status.winner is None
        assert list(picks) == ["best at o0", "best at o1", "knee"]
        assert (picks["best at o0"].label, picks["best at o1"].label) == ("one", "two")
        assert min(value.mean for value in picks["knee"].objectives.values()) > 0.5
        assert set(picks["knee"].gains) == {"o0", "o1"}
        assert chosen(store, "best") == chosen(store, "knee") == int(picks["knee"].id[1:])
        assert chosen(store, "best at o1") == int(picks["best at o1"].id[1:])
        assert exported(store, "best") == int(picks["knee"].id[1:])
        with pytest.raises(InputError, match="unmerged") as caught:
            exported(store, "best at o0")
        assert "--candidate one" in caught.value.hint
        assert exported(store, "one") == int(picks["best at o0"].id[1:]), "who names it gets it"
    text = drawn(status)
    assert "winner" not in text.replace("no one winner", "")
    for words in ("best at o0: ", "no merge is better at it", "knee: ", "gain over two in o1"):
        assert words in text
    (listed,) = summaries_of(Root(tmp_path), Drivers(Root(tmp_path)))
    assert listed.best_role == "knee"


@pytest.mark.parametrize("mix", [None, SUM])
def test_a_source_that_nothing_beats_is_said_to_be_one_and_exported_by_its_name_alone(
    tmp_path: Path, mix: WeightedSum | None
) -> None:
    setup = setup_of(mix, objectives=1 if mix is None else 2)
    status, store = searched(tmp_path, setup, NO_USE)
    with store:
        (pick,) = status.picks
        assert (pick.role, pick.origin) == ("best", "source")
        assert any("No merge is better" in told and f"source {pick.label}" in told for told in conclusions(status))
        with pytest.raises(InputError) as caught:
            exported(store, "best")
        assert caught.value.place == pick.id
        assert f"--candidate {pick.label}" in caught.value.hint
        assert exported(store, pick.label) == exported(store, pick.id) == int(pick.id[1:])
    assert "unmerged" in drawn(status)


def test_one_held_out_item_says_nothing_and_names_no_winner(tmp_path: Path) -> None:
    one = setup_of(objectives=1)
    one = replace(one, evaluators=(replace(one.evaluators[0], held_out_items=1),))
    status, store = searched(tmp_path, one, BOTH_SKILLS)
    store.close()
    assert status.winner is None
    assert status.picks == []
    assert status.choice is not None
    assert (status.choice.made, status.choice.too_few) == (True, ["o0"])
    gap = status.confirmed[0].objectives["o0"].difference[0]
    assert (gap.low, gap.high, gap.p, status.confirmed[0].objectives["o0"].stderr) == (None, None, None, None)
    text = drawn(status)
    assert "± -" in text
    assert "says nothing of how good a model is" in text
    assert "nan" not in text
    assert "NaN" not in status.model_dump_json()


def test_a_confirmation_that_was_broken_off_is_told(tmp_path: Path) -> None:
    setup = setup_of(objectives=1)
    folder = create(tmp_path, "made", setup)
    drive(folder, setup, simulation=BOTH_SKILLS)
    with Store.open(folder / "search.db") as store:
        assert status_of(store).state == "finished"
        with acquire(store):
            store.record_event(Shortlist(candidates=[5], drawn=[]))
        status = status_of(store)
        assert (status.state, status.winner) == ("interrupted", None)
        assert "evomerge confirm" in status.why
        (listed,) = summaries_of(Root(tmp_path), Drivers(Root(tmp_path)))
        assert (listed.state, listed.why) == (status.state, status.why)


def test_where_only_baselines_are_confirmed_their_table_is_there_and_a_word(tmp_path: Path) -> None:
    """Every candidate fails, or left its race: what there is to see are the baselines."""
    baselines = {mark.recipe.hash for mark in FakeSpace(1).baselines()}

    def only_baselines(job: Job) -> tuple[float, Measured | Failed]:
        return BOTH_SKILLS(job) if job.recipe.hash in baselines else (1.0, Failed("not_finite", "NaN"))

    status, store = searched(tmp_path, setup_of(objectives=1), only_baselines)
    store.close()
    assert status.confirmed == []
    text = drawn(status)
    assert "held-out split" in text
    assert "Nothing that the search found is confirmed" in text


def test_tables_have_parameters_and_say_once_what_a_baseline_is(tmp_path: Path) -> None:
    status, store = searched(tmp_path, setup_of(SUM), BOTH_SKILLS)
    with store:
        found = store.search()
        rows = ranked(store, Preference.of_search(found), 3)
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(top_table(rows, status, found.record, best=True))
    text = console.export_text()
    for row in rows:
        assert row.genome is not None
        assert f"{row.genome[0]:.3f}" in text
    assert status.best is not None
    assert status.best.parameters == {"w0": rows[0].genome[0]}  # type: ignore[index]
    assert origin_text("average", "uniform average") == "uniform average"
    assert origin_text("default", "ties defaults") == "ties defaults"
    assert origin_text("source", "maths") == "source maths"
    assert origin_text("optimizer", "") == "optimizer"


@pytest.mark.parametrize(
    ("losses", "roles"),
    [
        ([[0.0, 5.0], [1.0, 1.0], [5.0, 0.0]], {"best at a": 0, "best at b": 2, "knee": 1}),
        ([[0.0, 5.0], [0.0, 4.0], [5.0, 0.0]], {"best at a": 1, "best at b": 2, "knee": 1}),  # not the dominated one
        ([[np.nan, 5.0], [3.0, 3.0]], {"best at a": 1, "best at b": 1, "knee": 1}),
        ([[np.nan, 5.0]], {}),
        ([[0.0, 9.0], [1.0, 0.0]], {"best at a": 0, "best at b": 1, "knee": 0}),  # of two ends the first ...
    ],
)
def test_what_is_chosen_of_a_front(losses: list[list[float]], roles: dict[str, int]) -> None:
    preference = Preference({"a": False, "b": False}, None)
    assert preference.choose(np.array(losses)) == roles


def test_where_a_front_has_no_knee_the_one_that_gives_away_least_is_taken() -> None:
    """... unless what others score says that one of them gives away almost nothing."""
    losses = np.array([[-0.80, 0.0], [-0.70, -0.70]])
    among = np.array([*losses, [-0.10, -0.80], [0.0, 0.0]])
    assert Preference({"a": False, "b": False}, None).choose(losses, among)["knee"] == 1


def test_a_scalarisation_weighs(tmp_path: Path) -> None:
    losses = np.array([[0.0, 1.0], [0.6, 0.5], [1.0, 0.0]])

    def best(mix: WeightedSum | Chebyshev) -> int:
        return Preference({"a": False, "b": False}, mix).choose(losses)["best"]

    assert best(WeightedSum(name="weighted_sum", weights=(3, 1))) == 0
    assert best(WeightedSum(name="weighted_sum", weights=(1, 3))) == 2
    assert best(DISTANCE) == 1  # in the hollow of the front, where no sum leads


@pytest.mark.parametrize("mix", [SUM, DISTANCE])
def test_the_number_that_decides_stands_in_every_place_alike(
    tmp_path: Path,
    mix: WeightedSum | Chebyshev,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = replace(setup_of(mix), confirm=Confirm(top=3, drawn=8))
    status, store = searched(tmp_path, setup, BOTH_SKILLS)
    folder = tmp_path / "made"
    with store:
        assert status.winner is not None
        (pick,) = status.picks
        assert pick.scalar is not None
        assert pick.scalar_gain is not None
        name, found = pick.scalar.name, status.confirmed_entry(status.winner)
        assert isinstance(found, ConfirmedEntry)
        values = [found.objectives[each] for each in ("o0", "o1")]
        if mix is SUM:
            assert pick.scalar.mean == pytest.approx(sum(value.mean for value in values))
            assert pick.scalar.stderr == pytest.approx(np.hypot(values[0].stderr or 0, values[1].stderr or 0))
        assert pick.scalar_gain.to == max(
            ("one", "two"), key=lambda label: -next(g.mean for g in found.gaps(name) if g.to == label)
        )
        assert (pick.scalar_gain.low or 0) < pick.scalar_gain.mean < (pick.scalar_gain.high or 0)
        row = store.candidate(int(status.winner[1:]))
        on_search = status.entry(row, store.search().record).value(name)
        assert on_search is not None
        curse = curse_of(store)
        assert curse.objective == name
        (point,) = (each for each in curse.points if each.winner)
        assert point.search.mean == pytest.approx(on_search.mean), "the same number wherever it stands"
        assert len(curse.candidates) >= 8, "what is drawn is the best by the same number"
        texts = {
            "report": report_html(store, folder),
            "card": card("m", read_recipe(row.recipe, SOURCES), sources_of(),
                         Provenance(store.search(), status, row, curse)),
            "figure": draw(store, "history").to_json(),
            "curse": draw(store, "curse").to_json(),
        }  # fmt: skip
        assert (compared(store, row.number, 0)[0].objective, compared(store, row.number, 0)[0].low) != (name, None)
    places = {"list": [str(tmp_path)], "show": [str(folder), "best"], "compare": [str(folder), "best", "one"]}
    for command in ("status", "top", "show", "compare", "list", "curse"):
        texts[command] = " ".join(printed(capsys, command, *places.get(command, [str(folder)])).split())
    listed = json.loads(printed(capsys, "status", str(folder), "--json"))["picks"][0]
    assert (listed["scalar"]["name"], listed["scalar_gain"]["to"]) == (name, pick.scalar_gain.to)
    first = json.loads(printed(capsys, "top", str(folder), "--json"))[0]
    assert status.best is not None
    assert status.best.scalar is not None
    assert first["scalar"]["mean"] == pytest.approx(status.best.scalar.mean)
    monkeypatch.setenv("EVOMERGE_TOKEN", TOKEN)
    with serving(make_app(tmp_path)) as address:
        remote = json.loads(printed(capsys, "top", "made", "--json", "--server", address))
        texts["top of a server"] = " ".join(printed(capsys, "top", "made", "--server", address).split())
    assert (remote[0]["id"], remote[0]["scalar"]) == (first["id"], pytest.approx(first["scalar"]["mean"]))
    with client_of(make_app(tmp_path), accept="text/html") as client:
        for address in ("/", "/searches/made", f"/searches/made/candidates/{status.winner}", "/searches/made/compare"):
            texts[address] = client.get(address).text
    shown = f"{pick.scalar.mean:.3f}"
    for place, text in texts.items():
        if place not in ("figure", "curse"):
            assert shown in text, place
        assert name in text or place == "list", place  # which leaves objectives out where it is narrow


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def sources_of() -> dict[str, Source]:
    return {name: open_source(name, str(MINIATURES / "base"), place=name) for name in SOURCES}


def test_a_front_shows_each_objective_where_one_number_would_decide(tmp_path: Path) -> None:
    status, store = searched(tmp_path, replace(setup_of(), confirm=Confirm(top=3, drawn=8)), BOTH_SKILLS)
    with store:
        curse = curse_of(store)
        assert [each.objective for each in curse.all] == ["o0", "o1"]
        assert all(each.best == 8 and each.fall is not None for each in curse.all), "the best by each are drawn"
        svg = ET.fromstring(curse_svg(curse))
        assert len([each for each in svg if each.tag.endswith("svg")]) == 2
        drawn = draw(store, "history")
        assert {each.yaxis for each in drawn.data} == {"y", "y2"}
        assert sum(each.showlegend is not False and each.name == "best so far" for each in drawn.data) == 1
        assert {each.yaxis for each in draw(store, "history", FigureOptions(objective="o1")).data} <= {None, "y"}
    assert status.scalar is None


def test_an_earlier_winner_that_wins_again_is_no_source(tmp_path: Path) -> None:
    """What a path begins with is scored beside the sources, and is a merge."""

    class AfterAMerge(FakeSpace):
        def baselines(self) -> Iterator[Baseline]:
            half = np.full(1, 0.5)
            yield Baseline("merged", "source", self.decode(half), half)
            yield from super().baselines()

    setup = replace(setup_of(SUM), space=AfterAMerge(1), budget=Budget(candidates=8))
    status, store = searched(tmp_path, setup, BOTH_SKILLS)
    with store:
        winner = status.confirmed_entry(status.winner or "")
        assert winner is not None
        assert (winner.label, winner.origin) == ("merged", "earlier winner")
        (told,) = conclusions(status)
        assert "merged, the earlier winner" in told
        assert "unmerged" not in told
        assert exported(store, "best") == int(winner.id[1:])
        row = store.candidate(int(winner.id[1:]))
        assert origin_text(status.entry(row, store.search().record).origin, row.label) == "earlier winner merged"
    assert [mark.origin for mark in status.baselines][1:3] == ["source", "source"]


def test_names_that_are_near_are_asked_about_and_top_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, store = searched(tmp_path, setup_of(), BOTH_SKILLS)
    with store:
        for given, near in (("best in o0", "best at o0"), ("uniform avrage", "uniform average"), ("kne", "knee")):
            with pytest.raises(InputError) as caught:
                chosen(store, given)
            assert f"Did you mean {near!r}?" in caught.value.hint
        with pytest.raises(InputError) as caught:
            chosen(store, "c9999")
        assert "Did you mean" not in caught.value.hint
    told = " ".join(printed(capsys, "top", str(tmp_path / "made"), "-k", "3").split())
    assert f"3 of {status.candidates.asked} candidates: the 3 best" in told
    assert "--all" in told
    assert "candidates: " not in printed(capsys, "top", str(tmp_path / "made"), "--all")


def test_the_confirmation_stands_in_the_state_line_with_its_total(tmp_path: Path) -> None:
    status, store = searched(tmp_path, replace(setup_of(SUM), confirm=Confirm(top=3, drawn=8)), BOTH_SKILLS)
    store.close()
    effort = status.confirmation
    assert effort is not None
    assert effort.models == effort.models_done == 3 + 8  # baselines, and the best, some of which are only drawn
    assert effort.items_each == 2 * ITEMS
    assert f"confirmation {effort.models} models x {2 * ITEMS} held-out items" in headline(status)
    half = status.model_copy(update={"confirmation": effort.model_copy(update={"models_done": 4, "seconds": 75.0})})
    assert "confirmation 4 of 11 models x 80 held-out items 1m15s" in headline(half)
