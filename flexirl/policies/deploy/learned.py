"""A learned policy in an engine: an ONNX file in, decisions out, and a named heuristic when anything goes wrong.

Nothing is unpickled. A file whose schemas are unknown is refused when it is loaded; an exception, a number that is not
finite or a missed time limit while running makes the fallback decide, counted and logged.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from flexirl.errors import UserError
from flexirl.policies.deploy.decider import KINDS, SETTINGS, decide, new_decider
from flexirl.policies.deploy.network import Network, read_network
from flexirl.policies.interface import action as actions
from flexirl.policies.interface import observation
from flexirl.policies.interface.decision import DECISION, default_decision
from flexirl.policies.interface.policy import Policy
from flexirl.policies.interface.view import VISIBLE, View, idle_view
from flexirl.policies.rules import make_rule
from flexirl.runtime.profile.engine import load_profile
from flexirl.workloads.slo import SLO

_LOG = logging.getLogger(__name__)
_NUMBERS = {"dials": actions.NUM_DIALS, "grid": len(actions.GRID), "scores": VISIBLE}
_LOGGED_FAILURES = 3
FORMAT = "flexirl-policy-1"


# The fallback must be ready at once, without a search, and hold for a whole interval when it is asked but once in it.
FALLBACK = "qoserve"


class LearnedPolicy:
    """Decides by an exported network.

    fallback: name of the hand-written policy that decides where the network cannot. time_limit_s: a decision that takes
    longer than this is not used; None, never. interval_s: seconds between decisions it was trained with, or None.
    failures: decisions that the fallback took so far, by reason.
    Raises UserError for a file that is missing, damaged or of another schema.
    """

    every_iteration = False

    def __init__(self, path: Path, fallback: str = FALLBACK, time_limit_s: float | None = None) -> None:
        self.name = path.stem if path.stem != "policy" else f"learned:{path.resolve().parent.name}"
        self.fallback: Policy = make_rule(fallback)
        self.time_limit_s = time_limit_s
        self.failures: dict[str, int] = {}
        self.network, self.metadata = _open(path)
        kind = str(self.metadata.get("action", "dials"))
        self._check_shapes(path, kind)
        self._settings = np.zeros(1, SETTINGS)
        self._settings["kind"] = KINDS[kind]
        self._settings["masked"] = bool(self.metadata.get("masked", False))
        self._settings["immediate_order"] = self._order("immediate_order", actions.DEFAULT_IMMEDIATE_ORDER, path)
        self._settings["deferred_order"] = self._order("deferred_order", actions.DEFAULT_DEFERRED_ORDER, path)
        self.interval_s = self._interval(path)
        self.observed = np.zeros(self.network.sizes[0], np.float32)
        self._warm_up()

    def _interval(self, path: Path) -> float | None:
        interval_s = self.metadata.get("interval_s")
        if interval_s is None:
            return None
        if isinstance(interval_s, bool) or not isinstance(interval_s, int | float) or not 0 < interval_s < np.inf:
            raise UserError(
                f"Policy {path} has interval_s={interval_s!r}, no positive number of seconds; export it anew."
            )
        return float(interval_s)

    def _order(self, key: str, default: str, path: Path) -> int:
        name = str(self.metadata.get(key, default))
        if name not in actions.ORDERS:
            raise UserError(f"Policy {path} has {key} {name}, which this version does not know; train it anew.")
        return actions.ORDERS[name]

    def _check_shapes(self, path: Path, kind: str) -> None:
        if kind not in _NUMBERS:
            raise UserError(f"Policy {path} decides by {kind}, which this version does not know; train it anew.")
        observes, *_, gives = self.network.sizes.tolist()
        expected = len(observation.bounds(kind == "scores")[0])
        if observes != expected:
            raise UserError(
                f"Policy {path} observes {observes} numbers, but this version has {expected}; train it anew."
            )
        if gives != _NUMBERS[kind]:
            raise UserError(f"Policy {path} gives {gives} numbers, {kind} are {_NUMBERS[kind]}; train it anew.")

    def _warm_up(self) -> None:
        """Decides for an idle engine, since what is set up at first use takes as long as an iteration or two."""
        self.reset(idle_view(load_profile("cpu-tiny").values, SLO(1.0, 1.0)))
        self._decide()

    def reset(self, view: View) -> None:
        """Forgets what it observed before, and decides for this engine from here on."""
        self._decision = np.array([default_decision()], DECISION)
        self._decider = new_decider(view, self.network, self._settings, self._decision, self.observed)
        self.failures = {}
        self.fallback.reset(view)

    def decide(self, view: View) -> np.ndarray:
        """The network's decision, or the fallback's."""
        try:
            began = time.perf_counter() if self.time_limit_s is not None else 0.0
            if not self._decide():
                return self._fall_back(view, "not finite")
            if self.time_limit_s is not None and time.perf_counter() - began > self.time_limit_s:
                return self._fall_back(view, "too late")
        except Exception as error:  # whatever happens, the engine goes on
            return self._fall_back(view, type(error).__name__)
        return self._decision.reshape(())

    def _decide(self) -> bool:
        finite: bool = decide(self._decider)
        return finite

    def _fall_back(self, view: View, reason: str) -> np.ndarray:
        self.failures[reason] = self.failures.get(reason, 0) + 1
        if self.failures[reason] <= _LOGGED_FAILURES:
            _LOG.warning("%s: %s; %s decides instead", self.name, reason, self.fallback.name)
        return self.fallback.decide(view)


def load_policy(path: str | Path, fallback: str = FALLBACK, time_limit_s: float | None = None) -> LearnedPolicy:
    """The policy in an ONNX file; see `LearnedPolicy`."""
    return LearnedPolicy(Path(path), fallback, time_limit_s)


def _open(path: Path) -> tuple[Network, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"Policy {path} does not exist.")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # of the library that onnx reads with
        raise UserError(f"Policy {path} is not a readable ONNX file ({_first_line(error)}); export it anew.") from None
    properties = {entry.key: entry.value for entry in model.metadata_props}
    known = {"format": FORMAT, "observation_schema": observation.SCHEMA, "action_schema": actions.SCHEMA}
    for key, value in known.items():
        if properties.get(key) != value:
            raise UserError(f"Policy {path} has {key} {properties.get(key, 'none')}, but this version needs {value}.")
    metadata = {}
    for key, value in properties.items():
        if key not in known and key != "package_version":
            try:
                metadata[key] = json.loads(value)
            except json.JSONDecodeError:
                raise UserError(f"Policy {path} has unreadable metadata {key}; export it anew.") from None
    try:
        return read_network(model), metadata
    except UserError as error:
        raise UserError(f"Policy {path} has no network that can be run: {error}; export it anew.") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:120]
