"""A rule of one's own in one file, held against QoServe on the surrogate: less than a minute.

    python examples/own_rule.py

A subclass of `Heuristic` with a `name` is known by that name from then on, wherever a policy is named. Its knobs are
the fields of the dataclass. `prepare` sets what holds all the time, `decide` what follows from how the engine stands
now; both change a Decision, the record whose fields are in `flexirl/policies/interface/decision.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexirl.experiments.comparison import compare, table
from flexirl.experiments.configuration import default_task
from flexirl.policies.heuristics.base import Heuristic
from flexirl.policies.interface.decision import SHORTEST
from flexirl.policies.interface.view import View
from flexirl.workloads.trace import IMMEDIATE

OVERRIDES = ("workload=high_bursty", "workload.duration_s=120")


@dataclass(frozen=True)
class StandBack(Heuristic):
    """Shortest first; deferred work stands back while immediate requests wait.

    slack_used: share of the least slack of immediate decodes that prefill, and deferred work in calm times, may use;
    slack_in_bursts: that of deferred work while immediate requests wait; give_up_at: times its prefill that an
    immediate request must have left until its first token is due, or it goes behind the others.
    """

    slack_used: float = 0.9
    slack_in_bursts: float = 0.3
    give_up_at: float = 3.0

    name = "stand_back"
    every_iteration = True  # else it is asked once per decision interval

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """Once, at the start of a run."""
        decision["immediate_order"] = decision["deferred_order"] = SHORTEST
        decision["relegate"] = self.give_up_at
        decision["immediate_slack"] = self.slack_used
        decision["deferred_decodes"] = 0.5  # run whatever the slack

    def decide(self, view: View) -> np.ndarray:
        """Before every iteration."""
        waiting = view.group(IMMEDIATE)["waiting_tokens"] > 0
        self._decision["deferred_slack"] = self.slack_in_bursts if waiting else self.slack_used
        return self._decision


def main(seeds: int = 3, overrides: Sequence[str] = OVERRIDES) -> None:
    """Compares on so many episodes; overrides: of the configuration of `python -m flexirl.train`."""
    comparison = compare(default_task(overrides), [StandBack.name, "qoserve"], seeds)
    print(table(comparison.rows))


if __name__ == "__main__":
    main()
