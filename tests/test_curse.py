"""Search scores beside held-out ones: the numbers against plain formulas, the picture, and what the card says."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from helpers_miniature import MINIATURES
from helpers_search import SOURCES, drive, make_setup, simulate
from scipy import stats

from evomerge.checkpoints.source import open_source
from evomerge.recipes.base import read_recipe
from evomerge.recipes.stack import StackRecipe
from evomerge.report.card import Provenance, papers
from evomerge.report.curse import Curse, SplitScores, curse_of, curse_text
from evomerge.report.curse_picture import curse_svg
from evomerge.report.status import status_of
from evomerge.search.driving.confirm import Confirmation
from evomerge.search.driving.control import Control
from evomerge.search.driving.drive import Drive
from evomerge.search.pools.simulated import SimulatedClock, SimulatedPool
from evomerge.search.preparing.setup import Setup
from evomerge.search.settings.sections import Confirm
from evomerge.store import CandidateRow, Estimate, Store, acquire

SVG = "{http://www.w3.org/2000/svg}"


def settings_of(setup: Setup) -> dict[str, object]:
    return {
        "sources": {"one": "x", "two": "y"}, "space": {"kind": "made_up"}, "objectives": {}, "seed": setup.seed,
        "optimizer": {"name": "cma"}, "budget": {"candidates": 60, "hours": None},
        "confirm": setup.confirm.model_dump(),
    }  # fmt: skip


def searched(folder: Path, setup: Setup) -> Path:
    """A search that is confirmed, with all that a report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = [evaluator.version for evaluator in setup.evaluators]
    fingerprints = {
        "sources": {name: {} for name in SOURCES},
        "evaluators": [asdict(evaluator) for evaluator in setup.evaluators],
        "objectives": [asdict(o) | {"version": versions[o.evaluator]} for o in setup.objectives],
        "parameters": [],
    }
    place = folder / "search.db"
    Store.create(
        place, name="made-up", settings=settings_of(setup), fingerprints=fingerprints, environment={}
    ).close()  # fmt: skip
    drive(folder, setup)
    confirm(folder, setup)
    return place


def confirm(folder: Path, setup: Setup) -> None:
    def recipe_of(row: CandidateRow) -> StackRecipe:
        return read_recipe(row.recipe, SOURCES)

    with Store.open(folder / "search.db") as store, acquire(store):
        store.update_settings(settings_of(setup))
        pool = SimulatedPool(1, simulate, SimulatedClock())
        word = Control(store.take_commands, interval_s=0.0)
        assert Confirmation(Drive(setup, store, pool, word, logs=folder / "logs")).run(recipe_of)


@pytest.fixture(scope="module", params=[True, False], ids=["maximised", "minimised"])
def setup(request: pytest.FixtureRequest) -> Setup:
    found = make_setup(candidates=60)
    objectives = tuple(replace(objective, maximise=request.param) for objective in found.objectives)
    return replace(found, objectives=objectives, confirm=Confirm(top=3, drawn=12))


