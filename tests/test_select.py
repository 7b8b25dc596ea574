"""Choosing among many sources: the race, the order by gain, sources that are made, and the stage of a search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from helpers_miniature import MINIATURES, ROOT, evomerge, json_of, short_search_file, write_texts
from helpers_postgres import database, postgres
from helpers_search import Killed, killed_after, table
from hypothesis import given, strategies
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.source import Source, open_source
from evomerge.commands import controlling
from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.merging.building.derived import Derived, make_source
from evomerge.optimizers import CmaSettings
from evomerge.search.estimation.selection import (
    Chosen,
    Gain,
    ObjectiveRace,
    by_gain,
    pooled_difference,
    start_by_gains,
)
from evomerge.search.opening.session import Files, make_pool
from evomerge.search.pools.base import Pool
from evomerge.search.preparing.prepare import Prepared
from evomerge.search.settings.early import check_early
from evomerge.search.settings.folder import open_store
from evomerge.search.settings.search_file import SearchFile, load_search_file
from evomerge.store import Store
from evomerge.store.events import WinnerControlled

__all__ = ["database", "postgres"]  # fixtures

ZOO = ROOT / "examples" / "zoo"

# --- the race


def test_a_race_ends_for_those_whose_place_is_clear() -> None:
    base = np.array([0.0, 1.0] * 10)
    race = ObjectiveRace(["best", "worst", "base too"], 1, 1000, 0.9)
    race.judge(base, np.array([np.ones(20), np.zeros(20), base]))
    assert race.out == {"worst", "base too"}  # the one is below the base, the other surely behind the best
    assert race.racing == []
    assert ObjectiveRace(["a"], 1, 10, 0.9).out == set()


def test_a_race_goes_on_between_equals() -> None:
    base, rng = np.zeros(20), np.random.default_rng(0)
    race = ObjectiveRace(["a", "b", "c"], 1, 1000, 0.9)
    race.judge(base, (rng.random((3, 20)) < 0.5).astype(np.float64))
    assert len(race.racing) >= 2


@given(strategies.integers(0, 2**31), strategies.integers(1, 5))
def test_the_order_by_gain_is_the_greedy_cover(seed: int, most: int) -> None:
    """With all items scored, and bounds that are means: each time whoever covers most, as is counted plainly."""
    scores = np.random.default_rng(seed).random((6, 12)) < 0.4
    sources = {str(i): set(np.flatnonzero(row)) for i, row in enumerate(scores[1:])}
    rows = {name: [np.array([float(i in solved) for i in range(12)])] for name, solved in sources.items()}
    covered = set(np.flatnonzero(scores[0]))
    for chosen in by_gain([scores[0].astype(np.float64)], rows, most, 0.5):
        added = {name: len(solved - covered) for name, solved in sources.items()}
        assert added[chosen.name] == max(added.values()) == round(12 * chosen.gain.mean) > 0
        covered |= sources.pop(chosen.name)
        most -= 1
    assert most == 0 or not set().union(*sources.values()) - covered


def test_who_was_scored_on_few_items_does_not_come_first_by_luck() -> None:
    base = np.zeros(40)
    lucky = np.full(40, np.nan)
    lucky[:4] = [1, 1, 1, 0]
    steady = np.array([1, 1, 1, 0] * 10, dtype=np.float64)
    order = [chosen.name for chosen in by_gain([base], {"lucky": [lucky], "steady": [steady]}, 2, 0.9)]
    assert order[0] == "steady"


def test_a_search_begins_with_sources_as_they_add() -> None:
    kept = [Chosen(name, Gain(mean, 0.1)) for name, mean in (("most", 0.4), ("half", 0.2), ("none", 0.0))]
    names = ("most", "half", "none", "rest")
    weights = [Parameter(f"weight.{name}", 0.0, 1.5, 0.4, share_of=name) for name in names]
    density = Parameter("density", 0.0, 1.0, 0.5)
    start = start_by_gains(kept, [*weights, density])
    assert start == {"most": 0.75, "half": 0.375, "none": 0.0, "rest": 0.0}
    assert start_by_gains(kept[2:], weights) == {}
    narrow = [Parameter("weight.rest", 0.1, 0.2, 0.2, share_of="rest")]
    assert start_by_gains(kept, narrow) == {"rest": 0.1}  # moved into its bounds
    begun = CmaSettings(name="cma").at_gains().at_shares(start)
    assert begun.start([*weights, density]) == [0.75, 0.375, 0.0, 0.0, 0.5]
    first = begun.build([*weights, density], 1, 0).favourite
    assert first == pytest.approx([0.75, 0.375, 0.0, 0.0, 0.5], abs=0.02)


@pytest.mark.parametrize(
    ("x0", "words"),
    [({"nobody": 1.0}, "x0: no weight is of nobody"), ({"a": 2.0}, "begins at 2, and weight.a goes from 0 to 1.5")],
)
def test_a_start_that_cannot_be_is_refused(x0: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CmaSettings(name="cma", x0=x0).check([Parameter("weight.a", 0.0, 1.5, 0.4, share_of="a")], 1, "optimizer")


def test_a_pooled_difference_is_the_mean_over_objectives() -> None:
    ours, theirs = [np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0])], [np.zeros(4), np.array([1.0, 0.0])]
    gap = pooled_difference(ours, theirs)
    assert gap.mean == pytest.approx((0.75 + 0.0) / 2)
    assert gap.low < gap.mean < gap.high


# --- sources that are made


@pytest.fixture(scope="module")
def zoo() -> dict[str, Source]:
    references = {"base": str(ZOO / "base")} | {n: f"{ZOO / 'base'}+{ZOO / n}" for n in ("english", "kanji")}
    return {name: open_source(name, reference, place=name) for name, reference in references.items()}


@pytest.fixture(scope="module")
def miniatures() -> dict[str, Source]:
    return {n: open_source(n, str(MINIATURES / n), place=n) for n in ("base", "maths", "japanese")}


def made(derived: Derived, sources: dict[str, Source], folder: Path) -> Source:
    contents = {name: name for name in sources}
    reference = make_source(derived, "made", "base", sources, contents, folder)
    assert make_source(derived, "made", "base", sources, contents, folder) == reference
    return open_source("made", reference, place="made")


@pytest.mark.parametrize("family", ["zoo", "miniatures"])
def test_a_made_source_is_the_weighted_sum_of_changes(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sources = request.getfixturevalue(family)
    one, other = [name for name in sources if name != "base"]
    source = made(Derived({one: 0.5, other: -0.25}), sources, tmp_path)
    assert bool(source.adapters) == (family == "zoo")
    for name in sources["base"].tensors:
        base, first, second = (sources[n].read(name).double() for n in ("base", one, other))
        expected = base + 0.5 * (first - base) - 0.25 * (second - base)
        torch.testing.assert_close(source.read(name).double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("family", "rounding"), [("zoo", 0.02), ("miniatures", 0.3)])
def test_a_random_direction_is_as_long_and_elsewhere(
    family: str, rounding: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """But for what bfloat16 rounds off the weights of a model, which is much of what small tensors change."""
    sources = request.getfixturevalue(family)
    of = list(sources)[1]
    source = made(Derived({of: 0.5}, seed=3), sources, tmp_path)
    cosines = []
    for name in sources["base"].tensors:
        base, theirs, random = (s.read(name).double() for s in (sources["base"], sources[of], source))
        change, noise = (theirs - base).flatten(), (random - base).flatten()
        if change.norm() == 0:
            assert noise.norm() == 0
            continue
        assert float(noise.norm()) == pytest.approx(0.5 * float(change.norm()), rel=rounding)
        cosines.append(float(torch.nn.functional.cosine_similarity(change, noise, dim=0)))
    assert np.abs(cosines).mean() < 0.2


# --- a search


NAMES = {"base": "base", "maths": "maths", "japanese": "japanese", "idle": "base", "maths_too": "maths"}


KINDS = ("selected", "text loss")


def select_file(folder: Path, **changes: object) -> Path:
    """Two of four sources; one is the base again, and adds nothing."""
    sources = {name: str(MINIATURES / of) for name, of in NAMES.items()}
    content: dict[str, object] = {"sources": sources, "select": {"keep": 2, "rungs": [3, 4]}, "confirm": {"top": 1}}
    return short_search_file(folder, **content | changes)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    with mock.patch("evomerge.commands.selecting.make_pool", pool_of_a_valid_file):
        assert evomerge("search", select_file(folder), "--dir", folder / "search") == 0
    return folder / "search"


def pool_of_a_valid_file(prepared: Prepared, folder: Path, files: Mapping[str, Files]) -> Pool:
    """Workers of a cluster are given the settings as JSON, and check them like any search file."""
    SearchFile.model_validate(prepared.file.model_dump(mode="json"))
    return make_pool(prepared, folder, files)


def test_a_search_is_over_what_was_chosen(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = yaml.safe_load((searched / "search.yaml").read_text())
    assert file["select"] is None
    assert file["optimizer"]["x0"] == {}  # no source adds anything to so few items: it begins at the defaults
    with Store.open(searched / "search.db") as store:
        (event,) = store.events(kinds=("selected",))
        said = event.payload
        record = store.search().record
        scored = store.events(kinds=("select scored",))
    fates = {source["name"]: source["fate"] for source in said["sources"]}
    kept = [name for name, fate in fates.items() if fate == "kept"]
    assert fates["base"] == "base"
    assert len(kept) == 2
    assert list(record.sources)[:3] == ["base", *kept]
    assert set(record.sources) <= {"base", *kept, "rest"}
    assert {p.share_of for p in record.parameters} == set(record.sources) - {"base"}
    assert said["scored"] == sum(len(one["items"]) for event in scored for one in event.payload["scores"])
    assert said["full"] == 5 * 4
    assert {
        row["label"] for row in json_of(capsys, "top", searched, "--all", "--json") if row["origin"] == "source"
    } == {*record.sources}


@pytest.mark.parametrize("writes", [3, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_killed_selection_goes_on_and_ends_the_same(writes: int, searched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    arguments: list[object] = ["search", select_file(tmp_path), "--dir", folder]
    deaths = 0
    while True:
        try:
            with killed_after(writes):
                code = evomerge(*arguments)
        except Killed:
            deaths, arguments = deaths + 1, ["resume", folder]
            continue
        assert code == 0
        break
    assert deaths >= 2
    assert table(folder) == table(searched)
    with Store.open(folder / "search.db") as ours, Store.open(searched / "search.db") as theirs:
        sources = [store.events(kinds=("selected",))[0].payload for store in (ours, theirs)]
    assert sources[0] == sources[1]


def test_the_plan_is_that_of_the_sources_that_will_be_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a budget that the baselines of all sources would spend alone, and the law's among them."""
    file = select_file(tmp_path, budget={"candidates": 7}, baselines={"kappa": True})
    rows = {row["key"]: row["text"] for row in json_of(capsys, "validate", file, "--json")["rows"]}
    assert rows["select"].startswith("at most 2 of 4 sources, the others as one where that is better; by up to 4 items")
    assert "20 in all" in rows["select"]
    assert rows["space"].startswith("3 parameters")
    assert "x0 gains" in rows["optimizer"]  # the centre of a box of many weights is far too strong a merge


