"""From configuration to objects: plain nested data, as in conf/workload/*.yaml, becomes a `Scenario`.

Each node that stands for an object has a `kind`, looked up in a table here; its other entries are the parameters of
that class. A parameter that is itself an object is a nested node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexirl.errors import UserError
from flexirl.workloads import arrivals, files, lengths, scenario, sessions

Node = Mapping[str, Any]
Builder = Callable[[str, Any], Any]  # the node's place in the configuration, and the node


def from_config(config: Node) -> scenario.Scenario:
    """Builds the scenario of a `workload` node, a dict or an OmegaConf DictConfig.

    Raises UserError, naming the entry and the choices, for an unknown kind or parameter or a missing value.
    """
    if OmegaConf.is_config(config):
        try:
            config = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            reason = " ".join(str(error.msg).splitlines()[:1])
            raise UserError(f"{error.full_key or 'workload'} cannot be read: {reason}; give it a value.") from None
    node = dict(config)
    # These two are written once, at the top, since a user sets them most: `workload.load=0.9 workload.path=...`.
    load = node.pop("load", None)
    if load is not None and (isinstance(load, bool) or not isinstance(load, _NUMBER)):
        raise UserError(f"workload.load={load!r} should be a number; 1 is the engine's capacity.")
    immediate = _mapping("workload.immediate", node.get("immediate"))
    if immediate.get("kind") in ("synthetic", "sessions", "several"):
        immediate["load"] = load
    elif immediate.get("kind") == "trace":
        immediate |= {"load": load, "path": node.pop("path", None), "columns": node.pop("columns", None)}
    node["immediate"] = immediate
    return _object(scenario.Scenario, "workload", node, _SCENARIO)


def _object(cls: type, place: str, node: Any, nested: Mapping[str, Builder]) -> Any:
    """An instance of the dataclass `cls` from a node of its parameters; `nested` builds those that are objects."""
    node = _mapping(place, node)
    parameters = {f.name: f for f in fields(cls) if f.init}
    for name in node:
        if name not in parameters:
            raise UserError(f"{place}.{name} is not a parameter here; choose from {', '.join(parameters)}.")
    for name, parameter in parameters.items():
        if name not in node and parameter.default is MISSING and parameter.default_factory is MISSING:
            raise UserError(f"{place}.{name} is missing; give it a value.")
    values = {
        name: nested[name](f"{place}.{name}", value)
        if name in nested
        else _plain(f"{place}.{name}", parameters[name], value)
        for name, value in node.items()
    }
    try:
        return cls(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} has a value of the wrong type ({error}).") from None


def _mapping(place: str, node: Any) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        raise UserError(f"{place}={node!r} should be a group of settings.")
    return {str(name): value for name, value in node.items()}


# What an annotation accepts; the annotations are strings. bool is an int in Python, but not in a configuration.
_NUMBER = (int, float)


def _plain(place: str, parameter: Field[Any], value: Any) -> Any:
    """A number, text or tuple of numbers, as the parameter's annotation has it."""
    annotation = str(parameter.type)
    if value is None and "None" in annotation:
        return None
    if "tuple" in annotation:
        entries = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(entry, _NUMBER) and not isinstance(entry, bool) for entry in entries):
            return tuple(float(entry) for entry in entries)
        raise UserError(f"{place}={value!r} should be a list of numbers.")
    kind = annotation.split(" | ")[0]
    if kind == "float" and isinstance(value, _NUMBER) and not isinstance(value, bool):
        return float(value)
    if kind == "int" and isinstance(value, _NUMBER) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind in ("str", "DistributionName") and isinstance(value, str):
        return value
    wanted = {"float": "a number", "int": "a whole number", "bool": "true or false"}.get(kind, "text")
    raise UserError(f"{place}={value!r} should be {wanted}.")


def _of_kind(kinds: Mapping[str, Builder], place: str, node: Any) -> Any:
    """An object whose class is chosen by the node's `kind`."""
    node = _mapping(place, node)
    kind = node.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"{place}.kind={kind!r} is unknown; choose from {', '.join(kinds)}.")
    return kinds[kind](place, node)


def _class(cls: type, nested: Mapping[str, Builder] | None = None) -> Builder:
    return lambda place, node: _object(cls, place, node, nested or {})


