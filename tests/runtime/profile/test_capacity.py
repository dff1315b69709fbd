"""Load 1 is what a saturated engine serves, and no more is charged for a shorter request."""

from __future__ import annotations

import numpy as np
import pytest
from toys import ToyRun

from flexirl.runtime.profile.capacity import ServiceTime
from flexirl.runtime.profile.engine import load_profile
from flexirl.workloads.trace import Trace, empty_rows

PROFILES = ("h100-llama-3.1-8b", "a100-llama-3.1-8b", "a100x2-llama-2-70b")


def rows_of(prompt: int, output: int, count: int = 1) -> np.ndarray:
    rows = empty_rows(count)
    rows["prompt_tokens"], rows["output_tokens"], rows["max_tokens"] = prompt, output, output
    return rows


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("prompt", "output"), [(1024, 128), (512, 512), (128, 32)])
def test_saturated_engine_sustains_about_load_one(profile: str, prompt: int, output: int) -> None:
    """Endless immediate requests of one kind: seconds of service per second, between warm-up and drain."""
    engine = load_profile(profile)
    count = 6 * int(engine.values["max_running"])
    rows = rows_of(prompt, output, count)
    run = ToyRun(engine, Trace(rows, "saturated", 1))
    run.advance(1e6)
    finish_s = np.sort(run.state.requests["finish_s"])
    first, last = count // 3, 2 * count // 3
    served_s = ServiceTime(engine)(rows[first:last]).sum()
    assert served_s / (finish_s[last] - finish_s[first]) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("profile", PROFILES)
def test_service_time_grows_with_lengths(profile: str) -> None:
    service_time_s = ServiceTime(load_profile(profile))
    lengths = (1, 16, 64, 256, 1024, 2048)
    by_prompt = [service_time_s(rows_of(n, 100))[0] for n in lengths]
    by_output = [service_time_s(rows_of(100, n))[0] for n in lengths]
    assert (np.diff(by_prompt) > 0).all() and (np.diff(by_output) > 0).all() and by_prompt[0] > 0


def test_cached_prefix_and_images_count() -> None:
    service_time_s = ServiceTime(load_profile("h100-qwen2.5-vl-7b"))
    plain, cached, pictured = (rows_of(1000, 10)[0:1] for _ in range(3))
    cached["prefix_tokens"] = 1000
    pictured["num_images"], pictured["image_tokens"] = 1, 900
    assert 0 < service_time_s(cached)[0] < service_time_s(plain)[0] < service_time_s(pictured)[0]


def test_each_row_counts_alone() -> None:
    service_time_s = ServiceTime(load_profile("h100-llama-3.1-8b"))
    rows = np.concatenate([rows_of(100, 10), rows_of(5000, 300), rows_of(1, 1)])
    assert service_time_s(rows).tolist() == [service_time_s(rows[i : i + 1])[0] for i in range(3)]
