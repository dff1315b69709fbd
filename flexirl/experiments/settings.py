"""Values of single settings, checked: what is wrong is told with its name. Imports nothing that takes time."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import ListConfig

from flexirl.errors import UserError


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
