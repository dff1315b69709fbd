"""Builds what the programs run on from their configuration.

Gymnasium, PyTorch and the live engine take seconds to import: what needs them imports them itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.reward import Reward
from flexirl.errors import UserError
from flexirl.experiments.renamed import check_names_of_settings
from flexirl.experiments.values import CONF, count_of, number
from flexirl.policies.interface.policy import Policy
from flexirl.policies.registry import make_policy
from flexirl.runtime.profile.engine import EngineProfile, load_profile
from flexirl.runtime.profile.pace import at_pace
from flexirl.runtime.scheduler.accounts import Prices
from flexirl.workloads.config import from_config
from flexirl.workloads.slo import SLO

if TYPE_CHECKING:
    from flexirl.envs.batching import BatchingEnv
    from flexirl.envs.live import LiveFleet
    from flexirl.envs.vector import BatchingVectorEnv
    from flexirl.runtime.live.executor import Executor
    from flexirl.runtime.models.executor import ModelExecutor
    from flexirl.runtime.models.loading import LoadedModel


def load_engine(config: DictConfig) -> EngineProfile:
    """The engine of group `engine`: its profile at the pace given, with the figures that are not null replaced."""
    known = ("profile", "pace")
    changes = {str(name): value for name, value in config.items() if name not in known and value is not None}
    pace = number(config.pace, "engine.pace")
    if not pace > 0:
        raise UserError(f"engine.pace={pace} is out of range; 2 is an engine whose iterations take twice as long.")
    return at_pace(load_profile(config.profile), pace).replace(**changes)


def load_executor(config: DictConfig) -> tuple[LoadedModel, ModelExecutor]:
    """The model of `model`, `device` and `dtype`, and what runs it with the limits of group `engine`.

    PyTorch computes on `threads` threads from here on. Raises UserError for what cannot be loaded or does not fit.
    """
    # Transformers takes seconds to import, which whoever mistyped an option need not wait for.
    import torch

    from flexirl.runtime.models.executor import ModelExecutor, fit_profile
    from flexirl.runtime.models.loading import load_model

    profile = load_engine(config.engine)
    torch.set_num_threads(count_of(config.threads, "threads"))
    model = load_model(config.model, config.device, config.dtype)
    profile = fit_profile(model, profile, config.engine.kv_blocks, config.engine.host_kv_blocks)
    return model, ModelExecutor(model, profile)


def load_rule(config: DictConfig) -> Policy:
    """The policy of group `policy`: a rule with its knobs, or the network in an .onnx file."""
    knobs = {str(name): value for name, value in config.items() if name != "name"}
    return make_policy(str(config.name), knobs)


def load_slo(config: DictConfig) -> SLO:
    """The promise of group `slo`."""
    return SLO(*(number(config[name], f"slo.{name}") for name in ("ttft_s", "tpot_s", "patience")))


def load_prices(config: DictConfig) -> Prices:
    """The prices of group `slo`."""
    return Prices(**{str(name): number(value, f"slo.prices.{name}") for name, value in config.prices.items()})


def load_task(config: DictConfig) -> Task:
    """What is played, from groups `workload`, `engine`, `slo`, `reward` and `env`."""
    env = config.env
    return Task(
        scenario=from_config(config.workload),
        engine=load_engine(config.engine),
        slo=load_slo(config.slo),
        reward=Reward(**OmegaConf.to_container(config.reward, resolve=True)),  # type: ignore[arg-type]
        prices=load_prices(config.slo),
        interval_s=number(env.interval_s, "env.interval_s"),
        action=env.action,
        immediate_order=env.immediate_order,
        deferred_order=env.deferred_order,
    )


def load_task_on(config: DictConfig, trace: str) -> Task:
    """The task of `config` with the trace in that file in place of its own."""
    return load_task(OmegaConf.merge(config, {"workload": {"path": trace}}))  # type: ignore[arg-type]


def load_tasks(config: DictConfig) -> list[Task]:
    """What is trained on: the task of `config`, or those of the mixture of group `mixture`."""
    mixture = config.get("mixture")
    if mixture is None:
        return [load_task(config)]
    return _mixed(config, range(count_of(mixture.tasks, "mixture.tasks")))


def load_validation_tasks(config: DictConfig) -> list[Task]:
    """As many tasks of the mixture as are validated on: those that come after the ones trained on."""
    first = count_of(config.mixture.tasks, "mixture.tasks")
    return _mixed(config, range(first, first + count_of(config.validation.members, "validation.members")))


def held_out_task(config: DictConfig, task: Task) -> Task:
    """The task to validate and compare on: the held-out part of a recorded trace, else the same with other seeds."""
    path = config.validation.path
    if path is None and config.workload.immediate.kind == "trace":
        recorded = Path(config.workload.path)
        beside = recorded.with_name(recorded.name.replace(".csv", ".val.csv", 1))
        path = str(beside) if beside != recorded and beside.is_file() else None
    return task if path is None else load_task_on(config, path)


def _mixed(config: DictConfig, numbers: Iterable[int]) -> list[Task]:
    """The parts of a mixture take turns; task i of a part takes entry i of each of its axes, lists of overrides.

    The lists are repeated as often as needed. With lengths that have no common divisor, everything comes to meet
    everything.
    """
    parts = [list(axes.values()) for axes in config.mixture.parts.values()]
    tasks = []
    for count in numbers:
        i, which = divmod(count, len(parts))
        overrides = [override for axis in parts[which] for override in axis[i % len(axis)]]
        task = _train_config(overrides)
        task.env, task.reward = config.env, config.reward
        tasks.append(load_task(task))
    return tasks


def make_batching_env(overrides: Sequence[str] | str = (), task: Task | None = None, **options: Any) -> BatchingEnv:
    """Entry point of `flexirl/Batching-v0`: `task`, or that of `python -m flexirl.train` with these Hydra overrides."""
    from flexirl.envs.batching import BatchingEnv

    return BatchingEnv(Fleet(task or default_task(overrides), 1), **options)


def make_vector_env(
    num_envs: int = 1, overrides: Sequence[str] | str = (), task: Task | None = None, **options: Any
) -> BatchingVectorEnv:
    """Vector entry point of `flexirl/Batching-v0`: `num_envs` members of one fleet, stepped in compiled code."""
    from flexirl.envs.vector import BatchingVectorEnv

    return BatchingVectorEnv(task or default_task(overrides), num_envs, **options)


def make_live_env(overrides: Sequence[str] | str = (), **options: Any) -> BatchingEnv:
    """Entry point of `flexirl/LiveBatching-v0`: the engine of `flexirl.train env=live` with these overrides."""
    from flexirl.envs.batching import BatchingEnv

    config = _train_config(["env=live", *_listed(overrides)])
    task = load_task(config)
    return BatchingEnv(load_live_fleet(config, task, load_executor(config)[1]), **options)


def load_live_fleet(config: DictConfig, task: Task, executor: Executor) -> LiveFleet:
    """The task on a live engine, by the clock of group `env`."""
    from flexirl.envs.live import CLOCKS, LiveFleet

    if config.env.clock not in CLOCKS:
        raise UserError(f"env.clock={config.env.clock} is unknown; choose from {', '.join(CLOCKS)}.")
    return LiveFleet(task, executor, CLOCKS[config.env.clock], count_of(config.env.traces, "env.traces"))


def default_task(overrides: Sequence[str] | str = ()) -> Task:
    """The task of `python -m flexirl.train` with these Hydra overrides."""
    return load_task(_train_config(overrides))


def _listed(overrides: Sequence[str] | str) -> list[str]:
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _train_config(overrides: Sequence[str] | str) -> DictConfig:
    listed = _listed(overrides)
    check_names_of_settings(listed)
    # Whoever calls may be in a Hydra application of their own, whose state is to be found as it was.
    theirs, behaviour = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", listed)
    finally:
        GlobalHydra.instance().hydra = theirs
        VersionBase.instance().version_base = behaviour
