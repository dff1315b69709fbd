"""What a user types, in Hydra's grammar: paths with signs that mean something there, files in place of a choice."""

from __future__ import annotations

import re

from hydra.core.override_parser.types import Quote, QuotedString

# Last parts of settings that are paths, or may be.
_PATHS = ("path", "dir", "folder", "cache", "model", "profile", "prompts", "resume", "run", "shadow")
_FILES = {"engine": ((".json",), "profile"), "policy": ((".onnx", ".yaml"), "name")}  # in place of a group's choice
_PLAIN = re.compile(r"[\w/\-\\+.$%*@?|: ]*", re.ASCII)  # Hydra reads it as it stands
_SWEEP = re.compile(r"(choice|glob|shuffle|sort)\(")


def spelled_out(argument: str, sweep: bool = False) -> list[str]:
    """The overrides that Hydra reads as the user means them.

    Paths are quoted unless the user did so. In a sweep, commas outside quotes go between its values.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or key.startswith("-"):
        return [argument]
    if name in _FILES and value.strip("'\"").endswith(_FILES[name][0]):
        return [f"{key}=file", f"{key}.{_FILES[name][1]}={_as_read(value, sweep)}"]
    if name.split(".")[-1] in _PATHS:
        return [f"{key}={_as_read(value, sweep)}"]
    if argument.startswith("compare=") and "," in value:
        return [f"compare={quoted(value)}"]  # no sweep
    return [argument]


def quoted(text: str) -> str:
    """`text` as a value that Hydra reads back as it is, in quotes only where it needs them."""
    if _PLAIN.fullmatch(text) or "${" in text:  # an interpolation is to be resolved
        return text
    return QuotedString(text, Quote.single).with_quotes()


def _as_read(value: str, sweep: bool) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value
    if not sweep:
        return quoted(value)
    return value if _SWEEP.match(value) else ",".join(quoted(part) for part in value.split(","))
