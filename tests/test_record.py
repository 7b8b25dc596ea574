"""The typed record of a search: parsed from what programs of every format have written, and refused by its place."""

from __future__ import annotations

import copy
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import InputError
from evomerge.genome import Parameter
from evomerge.store import SearchRow
from evomerge.store.columns import parse_json
from evomerge.store.record import Budget, Confirm
from evomerge.testing.store_fixtures import FINGERPRINTS, SETTINGS

GOLDEN = Path(__file__).parent / "golden" / "store"


def row_of(settings: Any = SETTINGS, fingerprints: Any = FINGERPRINTS, **columns: Any) -> SearchRow:
    told: dict[str, Any] = {
        "place": "search.db", "name": "unit", "schema_version": 5, "created_at": 1.0, "state": "created", "why": "",
        "spent_s": 0.0, "environment": {},
    }  # fmt: skip
    return SearchRow(settings=settings, fingerprints=fingerprints, **told | columns)


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy without what a path such as ``budget.candidates`` leads to."""
    copied = copy.deepcopy(content)
    *path, last = key.split(".")
    inner: Any = copied
    for part in path:
        inner = inner[int(part) if part.isdecimal() else part]
    del inner[last]
    return copied


def test_the_store_of_an_older_program() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript((GOLDEN / "miniature-format-4.sql").read_text(encoding="utf-8"))
        settings, fingerprints = connection.execute("SELECT settings, fingerprints FROM search").fetchone()
    record = row_of(parse_json(settings), parse_json(fingerprints)).record
    assert list(record.sources) == ["base", "maths", "japanese"]
    assert record.files["maths"]["config.json"]["size"] == 715
    (objective,), (evaluator,) = record.objectives, record.evaluators
    assert (objective.name, objective.maximise, objective.items) == ("mini_math_ja", True, 24)
    assert evaluator.accepted == evaluator.version == objective.version
    assert (record.constraints, record.features, record.screen, record.calibration) == ((), (), None, None)
    assert record.parameters[1] == Parameter("model.weight.japanese", 0.0, 1.5, 0.4, group="model")
    assert (record.budget, record.confirm) == (Budget(candidates=13), Confirm(top=2, drawn=0, confidence=0.95))
    assert record.racing is not None
    assert record.racing.rungs == (10,)
    assert (record.tokenizer_source, record.optimizer.name, record.seed) == ("base", "cma", 0)


def test_what_older_programs_did_not_know_of_has_a_default() -> None:
    """Neither features nor races, screens, constraints, calibration, patience, digests of items or shares."""
    record = row_of().record
    assert record.measures == record.judging == record.objectives
    assert (record.racing, record.screen, record.budget.patience, record.device) == (None, None, None, None)
    assert record.evaluators[0].items == {}
    assert record.parameters[0].share_of == ""


def test_an_evaluator_that_changed_and_scores_as_recorded() -> None:
    changed = FINGERPRINTS | {"evaluators": [FINGERPRINTS["evaluators"][0] | {"accepted_version": "task@2"}]}  # type: ignore[operator]
    (evaluator,) = row_of(fingerprints=changed).record.evaluators
    assert (evaluator.version, evaluator.accepted) == ("task@1", "task@2")


@pytest.mark.parametrize(
    ("column", "key"),
    [
        *(("settings", key) for key in ("seed", "sources", "space", "optimizer.name", "budget", "confirm")),
        *(("fingerprints", key) for key in ("sources", "evaluators", "objectives", "parameters")),
        ("fingerprints", "objectives.0.maximise"),
        ("fingerprints", "evaluators.0.version"),
        ("fingerprints", "parameters.2.low"),
    ],
)
def test_what_every_program_has_written_and_is_missing(column: str, key: str) -> None:
    content = {"settings": SETTINGS, "fingerprints": FINGERPRINTS}
    row = row_of(**content | {column: without(content[column], key)})
    with pytest.raises(InputError, match="damaged") as caught:
        _ = row.record
    assert f"{column}.{key}: " in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "place"),
    [
        ({"created_at": 1e300}, "created_at"),
        ({"spent_s": float("inf")}, "spent_s"),
        ({"fingerprints": FINGERPRINTS | {"objectives": []}}, "fingerprints.objectives"),
        ({"settings": SETTINGS | {"sources": ["maths"]}}, "settings.sources"),
        ({"settings": SETTINGS | {"budget": {"candidates": "many"}}}, "settings.budget.candidates"),
    ],
)
def test_values_of_another_kind(columns: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError, match="damaged") as caught:
        _ = row_of(**columns).record
    assert f"{place}: " in str(caught.value)
