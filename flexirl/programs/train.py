"""Program: trains an agent, compares it with the heuristics, exports it: `python -m flexirl.train`.

On the surrogate, or (`env=live model=tiny`) on a live engine.
"""

from __future__ import annotations

from omegaconf import DictConfig

from flexirl.experiments.configuration import held_out_task, load_task, load_tasks
from flexirl.experiments.program import output_folder
from flexirl.experiments.records import record_run
from flexirl.experiments.settings import count_of, flag_of, names_of, seed_of
from flexirl.policies.registry import check_names


def run(config: DictConfig) -> float:
    """Trains, compares, exports; returns the best validation revenue share, so that sweeps can rank runs."""
    folder = output_folder()
    seed_of(config.seed)
    count_of(config.total_steps, "total_steps", least=0)
    count_of(config.validation.every_steps, "validation.every_steps")
    count_of(config.seeds, "seeds")
    flag_of(config.progress, "progress")
    names = names_of(config.policies, "policies")
    task, tasks = load_task(config), load_tasks(config)
    held_out = held_out_task(config, task)
    check_names(names)
    record_run(config, "train", folder)
    # PyTorch and its companions take seconds to import, which whoever mistyped an option need not wait for.
    from flexirl.programs.training import train

    return train(config, task, tasks, held_out, folder)
