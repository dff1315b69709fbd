"""A shadow policy: asked on the same view as the policy in charge, never obeyed; where it differs is written down."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import TracebackType

import numpy as np

from flexirl.policies.interface.decision import FIGURES, unsound
from flexirl.policies.interface.policy import Policy
from flexirl.policies.interface.view import View

_LOG = logging.getLogger(__name__)
COLUMNS = ("time_s", "field", "decided", "shadow")


class Shadow:
    """Writes to `path`, a CSV of `COLUMNS`, every field of a decision in which `policy` differs; a context manager.

    Asked whenever the policy in charge is. Only the fields of `DECISION` are compared, not scores of single requests.
    asked, differences: decisions so far, and those that differed. A shadow that fails is logged and asked no more.
    """

    def __init__(self, policy: Policy, path: Path) -> None:
        self.policy = policy
        self.asked = self.differences = 0
        self._failed = False
        self._file = open(path, "w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)

    def __enter__(self) -> Shadow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def reset(self, view: View) -> None:
        """Called once, before the first decision."""
        try:
            self.policy.reset(view)
        except Exception as error:
            self._fail(error)

    def compare(self, view: View, decision: np.ndarray) -> None:
        """Asks what the shadow would have said in place of `decision`, a 0-d array of `DECISION`."""
        if self._failed:
            return
        try:
            other = self.policy.decide(view)
            trouble = unsound(other)
            if trouble is not None:
                raise ValueError(trouble)
            differing = [name for name in FIGURES if decision[name] != other[name]]
            for name in differing:
                self._rows.writerow((view.now_s, name, decision[name].item(), other[name].item()))
        except Exception as error:  # the engine must not suffer for it
            self._fail(error)
            return
        self.asked += 1
        self.differences += bool(differing)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        _LOG.warning("shadow %s failed (%s); it is asked no more", self.policy.name, error)
