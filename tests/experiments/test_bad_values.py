"""Values that can be read and make no sense: one sentence that names them, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from flexirl.benchmarks.suites import composed
from flexirl.errors import UserError
from flexirl.experiments.configuration import load_task
from flexirl.policies.registry import PRETRAINED_FILE, make_policy
from flexirl.runtime.profile.engine import PROFILES, load_profile


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workload.load=1e9", "workload.load=1e\\+09 would be .* requests"),
        ("env.interval_s=1e-9", "env.interval_s=1e-09 is out of range"),
        ("slo.prices.prompt=-1", "slo.prices.prompt=-1.0 is out of range"),
        ("reward.loss=nan", "reward.loss=nan is out of range"),
        ("reward.waiting=much", "reward.waiting=much is out of range"),
    ],
)
def test_a_setting_without_sense_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(composed(["workload=tiny", override])).draw(0)


def test_one_task_draws_as_many_requests_as_fit_memory() -> None:
    assert len(load_task(composed(["workload=tiny", "workload.load=5"])).draw(0)) > 0


@pytest.mark.parametrize(
    ("figure", "message"),
    [(5, "has base_s=5; write it as"), ({"value": 1e9}, "base_s=1000000000.0 is not between 0 and 600")],
)
def test_a_profile_that_no_engine_has(figure: object, message: str, tmp_path: Path) -> None:
    document = json.loads((PROFILES / "h100-llama-3.1-8b.json").read_text())
    document["values"]["base_s"] = figure
    (tmp_path / "mine.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        load_profile(tmp_path / "mine.json")


def test_a_network_of_nan_is_no_policy(tmp_path: Path) -> None:
    model = onnx.load(PRETRAINED_FILE)
    weights = next(i for i in model.graph.initializer if numpy_helper.to_array(i).ndim == 2)
    weights.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weights), np.nan), weights.name))
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(UserError, match="a weight of it is no finite number"):
        make_policy(str(tmp_path / "broken.onnx"))
