"""The tables of files, batches and their lines. Changed only with a migration beside (`migrations/versions`)."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

metadata = MetaData()

# Contents are in the data folder under the file's id. Times are seconds since 1970.
files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("number", BigInteger, nullable=False),  # order of creation, for lists
    Column("tenant", String(256), nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Index("files_of_tenant", "tenant", "number"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("tenant", String(256), nullable=False),
    Column("status", String(16), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("completion_window", String(32), nullable=False),
    Column("metadata", Text),  # JSON
    Column("errors", Text),  # JSON: a list of what is wrong with the input
    Column("warning", Text),
    Column("output_expires_s", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("in_progress_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Column("ends_as", String(16)),  # of one that is finalizing
    Column("total", Integer, nullable=False, default=0),
    Column("completed", Integer, nullable=False, default=0),
    Column("failed", Integer, nullable=False, default=0),
    Column("prompt_tokens", BigInteger, nullable=False, default=0),
    Column("cached_tokens", BigInteger, nullable=False, default=0),
    Column("output_tokens", BigInteger, nullable=False, default=0),
    Index("batches_of_tenant", "tenant", "number"),
    Index("batches_by_status", "status"),
)

# One for each line of a batch that is not over; an answer is here before it is in a file.
lines = Table(
    "lines",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),  # of the line in the input file, from 1
    Column("offset", BigInteger, nullable=False),  # bytes
    Column("length", Integer, nullable=False),
    Column("custom_id", Text, nullable=False),
    Column("state", Integer, nullable=False),  # WAITING, DONE or FAILED
    Column("answer", Text),  # the line of the output or error file
    UniqueConstraint("batch_id", "custom_id", name="lines_by_custom_id"),
    Index("lines_by_state", "batch_id", "state", "number"),
)

WAITING, DONE, FAILED = range(3)
