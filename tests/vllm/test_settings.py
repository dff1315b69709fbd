"""What operators and clients may say, and the one sentence for what they may not. Needs no vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flexirl.errors import UserError
from flexirl.vllm.classes import Wish, default_wish, read_wish
from flexirl.vllm.settings import Settings, check_version, read_settings
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

NEVER_S = float("inf")
SETTINGS = Settings(ttft_s=0.5, tpot_s=0.04)
USUAL = Wish(IMMEDIATE, NEVER_S, 0.5, 0.04, "")
PATIENT = Wish(DEFERRED, NEVER_S, NEVER_S, NEVER_S, "")


@pytest.mark.parametrize(
    ("priority", "extra", "expected"),
    [
        (0, None, USUAL),
        (0, {}, USUAL),
        (-3, {"kv_transfer_params": {}}, USUAL),
        (1, None, PATIENT),
        (1, {"flexirl": {"class": "immediate"}}, USUAL),
        (0, {"flexirl": {"class": "deferred", "window_s": 86400}}, PATIENT._replace(window_s=86400.0)),
        (0, {"flexirl_class": "deferred", "flexirl_window_s": 60}, PATIENT._replace(window_s=60.0)),
        (0, {"flexirl": {"ttft_s": 2, "tpot_s": 0.1}}, USUAL._replace(ttft_s=2.0, tpot_s=0.1)),
        (0, {"flexirl_tenant": "a", "flexirl": {"tenant": "b"}}, USUAL._replace(tenant="b")),
    ],
)
def test_a_request_says_what_it_is(priority: int, extra: Any, expected: Wish) -> None:
    assert read_wish(priority, extra, SETTINGS) == expected


def test_defaults_are_the_operators() -> None:
    settings = Settings(deferred_above=5, window_s=100.0)
    assert read_wish(5, None, settings).request_class == IMMEDIATE
    assert read_wish(6, None, settings) == PATIENT._replace(window_s=100.0)
    assert default_wish(settings).request_class == IMMEDIATE


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"flexirl_class": "batch"}, "'batch'"),
        ({"flexirl": {"class": 1}}, "=1 "),
        ({"flexirl": "deferred"}, "'deferred'"),
        ({"flexirl": {"windw_s": 3}}, "windw_s"),
        ({"flexirl_window_s": "soon"}, "'soon'"),
        ({"flexirl_ttft_s": -1}, "-1"),
        ({"flexirl_tpot_s": float("nan")}, "nan"),
    ],
)
def test_a_word_that_means_nothing_is_named(extra: Any, named: str) -> None:
    with pytest.raises(UserError) as raised:
        read_wish(0, extra, SETTINGS)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_settings_come_from_the_command_line_or_a_file(tmp_path: Path) -> None:
    wanted = {"policy": "hygen", "knobs": {"latency_budget_s": 0.03}, "ttft_s": 0.4}
    file = tmp_path / "flexirl.json"
    file.write_text(json.dumps(wanted))
    assert read_settings({"flexirl": wanted}) == read_settings({"flexirl": str(file)}) == Settings(**wanted)
    assert read_settings({}) == read_settings(None) == Settings()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"polcy": "edf"}, "polcy"),
        ({"policy": 3}, "=3 "),
        ({"knobs": []}, "[]"),
        ({"ttft_s": 0}, "=0 "),
        ({"tpot_s": None}, "None"),
        ({"time_limit_s": "1"}, "'1'"),
        ({"relegated_wait_s": float("inf")}, "inf"),
        ({"max_requests": 0}, "=0 "),
        ({"tenants": 1.5}, "1.5"),
        ({"victims": "oldest"}, "'oldest'"),
        ({"any_version": 1}, "=1 "),
        ([1], "[1]"),
        ("nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_setting_that_means_nothing_is_named(given: Any, named: str) -> None:
    with pytest.raises(UserError) as raised:
        read_settings({"flexirl": given})
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "flexirl.yaml"
    file.write_text("policy: [")
    with pytest.raises(UserError, match=r"flexirl\.yaml is no YAML or JSON"):
        read_settings({"flexirl": str(file)})


def test_another_vllm_is_refused_unless_asked_for() -> None:
    for version in ("0.32", "0.32.0", "0.32.1"):
        check_version(version, False)
    for version in ("0.31.2", "0.33.0", "0.320.0", "dev"):
        with pytest.raises(UserError, match=f"vLLM {version} has not been tried.*any_version"):
            check_version(version, False)
        check_version(version, True)


def test_the_package_can_be_imported_without_vllm() -> None:
    import flexirl.vllm

    assert "flexirl.vllm.scheduler" not in sys.modules or "vllm.v1" in sys.modules
    with pytest.raises(AttributeError):
        _ = flexirl.vllm.Nothing
