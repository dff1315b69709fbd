"""Plain values of the configuration: what they must be, in sentences that name the setting.

Imported while the command line is checked, so nothing here takes a library that is slow to import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from flexirl.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"


def number(value: object, name: str) -> float:
    """`value` as a float; raises UserError, naming the setting, for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name}={value} is not a number.")
    return float(value)


def seed_of(value: object, name: str = "seed") -> int:
    """`value` as a seed; raises UserError unless it is a whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name}={value} is out of range; a seed is a whole number of 0 or more.")
    return value


def count_of(value: object, name: str, least: int = 1) -> int:
    """`value` as a number of things; raises UserError unless it is a whole number of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value} is out of range; give a whole number of {least} or more.")
    return value


def flag_of(value: object, name: str) -> bool:
    """`value` as a flag; raises UserError for anything but true and false, such as the word off."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value} is neither true nor false.")
    return value


def names_of(value: object, name: str) -> list[str]:
    """`value` as a list of names; raises UserError for a single one, whose letters would pass for names."""
    if not isinstance(value, Sequence | ListConfig) or isinstance(value, str):
        raise UserError(f"{name}={value} is not a list; write {name}='[{value}]'.")
    return [str(entry) for entry in value]


def policies_of(value: object, name: str) -> list[str]:
    """`value` as a list of policies, each with a file in `conf/policy` or of its own; raises UserError for others.

    Whether that file holds a policy is found when it is loaded.
    """
    known = sorted({path.stem for path in (CONF / "policy").glob("*.yaml")} - {"file"})
    names = names_of(value, name)
    for policy in names:
        of_file = policy.endswith((".onnx", ".yaml"))
        if of_file and not Path(policy).is_file():
            raise UserError(f"{policy} does not exist.")
        if not of_file and policy not in known:
            raise UserError(
                f"policy {policy!r} is unknown; choose from {', '.join(known)}, or give an .onnx or .yaml file."
            )
    return names


# Settings that mean the same in every program that has them. Null passes: what it means, if anything, a program knows.
_KINDS: dict[str, Callable[[Any, str], object]] = {
    "seed": seed_of,
    "seeds": count_of,
    "policies": policies_of,
    "progress": flag_of,
    "total_steps": partial(count_of, least=0),
    "validation.every_steps": count_of,
    "validation.members": count_of,
    "env.members": count_of,
    "env.group_size": count_of,
    "env.traces": count_of,
    "env.interval_s": number,
    "engine.pace": number,
    "slo.ttft_s": number,
    "slo.tpot_s": number,
    "threads": count_of,
    "processes": count_of,
    "seconds": number,
    "max_tokens": count_of,
}


def check_values(config: DictConfig) -> None:
    """Raises UserError for the first plain setting whose value is of the wrong kind."""
    for name, kind in _KINDS.items():
        value = OmegaConf.select(config, name)
        if value is not None:
            kind(value, name)
