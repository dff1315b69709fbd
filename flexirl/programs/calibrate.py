"""Program: measures a model on this machine and writes an engine profile: `python -m flexirl.calibrate model=tiny`."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from flexirl.experiments.configuration import load_executor
from flexirl.experiments.plots import plot_calibration
from flexirl.experiments.program import output_folder
from flexirl.experiments.values import number, seed_of
from flexirl.policies.registry import make_policy
from flexirl.progress import progress_bar
from flexirl.runtime.fitting.calibration import calibrate
from flexirl.runtime.profile.capacity import ServiceTime
from flexirl.runtime.profile.engine import save_profile
from flexirl.runtime.profile.fits import longest_sequence
from flexirl.runtime.profile.step_time import BATCH
from flexirl.workloads.config import from_config
from flexirl.workloads.slo import SLO

RULE = "qoserve"  # decides in the engine's own run, by which the fit is checked


def run(config: DictConfig) -> None:
    """Measures, fits, prints and writes; raises UserError for bad configuration."""
    folder = output_folder()
    seconds, seed = number(config.seconds, "seconds"), seed_of(config.seed)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    model, executor = load_executor(config)
    slo = SLO(np.inf, np.inf)  # nobody is promised anything here
    trace = from_config(config.workload).draw(seed, ServiceTime(executor.profile), slo)
    trace = trace.within(longest_sequence(executor.profile.values))
    about = {
        "machine": machine(model.device, torch.get_num_threads()), "model": model.name, "dtype": str(model.dtype),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    with progress_bar(100, "%", config.progress, desc="measuring") as bar:
        name = str(config.name or f"{Path(model.name).name}-{model.device.type}")
        found = calibrate(
            executor,
            make_policy(RULE),
            trace,
            name,
            about,
            seconds,
            seed,
            lambda share: bar.update(round(100 * share) - bar.n),
        )
    save_profile(found.profile, folder / "profile.json")
    columns = {**{name: found.features[name] for name in BATCH.names or ()}, "seconds": found.times_s}
    table = np.column_stack(list(columns.values()))
    np.savetxt(folder / "iterations.csv", table, delimiter=",", header=",".join(columns), comments="")
    plot_calibration(found.features, found.times_s, found.profile, found.steps, found.predicted_s, folder)
    print(summary(found.profile.name, found.profile.fit, found.profile.values))
    (folder / "summary.json").write_text(json.dumps(found.profile.fit, indent=1) + "\n")
    print(f"written to {folder / 'profile.json'}; use it as engine={folder / 'profile.json'}")


def machine(device: torch.device, threads: int) -> str:
    """The device by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {threads} threads"


def summary(name: str, report: dict[str, Any], values: Any) -> str:
    """What was found, in a few lines."""
    return "\n".join(
        [
            f"{name} on {report['machine']}: {report['rows_fitted']} iterations fitted, "
            f"error {report['mape']:.1%} on {report['rows_held_out']} held out (95th percentile "
            f"{report['p95_error']:.1%}), noise {report['noise']:.1%}",
            f"engine's own run: error {report['run_mape']:.1%} per iteration over {report['run_iterations']}, "
            f"{report['run_total_error']:+.1%} in all",
            f"base {1e3 * values['base_s']:.3f} ms, host {1e3 * values['host_s']:.3f} ms, swap "
            f"{1e9 * values['per_swap_token_s']:.0f} ns per token, images "
            f"{1e6 * values['per_image_token_s']:.1f} microseconds per token; {values['kv_blocks']} blocks",
        ]
    )
