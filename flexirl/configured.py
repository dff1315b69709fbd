"""Builds what the programs run on from their configuration."""

from __future__ import annotations

from omegaconf import DictConfig

from flexirl.errors import UserError
from flexirl.runtime.accounts import Prices
from flexirl.runtime.engine import EngineProfile, load_profile
from flexirl.workloads.scenario import SLO


def load_engine(config: DictConfig) -> EngineProfile:
    """The engine of group `engine`: its profile with the figures that are not null replaced."""
    changes = {str(name): value for name, value in config.items() if name != "profile" and value is not None}
    return load_profile(config.profile).replace(**changes)


def load_slo(config: DictConfig) -> SLO:
    """The promise of group `slo`."""
    return SLO(number(config.ttft_s, "slo.ttft_s"), number(config.tpot_s, "slo.tpot_s"))


def load_prices(config: DictConfig) -> Prices:
    """The prices of group `slo`."""
    return Prices(**{str(name): number(value, f"slo.prices.{name}") for name, value in config.prices.items()})


def number(value: object, name: str) -> float:
    """`value` as a float; raises UserError, naming the setting, for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name}={value} is not a number.")
    return float(value)


def seed_of(value: object, name: str = "seed") -> int:
    """`value` as a seed; raises UserError unless it is a whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name}={value} is out of range; a seed is a whole number of 0 or more.")
    return value