@pytest.fixture(scope="module")
def place(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return searched(tmp_path_factory.mktemp("searched"), setup)


def scores(store: Store, number: int, split: str) -> np.ndarray:
    (found,) = store.scores(number, split)
    return found.metrics["acc"].astype(np.float64)


def number_of(point: SplitScores) -> int:
    return int(point.id.removeprefix("c"))


def test_points_have_both_scores_and_say_what_they_are(place: Path, setup: Setup) -> None:
    with Store.open(place) as store:
        curse, status = curse_of(store), status_of(store)
        (event,) = store.events(kinds=("shortlist",))
        for point in curse.points:
            for split, value in (("search", point.search), ("held_out", point.held_out)):
                assert value.mean == pytest.approx(scores(store, number_of(point), split).mean())
    found = {number_of(p): p for p in curse.candidates}
    assert set(found) == {*event.payload["candidates"], *event.payload["drawn"]}
    assert {n for n, p in found.items() if p.confirmed} == set(event.payload["candidates"])
    assert [p.id for p in curse.points if p.winner] == [status.winner]
    assert curse.best == 12
    assert {p.label for p in curse.baselines} == {"one", "two", "uniform average"}
    sign = 1 if setup.objectives[0].maximise else -1
    means = [sign * p.search.mean for p in curse.candidates]
    assert means == sorted(means, reverse=True)


def test_the_fall_is_that_of_the_best_beyond_that_of_the_baselines(place: Path, setup: Setup) -> None:
    with Store.open(place) as store:
        curse = curse_of(store)
        sign = 1 if setup.objectives[0].maximise else -1
        best, marks = (
            {split: sign * np.mean([scores(store, number_of(p), split) for p in group], axis=0) for split in SPLITS}
            for group in ([p for p in curse.candidates if p.best], curse.baselines)
        )
    assert curse.fall is not None
    assert curse.fall_of_baselines is not None
    assert curse.excess is not None
    for fall, split in (
        (curse.fall, best),
        (curse.fall_of_baselines, marks),
        (curse.excess, {s: best[s] - marks[s] for s in SPLITS}),
    ):
        welch = stats.ttest_ind(split["search"], split["held_out"], equal_var=False).confidence_interval(0.95)
        assert fall.mean == pytest.approx(split["search"].mean() - split["held_out"].mean())
        assert (fall.low, fall.high) == pytest.approx((welch.low, welch.high))


SPLITS = ("search", "held_out")


def test_slope_and_tau_are_scipys(place: Path) -> None:
    with Store.open(place) as store:
        curse = curse_of(store)
    x, y = (
        [value.mean for value in side] for side in zip(*((p.search, p.held_out) for p in curse.candidates), strict=True)
    )
    assert curse.slope == pytest.approx(stats.linregress(x, y).slope)
    assert curse.tau == pytest.approx(stats.kendalltau(x, y).statistic)


def test_status_corrects_for_every_comparison_and_says_how_many(place: Path, setup: Setup) -> None:
    with Store.open(place) as store:
        status = status_of(store)
        (event,) = store.events(kinds=("shortlist",))
        sign = 1 if setup.objectives[0].maximise else -1
        ours = scores(store, int(status.confirmed[0].id.removeprefix("c")), "held_out")
        theirs = scores(store, 0, "held_out")
    assert status.choice is not None
    assert status.choice.comparisons == 3 * len(event.payload["candidates"])
    assert status.choice.drawn == len(event.payload["drawn"])
    gap = status.confirmed[0].objectives["o0"].difference[0]
    plain = stats.ttest_rel(sign * ours, sign * theirs)
    interval = plain.confidence_interval(0.95)
    assert gap.to == "one"
    assert gap.mean == pytest.approx(sign * (ours.mean() - theirs.mean()))
    assert gap.low < interval.low < interval.high < gap.high
    assert gap.p >= plain.pvalue


def test_a_second_shortlist_is_told_and_the_same_one_again_is_not(tmp_path: Path) -> None:
    setup = make_setup(candidates=60)
    place = searched(tmp_path, setup)

    def choice() -> tuple[int, float]:
        with Store.open(place) as store:
            found = status_of(store).choice
        assert found is not None
        return found.shortlists, found.frozen_at

    first = choice()
    confirm(tmp_path, setup)
    assert choice() == first
    confirm(tmp_path, replace(setup, confirm=Confirm(top=6)))
    assert choice()[0] == 2
    assert choice()[1] > first[1]


# ---- what people see -------------------------------------------------------------------------------------------------


def point(search: float, held_out: float, label: str = "", error: float = 0.02, **changes: object) -> SplitScores:
    values = {
        "search": Estimate(mean=search, stderr=1.5 * error, n=100),
        "held_out": Estimate(mean=held_out, stderr=error, n=200),
    }
    content: dict[str, object] = {"id": "c0009", "label": label, "baseline": bool(label), "confirmed": bool(label)}
    content |= {"best": not label, "winner": False}
    return SplitScores.model_validate(content | values | changes)


def curse(*points: SplitScores, **changes: object) -> Curse:
    content: dict[str, object] = {
        "search": "demo", "objective": "maths", "maximise": True, "confidence": 0.95, "points": points,
        "best": sum(not p.baseline for p in points), "fall": {"mean": 0.05, "low": 0.01, "high": 0.09},
        "fall_of_baselines": {"mean": -0.01, "low": -0.04, "high": 0.02},
        "excess": {"mean": 0.06, "low": 0.02, "high": 0.1}, "tau": 0.4, "slope": 0.5,
    }  # fmt: skip
    return Curse.model_validate(content | changes)


FOUND = (
    point(0.70, 0.60, confirmed=True),
    point(0.68, 0.66, confirmed=True, winner=True),
    point(0.66, 0.61),
    point(0.65, 0.55),
)


def test_the_text_says_what_fell_and_what_is_the_curse() -> None:
    text = " ".join(curse_text(curse(*FOUND, point(0.5, 0.51, "japanese"))))
    assert "the 4 best by maths are 0.050 [0.010, 0.090] worse (95% interval)" in text
    assert "are 0.010 better there: what is left, +0.060 [+0.020, +0.100], is the winner's curse" in text
    assert "a difference in search score is 0.50 times as large on held-out items (slope)" in text
    assert "tau +0.40" in text
    risen = curse(*FOUND, fall={"mean": -0.05, "low": -0.09, "high": -0.01})
    assert "0.050 [0.010, 0.090] better" in curse_text(risen)[0]
    assert curse_text(curse(fall=None)) == ["No candidate of the best in search has both scores yet."]


def drawn(found: Curse) -> ET.Element:
    return ET.fromstring(curse_svg(found))


def groups(svg: ET.Element, kind: str) -> list[ET.Element]:
    """The marks of a kind within the picture, the legend apart: those that say on hovering what they are."""
    return [
        g for g in svg.iter(f"{SVG}g")
        if g.find(f"{SVG}title") is not None and set(kind.split()) <= set(g.get("class", "").split())
    ]  # fmt: skip


def test_the_picture_has_every_candidate_where_its_scores_are() -> None:
    svg = drawn(curse(*FOUND, point(0.5, 0.51, "japanese")))
    assert len(groups(svg, "found")) == 4
    assert len(groups(svg, "found drawn")) == 2
    assert len(groups(svg, "baseline")) == 1
    (winner,) = groups(svg, "winner")
    assert winner.findtext(f"{SVG}title") == "c0009: search 0.680 ± 0.030, held out 0.660 ± 0.020"
    dots = [g.find(f"{SVG}circle") for g in groups(svg, "found")]
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in dots if dot is not None]
    x, y = (np.array(column) for column in zip(*places[::-1], strict=True))  # the best is drawn last
    assert np.corrcoef(x, [p.search.mean for p in FOUND])[0, 1] == pytest.approx(1.0, abs=1e-4)
    assert np.corrcoef(y, [p.held_out.mean for p in FOUND])[0, 1] == pytest.approx(-1.0, abs=1e-4)
    (diagonal, _) = (line for line in svg.iter(f"{SVG}line") if line.get("class") == "diagonal")
    x1, y1, x2, y2 = (float(diagonal.get(key, "")) for key in ("x1", "y1", "x2", "y2"))
    assert x2 - x1 == pytest.approx(y1 - y2)


