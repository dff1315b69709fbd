"""Suites: from `conf/suite/*.yaml` to scenarios, each what `python -m flexirl.evaluate` runs with its overrides."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from flexirl.errors import UserError
from flexirl.experiments.configuration import load_task
from flexirl.experiments.overrides import quoted
from flexirl.experiments.values import CONF, count_of

TRACE_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
SHORTEST_WARMUP = 0.1  # of the length of a trace that is shorter than a scenario

Axis = Mapping[str, list[str]]


@dataclass(frozen=True)
class Cell:
    """A scenario: `labels` place it on the axes of its suite, `overrides` are those of `flexirl.evaluate`."""

    suite: str
    labels: dict[str, str | float]
    overrides: tuple[str, ...]
    seeds: int

    @property
    def name(self) -> str:
        """The labels in one line; unique within a suite."""
        return ", ".join(f"{axis} {label}" for axis, label in self.labels.items())

    def command(self, seed: int) -> str:
        """What a user types to run this scenario alone."""
        parts = [*self.overrides, f"seeds={self.seeds}", f"seed={seed}"]
        return shlex.join(["python", "-m", "flexirl.evaluate", *parts])


def expand(suite: DictConfig, seeds: int | None = None) -> tuple[list[Cell], list[str]]:
    """The scenarios of a suite and of those it includes, and a sentence for each included suite that cannot run.

    seeds: of every scenario; None takes the suite's own. Raises UserError for a suite that cannot run by itself.
    """
    own = suite_settings(suite)
    cells = _own_cells(own, seeds)
    skipped: list[str] = []
    for name in own["include"]:
        path = CONF / "suite" / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"suite.include={name} is unknown; choose from {', '.join(suite_names())}.")
        included = suite_settings(OmegaConf.load(path)) | {"folder": own["folder"]}
        if included["files"] is not None and own["folder"] is None:
            skipped.append(f"Suite {name} was left out: it needs suite.folder=PATH.")
        else:
            cells += _own_cells(included, seeds)
    return cells, skipped


def suite_names() -> list[str]:
    """Names of the packaged suites, sorted."""
    return sorted(path.stem for path in (CONF / "suite").glob("*.yaml"))


def suite_settings(suite: Any) -> dict[str, Any]:
    """A suite's entries as plain data, with defaults; raises UserError for one that is no entry."""
    defaults = {"name": "", "include": [], "seeds": 1, "folder": None, "files": None, "grids": []}
    settings: Any = OmegaConf.to_container(suite, resolve=True)
    for entry in settings:
        if entry not in defaults:
            raise UserError(f"suite.{entry} is no entry of a suite; choose from {', '.join(defaults)}.")
    return defaults | settings


def _own_cells(suite: dict[str, Any], seeds: int | None) -> list[Cell]:
    seeds = count_of(suite["seeds"] if seeds is None else seeds, "suite.seeds" if seeds is None else "seeds")
    cells = []
    for i, grid in enumerate(suite["grids"]):
        unknown = set(grid) - {"overrides", "axes"}
        if unknown:
            raise UserError(f"suite.grids[{i}].{min(unknown)} is no entry of a grid; choose from overrides, axes.")
        axes = {str(name): _axis(str(name), values) for name, values in grid.get("axes", {}).items()}
        if suite["files"] is not None:
            axes = {"trace": _trace_axis(suite)} | axes
        for labels in product(*axes.values()):
            chosen = (axes[axis][label] for axis, label in zip(axes, labels, strict=True))
            overrides = [*grid.get("overrides", ()), *chain.from_iterable(chosen)]
            if suite["files"] is not None:
                overrides += _fitted_to_trace(overrides)
            named = {name.split(".")[-1]: _number(label) for name, label in zip(axes, labels, strict=True)}
            cells.append(Cell(suite["name"], named, tuple(overrides), seeds))
    return cells


def _axis(name: str, values: Any) -> Axis:
    """The overrides of each label: a list of values of the setting that the axis is named after, or a mapping."""
    if isinstance(values, list) and values:
        return {str(value): [f"{name}={value}"] for value in values}
    if isinstance(values, dict) and values and all(isinstance(overrides, list) for overrides in values.values()):
        return {str(label): [str(override) for override in overrides] for label, overrides in values.items()}
    raise UserError(f"Axis {name} of the suite should be a list of values, or of overrides by label.")


def _number(label: str) -> str | float:
    try:
        return float(label)
    except ValueError:
        return label


def _trace_axis(suite: dict[str, Any]) -> Axis:
    """The trace files of the suite's folder that match its pattern, or all of them where none does."""
    if suite["folder"] is None:
        raise UserError(f"suite={suite['name']} needs traces; give the folder they lie in as suite.folder=PATH.")
    folder = Path(suite["folder"]).expanduser().resolve()
    files = [path for path in sorted(folder.glob("*")) if path.name.endswith(TRACE_SUFFIXES) and path.is_file()]
    files = [path for path in files if path.match(str(suite["files"]))] or files
    if not files:
        raise UserError(f"suite.folder={folder} holds no trace ({', '.join(TRACE_SUFFIXES)}); give another folder.")
    labels = [_label(path.name) for path in files]
    return {
        label if labels.count(label) == 1 else path.name: [f"workload.path={quoted(str(path))}"]
        for label, path in zip(labels, files, strict=True)
    }


def _label(name: str) -> str:
    """A trace file's name without what its kind and its held-out part are called by."""
    for suffix in (".gz", ".csv", ".jsonl", ".val"):
        name = name.removesuffix(suffix)
    return name


def _fitted_to_trace(overrides: list[str]) -> list[str]:
    """What plays a trace whole where it is shorter, at its load, than the scenario."""
    wanted = composed(overrides).workload
    at_load_1 = tuple(override for override in overrides if not override.startswith("workload.load="))
    length_s = _trace_length_s(at_load_1) / wanted.load
    if length_s >= wanted.duration_s:
        return []
    return ["workload.duration_s=null", f"workload.warmup_s={min(SHORTEST_WARMUP * length_s, wanted.warmup_s):.3g}"]


@lru_cache
def _trace_length_s(overrides: tuple[str, ...]) -> float:
    """Seconds of a whole trace at load 1."""
    whole = ("workload.duration_s=null", "workload.warmup_s=0", "workload.load=1")
    return load_task(composed((*overrides, *whole))).duration_s()


def composed(overrides: list[str] | tuple[str, ...]) -> DictConfig:
    """The configuration of `python -m flexirl.evaluate` with these overrides; raises UserError for wrong ones."""
    # Hydra keeps one configuration source at a time, and a program that it runs has set one already.
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("evaluate", list(overrides))
    except HydraException as error:
        raise UserError(f"A scenario of the suite cannot be configured: {error}") from None
