"""A PostgreSQL server of the tests' own, where it is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """An SQLAlchemy URL of an empty database, gone after the tests; they are skipped without PostgreSQL."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    user: list[str] = []
    if os.getuid() == 0:  # as whom it does not start
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not start as root, and there is no user postgres")
        user = ["runuser", "-u", "postgres", "--"]
    with tempfile.TemporaryDirectory() as parent, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        folder = Path(parent) / "data"
        if user:
            shutil.chown(parent, "postgres")
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": parent}
        subprocess.run([*user, "initdb", "-D", str(folder), "-U", "flexirl", "-A", "trust", "-N"], **quiet)  # type: ignore[call-overload]
        probe.close()
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        control = [*user, "pg_ctl", "-D", str(folder), "-w"]
        subprocess.run([*control, "-l", str(folder / "log"), "-o", options, "start"], **quiet)  # type: ignore[call-overload]
        try:
            yield f"postgresql+psycopg://flexirl@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)  # type: ignore[call-overload]
