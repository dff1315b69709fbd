"""Program: compares policies on the same arrivals: `python -m flexirl.evaluate policies='[hygen,PATH.onnx]'`.

On the surrogate, on a live engine (`executor=live model=tiny`), or on both, side by side (`compare=live,surrogate`).
"""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from flexirl.configured import count_of, load_executor, load_task, names_of, seed_of
from flexirl.errors import UserError
from flexirl.evaluation import Runner, compare, on_live, on_surrogate, table, write_leaderboard
from flexirl.fidelity import rank_agreement, side_by_side, write_fidelity
from flexirl.fidelity import table as fidelity_table
from flexirl.plots import plot_comparison, plot_fidelity, plot_timeline
from flexirl.policies.registry import check_names
from flexirl.program import output_folder, run_program

ENGINES = ("surrogate", "live")


def run(config: DictConfig) -> None:
    """Compares, prints and writes; raises UserError for bad configuration."""
    folder = output_folder()
    names = names_of(config.policies, "policies")
    check_names(names)
    seeds, seed = count_of(config.seeds, "seeds"), seed_of(config.seed)
    engines = [str(config.executor)] if config.compare is None else str(config.compare).split(",")
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"{engine} is no engine to run on; choose from {', '.join(ENGINES)}.")
    task = load_task(config)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    tuning = None
    if config.tuning.path is not None:
        tuning = load_task(OmegaConf.merge(config, {"workload": {"path": config.tuning.path}}))  # type: ignore[arg-type]
    runners: dict[str, Runner] = {"surrogate": on_surrogate}
    if "live" in engines:
        _, executor = load_executor(config)
        task, runners["live"] = replace(task, engine=executor.profile), on_live(executor)
    rows = {}
    for engine in engines:
        comparison = compare(task, names, seeds, tuning, seed, runners[engine])
        rows[engine] = comparison.rows
        place = folder / engine if len(engines) > 1 else folder
        place.mkdir(exist_ok=True)
        write_leaderboard(comparison.rows, place)
        plot_comparison(comparison.rows, place / "comparison.png")
        for name, result in comparison.first_runs.items():
            plot_timeline(result.timeline, name, place / f"timeline_{name.replace(':', '_')}.png")
        print(table(comparison.rows) if len(engines) == 1 else f"{engine}\n{table(comparison.rows)}\n")
    if len(rows) == 2:
        compared = side_by_side(rows["live"], rows["surrogate"])
        tau = rank_agreement(rows["live"], rows["surrogate"])
        write_fidelity(compared, tau, folder)
        plot_fidelity(compared, folder / "fidelity.png")
        print(f"{fidelity_table(compared)}\norders of the policies by revenue: Kendall's tau {tau:.2f}")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_program("evaluate", run)