@pytest.mark.parametrize(("said", "begins"), [({}, "gains"), ({"x0": "centre"}, "centre")])
def test_it_begins_by_what_sources_add_unless_the_file_says_otherwise(
    said: dict[str, str], begins: str, tmp_path: Path
) -> None:
    file = load_search_file(select_file(tmp_path, optimizer={"name": "cma", **said}))
    assert isinstance(file.optimizer, CmaSettings)
    assert file.optimizer.x0 == begins
    plain = load_search_file(select_file(tmp_path, optimizer={"name": "cma", **said}, select=None))
    assert isinstance(plain.optimizer, CmaSettings)
    assert plain.optimizer.x0 == "centre"


@pytest.mark.nightly  # two whole searches
@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", ["server", "ray"])
def test_a_selection_and_soups_are_the_same_elsewhere(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "texts.jsonl", slice(0, 6))
    texts = {"file": str(tmp_path / "texts.jsonl"), "prompts": 6, "tokens": 24}
    changes: dict[str, object] = {"calibration": texts, "baselines": {"soups": True}, "budget": {"candidates": 11}}
    assert evomerge("search", select_file(tmp_path, **changes), "--dir", tmp_path / "here") == 0
    if where == "ray":
        changes |= {"pool": "ray", "cluster": {"workers": 2}}
    else:
        url = request.getfixturevalue("postgres").url(request.getfixturevalue("database"))
        monkeypatch.setenv("EVOMERGE_STORE", url)
    assert evomerge("search", select_file(tmp_path, **changes), "--dir", tmp_path / "there") == 0
    found = []
    for folder in (tmp_path / "there", tmp_path / "here"):
        with open_store(folder) as store:
            events = {kind: [event.payload for event in store.events(kinds=(kind,))] for kind in KINDS}
            rows = [(row.label, row.recipe_hash, row.genome, row.losses) for row in store.candidates()]
        found.append([events, *map(repr, rows)])
        monkeypatch.delenv("EVOMERGE_STORE", raising=False)
    assert found[0] == found[1]
    assert any("LM-Cocktail" in row for row in found[0][1:])


