"""What it takes to repeat a run, kept in its folder: configuration, exact command, package versions."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import distributions
from pathlib import Path

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
