"""Inserting rows about candidates or items within an open transaction of the driver."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import Connection, delete, insert, select

from evomerge.store import statements, tables
from evomerge.store.rows import Answers, Estimate, ItemTexts, Scores


def drop_undriven(connection: Connection, name: str) -> None:
    """Delete the search with this name and everything that belongs to it, if no driver ever held its lease."""
    ours = (tables.search.c.name == name) & (tables.lease.c.search_id == tables.search.c.id)
    query = select(tables.search.c.id).where(ours, tables.lease.c.epoch == 0)
    if (search_id := connection.execute(query).scalar_one_or_none()) is not None:
        drop_contents(connection, search_id)
        connection.execute(delete(tables.lease).where(tables.lease.c.search_id == search_id))
        connection.execute(delete(tables.search).where(tables.search.c.id == search_id))


def drop_contents(connection: Connection, search_id: int) -> None:
    """Delete everything that belongs to a search, except its own row and its lease."""
    for table in tables.metadata.sorted_tables:
        if "search_id" in table.c and table is not tables.lease:
            connection.execute(delete(table).where(table.c.search_id == search_id))


def insert_items(connection: Connection, search_id: int, items: Sequence[ItemTexts]) -> None:
    """Insert texts, replacing older ones of the same evaluator and split."""
    for one in items:
        row = {"search_id": search_id, "evaluator": one.evaluator, "split": one.split}
        connection.execute(delete(tables.item).where(*(tables.item.c[name] == value for name, value in row.items())))
        texts: Sequence[object] = one.texts
        if one.pictures:
            texts = [(*text, list(shown)) for text, shown in zip(one.texts, one.pictures, strict=True)]
        connection.execute(insert(tables.item), row | {"texts": _json(texts)})
        _insert_thumbnails(connection, search_id, one.thumbnails)


def _insert_thumbnails(connection: Connection, search_id: int, thumbnails: Mapping[str, bytes]) -> None:
    """Insert those thumbnails that are not there yet, because evaluators may share pictures."""
    columns = tables.thumbnail.c
    there = set(connection.execute(select(columns.picture).where(columns.search_id == search_id)).scalars())
    rows = [
        {"search_id": search_id, "picture": picture, "image": image}
        for picture, image in thumbnails.items()
        if picture not in there
    ]
    if rows:
        connection.execute(insert(tables.thumbnail), rows)


def insert_objectives(connection: Connection, search_id: int, number: int, objectives: Mapping[str, Estimate]) -> None:
    rows = [
        {
            "search_id": search_id,
            "candidate": number,
            "name": name,
            "mean": _null_if_nan(estimate.mean),
            "stderr": estimate.stderr,
            "n": estimate.n,
        }
        for name, estimate in objectives.items()
    ]
    if rows:
        connection.execute(statements.NEW_OBJECTIVE, rows)


def insert_scores(connection: Connection, search_id: int, number: int, scores: Sequence[Scores]) -> None:
    """Insert scores, replacing older ones of the same evaluator on the same split."""
    for one in scores:
        key = {"search_id": search_id, "candidate": number, "evaluator": one.evaluator, "split": one.split}
        values = np.stack([np.asarray(array, dtype=np.float32) for array in one.metrics.values()])
        if values.shape[1:] != (len(one.items),):
            raise ValueError(f"{one.evaluator}: {len(one.items)} items, but scores of shape {values.shape}")
        row = {"items": one.items, "metrics": list(one.metrics), "scores": values}
        connection.execute(statements.put_score(connection.dialect.name), key | row)


def insert_answers(
    connection: Connection, search_id: int, number: int, attempt: int, answers: Sequence[Answers]
) -> None:
    """Insert answers, replacing those of the same attempt, and drawings, replacing those of the same items."""
    for one in answers:
        if len(one.items) != len(one.texts):
            raise ValueError(f"{one.evaluator}: {len(one.items)} items, but {len(one.texts)} answers")
        key: dict[str, Any] = {"search_id": search_id, "candidate": number, "attempt": attempt}
        key |= {"evaluator": one.evaluator, "split": one.split}
        _insert_drawings(connection, search_id, number, one)
        if not one.items:
            continue
        connection.execute(statements.OLD_ANSWER, _of(key))
        row = {"items": np.array(one.items, dtype=np.int32), "texts": _json(one.texts)}
        connection.execute(statements.NEW_ANSWER, key | row)


def _insert_drawings(connection: Connection, search_id: int, number: int, answers: Answers) -> None:
    key = {"search_id": search_id, "candidate": number, "evaluator": answers.evaluator, "split": answers.split}
    if rows := [{**key, "item": item, "image": image} for item, image in answers.drawings.items()]:
        connection.execute(statements.put_drawing(connection.dialect.name), rows)


def _of(key: Mapping[str, Any]) -> dict[str, Any]:
    return {f"of_{name}": value for name, value in key.items()}


def _json(texts: Sequence[Any]) -> str:
    return json.dumps(list(texts), ensure_ascii=False)


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
