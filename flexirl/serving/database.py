"""Opens a database: SQLite in a file, or whatever an SQLAlchemy URL names, brought to the tables of this version."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from flexirl.errors import UserError

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_S = 30.0  # that a statement waits for another process to let the database go


def open_database(url: str) -> Engine:
    """The database at a URL, migrated; raises UserError if it cannot be used."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells a lot while it is imported
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    try:
        sqlite = sa.engine.make_url(url).get_backend_name() == "sqlite"
        database = sa.create_engine(url, connect_args={"timeout": _BUSY_S} if sqlite else {})
        if sqlite:
            sa.event.listen(database, "connect", _make_durable)
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with database.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except (sa.exc.SQLAlchemyError, ImportError, CommandError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"The database {_shown(url)} cannot be used ({reason}).") from None
    return database


def _make_durable(connection: Any, _record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _shown(url: str) -> str:
    """The URL without its password."""
    try:
        return sa.engine.make_url(url).render_as_string()
    except sa.exc.ArgumentError:
        return url
