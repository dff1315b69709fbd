"""Suites expand to the expected scenarios, each one that `flexirl.evaluate` can run."""

from __future__ import annotations

import gzip
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flexirl.benchmarks.suites import Cell, composed, expand, suite_names
from flexirl.errors import UserError
from flexirl.experiments.configuration import CONF, load_task

COUNTS = {
    "bursts": 3 * 5, "deadlines": 2 * 3, "distributions": (5 * 5 + 4) * 5, "overload": 4 + 4, "quick": 7 * 2,
    "memory": 7, "predictor": 4 * 4, "shift": 9 * 2, "tenants": 3 * 3, "tiers": 5, "vlm": 3 * 3,
}  # fmt: skip


def cells_of(name: str, **changes: object) -> list[Cell]:
    """A packaged suite's scenarios."""
    suite = OmegaConf.merge(OmegaConf.load(CONF / "suite" / f"{name}.yaml"), changes)
    return expand(suite)[0]  # type: ignore[arg-type]


def suite_of(grid: dict[str, object], **entries: object) -> list[Cell]:
    """The scenarios of a suite made up here."""
    return expand(OmegaConf.create({"name": "mine", "grids": [grid], **entries}))[0]


def test_every_suite_is_known_here() -> None:
    assert set(suite_names()) == {*COUNTS, "all", "traces"}


@pytest.mark.parametrize("name", COUNTS)
def test_suites_expand(name: str) -> None:
    cells = cells_of(name)
    assert len(cells) == len({cell.name for cell in cells}) == COUNTS[name]
    assert {cell.suite for cell in cells} == {name}
    for cell in cells[:: max(1, len(cells) // 4)]:
        assert load_task(composed(cell.overrides)).duration_s() >= 100


def test_all_includes_every_suite_but_the_quick_one() -> None:
    cells, skipped = expand(OmegaConf.load(CONF / "suite" / "all.yaml"), seeds=4)  # type: ignore[arg-type]
    assert {cell.suite for cell in cells} == set(COUNTS) - {"quick"}
    assert len(cells) == sum(COUNTS.values()) - COUNTS["quick"] and {cell.seeds for cell in cells} == {4}
    assert skipped == ["Suite traces was left out: it needs suite.folder=PATH."]


def test_pairs_of_distributions_are_what_their_labels_say() -> None:
    pair = next(cell for cell in cells_of("distributions") if cell.name == "outer zipf, inner gaussian, load 2.0")
    workload = composed(pair.overrides).workload
    assert workload.immediate.arrivals.outer.distribution == "zipf" and workload.load == 2.0
    assert workload.immediate.arrivals.inner.distribution == "gaussian" and workload.deferred.kind == "none"
    assert pair.labels == {"outer": "zipf", "inner": "gaussian", "load": 2.0}


def test_the_settings_of_special_suites() -> None:
    tiers = composed(cells_of("tiers")[0].overrides).workload.slo_tiers
    assert (tiers[0].ttft_s, tiers[0].tpot_s) == (6.0, 0.05)
    assert [tier.window_s for tier in tiers[1:]] == [600.0, 1800.0]
    deadlines = composed(cells_of("deadlines")[0].overrides).workload
    assert list(deadlines.deferred.window_s) == [900, 3600, 86400] and deadlines.immediate.arrivals.kind == "day_night"
    assert {load_task(composed(cell.overrides)).engine.name for cell in cells_of("vlm")} == {"h100-qwen2.5-vl-7b"}
    bursts = composed(cells_of("overload")[-1].overrides).workload
    assert bursts.immediate.arrivals.off_level == 0.1 and bursts.load == 1.5


def test_a_cell_says_how_to_run_it_alone() -> None:
    (cell,) = suite_of({"axes": {"workload": {"my name": ["workload=poisson"]}}}, seeds=3)
    assert shlex.split(cell.command(7)) == ["python", "-m", "flexirl.evaluate", "workload=poisson", "seeds=3", "seed=7"]
    assert cell.name == "workload my name"


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder with a long and a short trace, one of them for training."""
    folder = tmp_path / "my traces"
    folder.mkdir()
    for name, requests in (("long.val.csv.gz", 40_000), ("short.val.csv.gz", 200), ("long.csv.gz", 10)):
        lines = "".join(f"{i},500,50\n" for i in range(requests))
        (folder / name).write_bytes(gzip.compress(b"arrival_s,prompt_tokens,output_tokens\n" + lines.encode()))
    (folder / "README.md").write_text("no trace")
    return folder


def test_every_trace_of_a_folder_is_played(traces: Path) -> None:
    cells = cells_of("traces", folder=str(traces))
    assert len(cells) == 2 * 2 * 3 and {cell.labels["trace"] for cell in cells} == {"long", "short"}
    durations = {str(cell.labels["trace"]): load_task(composed(cell.overrides)).duration_s() for cell in cells[::5]}
    assert durations["long"] == 200 and durations["short"] < 30  # the short one is played whole
    for path in traces.glob("*.val.*"):
        path.unlink()
    assert {cell.labels["trace"] for cell in cells_of("traces", folder=str(traces))} == {"long"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": []}, "suite.grid is no entry of a suite"),
        ({"grids": [{"axis": {}}]}, r"suite.grids\[0\].axis is no entry of a grid"),
        ({"grids": [{"axes": {"workload.load": 3}}]}, "Axis workload.load of the suite should be a list"),
        ({"include": ["nothing"]}, "suite.include=nothing is unknown; choose from all, bursts"),
        ({"seeds": 0, "grids": [{}]}, "suite.seeds=0"),
        ({"files": "*", "grids": [{}]}, "needs traces; give the folder they lie in as suite.folder=PATH"),
        ({"files": "*", "folder": "/nowhere", "grids": [{}]}, "/nowhere holds no trace"),
    ],
)
def test_bad_suites(entries: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(OmegaConf.create({"name": "mine", **entries}))


def test_traces_with_odd_names_are_all_played(tmp_path: Path) -> None:
    folder = tmp_path / "Ann's traces, old=1"
    folder.mkdir()
    text = "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i},500,50\n" for i in range(200))
    line = '{"timestamp": %d, "input_length": 500, "output_length": 50, "hash_ids": [%d]}\n'
    for name in ("v1.0.val.csv", "v1.1.val.csv", "same.val.csv"):
        (folder / name).write_text(text)
    lines = "".join(line % (1000 * i, i) for i in range(200))
    (folder / "same.val.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    cells = cells_of("traces", folder=str(folder))
    names = {cell.labels["trace"] for cell in cells}
    assert names == {"v1.0", "v1.1", "same.val.csv", "same.val.jsonl.gz"} and len(cells) == 4 * 2 * 3
    files = {Path(composed(cell.overrides).workload.path).name for cell in cells}
    assert files == {path.name for path in folder.iterdir()}
