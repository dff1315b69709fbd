"""Hand-written rules by name, with the knobs of `conf/policy/<name>.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import flexirl.policies.heuristics  # noqa: F401  each rule makes itself known
from flexirl.errors import UserError
from flexirl.policies.heuristics.base import RULES, Heuristic

_SPECS = Path(__file__).resolve().parent.parent / "conf" / "policy"


def rule_names() -> list[str]:
    """Names of the hand-written policies."""
    return list(RULES)


def make_rule(name: str, knobs: Mapping[str, Any] | None = None) -> Heuristic:
    """The rule of that name; knobs replace those of its file.

    Raises UserError for an unknown name or knob, or a bad value.
    """
    if name not in RULES:
        raise UserError(f"policy {name!r} is no rule; choose from {', '.join(rule_names())}.")
    rule = RULES[name]
    kinds = {knob.name: str(knob.type) for knob in fields(rule) if knob.init}
    return rule(**checked_knobs(name, kinds, {**load_rule_spec(name), **(knobs or {})}))


def save_rule(rule: Heuristic, path: Path) -> None:
    """Writes the rule's name and all its knobs as YAML, which `load_rule` reads."""
    knobs = {knob: value for knob, value in asdict(rule).items() if not knob.startswith("_")}
    OmegaConf.save(OmegaConf.create({"name": type(rule).name, **knobs}), path)


def load_rule(path: str | Path, knobs: Mapping[str, Any] | None = None) -> Heuristic:
    """The rule in a YAML file of its name and knobs; `knobs` replace those. Raises UserError for what is none.

    It goes by the name of the file, so that one rule with several settings can be compared with itself.
    """
    try:
        spec = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is no readable YAML file ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise UserError(f"{path} is no rule: it needs a name and, if any, knobs, as conf/policy/qoserve.yaml has.")
    own = {str(knob): value for knob, value in spec.items() if knob != "name"}
    rule = make_rule(spec["name"], {**own, **(knobs or {})})
    object.__setattr__(rule, "name", Path(path).stem)
    return rule


def load_rule_spec(name: str) -> dict[str, Any]:
    """The knobs in `conf/policy/<name>.yaml`; none for a rule that has no file, whose knobs have their defaults."""
    path = _SPECS / f"{name}.yaml"
    if not path.is_file():
        return {}
    spec = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(spec, dict)
    return {str(knob): value for knob, value in spec.items() if knob != "name"}


def checked_knobs(name: str, kinds: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of policy `name`, each of the kind that its annotation says; raises UserError where one is not."""
    for knob in values:
        if knob not in kinds:
            known = ", ".join(kinds) if kinds else "none"
            raise UserError(f"policy {name} has no knob {knob!r}; it has {known}.")
    return {knob: _value(f"{name}.{knob}", kinds[knob], value) for knob, value in values.items()}


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
