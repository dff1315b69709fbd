"""What is kept of a run in its folder: configuration, exact command, package versions, what it printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import distributions
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf


def command(program: str) -> str:
    """The command line that started this run of a program."""
    return f"python -m flexirl.{program} {shlex.join(sys.argv[1:])}"


def record_run(config: DictConfig, program: str, folder: Path) -> None:
    """Writes config.yaml, command.txt and packages.txt."""
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    (folder / "command.txt").write_text(command(program) + "\n")
    versions = sorted(f"{d.metadata['Name']}=={d.version}" for d in distributions())
    (folder / "packages.txt").write_text("\n".join(dict.fromkeys(versions)) + "\n")


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """What is printed meanwhile is written to the file, too; Hydra's log of warnings goes to the same."""
    with open(path, "a") as file, redirect_stdout(_Both(sys.stdout, file)):  # type: ignore[type-var]
        yield


class _Both:
    """Writes to two files; in all else, the first."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self._first, self._second = first, second

    def write(self, text: str) -> int:
        self._second.write(text)
        self._second.flush()
        return self._first.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._first, name)


def remove_if_bare(folder: Path) -> None:
    """Removes a run's folder that holds nothing but what every run has, and the day's folder if that was all in it."""
    of_every_run = {".hydra", "config.yaml", "command.txt", "packages.txt"}
    if folder == Path.cwd() or any(f.name not in of_every_run and f.suffix != ".log" for f in folder.iterdir()):
        return
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
