"""The tables of a store. What a candidate is made of never changes and stands apart from how it fares, which does."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    false,
)

from evomerge.store.columns import Array, Json, PackedText

SCHEMA_VERSION = 5
"""Raised, with a migration, whenever a program that knows the older number would misread a store."""

metadata = MetaData()

search = Table(
    "search",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("schema_version", Integer, nullable=False),
    Column("created_at", Double, nullable=False),  # seconds since 1970, as is every time below
    Column("state", String(20), nullable=False),
    Column("why", String(500), nullable=False, server_default=""),  # what ended it, in words
    Column("spent_s", Double, nullable=False, server_default="0"),  # seconds in which a driver was at work
    Column("settings", Json, nullable=False),  # the resolved search file
    Column("fingerprints", Json, nullable=False),  # of sources and evaluators
    Column("environment", Json, nullable=False),  # versions of libraries
)

candidate = Table(
    "candidate",
    metadata,
    Column("search_id", Integer, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, nullable=False),  # which ask it came in
    Column("origin", String(40), nullable=False),  # a landmark's kind, or the optimizer's name
    Column("label", String(200), nullable=False),
    Column("recipe_hash", String(64), nullable=False),
    Column("status", String(10), nullable=False),
    Column("same_as", Integer),  # a cached candidate's scores are those of this one
    Column("attempts", Integer, nullable=False),
    Column("worker", String(200), nullable=False),
    Column("eligible", Boolean, nullable=False, server_default=false()),  # for the front and for confirmation
    Column("on_front", Boolean, nullable=False, server_default=false()),
    Column("niche", Json),  # its bin along each feature, from 0; null without features, and before it was told
    Column("elite", Boolean, nullable=False, server_default=false()),  # among the best of its niche
    Column("losses", Json),  # what the optimizer was told
    Column("timings", Json),
    Column("failure", Json),
    Column("asked_at", Double, nullable=False),
    Column("finished_at", Double),
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
    Column("search_id", Integer, primary_key=True),
    Column("candidate", Integer, primary_key=True, autoincrement=False),
    Column("genome", Array("<f8")),
    Column("recipe", PackedText, nullable=False),
)

# A candidate's objectives on the search split. NaN is stored as null: databases disagree on how it sorts.
objective = Table(
    "objective",
    metadata,
    Column("search_id", Integer, primary_key=True),
    Column("candidate", Integer, primary_key=True, autoincrement=False),
    Column("name", String(100), primary_key=True),
    Column("mean", Double),
    Column("stderr", Double),
    Column("n", Integer, nullable=False),
    Index("objective_by_mean", "search_id", "name", "mean"),
)

score = Table(
    "score",
    metadata,
    Column("search_id", Integer, primary_key=True),
    Column("candidate", Integer, primary_key=True, autoincrement=False),
    Column("evaluator", String(200), primary_key=True),  # the evaluator's version
    Column("split", String(20), primary_key=True),
    Column("items", Array("<i4"), nullable=False),  # positions in the split
    Column("metrics", Json, nullable=False),  # names, in the order of the rows of `scores`
    Column("scores", Array("<f4"), nullable=False),  # shape [metrics, items]
)

# What an attempt's model answered; an item that several attempts answered has the answer of the last.
answer = Table(
    "answer",
    metadata,
    Column("search_id", Integer, primary_key=True),
    Column("candidate", Integer, primary_key=True, autoincrement=False),
    Column("evaluator", String(200), primary_key=True),
    Column("split", String(20), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("items", Array("<i4"), nullable=False),
    Column("texts", PackedText, nullable=False),  # a JSON list
)

# What the items ask, for people.
item = Table(
    "item",
    metadata,
    Column("search_id", Integer, primary_key=True),
    Column("evaluator", String(200), primary_key=True),
    Column("split", String(20), primary_key=True),
    Column("texts", PackedText, nullable=False),  # a JSON list of [question, right answer]
)

event = Table(
    "event",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("search_id", Integer, nullable=False),
    Column("time", Double, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("candidate", Integer),
    Column("attempt", Integer),
    Column("payload", Json, nullable=False),
    Index("event_by_kind", "search_id", "kind", "seq"),
    Index("event_by_search", "search_id", "seq"),
)

lease = Table(
    "lease",
    metadata,
    Column("search_id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),  # how often the search has been taken; a lower one may not write
    Column("writes", Integer, nullable=False, server_default="0"),  # in this epoch: tells a write that was done
    Column("host", String(255)),  # null: nobody holds it
    Column("namespace", String(100)),
    Column("pid", Integer),
    Column("started", Double),  # seconds from the host's start to the process's
    Column("acquired_at", Double),
    Column("expires_at", Double),  # by the database's clock, for whoever is on another machine than the holder
    Column("boot", String(64)),  # which start of which machine the holder is of
    Column("expires_since_boot", Double),  # seconds from that start, for whoever is on the same machine
)

command = Table(
    "command",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("search_id", Integer, nullable=False),
    Column("verb", String(20), nullable=False),
    Column("requested_at", Double, nullable=False),
    Column("taken_at", Double),
    Index("command_by_search", "search_id", "taken_at"),
)

# Alembic's, with the number of the last migration: SCHEMA_VERSION.
alembic_version = Table(
    "alembic_version",
    metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
