"""What programs build from their configuration: mixtures of tasks, engines at another pace."""

from __future__ import annotations

import math

import pytest
from omegaconf import open_dict

from flexirl.errors import UserError
from flexirl.experiments.configuration import _train_config, default_task, load_tasks, load_validation_tasks


def test_axes_whose_lengths_have_no_common_divisor_come_to_meet() -> None:
    config = _train_config([])
    axes = {
        "load": [["workload.load=0.3"], ["workload.load=0.6"]],
        "promise": [["slo.tpot_s=0.02", "slo.ttft_s=2.0"], ["slo.tpot_s=0.03"], []],
    }
    with open_dict(config):
        config.mixture = {"tasks": 6, "parts": {"only": axes}}
    tasks = load_tasks(config)
    met = [(task.scenario.immediate.load, task.slo.tpot_s, task.slo.ttft_s) for task in tasks]  # type: ignore[attr-defined]
    assert met[:3] == [(0.3, 0.02, 2.0), (0.6, 0.03, 1.0), (0.3, 0.05, 1.0)]
    assert len(set(met)) == 6


def test_the_parts_of_a_mixture_take_turns() -> None:
    config = _train_config([])
    parts = {
        "light": {"load": [["workload.load=0.3"], ["workload.load=0.4"]]},
        "heavy": {"load": [["workload.load=0.9"]]},
    }
    with open_dict(config):
        config.mixture = {"tasks": 5, "parts": parts}
    loads = [task.scenario.immediate.load for task in load_tasks(config)]  # type: ignore[attr-defined]
    assert loads == [0.3, 0.9, 0.4, 0.9, 0.3]


def test_a_mixture_is_validated_on_the_tasks_that_follow() -> None:
    config = _train_config(["mixture=general", "mixture.tasks=3", "validation.members=2"])
    more = _train_config(["mixture=general", "mixture.tasks=5"])
    assert load_validation_tasks(config) == load_tasks(more)[3:]


def test_the_axes_of_the_packaged_mixture_have_such_lengths() -> None:
    for axes in _train_config(["mixture=general"]).mixture.parts.values():
        lengths = [len(axis) for axis in axes.values()]
        assert len(lengths) >= 3 and math.lcm(*lengths) == math.prod(lengths)


def test_an_engine_at_another_pace() -> None:
    engine, slower = default_task([]).engine, default_task(["engine.pace=2", "engine.kv_blocks=3000"]).engine
    assert slower.values["base_s"] == 2 * engine.values["base_s"] and slower.values["kv_blocks"] == 3000
    with pytest.raises(UserError, match=r"engine\.pace=0\.0 is out of range"):
        default_task(["engine.pace=0"])
