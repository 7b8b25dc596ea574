"""Shared by the contracts of stores and leases: sample rows, and a store with a lease and a reader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import update

from evomerge.store import tables
from evomerge.store.lease import Lease, acquire
from evomerge.store.rows import Estimate, ItemTexts, ListedCandidate, NewCandidate, Scores
from evomerge.store.store import Store

SETTINGS = {
    "name": "unit", "seed": 0, "sources": {"maths": "数学"}, "space": {"bounds": [0.0, math.inf]}, "objectives": {},
    "optimizer": {"name": "cma"}, "budget": {"candidates": 40}, "confirm": {},
}  # fmt: skip
FINGERPRINTS = {
    "sources": {"maths": {"model.safetensors": {"sha256": "ab12", "size": 5, "mtime_ns": 7}}},
    "evaluators": [{"name": "task", "version": "task@1", "search_items": 9, "held_out_items": 9}],
    "objectives": [
        {"name": "acc", "evaluator": 0, "metric": "acc", "maximise": True, "items": 9, "version": "task@1"}
    ],
    "parameters": [{"name": name, "low": -1.0, "high": 1.0, "default": 0.0} for name in "abc"],
}  # fmt: skip


def create(place: str | Path, name: str = "unit") -> Store:
    """A new store at this place, without taking its lease."""
    return Store.create(
        place,
        name=name,
        settings=SETTINGS,
        fingerprints=FINGERPRINTS,
        environment={"cma": "4"},
        items=[
            ItemTexts("task@1", "search", [("いくつ？", "12"), ("why", "")]),
            ItemTexts(
                "seen@1", "search", [("what?", "a cat"), ("why?", "")], [["ab", "cd"], []], {"ab": b"1", "cd": b"2"}
            ),
        ],
    )


def candidate(number: int, **changes: object) -> NewCandidate:
    """A candidate with a genome of three numbers, one of which has no short decimal form."""
    genome = np.array([number, 0.1 + 0.2, -1e-300])
    fields = {"origin": "cma", "recipe": f'{{"seed":{number}}}', "recipe_hash": f"hash{number}", "genome": genome}
    return NewCandidate(number=number, **{**fields, **changes})  # type: ignore[arg-type]


def scores(split: str = "search", start: float = 0.0) -> Scores:
    """Two metrics on three items of a split, with values that are exact only in float32."""
    values = np.array([start, 1 / 3, np.inf], dtype=np.float32)
    items = np.array([4, 0, 7], dtype=np.int32)
    return Scores("task@1", split, items, {"acc": values, "chrf": values[::-1]})


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, stderr=0.125, n=3)


def finish(store: Store, number: int, mean: float) -> None:
    """Dispatch a pending candidate, and record its result."""
    store.record_dispatch(number, 1, "worker-0")
    assert store.record_result(number, 1, [scores()], {"merge": 0.5}, {"acc": estimate(mean)}, "worker-0")


def expire(store: Store) -> None:
    """Make the lease look as if its holder had not renewed it for a long time."""
    with store.transaction(writes=True) as connection:
        connection.execute(update(tables.lease).values(expires_at=0.0, expires_since_boot=0.0))


def content(row: ListedCandidate) -> dict[str, object]:
    """A row as plain values that ``==`` can compare, including the bits of floats."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in values.items()}


class StoreFixtures:
    """Override ``place``: a path, or the URL of an empty database."""

    @pytest.fixture
    def place(self) -> str | Path:
        raise NotImplementedError

    @pytest.fixture
    def reader(self, place: str | Path, store: Store) -> Iterator[Store]:
        """A second connection to the store that ``store`` writes to."""
        with Store.open(place) as reader:
            yield reader

    @pytest.fixture
    def store(self, place: str | Path) -> Iterator[Store]:
        with create(place) as store:
            yield store

    @pytest.fixture
    def lease(self, store: Store) -> Iterator[Lease]:
        with acquire(store) as lease:
            yield lease
