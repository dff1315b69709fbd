"""What `--help` prints: a program's settings and groups as the files of `conf` have them, comments and all."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from flexirl.experiments.values import CONF


def help_text(program: str, config_name: str) -> str:
    """How to call a program, the groups it has with their choices, and its settings with their defaults."""
    path = CONF / f"{config_name}.yaml"
    about, settings = _parts(path)
    lines = [
        f"usage: python -m flexirl.{program} [GROUP=CHOICE] [SETTING=VALUE] [--multirun]",
        "", about, "", "settings, with their defaults:", *(f"  {line}" for line in settings),
    ]  # fmt: skip
    for group, default in _groups(path).items():
        lines += ["", f"group {group}, by default {default}:", *_choices(group)]
    return "\n".join([*lines, "", "--cfg job prints the whole configuration that a command has, every setting of it."])


def _parts(path: Path) -> tuple[str, list[str]]:
    """The file's first comment, and its lines without the defaults list and what configures Hydra."""
    first, *rest = path.read_text().splitlines()
    blocks = re.split(r"^(?=\w)", "\n".join(rest), flags=re.MULTILINE)
    kept = [block.rstrip() for block in blocks if block and not block.startswith(("defaults:", "hydra:"))]
    return first.removeprefix("# "), "\n".join(kept).splitlines()


def _groups(path: Path) -> dict[str, str]:
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    chosen = [entry for entry in config.get("defaults", []) if entry != "_self_"]
    return {str(group): str(choice or "none") for entry in chosen for group, choice in entry.items()}


def _choices(group: str) -> list[str]:
    """A line per file of the group, with the comment that it begins with."""
    lines = []
    for path in sorted((CONF / group).glob("*.yaml")):
        first = path.read_text().removeprefix("# @package _global_\n").splitlines()[0]
        lines.append(f"  {path.stem:24}{first.removeprefix('# ') if first.startswith('# ') else ''}".rstrip())
    return lines
