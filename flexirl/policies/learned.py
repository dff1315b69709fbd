"""A learned policy in an engine: an ONNX file in, decisions out, and a named heuristic when anything goes wrong.

Nothing is unpickled. A file whose schemas are unknown is refused when it is loaded; an exception, a number that is not
finite or a missed time limit while running makes the fallback decide, counted and logged.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from flexirl.envs import action as actions
from flexirl.envs import observation
from flexirl.envs.action import set_dials, set_scores
from flexirl.envs.observation import Observer
from flexirl.errors import UserError
from flexirl.policies.export import FORMAT
from flexirl.policies.registry import make_policy
from flexirl.runtime.engine import load_profile
from flexirl.runtime.policy import Policy, View
from flexirl.runtime.simulation import start
from flexirl.workloads.scenario import SLO
from flexirl.workloads.trace import DEFERRED, Trace, empty_rows

_LOG = logging.getLogger(__name__)
_NUMBERS = {"dials": actions.NUM_DIALS, "grid": len(actions.GRID), "scores": observation.VISIBLE}
_LOGGED_FAILURES = 3


# The fallback must be ready at once, without a search, and hold for a whole interval when it is asked but once in it.
FALLBACK = "qoserve"


class LearnedPolicy:
    """Decides by an exported network.

    fallback: name of the hand-written policy that decides where the network cannot. time_limit_s: a decision that takes
    longer than this is not used; None, never. failures: decisions that the fallback took so far, by reason.
    Raises UserError for a file that is missing, damaged or of another schema.
    """

    every_iteration = False

    def __init__(self, path: Path, fallback: str = FALLBACK, time_limit_s: float | None = None) -> None:
        self.name = path.stem if path.stem != "policy" else f"learned:{path.resolve().parent.name}"
        self.fallback: Policy = make_policy(fallback)
        self.time_limit_s = time_limit_s
        self.failures: dict[str, int] = {}
        self._session, self.metadata = _open(path)
        self._kind = str(self.metadata.get("action", "dials"))
        self._masked = bool(self.metadata.get("masked", False))
        self._immediate_order = self._order("immediate_order", actions.DEFAULT_IMMEDIATE_ORDER, path)
        self._deferred_order = self._order("deferred_order", actions.DEFAULT_DEFERRED_ORDER, path)
        self._check_shapes(path)
        self._warm_up()

    def _order(self, key: str, default: str, path: Path) -> int:
        name = str(self.metadata.get(key, default))
        if name not in actions.ORDERS:
            raise UserError(f"Policy {path} has {key} {name}, which this version does not know; train it anew.")
        return actions.ORDERS[name]

    def _check_shapes(self, path: Path) -> None:
        if self._kind not in _NUMBERS:
            raise UserError(f"Policy {path} decides by {self._kind}, which this version does not know; train it anew.")
        expected = len(observation.bounds(self._kind == "scores")[0])
        sizes = {tensor.name: tensor.shape[-1:] for tensor in self._session.get_inputs()}
        if sizes != {"observation": [expected]}:
            has = ", ".join(f"{name} of {size[-1] if size else 1}" for name, size in sizes.items()) or "nothing"
            raise UserError(f"Policy {path} observes {has}, but this version has {expected} numbers; train it anew.")
        numbers = _NUMBERS[self._kind]
        try:
            action, raw = self._run(np.zeros(expected, np.float32))
        except Exception as error:
            raise UserError(f"Policy {path} cannot decide ({_first_line(error)}); export it anew.") from None
        if raw.shape != (numbers,) or action.shape != (() if self._kind == "grid" else (numbers,)):
            raise UserError(f"Policy {path} gives other than the {numbers} numbers of {self._kind}; train it anew.")

    def _warm_up(self) -> None:
        """Decides for an idle engine, since what is set up at first use takes as long as an iteration or two."""
        view = View(start(load_profile("cpu-tiny"), Trace(empty_rows(0), "idle", 1), 0), SLO(1.0, 1.0))
        self.reset(view)
        action, raw = self._run(self._observer(view.state))
        self._write(self._dials(action, raw, view) if self._kind == "grid" else action, view)

    def _run(self, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The network's action and what it was cut or chosen from, for one observation."""
        action, raw = self._session.run(["action", "raw"], {"observation": observed[None]})
        return action[0], raw[0]

    def reset(self, view: View) -> None:
        """Forgets what it observed before."""
        self._observer = Observer(view.slo.ttft_s, view.slo.tpot_s, self._kind == "scores")
        self.failures = {}
        self.fallback.reset(view)

    def decide(self, view: View) -> np.ndarray:
        """The network's decision, or the fallback's."""
        try:
            began = time.perf_counter() if self.time_limit_s is not None else 0.0
            action, raw = self._run(self._observer(view.state))
            if not (_finite(raw) and (self._kind == "grid" or _finite(action))):
                return self._fall_back(view, "not finite")
            numbers = self._dials(action, raw, view) if self._kind == "grid" else action
            if self.time_limit_s is not None and time.perf_counter() - began > self.time_limit_s:
                return self._fall_back(view, "too late")
        except Exception as error:  # whatever a foreign file does, the engine goes on
            return self._fall_back(view, type(error).__name__)
        self._write(numbers, view)
        return view.state.decision[0]

    def _write(self, numbers: np.ndarray, view: View) -> None:
        if self._kind == "scores":
            set_scores(view.state, numbers, view.slo.tpot_s)
        else:
            set_dials(view.state, numbers, view.slo.tpot_s, self._immediate_order, self._deferred_order)

    def _dials(self, choice: np.ndarray, raw: np.ndarray, view: View) -> np.ndarray:
        """The dials of the network's choice; an agent that learned under masks never had to choose what they hide."""
        if self._masked and view.state.classes["running"][DEFERRED] == 0:
            raw[actions.PREEMPTS] = -np.inf
            choice = np.asarray(raw.argmax())
        return np.array(actions.GRID[int(choice)], np.float32)

    def _fall_back(self, view: View, reason: str) -> np.ndarray:
        self.failures[reason] = self.failures.get(reason, 0) + 1
        if self.failures[reason] <= _LOGGED_FAILURES:
            _LOG.warning("%s: %s; %s decides instead", self.name, reason, self.fallback.name)
        return self.fallback.decide(view)


def load_policy(path: str | Path, fallback: str = FALLBACK, time_limit_s: float | None = None) -> LearnedPolicy:
    """The policy in an ONNX file; see `LearnedPolicy`."""
    return LearnedPolicy(Path(path), fallback, time_limit_s)


def _open(path: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"Policy {path} does not exist.")
    options = onnxruntime.SessionOptions()
    # One core, no spinning threads: a decision is microseconds of work beside an engine that needs the rest.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"Policy {path} is not a readable ONNX file ({_first_line(error)}); export it anew.") from None
    properties = session.get_modelmeta().custom_metadata_map
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
    return session, metadata


def _finite(numbers: np.ndarray) -> bool:
    return math.isfinite(numbers.dot(numbers))  # in a fifth of the time of np.isfinite(...).all()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:120]
