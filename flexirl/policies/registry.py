"""Policies by name: a rule with the knobs of `conf/policy/<name>.yaml`, the packaged network, or one in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flexirl.errors import UserError
from flexirl.policies.heuristics.anchors import DeferredOnly, ImmediateOnly
from flexirl.policies.heuristics.base import Heuristic
from flexirl.policies.heuristics.conserve import ConServe
from flexirl.policies.heuristics.edf import Edf
from flexirl.policies.heuristics.fixed_dials import FixedDials
from flexirl.policies.heuristics.hygen import HyGen
from flexirl.policies.heuristics.laxity import Laxity
from flexirl.policies.heuristics.no_evict import NoEvict
from flexirl.policies.heuristics.qoserve import QoServe
from flexirl.policies.heuristics.sarathi import Sarathi
from flexirl.policies.heuristics.sglang import SGLang
from flexirl.policies.heuristics.vllm import VllmFcfs, VllmPriority
from flexirl.policies.heuristics.vtc import Vtc
from flexirl.policies.interface.policy import Policy

HEURISTICS: dict[str, type[Heuristic]] = {
    rule.name: rule
    for rule in (
        VllmFcfs, VllmPriority, Sarathi, NoEvict, SGLang, HyGen, ConServe, QoServe, Edf, Laxity, Vtc, FixedDials,
        ImmediateOnly, DeferredOnly,
    )
}  # fmt: skip
# The network that comes with the package: trained on many scenarios, for use without training (`make pretrained`).
PRETRAINED, PRETRAINED_FILE = "pretrained", Path(__file__).resolve().parent / "deploy" / "pretrained.onnx"
_NETWORK_KNOBS = {"fallback": "str", "time_limit_s": "float | None"}  # of `conf/policy/file.yaml`
_SPECS = Path(__file__).resolve().parent.parent / "conf" / "policy"


def policy_names() -> list[str]:
    """Names of the hand-written policies."""
    return list(HEURISTICS)


def make_policy(name_or_path: str, knobs: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name, `pretrained` among them, or the one exported to that .onnx file.

    knobs: replace those of `conf/policy/<name>.yaml`. Raises UserError for an unknown name or knob or a bad value.
    """
    path = str(PRETRAINED_FILE) if name_or_path == PRETRAINED else name_or_path
    if path.endswith(".onnx"):
        # Only a learned policy needs the network's runtime, which takes long to import.
        from flexirl.policies.deploy.learned import load_policy

        return load_policy(path, **_checked(name_or_path, _NETWORK_KNOBS, knobs or {}))
    if name_or_path not in HEURISTICS:
        raise UserError(
            f"policy {name_or_path!r} is unknown; choose from {', '.join(policy_names())}, {PRETRAINED}, "
            "or give an .onnx file."
        )
    rule = HEURISTICS[name_or_path]
    values = {**load_policy_spec(name_or_path), **(knobs or {})}
    kinds = {knob.name: str(knob.type) for knob in fields(rule) if knob.init}
    return rule(**_checked(name_or_path, kinds, values))


def _checked(name: str, kinds: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of policy `name`, each of the kind that its annotation says."""
    for knob in values:
        if knob not in kinds:
            known = ", ".join(kinds) if kinds else "none"
            raise UserError(f"policy {name} has no knob {knob!r}; it has {known}.")
    return {knob: _value(f"{name}.{knob}", kinds[knob], value) for knob, value in values.items()}


def load_policy_spec(name: str) -> dict[str, Any]:
    """The knobs in `conf/policy/<name>.yaml`."""
    spec = OmegaConf.to_container(OmegaConf.load(_SPECS / f"{name}.yaml"))
    assert isinstance(spec, dict)
    return {str(knob): value for knob, value in spec.items() if knob != "name"}


def _value(knob: str, kind: str, value: Any) -> Any:
    """`value` as the knob's annotation has it: a number, a flag, a tuple of numbers, or None where that is allowed."""
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("tuple"):
        if isinstance(value, list | tuple) and all(_is_number(entry) for entry in value):
            return tuple(float(entry) for entry in value)
        raise UserError(f"policy knob {knob}={value!r} should be a list of numbers.")
    if kind.startswith("float") and _is_number(value):
        return float(value)
    if kind.startswith("int") and _is_number(value) and value == int(value):
        return int(value)
    if kind in ("str", "int | str") and isinstance(value, str):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    wanted = {
        "str": "a name", "int": "a whole number", "int | str": "a whole number or a word", "bool": "true or false",
    }  # fmt: skip
    raise UserError(f"policy knob {knob}={value!r} should be {wanted.get(kind, 'a number')}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for the first name that is neither a hand-written policy nor an .onnx file that loads.

    Called before long work, so that a wrong name is not found at its end.
    """
    for name in names:
        make_policy(str(name))
