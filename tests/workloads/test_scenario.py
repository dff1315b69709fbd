"""Scenarios: presets, load, reproducibility, independence of random streams, and bad configuration."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from flexirl.errors import UserError
from flexirl.runtime.profile.capacity import ServiceTime
from flexirl.runtime.profile.engine import load_profile
from flexirl.workloads.config import from_config
from flexirl.workloads.scenario import Scenario
from flexirl.workloads.slo import SLO
from flexirl.workloads.statistics import peak_to_mean
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace, check, empty_rows

SYNTHETIC = (
    "default", "low_bursty", "medium_bursty", "high_bursty", "poisson", "on_off", "overload", "tenants", "vlm",
    "deadlines", "mixed_windows",
)  # fmt: skip
CONF = Path(__file__).parents[2] / "flexirl" / "conf"
DEFAULT_SLO = SLO(1.0, 0.1)


def service_time_s(rows):
    return rows["prompt_tokens"] * 20e-6 + rows["output_tokens"] * 300e-6


def configured(*overrides: str) -> Scenario:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_config(compose("workload_stats", list(overrides)).workload)


def draw(scenario, seed=0, slo=DEFAULT_SLO):
    trace = scenario.draw(seed, service_time_s, slo)
    check(trace.rows, "test")
    return trace


def plain(**changes):
    """A small scenario as plain data."""
    lengths = {"kind": "independent", "prompt": {"kind": "fixed", "tokens": 100},
               "output": {"kind": "uniform", "min": 1, "max": 50}}  # fmt: skip
    config = {
        "name": "plain", "load": 0.5, "duration_s": 100.0, "warmup_s": 10.0, "slo_tiers": [], "predictor": {},
        "immediate": {
            "kind": "synthetic", "arrivals": {"kind": "poisson"}, "lengths": lengths, "tenants": {"count": 2},
        },
        "deferred": {"kind": "backlog", "lengths": lengths, "tenants": {"count": 3}},
    }  # fmt: skip
    return config | changes


@pytest.mark.parametrize("name", SYNTHETIC)
def test_presets_draw_servable_sorted_traces(name):
    scenario = configured(f"workload={name}")
    trace = draw(scenario)
    arrival_s = trace.rows["arrival_s"]
    assert scenario.name == trace.name == name
    assert (np.diff(arrival_s) >= 0).all() and arrival_s[0] >= 0 and arrival_s[-1] < scenario.duration_s
    immediate, deferred = trace.of_class(IMMEDIATE), trace.of_class(DEFERRED)
    assert len(immediate) > 100 and len(deferred) > 100
    assert (immediate["ttft_slo_s"] == 1.0).all() and (immediate["window_s"] == np.inf).all()
    assert (deferred["ttft_slo_s"] == np.inf).all()
    assert trace.rows["tenant"].max() < trace.num_tenants
    assert (trace.rows["predicted_output_tokens"] == 0).all()


@pytest.mark.parametrize(
    ("name", "low", "high"), [("low_bursty", 1.1, 1.35), ("medium_bursty", 3.0, 4.0), ("high_bursty", 20.0, 60.0)]
)
def test_peak_to_mean_of_the_presets(name, low, high):
    arrivals = configured(f"workload={name}").immediate.arrivals
    for seed in range(10):
        times = arrivals.draw(5.0, 20_000.0, np.random.default_rng(seed))
        assert len(times) in (100_000, 100_001)
        assert low < peak_to_mean(times, 20_000.0) < high


def test_load_is_the_expected_demand():
    for load in (0.4, 0.8):
        scenario = configured("workload=poisson", "workload.duration_s=200", f"workload.load={load}")
        demand = [service_time_s(draw(scenario, s).of_class(IMMEDIATE)).sum() / 200 for s in range(40)]
        assert np.mean(demand) == pytest.approx(load, rel=0.02)
    half, full = (from_config(plain(load=load)).immediate for load in (0.5, 1.0))
    assert full.rate_per_s(service_time_s) == 2 * half.rate_per_s(service_time_s)


def write_trace(path, rows=400, seed=0):
    rng = np.random.default_rng(seed)
    times = 1000 + np.cumsum(rng.exponential(1.0, rows))
    lines = [
        f"{t:.6f},{p},{o}"
        for t, p, o in zip(times, rng.integers(1, 5000, rows), rng.integers(1, 500, rows), strict=True)
    ]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("load", [0.3, 1.7])
def test_a_whole_trace_has_exactly_the_load(tmp_path, load):
    path = write_trace(tmp_path / "t.csv")
    scenario = configured(
        "workload=trace", f"workload.path={path}", f"workload.load={load}", "workload.duration_s=null"
    )
    immediate = draw(scenario).of_class(IMMEDIATE)
    duration_s = scenario.length_s(service_time_s)
    assert len(immediate) == 400 and immediate["arrival_s"][0] == 0.0 and immediate["arrival_s"][-1] < duration_s
    assert service_time_s(immediate).sum() / duration_s == pytest.approx(load, rel=1e-12)


def test_windows_of_a_trace_have_its_load_on_average(tmp_path):
    path = write_trace(tmp_path / "t.csv", 4000)
    scenario = configured(
        "workload=trace", f"workload.path={path}", "workload.load=0.8", "workload.duration_s=20", "workload.warmup_s=0",
        "workload/deferred=none",
    )  # fmt: skip
    traces = [draw(scenario, seed) for seed in range(200)]
    assert all(t.rows["arrival_s"].min() >= 0 and t.rows["arrival_s"].max() < 20 for t in traces)
    assert np.mean([service_time_s(t.rows).sum() / 20 for t in traces]) == pytest.approx(0.8, rel=0.05)
    assert len({len(t) for t in traces}) > 5  # different places


def test_recorded_times_are_kept_without_a_load(tmp_path):
    path = write_trace(tmp_path / "t.csv")
    scenario = configured("workload=trace", f"workload.path={path}", "workload.load=null", "workload.duration_s=null")
    recorded = np.loadtxt(path, delimiter=",", skiprows=1)[:, 0]
    assert draw(scenario).of_class(IMMEDIATE)["arrival_s"] == pytest.approx(recorded - recorded[0])


def test_a_trace_that_is_shorter_than_its_windows_is_played_whole(tmp_path):
    path = write_trace(tmp_path / "t.csv")
    scenario = configured("workload=trace", f"workload.path={path}", "workload.duration_s=100000")
    recorded = np.loadtxt(path, delimiter=",", skiprows=1)[:, 0]
    assert draw(scenario).of_class(IMMEDIATE)["arrival_s"] == pytest.approx(recorded - recorded[0])
    assert scenario.length_s(service_time_s) < 100000


def test_deferred_requests_of_a_file_are_played_and_none_made_up(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"{i},100,10,{'batch,600' if i % 4 == 0 else 'chat,'}" for i in range(400)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens,class,window_s", *lines]) + "\n")
    whole = ("workload=trace", f"workload.path={path}", "workload.duration_s=null")
    scenario = configured(*whole)
    trace = draw(scenario)
    deferred = trace.of_class(DEFERRED)
    assert not scenario.invents_deferred and len(trace) == 400
    assert deferred["arrival_s"].tolist() == list(range(0, 400, 4)) and (deferred["window_s"] == 600).all()
    assert np.isinf(deferred["ttft_slo_s"]).all() and np.isfinite(trace.of_class(IMMEDIATE)["ttft_slo_s"]).all()
    # The load is that of the immediate requests.
    loaded = configured(*whole, "workload.load=0.5", "workload.warmup_s=0")
    rows = draw(loaded).of_class(IMMEDIATE)
    assert service_time_s(rows).sum() / loaded.length_s(service_time_s) == pytest.approx(0.5)
    # Others take their place where they are asked for.
    assert len(draw(configured(*whole, "workload/deferred=none"))) == 300
    windows = draw(configured("workload=trace", f"workload.path={path}", "workload.duration_s=50"))
    assert windows.duration_s < 50 and 10 <= len(windows.of_class(DEFERRED)) <= 14
    # Without any in the file, a backlog is made up.
    plain = write_trace(tmp_path / "plain.csv")
    made_up = configured("workload=trace", f"workload.path={plain}", "workload.duration_s=null")
    assert made_up.invents_deferred and len(draw(made_up).of_class(DEFERRED)) > 0


def test_a_recorded_production_trace(traces):
    scenario = configured("workload=trace", f"workload.path={traces}/azure23_conv.csv.gz", "workload.load=0.8")
    assert len(draw(scenario).of_class(IMMEDIATE)) > 500


def test_the_backlog_cannot_run_out():
    for seed in range(20):
        deferred = draw(from_config(plain()), seed).of_class(DEFERRED)
        seconds = service_time_s(deferred)
        assert 130.0 <= seconds.sum() < 130.0 + seconds.max()
        assert (deferred["arrival_s"] == 0).all() and (deferred["window_s"] == np.inf).all()


def test_batches_arrive_together_with_a_scaled_window():
    batches = {"kind": "batches", "batch_size": 7, "times_s": [50.0, 0.0, 500.0], "time_scale": 0.001,
               "lengths": plain()["deferred"]["lengths"], "tenants": {"count": 5}}  # fmt: skip
    deferred = draw(from_config(plain(deferred=batches))).of_class(DEFERRED)
    assert deferred["arrival_s"].tolist() == [0.0] * 7 + [50.0] * 7  # the third file is after the end
    assert deferred["window_s"] == pytest.approx(86.4)
    assert len(set(deferred["tenant"][:7].tolist())) == 1  # a file belongs to one tenant
    del batches["times_s"]
    scenario = from_config(plain(deferred=batches | {"interval_s": 10.0}))
    assert np.mean([len(draw(scenario, s).of_class(DEFERRED)) / 7 for s in range(100)]) == pytest.approx(10, rel=0.1)


def test_files_of_a_load_have_one_of_several_windows():
    config = {"kind": "batches", "batch_size": 7, "load": 0.4, "window_s": [60.0, 600.0], "time_scale": 0.5,
              "lengths": plain()["deferred"]["lengths"]}  # fmt: skip
    deferred = draw(from_config(plain(deferred=config, duration_s=20_000.0))).of_class(DEFERRED)
    assert service_time_s(deferred).sum() / 20_000.0 == pytest.approx(0.4, rel=0.1)
    windows_s = deferred["window_s"].reshape(-1, 7)
    assert (windows_s == windows_s[:, :1]).all() and set(windows_s.flat) == {30.0, 300.0}
    assert (windows_s == 30.0).mean() == pytest.approx(0.5, abs=0.1)


def test_tiers_tenants_and_predictor():
    strict, lenient = {"ttft_s": 0.5, "tpot_s": 0.05}, {"ttft_s": 5, "tpot_s": 0.5, "window_s": 9}
    config = plain(
        slo_tiers=[{"share": 3, **strict}, {"share": 1, **lenient}],
        predictor={"enabled": True, "error": 0.3}, duration_s=2000.0,
    )  # fmt: skip
    config["immediate"]["tenants"] = {"count": 2, "skew": 1.0}
    trace = draw(from_config(config))
    immediate = trace.of_class(IMMEDIATE)
    assert (immediate["ttft_slo_s"] == 0.5).mean() == pytest.approx(0.75, abs=0.02)
    assert ((immediate["ttft_slo_s"] == 5) == (immediate["tpot_slo_s"] == 0.5)).all()
    assert (immediate["window_s"] == np.where(immediate["ttft_slo_s"] == 5, 9, np.inf)).all()
    assert np.bincount(immediate["tenant"]) / len(immediate) == pytest.approx([2 / 3, 1 / 3], abs=0.02)
    true, guess = trace.rows["output_tokens"], trace.rows["predicted_output_tokens"]
    assert guess.min() >= 1 and (guess <= trace.rows["max_tokens"]).all()
    middle = (true > 10) & (true < 20)  # neither rounding nor the limit matters much
    assert np.log(guess[middle] / true[middle]).std() == pytest.approx(0.3, rel=0.05)
    exact = draw(from_config(plain(predictor={"enabled": True, "error": 0.0})))
    assert (exact.rows["predicted_output_tokens"] == exact.rows["output_tokens"]).all()


def changed(before, after):
    """Names of the columns of immediate requests, then of deferred ones, that differ."""
    result = []
    for request_class in (IMMEDIATE, DEFERRED):
        a, b = before.of_class(request_class), after.of_class(request_class)
        result.append({name for name in a.dtype.names if len(a) != len(b) or (a[name] != b[name]).any()})
    return result


def test_random_streams_are_independent():
    def variant(change):
        config = json.loads(json.dumps(plain()))
        change(config)
        return draw(from_config(config))

    base = draw(from_config(plain()))
    assert changed(base, variant(lambda c: c["immediate"]["tenants"].update(skew=3.0))) == [{"tenant"}, set()]
    assert changed(base, variant(lambda c: c["deferred"]["tenants"].update(count=9))) == [set(), {"tenant"}]
    assert changed(base, variant(lambda c: c["predictor"].update(enabled=True))) == [
        {"predicted_output_tokens"}, {"predicted_output_tokens"},
    ]  # fmt: skip
    assert changed(base, variant(lambda c: c["deferred"].update(margin=0.5)))[0] == set()
    assert changed(base, variant(lambda c: c["immediate"].update(arrivals={"kind": "gamma"})))[1] == set()
    # Same costs, other lengths: arrivals stay.
    swapped = variant(lambda c: c["immediate"]["lengths"].update(prompt={"kind": "uniform", "min": 100, "max": 100}))
    assert changed(base, swapped) == [set(), set()]


def digest(trace):
    return hashlib.sha256(b"".join(trace.rows[name].tobytes() for name in trace.rows.dtype.names)).hexdigest()


def test_seeds_reproduce_across_processes():
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_scenario as t\n"
        "names = ('default', 'vlm', 'deadlines')\n"
        "print(json.dumps([t.digest(t.draw(t.configured('workload=' + name), 7)) for name in names]))"
    )
    here = Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", code, str(here)], capture_output=True, text=True, check=True, cwd=here.parents[1]
    )
    ours = [digest(draw(configured(f"workload={n}"), 7)) for n in ("default", "vlm", "deadlines")]
    assert json.loads(ran.stdout) == ours
    assert digest(draw(configured("workload=default"), 8)) != ours[0]


def test_drawing_an_episode_is_cheap():
    scenario = configured("workload=default")
    draw(scenario)
    start = time.perf_counter()
    for seed in range(10):
        scenario.draw(seed, service_time_s, DEFAULT_SLO)
    assert (time.perf_counter() - start) / 10 < 0.05  # 1 to 2 ms on an idle machine


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["workload=trace"], "workload.path"),
        (["workload=trace", "workload.path=none.csv"], "none.csv does not exist"),
        (["+workload.path=t.csv"], "workload.path is not a parameter here"),
        (["workload.load=-1"], "workload.load=-1.0 is out of range"),
        (["workload.load=much"], "workload.load='much' should be a number"),
        (["workload.warmup_s=700"], "workload.warmup_s=700.0"),
        (["workload.duration_s=0"], "workload.duration_s=0.0"),
        (
            ["workload.immediate.kind=steady"],
            "kind='steady' is unknown; choose from synthetic, sessions, several, trace, none",
        ),
        (["workload.immediate.arrivals.kind=pareto"], "choose from poisson, gamma"),
        (["+workload.immediate.arrivals.burst=3"], "arrivals.burst is not a parameter here; choose from outer"),
        (["workload.immediate.arrivals.outer.distribution=cauchy"], "choose from uniform, poisson"),
        (["workload.immediate.arrivals.granularity=1.5"], "should be a whole number"),
        (["workload.immediate.lengths.prompt.mu=long"], "should be a list of numbers"),
        (["workload.slo_tiers=[{share: 1}]"], r"slo_tiers\[0\].ttft_s is missing"),
        (["workload.predictor.enabled=3"], "should be true or false"),
        (["workload=deadlines", "workload.deferred.interval_s=5"], "one of interval_s, times_s and load"),
    ],
)
def test_bad_configuration(overrides, message):
    with pytest.raises(UserError, match=message) as raised:
        configured(*overrides)
    assert "\n" not in str(raised.value)


def test_a_synthetic_workload_needs_a_duration():
    with pytest.raises(UserError, match="duration_s=null is for traces"):
        draw(from_config(plain(duration_s=None)))


def test_requests_ask_for_no_more_than_a_model_has_left_for_them() -> None:
    rows = empty_rows(4)
    rows["prompt_tokens"] = [10, 90, 99, 150]
    rows["output_tokens"] = [5, 30, 3, 7]
    rows["max_tokens"] = [50, 60, 200, 9]
    rows["predicted_output_tokens"] = [4, 40, 0, 8]
    cut = Trace(rows, "requests", 2).within(100)
    assert cut.rows["prompt_tokens"].tolist() == [10, 90, 99, 150] and cut.num_tenants == 2
    assert cut.rows["output_tokens"].tolist() == [5, 10, 1, 1]
    assert cut.rows["max_tokens"].tolist() == [50, 10, 1, 1]
    assert cut.rows["predicted_output_tokens"].tolist() == [4, 10, 0, 1]
    assert rows["output_tokens"].tolist() == [5, 30, 3, 7]  # not changed itself


@pytest.mark.parametrize("rows", ["5,100,10\n", "5,100,10\n5,100,10\n5,100,10\n"])
def test_requests_at_one_time_have_a_load_or_none(tmp_path, rows):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    whole = ("workload=trace", f"workload.path={path}", "workload.duration_s=null")
    with pytest.raises(UserError, match=r"t.csv has all of its \d requests at one time.*give workload.load"):
        configured(*whole, "workload.load=null")
    with pytest.raises(UserError, match=r"lasts .* s, no longer than workload.warmup_s=20.*set workload.warmup_s=0"):
        draw(configured(*whole, "workload.load=0.5"))
    scenario = configured(*whole, "workload.load=0.5", "workload.warmup_s=0", "workload/deferred=none")
    trace = draw(scenario)
    assert (trace.rows["arrival_s"] == 0).all()
    assert service_time_s(trace.rows).sum() / scenario.length_s(service_time_s) == pytest.approx(0.5)


def test_the_load_of_a_trace_is_what_the_engine_can_serve_of_it(tmp_path):
    path = write_trace(tmp_path / "t.csv")  # prompts of up to 5000 tokens
    engine = load_profile("h100-llama-3.1-8b").replace(max_model_len=3000)
    scenario = configured(
        "workload=trace", f"workload.path={path}", "workload.load=0.8", "workload.duration_s=null",
        "workload.warmup_s=0", "workload/deferred=none",
    )  # fmt: skip
    cost_s = ServiceTime(engine)
    rows = scenario.draw(0, cost_s, DEFAULT_SLO).within(3000).rows
    served = rows[rows["prompt_tokens"] < 3000]
    assert 100 < len(served) < 300
    assert cost_s(served).sum() / scenario.length_s(cost_s) == pytest.approx(0.8, rel=1e-9)
    none = ServiceTime(engine.replace(max_model_len=1))
    with pytest.raises(UserError, match="none of them fits it"):
        scenario.length_s(none)