@pytest.mark.nightly  # a search that is longer than the others here
def test_the_winner_is_compared_with_random_directions_at_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control is made again by hand, and scored as a model of its own; a stop before it is made up for."""
    items = {"task": "mini_math_ja", "metric": "acc_ja", "search": "validation[:12]", "held_out": "test[:8]"}
    file = select_file(tmp_path, objectives={"mini_math_ja": items}, budget={"candidates": 11})
    folder = tmp_path / "search"
    with mock.patch("evomerge.commands.driving.control_winner", return_value=False):
        assert evomerge("search", file, "--dir", folder) != 0
    fault = InputError("select", "its control cannot be scored: no memory", "See logs/control.log.")
    with mock.patch.object(controlling._Control, "compare", side_effect=fault):
        assert evomerge("resume", folder) == 2
    said = capsys.readouterr().err
    assert "error: select: the winner has no control: its control cannot be scored: no memory. See logs/" in said
    assert f"To try the control again: evomerge resume {folder}" in said
    assert evomerge("resume", folder) == 0
    with Store.open(folder / "search.db") as store:
        (event,) = store.events(kinds=("winner controlled",))
        said = event.read(WinnerControlled)
        (ours,) = store.scores(said.candidate, "held_out")
        weights = json.loads(store.candidate(said.candidate).recipe)["blends"][0]["parameters"]["weight"]
    kept, (other,) = said.kept, said.replaced
    assert weights[kept] >= weights[other] > 0
    (control,) = (folder / "sources").glob(f"control_{other}-*")
    base, first, random = (
        AutoModelForCausalLM.from_pretrained(path) for path in (MINIATURES / "base", MINIATURES / NAMES[kept], control)
    )
    made = {name: tensor.float() for name, tensor in base.state_dict().items()}
    for name, tensor in made.items():
        made[name] = tensor + sum(
            weights[source] * (model.state_dict()[name].float() - tensor)
            for source, model in ((kept, first), (other, random))
        )
    base.load_state_dict({name: tensor.to(base.dtype) for name, tensor in made.items()})
    base.save_pretrained(tmp_path / "made")
    AutoTokenizer.from_pretrained(MINIATURES / "base").save_pretrained(tmp_path / "made")
    scored = json_of(capsys, "score", tmp_path / "made", file, "--split", "held_out", "--json")
    by_hand = float(ours.metrics["acc_ja"].mean()) - scored["objectives"]["mini_math_ja"]["mean"]
    assert said.better is not None
    assert said.better.mean == pytest.approx(by_hand)
    assert evomerge("resume", folder) == 0
    assert "nothing to do" in capsys.readouterr().out


# --- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": None}, "select: compares sources with their base"),
        ({"select": {"keep": 4}}, "select.keep: is 4, and there are 4 sources to choose from"),
        ({"select": {"keep": 9}}, "keep: .*8"),
        ({"select": {"keep": 1}}, "keep: .*2"),
        ({"select": {"rungs": [4, 3]}}, "each be larger"),
        ({"select": {"rest": "sum"}}, "rest"),
        ({"sources": {n: str(MINIATURES / "base") for n in ("base", "rest", "b", "c")}}, "sources.rest: is the name"),
        ({"calibration": {"sources": dict.fromkeys(NAMES, "x")}}, "select.rest: would add a source without"),
        ({"artifacts": "file:///tmp/copies"}, "select: makes sources in the search's folder"),
    ],
)
def test_refuses_what_cannot_be_chosen(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a text of more than twenty characters\n" * 40)
    path = select_file(tmp_path)
    content = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(InputError, match=words):
        check_early(load_search_file(path))