def _recorded(place: str, node: Any) -> scenario.Recorded:
    node = {"format": None, "seed": 0, "columns": None, **_mapping(place, node)}
    names = ("path", "load", "format", "seed", "columns")
    for name in node:
        if name not in names:
            raise UserError(f"{place}.{name} is not a parameter of a trace; choose from {', '.join(names)}.")
    if not isinstance(node.get("path"), str):
        raise UserError(f"workload.path={node.get('path')!r} should be the path of a trace file.")
    if node["columns"] is not None:
        node["columns"] = {what: str(name) for what, name in _mapping("workload.columns", node["columns"]).items()}
    return scenario.Recorded(**node)


def _tiers(place: str, node: Any) -> tuple[scenario.Tier, ...]:
    if not isinstance(node, list | tuple):
        raise UserError(f"{place}={node!r} should be a list of share, ttft_s, tpot_s, window_s.")
    return tuple(_object(scenario.Tier, f"{place}[{i}]", tier, {}) for i, tier in enumerate(node))


_SPREADS = {"outer": _class(arrivals.Spread), "inner": _class(arrivals.Spread)}
ARRIVALS: dict[str, Builder] = {
    "poisson": _class(arrivals.Poisson),
    "gamma": _class(arrivals.Gamma),
    "weibull": _class(arrivals.Weibull),
    "on_off": _class(arrivals.OnOff),
    "day_night": _class(arrivals.DayNight),
    "outer_inner": _class(arrivals.OuterInner, _SPREADS),
}

MARGINALS: dict[str, Builder] = {
    "lognormal": _class(lengths.Lognormal),
    "fixed": _class(lengths.Fixed),
    "uniform": _class(lengths.Uniform),
}
_marginal = partial(_of_kind, MARGINALS)

LENGTHS: dict[str, Builder] = {
    "independent": _class(lengths.Independent, {"prompt": _marginal, "output": _marginal}),
    "images": _class(lengths.Images, {"text": _marginal, "output": _marginal, "tokens_per_image": _marginal}),
    "empirical": _class(lengths.Empirical),
}


def _several(place: str, node: Any) -> sessions.Several:
    """Parts by name; each has a relative `share` of the load beside what its kind takes."""
    node = _mapping(place, node)
    parts = {name: _mapping(f"{place}.parts.{name}", part) for name, part in _mapping(place, node["parts"]).items()}
    shares = {name: part.pop("share", 1.0) for name, part in parts.items()}
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, _NUMBER) or share <= 0:
            raise UserError(f"{place}.parts.{name}.share={share!r} should be a positive number.")
    load = node.get("load")
    if load is None or not parts:
        raise UserError(f"{place} needs parts and workload.load, the share of the engine's capacity they ask for.")
    total = sum(shares.values())
    return sessions.Several(
        tuple(
            _of_kind(IMMEDIATE, f"{place}.parts.{name}", {**part, "load": load * shares[name] / total})
            for name, part in parts.items()
        )
    )


def _kinds(place: str, node: Any) -> dict[str, files.Kind]:
    marginals = dict.fromkeys(("instruction", "prompt", "output", "requests"), _marginal)
    return {
        name: _object(files.Kind, f"{place}.{name}", kind, marginals) for name, kind in _mapping(place, node).items()
    }


_STREAM: dict[str, Builder] = {
    "arrivals": partial(_of_kind, ARRIVALS),
    "lengths": partial(_of_kind, LENGTHS),
    "tenants": _class(scenario.Tenants),
}


_SESSIONS: dict[str, Builder] = {
    **_STREAM,
    **dict.fromkeys(("turns", "first", "later", "output", "system"), _marginal),
    "pause": _class(sessions.Pause),
}


def _deferred(place: str, node: Any) -> Any:
    return _of_kind(DEFERRED, place, node)


IMMEDIATE: dict[str, Builder] = {
    "synthetic": _class(scenario.Synthetic, _STREAM),
    "sessions": _class(sessions.Sessions, _SESSIONS),
    "several": _several,
    "trace": _recorded,
    "none": _class(scenario.Silent),
}
DEFERRED: dict[str, Builder] = {
    "backlog": _class(scenario.Backlog, _STREAM),
    "batches": _class(scenario.Batches, _STREAM),
    "files": _class(files.Files, {"kinds": _kinds, **_STREAM}),
    "none": _class(scenario.NoDeferred),
    "of_file": lambda place, node: _object(scenario.OfFile, place, node, {"otherwise": _deferred}),
}

_SCENARIO: dict[str, Builder] = {
    "immediate": partial(_of_kind, IMMEDIATE),
    "deferred": partial(_of_kind, DEFERRED),
    "slo_tiers": _tiers,
    "predictor": _class(scenario.Predictor),
}
