"""The tables of a store. What a candidate is made of never changes and stands apart from how it fares, which does."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    false,
)

from evomerge.store.columns import Array, Json, PackedText, Real, WholeNumber, Words

SCHEMA_VERSION = 9
"""Raised, with a migration, whenever a program that knows the older number would misread a store."""

metadata = MetaData()

search = Table(
    "search",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Words(200), nullable=False, unique=True),
    Column("schema_version", WholeNumber, nullable=False),
    Column("created_at", Real, nullable=False),  # seconds since 1970, as is every time below
    Column("state", Words(20), nullable=False),
    Column("why", Words(500), nullable=False, server_default=""),  # what ended it, in words
    Column("spent_s", Real, nullable=False, server_default="0"),  # seconds in which a driver was at work
    Column("worker_s", Real, nullable=False, server_default="0"),  # seconds that workers were held, summed over workers
    Column("gpu_s", Real, nullable=False, server_default="0"),  # the same of their GPUs
    Column("held_s", Real, nullable=False, server_default="0"),  # seconds of the clock in which any of that was counted
    Column("settings", Json(dict), nullable=False),  # the resolved search file
    Column("fingerprints", Json(dict), nullable=False),  # of sources and evaluators
    Column("environment", Json(dict), nullable=False),  # versions of libraries
)

candidate = Table(
    "candidate",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("number", WholeNumber, primary_key=True, autoincrement=False),
    Column("step", WholeNumber, nullable=False),  # which ask it came in
    Column("origin", Words(40), nullable=False),  # a baseline's kind, or the optimizer's name
    Column("label", Words(200), nullable=False),
    Column("recipe_hash", Words(64), nullable=False),
    Column("status", Words(10), nullable=False),
    Column("same_as", WholeNumber),  # a cached candidate's scores are those of this one
    Column("attempts", WholeNumber, nullable=False),
    Column("worker", Words(200), nullable=False),
    Column("eligible", Boolean, nullable=False, server_default=false()),  # for the front and for confirmation
    Column("on_front", Boolean, nullable=False, server_default=false()),
    Column("niche", Json(list, int)),  # its bin along each feature, from 0; null without features, or till it is told
    Column("elite", Boolean, nullable=False, server_default=false()),  # among the best of its niche
    Column("losses", Json(list, (int, float))),  # what the optimizer was told
    Column("change", Real),  # how far the model is from the search's base; null where that is not known
    Column("timings", Json(dict, (int, float))),
    Column("failure", Json(dict)),
    Column("asked_at", Real, nullable=False),
    Column("finished_at", Real),
    # Each ends in the number, by which rows are wanted: SQLite would otherwise walk the primary key to save the sort.
    Index("candidate_by_hash", "search_id", "recipe_hash", "status", "number"),
    Index("candidate_by_status", "search_id", "status", "number"),
    Index("candidate_by_origin", "search_id", "origin", "number"),
    Index("candidate_by_step", "search_id", "step", "number"),
    Index("candidate_by_front", "search_id", "on_front", "number"),
)

# Apart from the candidate, because updating a row rewrites the whole of it and scanning reads past it.
recipe = Table(
    "recipe",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("candidate", WholeNumber, primary_key=True, autoincrement=False),
    Column("genome", Array("<f8")),
    Column("recipe", PackedText, nullable=False),
)

# A candidate's objectives on the search split. NaN is stored as null: databases disagree on how it sorts.
objective = Table(
    "objective",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("candidate", WholeNumber, primary_key=True, autoincrement=False),
    Column("name", Words(100), primary_key=True),
    Column("mean", Real),
    Column("stderr", Real),
    Column("n", WholeNumber, nullable=False),
    Index("objective_by_mean", "search_id", "name", "mean"),
)

score = Table(
    "score",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("candidate", WholeNumber, primary_key=True, autoincrement=False),
    Column("evaluator", Words(200), primary_key=True),  # the evaluator's version
    Column("split", Words(20), primary_key=True),
    Column("items", Array("<i4"), nullable=False),  # positions in the split
    Column("metrics", Json(list, str), nullable=False),  # names, in the order of the rows of `scores`
    Column("scores", Array("<f4"), nullable=False),  # shape [metrics, items]
)

# What an attempt's model answered; an item that several attempts answered has the answer of the last.
answer = Table(
    "answer",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("candidate", WholeNumber, primary_key=True, autoincrement=False),
    Column("evaluator", Words(200), primary_key=True),
    Column("split", Words(20), primary_key=True),
    Column("attempt", WholeNumber, primary_key=True, autoincrement=False),
    Column("items", Array("<i4"), nullable=False),
    Column("texts", PackedText, nullable=False),  # a JSON list
)

# What the items ask, for people.
item = Table(
    "item",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("evaluator", Words(200), primary_key=True),
    Column("split", Words(20), primary_key=True),
    # A JSON list of [question, right answer]; of items with pictures, with a list of these by their hashes.
    Column("texts", PackedText, nullable=False),
)

# Small copies of the pictures of items, for people: newly encoded, PNG or JPEG.
thumbnail = Table(
    "thumbnail",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("picture", Words(64), primary_key=True),  # SHA-256 of what it is of, in hex
    Column("image", LargeBinary, nullable=False),
)

# Small copies of the pictures that were made with a candidate, for people: newly encoded, PNG or JPEG.
drawing = Table(
    "drawing",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("candidate", WholeNumber, primary_key=True, autoincrement=False),
    Column("evaluator", Words(200), primary_key=True),
    Column("split", Words(20), primary_key=True),
    Column("item", WholeNumber, primary_key=True, autoincrement=False),
    Column("image", LargeBinary, nullable=False),
)

event = Table(
    "event",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("search_id", WholeNumber, nullable=False),
    Column("time", Real, nullable=False),
    Column("kind", Words(40), nullable=False),
    Column("candidate", WholeNumber),
    Column("attempt", WholeNumber),
    Column("payload", Json(dict), nullable=False),
    Index("event_by_kind", "search_id", "kind", "seq"),
    Index("event_by_search", "search_id", "seq"),
)

lease = Table(
    "lease",
    metadata,
    Column("search_id", WholeNumber, primary_key=True, autoincrement=False),
    Column("epoch", WholeNumber, nullable=False),  # how often the search has been taken; a lower one may not write
    Column("writes", WholeNumber, nullable=False, server_default="0"),  # in this epoch: tells a write that was done
    Column("host", Words(255)),  # null: nobody holds it
    Column("namespace", Words(100)),
    Column("pid", WholeNumber),
    Column("started", Real),  # seconds from the host's start to the process's
    Column("acquired_at", Real),
    Column("expires_at", Real),  # by the database's clock, for whoever is on another machine than the holder
    Column("boot", Words(64)),  # which start of which machine the holder is of
    Column("expires_since_boot", Real),  # seconds from that start, for whoever is on the same machine
)

command = Table(
    "command",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("search_id", WholeNumber, nullable=False),
    Column("verb", Words(20), nullable=False),
    Column("requested_at", Real, nullable=False),
    Column("taken_at", Real),
    Index("command_by_search", "search_id", "taken_at"),
)

# Alembic's, with the number of the last migration: SCHEMA_VERSION.
alembic_version = Table(
    "alembic_version",
    metadata,
    Column("version_num", Words(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
