"""Program: compares policies on the same arrivals: `python -m flexirl.evaluate policies='[hygen,PATH.onnx]'`."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from flexirl.configured import count_of, load_task, names_of, seed_of
from flexirl.evaluation import compare, table, write_leaderboard
from flexirl.plots import plot_comparison, plot_timeline
from flexirl.policies.registry import check_names
from flexirl.program import output_folder, run_program


def run(config: DictConfig) -> None:
    """Compares, prints and writes; raises UserError for bad configuration."""
    folder = output_folder()
    names = names_of(config.policies, "policies")
    check_names(names)
    seeds = count_of(config.seeds, "seeds")
    task = load_task(config)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    tuning = None
    if config.tuning.path is not None:
        tuning = load_task(OmegaConf.merge(config, {"workload": {"path": config.tuning.path}}))  # type: ignore[arg-type]
    comparison = compare(task, names, seeds, tuning, seed_of(config.seed))
    write_leaderboard(comparison.rows, folder)
    plot_comparison(comparison.rows, folder / "comparison.png")
    for name, result in comparison.first_runs.items():
        plot_timeline(result.timeline, name, folder / f"timeline_{name.replace(':', '_')}.png")
    print(table(comparison.rows))
    print(f"written to {folder}")


if __name__ == "__main__":
    run_program("evaluate", run)
