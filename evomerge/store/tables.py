"""The tables of a store. The immutable definition of a candidate is separate from its changing state."""

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

from evomerge.store.columns import Array, Json, PackedText, PlainText, Real, WholeNumber

SCHEMA_VERSION = 9
"""Incremented, with a migration, whenever a program that knows only the older format would misread a store."""

metadata = MetaData()

search = Table(
    "search",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", PlainText(200), nullable=False, unique=True),
    Column("schema_version", WholeNumber, nullable=False),
    Column("created_at", Real, nullable=False),  # seconds since 1970, like all times below
    Column("state", PlainText(20), nullable=False),
    Column("why", PlainText(500), nullable=False, server_default=""),  # what ended it
    Column("spent_s", Real, nullable=False, server_default="0"),  # seconds in which a driver was running
    Column("worker_s", Real, nullable=False, server_default="0"),  # seconds of use, summed over workers
    Column("gpu_s", Real, nullable=False, server_default="0"),  # the same for GPUs
    Column("held_s", Real, nullable=False, server_default="0"),  # wall-clock seconds over which the two were counted
    Column("settings", Json(dict), nullable=False),  # the resolved search file
    Column("fingerprints", Json(dict), nullable=False),  # of sources and evaluators
    Column("environment", Json(dict), nullable=False),  # versions of libraries
)

candidate = Table(
    "candidate",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("number", WholeNumber, primary_key=True, autoincrement=False),
    Column("step", WholeNumber, nullable=False),  # the ask that it belongs to
    Column("origin", PlainText(40), nullable=False),  # a baseline's kind, or the optimizer's name
    Column("label", PlainText(200), nullable=False),
    Column("recipe_hash", PlainText(64), nullable=False),
    Column("status", PlainText(10), nullable=False),
    Column("same_as", WholeNumber),  # the candidate whose scores a cached one reuses
    Column("attempts", WholeNumber, nullable=False),
    Column("worker", PlainText(200), nullable=False),
    Column("eligible", Boolean, nullable=False, server_default=false()),  # for the front and for confirmation
    Column("on_front", Boolean, nullable=False, server_default=false()),
    Column("niche", Json(list, int)),  # its bin along each feature, from 0; null without features or before the tell
    Column("elite", Boolean, nullable=False, server_default=false()),  # among the best of its niche
    Column("losses", Json(list, (int, float))),  # what the optimizer was told
    Column("change", Real),  # the distance from the search's base; null if unknown
    Column("timings", Json(dict, (int, float))),
    Column("failure", Json(dict)),
    Column("asked_at", Real, nullable=False),
    Column("finished_at", Real),
    # Each index ends in the number, the usual order: otherwise SQLite would scan the primary key to avoid sorting.
    Index("candidate_by_hash", "search_id", "recipe_hash", "status", "number"),
    Index("candidate_by_status", "search_id", "status", "number"),
    Index("candidate_by_origin", "search_id", "origin", "number"),
    Index("candidate_by_step", "search_id", "step", "number"),
    Index("candidate_by_front", "search_id", "on_front", "number"),
)

# Separate from the candidate, because an update rewrites the whole row and a scan reads all of it.
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
    Column("name", PlainText(100), primary_key=True),
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
    Column("evaluator", PlainText(200), primary_key=True),  # the evaluator's version
    Column("split", PlainText(20), primary_key=True),
    Column("items", Array("<i4"), nullable=False),  # positions in the split
    Column("metrics", Json(list, str), nullable=False),  # names, in the order of the rows of `scores`
    Column("scores", Array("<f4"), nullable=False),  # shape [metrics, items]
)

# The answers of attempts; if several attempts answered an item, the last answer is kept.
answer = Table(
    "answer",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("candidate", WholeNumber, primary_key=True, autoincrement=False),
    Column("evaluator", PlainText(200), primary_key=True),
    Column("split", PlainText(20), primary_key=True),
    Column("attempt", WholeNumber, primary_key=True, autoincrement=False),
    Column("items", Array("<i4"), nullable=False),
    Column("texts", PackedText, nullable=False),  # a JSON list
)

# The texts of items, for people.
item = Table(
    "item",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("evaluator", PlainText(200), primary_key=True),
    Column("split", PlainText(20), primary_key=True),
    # A JSON list of [question, right answer]; items with pictures also have a list of their hashes.
    Column("texts", PackedText, nullable=False),
)

# Thumbnails of the pictures of items, for people: re-encoded as PNG or JPEG.
thumbnail = Table(
    "thumbnail",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("picture", PlainText(64), primary_key=True),  # SHA-256 of the original, in hex
    Column("image", LargeBinary, nullable=False),
)

# Thumbnails of the pictures that were made with a candidate, for people: re-encoded as PNG or JPEG.
drawing = Table(
    "drawing",
    metadata,
    Column("search_id", WholeNumber, primary_key=True),
    Column("candidate", WholeNumber, primary_key=True, autoincrement=False),
    Column("evaluator", PlainText(200), primary_key=True),
    Column("split", PlainText(20), primary_key=True),
    Column("item", WholeNumber, primary_key=True, autoincrement=False),
    Column("image", LargeBinary, nullable=False),
)

event = Table(
    "event",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("search_id", WholeNumber, nullable=False),
    Column("time", Real, nullable=False),
    Column("kind", PlainText(40), nullable=False),
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
    Column("epoch", WholeNumber, nullable=False),  # how often the lease was taken; lower epochs may not write
    Column("writes", WholeNumber, nullable=False, server_default="0"),  # in this epoch, to detect commits
    Column("host", PlainText(255)),  # null if nobody holds it
    Column("namespace", PlainText(100)),
    Column("pid", WholeNumber),
    Column("started", Real),  # seconds from the host's boot to the start of the process
    Column("acquired_at", Real),
    Column("expires_at", Real),  # by the database's clock, for observers on other machines than the holder
    Column("boot", PlainText(64)),  # the boot id of the holder's machine
    Column("expires_since_boot", Real),  # seconds since that boot, for observers on the same machine
)

command = Table(
    "command",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("search_id", WholeNumber, nullable=False),
    Column("verb", PlainText(20), nullable=False),
    Column("requested_at", Real, nullable=False),
    Column("taken_at", Real),
    Index("command_by_search", "search_id", "taken_at"),
)

# Alembic's table, with the number of the last migration: SCHEMA_VERSION.
alembic_version = Table(
    "alembic_version",
    metadata,
    Column("version_num", PlainText(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
