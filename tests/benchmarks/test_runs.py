"""Runs: cached and resumed results equal fresh ones, and are those of `flexirl.evaluate`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexirl.benchmarks import runs
from flexirl.benchmarks.results import collect
from flexirl.benchmarks.runs import UPPER_BOUND, Job, Result, run_all
from flexirl.benchmarks.suites import Cell, composed
from flexirl.compile_cache import Sources, read_source, sources
from flexirl.experiments.comparison import compare
from flexirl.experiments.configuration import load_task

SHORT = ("workload=poisson", "workload.duration_s=10", "workload.warmup_s=1")
CELL = Cell("mine", {"load": 0.5}, (*SHORT, "workload.load=0.5"), 2)
POLICIES = ("vllm_priority", "qoserve", "immediate_only", "deferred_only")


def jobs_of(*policies: str, seed: int = 0) -> list[Job]:
    """New jobs, which remember nothing."""
    return [Job(CELL, policy, seed) for policy in policies]


def without_wall_time(results: Iterable[Result]) -> list[Result]:
    """The only figure that is not simulated is left out."""
    return [
        {**one, "rows": [{k: v for k, v in row.items() if k != "wall_s"} for row in one.get("rows", [])]}
        for one in results
    ]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """All runs in one go."""
    return run_all(jobs_of(*POLICIES, UPPER_BOUND), tmp_path_factory.mktemp("fresh"), 1, progress=False)


def test_a_second_time_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_all(jobs_of("qoserve"), tmp_path, 1, progress=False)
    monkeypatch.setattr(Job, "run", lambda job: pytest.fail("it was run again"))
    assert run_all(jobs_of("qoserve"), tmp_path, 1, progress=False) == first


def test_an_interrupted_benchmark_goes_on(tmp_path: Path, fresh: list[Result], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, run = jobs_of(*POLICIES, UPPER_BOUND), Job.run

    def interrupted(job: Job) -> Result:
        if job.policy == "immediate_only":
            raise KeyboardInterrupt
        return run(job)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Job, "run", interrupted)
        run_all(jobs, tmp_path, 1, progress=False)
    assert len(list(tmp_path.iterdir())) == 2  # those before it, and no half one
    assert without_wall_time(run_all(jobs, tmp_path, 1, progress=False)) == without_wall_time(fresh)


def test_processes_give_the_same_results(tmp_path: Path, fresh: list[Result]) -> None:
    assert without_wall_time(
        run_all(jobs_of(*POLICIES, UPPER_BOUND), tmp_path, 2, progress=False)
    ) == without_wall_time(fresh)


def test_what_a_result_depends_on_changes_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,10,5\n")
    network = tmp_path / "policy.onnx"
    network.write_bytes(b"one")
    traced = replace(CELL, overrides=("workload=trace", f"workload.path={trace}"))
    first = Job(CELL, "qoserve", 0)
    keys = [
        first.key,
        Job(replace(CELL, overrides=(*SHORT, "workload.load=0.6")), "qoserve", 0).key,
        Job(replace(CELL, seeds=3), "qoserve", 0).key,
        Job(CELL, "qoserve", 1).key,
        Job(CELL, "edf", 0).key,
        Job(traced, "qoserve", 0).key,
        Job(CELL, str(network), 0).key,
    ]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,10,6\n")
    network.write_bytes(b"two")
    runs._digest.cache_clear()
    keys += [Job(traced, "qoserve", 0).key, Job(CELL, str(network), 0).key]
    monkeypatch.setattr("flexirl.__version__", "0.0.0")
    keys.append(Job(CELL, "qoserve", 0).key)
    assert len(set(keys)) == len(keys)
    # The same scenario in other words, under another name, is the same.
    monkeypatch.undo()
    renamed = Cell("other", {}, (*SHORT, "engine=h100-llama-3.1-8b", "workload.load=0.5"), 2)
    assert Job(renamed, "qoserve", 0).key == first.key


def test_rows_are_those_of_evaluate(fresh: list[Result]) -> None:
    rows = collect(jobs_of(*POLICIES, UPPER_BOUND), fresh).rows
    expected = compare(load_task(composed(CELL.overrides)), POLICIES, 2).rows
    more = {"suite", "scenario", "labels", "upper_bound_revenue_per_s", "share_of_upper_bound", "wall_s"}
    assert [{k: v for k, v in row.items() if k not in more} for row in rows] == [
        {k: v for k, v in row.items() if k != "wall_s"} for row in expected
    ]
    for row in rows:
        assert row["share_of_upper_bound"] == row["revenue_per_s"] / row["upper_bound_revenue_per_s"] <= 1
    assert len({row["upper_bound_revenue_per_s"] for row in rows}) == 2  # one per seed


def test_a_course_holds_what_figures_need(fresh: list[Result]) -> None:
    course: Any = json.loads(json.dumps(fresh[1]))
    assert len(set(map(len, course["timeline"].values()))) == 1 and course["timeline"]["now_s"][-1] >= 10
    assert all(len(values) == runs.SERIES_BINS for values in course["series"].values())


def test_the_key_follows_all_code_that_runs_load() -> None:
    """Against what a process has loaded after a rule, a network and the bound have run in it."""
    code = (
        "import json, sys\n"
        "from flexirl.benchmarks.runs import UPPER_BOUND, Job\n"
        "from flexirl.benchmarks.suites import Cell\n"
        f"cell = Cell('mine', {{}}, {CELL.overrides!r}, 1)\n"
        "for policy in ('qoserve', 'pretrained', UPPER_BOUND):\n"
        "    Job(cell, policy, 0).run()\n"
        "print(json.dumps({n: m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'flexirl'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    known = sources().modules(*runs.code(), later=True)
    assert "flexirl.policies.deploy.learned" in known and "flexirl.benchmarks.bound" in known and len(loaded) > 50
    for name in loaded.keys() - known:  # packages that only say where compiled code is kept
        path = Path(loaded[name])
        assert path.name == "__init__.py" and set(read_source(path).imports) <= {"flexirl", "flexirl.compile_cache"}


def test_each_module_that_runs_depend_on_changes_the_stamp(tmp_path: Path) -> None:
    copy = tmp_path / "flexirl"
    shutil.copytree(runs.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.onnx"))

    def stamps() -> list[str]:
        fresh = Sources(tmp_path / "sources.json", copy)
        return [fresh.stamp(*runs.code(), later=True, without=without) for without in ((), (runs.BOUND,))]

    before = stamps()
    of_policies = sources().modules(*runs.code(), later=True, without=(runs.BOUND,))
    for name in sources().modules(*runs.code(), later=True):
        place = tmp_path / name.replace(".", "/")
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        path.write_text(f"{path.read_text()}\nCHANGED = True\n")
        after = stamps()
        assert after[0] != before[0], name
        assert (after[1] != before[1]) == (name in of_policies), name
        before = after
