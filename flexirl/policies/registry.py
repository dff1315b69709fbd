"""Policies by name: a rule, the packaged network, or one in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexirl.errors import UserError
from flexirl.policies.interface.policy import Policy
from flexirl.policies.rules import checked_knobs, load_rule, make_rule, rule_names

# The network that comes with the package: trained on many scenarios, for use without training (`make pretrained`).
PRETRAINED, PRETRAINED_FILE = "pretrained", Path(__file__).resolve().parent / "deploy" / "pretrained.onnx"
_NETWORK_KNOBS = {"fallback": "str", "time_limit_s": "float | None"}  # of `conf/policy/file.yaml`


def make_policy(name_or_path: str, knobs: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name, `pretrained` among them, or the one in that .onnx or .yaml file (see `save_rule`).

    knobs: replace those of `conf/policy/<name>.yaml`. Raises UserError for an unknown name or knob or a bad value.
    """
    path = str(PRETRAINED_FILE) if name_or_path == PRETRAINED else name_or_path
    if path.endswith(".onnx"):
        # Only a learned policy needs the library that reads networks.
        from flexirl.policies.deploy.learned import load_policy

        return load_policy(path, **checked_knobs(name_or_path, _NETWORK_KNOBS, knobs or {}))
    if path.endswith(".yaml"):
        return load_rule(path, {name: value for name, value in (knobs or {}).items() if name not in _NETWORK_KNOBS})
    if name_or_path not in rule_names():
        raise UserError(
            f"policy {name_or_path!r} is unknown; choose from {', '.join(rule_names())}, {PRETRAINED}, "
            "or give an .onnx or .yaml file."
        )
    return make_rule(name_or_path, knobs)


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for a name that is neither a hand-written policy nor a file that loads, and for two alike.

    Called before long work, so that a wrong name is not found at its end.
    """
    known: dict[str, str] = {}
    for name in map(str, names):
        goes_by = make_policy(name).name
        if known.setdefault(goes_by, name) != name:
            raise UserError(f"{known[goes_by]} and {name} both go by the name {goes_by}; rename one of the files.")
