"""Compositions: tasks that need several skills at once, beside their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_miniature import evomerge, json_of, short_search_file

from evomerge.errors import InputError
from evomerge.report.compositions import compositions_of
from evomerge.report.entries import Entry
from evomerge.search.settings.search_file import load_search_file
from evomerge.service.report import report_html
from evomerge.store import Estimate, Store

WAYS = {"both": "maximize", "sums": "maximize", "language": "maximize"}


def entry(number: int, label: str, origin: str, both: float, sums: float, language: float) -> Entry:
    values = {"both": both, "sums": sums, "language": language}
    estimates = {name: Estimate(mean=mean, stderr=0.01, n=100) for name, mean in values.items()}
    return Entry(id=f"c{number:04d}", label=label, origin=origin, objectives=estimates)


ENTRIES = [
    entry(0, "maths", "source", 0.01, 0.8, 0.1),
    entry(1, "japanese", "source", 0.02, 0.1, 0.9),
    entry(2, "idle", "source", 0.0, 0.0, 0.0),
    entry(7, "", "cma", 0.4, 0.7, 0.6),
]


def test_a_merge_stands_beside_the_product_of_its_parts() -> None:
    by_id = {one.id: one for one in ENTRIES}
    (found,) = compositions_of({"both": ("sums", "language")}, WAYS, by_id, held_out=True)
    assert [row.id for row in found.rows] == ["c0007", "c0001", "c0000", "c0002"]
    assert found.rows[0].product == pytest.approx(0.42)
    assert found.sentence == (
        "both needs several skills at once: c0007 has 0.400, beside sums 0.700; language 0.600, whose product is "
        "0.420. No source alone is better than 0.020."
    )


def test_what_is_no_share_has_no_product_and_what_is_not_scored_no_row() -> None:
    by_id = {one.id: one for one in ENTRIES}
    (found,) = compositions_of({"both": ("sums",)}, {**WAYS, "sums": "minimize"}, by_id, held_out=False)
    assert {row.product for row in found.rows} == {None}
    assert list(compositions_of({"both": ("speed",)}, {**WAYS, "speed": "maximize"}, by_id, held_out=False)) == []


@pytest.mark.parametrize(
    ("compositions", "words"),
    [
        ({"both": ["mini_translate_ja"]}, "compositions.both: there is no objective 'both'"),
        ({"mini_translate_ja": ["mini_translate_ja"]}, "needs other objectives as its parts"),
        ({"mini_translate_ja": []}, "compositions"),
    ],
)
def test_refuses_what_is_no_composition(compositions: dict[str, list[str]], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        load_search_file(short_search_file(tmp_path, compositions=compositions))


def test_a_search_tells_of_its_compositions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = {"search": "validation[:4]", "held_out": "test[:4]"}
    objectives = {
        "both": {"task": "mini_math_ja", "metric": "acc_ja", **items},
        "sums": {"task": "mini_math_en", "metric": "acc", **items},
    }
    file = short_search_file(
        tmp_path, objectives=objectives, compositions={"both": ["sums"]},
        optimizer={"name": "nsga2", "population": 4}, budget={"candidates": 5},
    )  # fmt: skip
    folder = tmp_path / "search"
    assert evomerge("search", file, "--dir", folder) == 0
    assert "both needs several skills at once" in capsys.readouterr().out.replace("\n", " ")
    (shown,) = json_of(capsys, "status", folder, "--json")["compositions"]
    assert shown["split"] == "held_out"
    assert [row["product"] for row in shown["rows"]] == [row["parts"]["sums"]["mean"] for row in shown["rows"]]
    with Store.open(folder / "search.db") as store:
        assert "both and its parts on held-out items" in report_html(store, folder)
