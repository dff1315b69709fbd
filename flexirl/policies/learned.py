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
import onnxruntime

from flexirl.envs import action as actions
from flexirl.envs import observation
from flexirl.envs.action import set_dials, set_scores
from flexirl.envs.observation import Observer
from flexirl.errors import UserError
from flexirl.policies.export import FORMAT
from flexirl.policies.registry import make_policy
from flexirl.runtime.policy import Policy, View

_LOG = logging.getLogger(__name__)
_KINDS = {"dials", "grid", "scores"}
_LOGGED_FAILURES = 3


class LearnedPolicy:
    """Decides by an exported network.

    time_limit_s: a decision that takes longer than this is not used; None, never. failures: decisions that the fallback
    took so far, by reason.
    """

    every_iteration = False

    def __init__(self, path: Path, fallback: str = "hygen", time_limit_s: float | None = None) -> None:
        self.name = path.stem if path.stem != "policy" else f"learned:{path.parent.name}"
        self.fallback: Policy = make_policy(fallback)
        self.time_limit_s = time_limit_s
        self.failures: dict[str, int] = {}
        self._session, self.metadata = _open(path)
        self._kind = str(self.metadata.get("action", "dials"))
        self._orders = tuple(
            _ORDERS.get(str(self.metadata.get(name, "arrival")), ARRIVAL)
            for name in ("immediate_order", "deferred_order")
        )
        self._check_shapes(path)

    def _check_shapes(self, path: Path) -> None:
        if self._kind not in _KINDS:
            raise UserError(f"{path} decides by {self._kind}, which this version does not know.")
        expected = len(observation.bounds(self._kind == "scores")[0])
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].shape[-1] != expected:
            raise UserError(
                f"{path} observes {inputs[0].shape[-1]} numbers, but this version has {expected}; train it anew."
            )

    def reset(self, view: View) -> None:
        """Forgets what it observed before."""
        self._observer = Observer(view.slo.ttft_s, view.slo.tpot_s, self._kind == "scores")
        self.failures = {}
        self.fallback.reset(view)

    def decide(self, view: View) -> np.ndarray:
        """The network's decision, or the fallback's."""
        try:
            began = time.perf_counter() if self.time_limit_s is not None else 0.0
            outputs = self._session.run(["action", "raw"], {"observation": self._observer(view.state)[None]})
            action = outputs[0][0]
            if not np.isfinite(outputs[1]).all():
                return self._fall_back(view, "not finite")
            if self.time_limit_s is not None and time.perf_counter() - began > self.time_limit_s:
                return self._fall_back(view, "too late")
        except Exception as error:  # whatever a foreign file does, the engine goes on
            return self._fall_back(view, type(error).__name__)
        if self._kind == "scores":
            set_scores(view.state, np.clip(action, -1.0, 1.0), view.slo.tpot_s)
        else:
            dials = np.array(actions.GRID[int(action)], np.float32) if self._kind == "grid" else action
            set_dials(view.state, np.clip(dials, -1.0, 1.0), view.slo.tpot_s, *self._orders)
        return view.state.decision[0]

    def _fall_back(self, view: View, reason: str) -> np.ndarray:
        self.failures[reason] = self.failures.get(reason, 0) + 1
        if self.failures[reason] <= _LOGGED_FAILURES:
            _LOG.warning("%s: %s; %s decides instead", self.name, reason, self.fallback.name)
        return self.fallback.decide(view)


def load_policy(path: str | Path, fallback: str = "hygen") -> LearnedPolicy:
    """The policy in an ONNX file; raises UserError where it is missing, damaged or of another schema."""
    return LearnedPolicy(Path(path), fallback)


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
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"Policy {path} is not a readable ONNX file ({reason}); export it anew.") from None
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
