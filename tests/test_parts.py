"""Parts of every kind that a package adds: found by entry point, read from a search file, listed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers_parts import EvaluatorOfPackage, ObserverOfPackage, OptimizerOfPackage, SpaceOfPackage
from pydantic import BaseModel

from evaluators.base import EvaluatorSettings
from evomerge.cli import main
from evomerge.errors import InputError
from evomerge.plugins import NOUNS, OWN, find_class, find_plugin, plugins
from evomerge.search.settings.search_file import SearchFile, parse_search_file
from evomerge.service.pages import forms

PARTS = {
    "evomerge.merge_methods": {"first": "FIRST", "linear": "FIRST"},
    "evomerge.search_spaces": {"space_of_package": "SpaceOfPackage"},
    "evomerge.evaluators": {"evaluator_of_package": "EvaluatorOfPackage", "nothing": "NOTHING", "gone": "GONE"},
    "evomerge.optimizers": {"optimizer_of_package": "OptimizerOfPackage"},
    "evomerge.observers": {"observer_of_package": "ObserverOfPackage"},
}


@pytest.fixture(autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("site-packages")
    about = place / "of_package-2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: of-package\nVersion: 2\n")
    lines = [
        line
        for group, parts in PARTS.items()
        for line in (f"[{group}]", *(f"{name} = helpers_parts:{target}" for name, target in parts.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        yield


def file(**sections: Any) -> SearchFile:
    content: dict[str, Any] = {
        "name": "parts",
        "sources": {"a": "x/a", "b": "x/b"},
        "space": {"kind": "space_of_package", "method": "first", "depth": 7},
        "objectives": {"o": {"evaluator": "evaluator_of_package", "metric": "acc", "words": 9}},
        "optimizer": {"name": "optimizer_of_package", "cells": 4},
        "observers": [{"kind": "logs"}, {"kind": "observer_of_package", "loud": True}],
        "budget": {"candidates": 8},
    }
    return parse_search_file(content | sections, place="search.yaml", root=Path())


def test_a_search_file_names_parts_of_a_package_with_their_own_settings() -> None:
    read = file()
    assert isinstance(read.space, SpaceOfPackage)
    assert isinstance(read.optimizer, OptimizerOfPackage)
    assert isinstance(read.observers[1], ObserverOfPackage)
    (evaluator,) = read.evaluators().values()
    assert isinstance(evaluator, EvaluatorOfPackage)
    assert (read.space.depth, read.optimizer.cells, read.observers[1].loud, evaluator.words) == (7, 4, True, 9)


def test_what_is_read_is_read_again_from_what_is_kept_of_it() -> None:
    read = file()
    assert parse_search_file(read.model_dump(mode="json"), place="search.yaml", root=Path()) == read


@pytest.mark.parametrize(
    ("section", "content", "place"),
    [
        ("space", {"kind": "space_of_packages"}, "space.kind"),
        ("space", {"kind": "space_of_package", "method": "first", "dept": 1}, "space.dept"),
        ("optimizer", {"name": "optimizer_of_packages"}, "optimizer.name"),
        ("optimizer", {"name": "optimizer_of_package", "cells": "many"}, "optimizer.cells"),
        ("optimizer", {"cells": 4}, "optimizer.name"),
        ("optimizer", 5, "optimizer"),
        ("observers", [{"kind": "logs"}, {"kind": "observer_of_packages"}], "observers.1.kind"),
        ("observers", [{"kind": "observer_of_package", "lout": True}], "observers.0.lout"),
        ("observers", [{"loud": True}], "observers.0.kind"),
        ("observers", [{"kind": "observer_of_package"}, {"kind": "observer_of_package"}], "observers"),
        ("objectives", {"o": {"evaluator": "evaluator_of_packages", "metric": "a"}}, "objectives.o.evaluator"),
        ("objectives", {"o": {"evaluator": "nothing", "metric": "a"}}, "objectives.o.evaluator"),
        ("objectives", {"o": {"evaluator": "gone", "metric": "a"}}, "objectives.o.evaluator"),
    ],
)
def test_what_is_wrong_with_them_is_named_by_its_place(section: str, content: object, place: str) -> None:
    with pytest.raises(InputError) as refused:
        file(**{section: content})
    assert refused.value.place.removeprefix("search.yaml: ") == place


def test_a_package_replaces_nothing_of_the_project() -> None:
    assert plugins("evomerge.merge_methods")["linear"].value == OWN["evomerge.merge_methods"]["linear"]
    assert plugins("evomerge.merge_methods")["first"].value == "helpers_parts:FIRST"


def test_a_part_that_is_no_such_part_is_said_to_be_none() -> None:
    with pytest.raises(InputError, match=r"is not an evaluator\. Let it name a subclass of EvaluatorSettings"):
        find_class("evomerge.evaluators", "nothing", "o", EvaluatorSettings)


@pytest.mark.parametrize("group", OWN)
def test_every_part_of_the_project_is_where_it_is_said_to_be(group: str) -> None:
    assert NOUNS.keys() == OWN.keys()
    for name in OWN[group]:
        part = find_plugin(group, name, name)
        assert part is not None


def test_what_is_installed_is_listed_with_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plugins"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert "merge methods: linear, passthrough" in listed
    for name in ("first", "space_of_package", "evaluator_of_package", "optimizer_of_package", "observer_of_package"):
        assert f"  {name}, of of-package 2" in listed


def test_the_form_of_the_page_has_them_with_the_settings_that_their_schema_has() -> None:
    (space,) = (group for group in forms.spaces() if group.name == "space_of_package")
    assert {"method", "depth"} <= {field.key for field in space.fields}
    assert "kind" not in {field.key for field in space.fields}
    assert next(field for field in space.fields if field.key == "depth") == forms.Field(
        "depth", "Depth", "number", example="3"
    )
    evaluators = {group.name: group for group in forms.evaluators()}
    assert [(field.key, field.kind) for field in evaluators["evaluator_of_package"].fields][:1] == [("metric", "text")]
    assert "words" in {field.key for field in evaluators["evaluator_of_package"].fields}
    assert not {"gone", "nothing"} & evaluators.keys()
    (optimizer,) = forms.optimizers()
    assert (optimizer.name, [field.key for field in optimizer.fields]) == ("optimizer_of_package", ["cells"])


def test_fields_follow_from_the_kind_of_a_setting() -> None:
    class Given(BaseModel):
        count: int
        share: float | None = None
        mode: Literal["a", "b"] = "a"
        on: bool = False
        off: bool = True
        rungs: list[int] = []
        section: dict[str, int] = {}

    drawn = {field.key: field for field in forms.fields_of(Given)}
    assert {key: field.kind for key, field in drawn.items()} == {
        "count": "number", "share": "number", "mode": "text", "on": "switch", "off": "text", "rungs": "numbers",
    }  # fmt: skip
    assert drawn["count"].required
    assert drawn["mode"].options == ("", "a", "b")
    assert Given.model_validate({"count": 1, "off": drawn["off"].options[2]}).off is False