def test_a_baseline_far_off_is_told_and_does_not_squeeze_the_rest() -> None:
    far = point(0.01, 0.02, "base")
    svg = drawn(curse(*FOUND, far))
    assert groups(svg, "baseline") == []
    texts = " ".join(text.text or "" for text in svg.iter(f"{SVG}text"))
    assert "base (0.010, 0.020)" in texts


@pytest.mark.parametrize(
    "found",
    [
        curse(point(0.5, 0.5, error=0.0), slope=None, tau=None),
        curse(*FOUND, search="<&>\x00 \ud800", objective="]]>", slope=None, tau=None),
        curse(point(-3.2, -3.9), point(-3.1, -3.5, winner=True), maximise=False),
        curse(point(21000.0, 20000.0), point(19000.0, 22000.0, "x" * 300), point(2e4, 2e4, "y" * 300)),
    ],
    ids=["one", "names", "negative", "large"],
)
def test_everything_drawn_lies_within_the_picture(found: Curse) -> None:
    svg = drawn(found)
    width, height = (float(number) for number in svg.get("viewBox", "").split()[2:])
    for element in svg.iter():
        for key, most in (("x1", width), ("x2", width), ("cx", width), ("y1", height), ("y2", height), ("cy", height)):
            assert 0 <= float(element.get(key, 0)) <= most


def test_the_card_discloses_how_many_there_were_and_how_the_winner_was_chosen(place: Path) -> None:
    sources = {name: open_source(name, str(MINIATURES / "base"), place=name) for name in SOURCES}
    with Store.open(place) as store:
        status = status_of(store)
        row = store.candidate(int(status.confirmed[0].id.removeprefix("c")))
        provenance = Provenance(store.search(), status, row, curse_of(store))
        other = replace(provenance, row=store.candidate(59), curse=None)
    recipe = read_recipe(row.recipe, SOURCES)
    texts = papers("merged", recipe, sources, provenance)
    counts = provenance.status.candidates
    card = " ".join(texts["README.md"].split())
    for words in (
        f"The search asked for 60 candidates: {counts.done} were scored, each on 40 items of the search split "
        f"({40 * counts.done:,} in all), {counts.cached} had the recipe of one of these, and 0 failed.",
        "A shortlist of 3 was written down at",
        "9 more were scored there for the picture alone; they could not win.",
        "Intervals hold all at once with 95%: corrected for 9 comparisons "
        "(3 candidates with one, two, uniform average).",
        "may be luck of the choice",
        f"this model's o0 {row.objectives['o0'].mean:.3f} became",
        "the 12 best by o0 are",
        "(curse.svg)",
    ):
        assert words in card
    assert ET.fromstring(texts["curse.svg"]).tag == f"{SVG}svg"
    picked = papers("merged", recipe, sources, other)
    assert "**This model is c0059, and not the winner: somebody picked it.**" in picked["README.md"]
    assert "curse.svg" not in picked
