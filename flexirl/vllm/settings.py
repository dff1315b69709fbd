"""What the operator of a vLLM server sets: the `flexirl` part of vLLM's `--additional-config`, or a file it names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flexirl.errors import UserError

KEY = "flexirl"  # in vLLM's additional configuration, and in a request's extra arguments
SUPPORTED = "0.32"
LEAST_WORK, BY_POLICY = "least_work", "policy"


@dataclass(frozen=True)
class Settings:
    """policy, knobs: as `flexirl.policies.registry.make_policy` takes them; interval_s: seconds between decisions.

    ttft_s, tpot_s: the promise to immediate requests that bring none; window_s: that of deferred ones, None for none.
    deferred_above: a request of a higher priority number is deferred, unless it says otherwise.
    time_limit_s: a decision that takes longer is not used; None, never. profile: the engine's until it is measured.
    victims: `least_work`, or `policy` for whom the decision names. relegated_wait_s: a request that was given up waits
    so long at most, then takes its turn as in vLLM. max_requests: that are looked at; others wait outside until some
    have ended. tenants: told apart, at most. any_version: try a vLLM that is not supported.
    """

    policy: str = "pretrained"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    interval_s: float | None = None
    ttft_s: float = 1.0
    tpot_s: float = 0.05
    window_s: float | None = None
    deferred_above: int = 0
    time_limit_s: float | None = 0.05
    profile: str = "h100-llama-3.1-8b"
    victims: str = LEAST_WORK
    relegated_wait_s: float = 60.0
    max_requests: int = 65536
    tenants: int = 64
    any_version: bool = False

    def __post_init__(self) -> None:
        for name in ("policy", "profile"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{KEY}.{name}={getattr(self, name)!r} is no name; give one, or a file.")
        if not isinstance(self.knobs, Mapping):
            raise UserError(f"{KEY}.knobs={self.knobs!r} should be the policy's knobs by name.")
        for name, may_lack in (
            ("interval_s", True), ("ttft_s", False), ("tpot_s", False), ("window_s", True), ("time_limit_s", True),
            ("relegated_wait_s", False),
        ):  # fmt: skip
            if not (may_lack and getattr(self, name) is None) and not is_seconds(getattr(self, name)):
                raise UserError(
                    f"{KEY}.{name}={getattr(self, name)!r} is out of range; give a positive number of seconds."
                )
        for name in ("deferred_above", "max_requests", "tenants"):
            value, least = getattr(self, name), -(2**31) if name == "deferred_above" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{KEY}.{name}={value!r} is out of range; give a whole number from {least}.")
        if self.victims not in (LEAST_WORK, BY_POLICY):
            raise UserError(f"{KEY}.victims={self.victims!r} is unknown; choose from {LEAST_WORK}, {BY_POLICY}.")
        if not isinstance(self.any_version, bool):
            raise UserError(f"{KEY}.any_version={self.any_version!r} should be true or false.")


def is_seconds(value: Any) -> bool:
    """True for a positive, finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def read_settings(additional_config: Any) -> Settings:
    """The settings in vLLM's additional configuration; raises UserError for what is none.

    Its `flexirl` is a mapping, or the path of a YAML or JSON file that holds one.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if isinstance(given, str):
        given = _read_file(Path(given))
    if not isinstance(given, Mapping):
        raise UserError(f"{KEY}={given!r} in vLLM's additional config should be a mapping, or the path of a file.")
    known = [setting.name for setting in fields(Settings)]
    for name in given:
        if name not in known:
            raise UserError(f"{KEY}.{name} is no setting of the plug-in for vLLM; choose from {', '.join(known)}.")
    return Settings(**given)


def _read_file(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError:
        raise UserError(f"{KEY}: file {path} cannot be read; give a YAML or JSON file of settings.") from None
    except Exception as error:  # of the library that reads YAML
        first = str(error).split("\n")[0]
        raise UserError(f"{KEY}: file {path} is no YAML or JSON ({first}); mend it.") from None


def check_version(version: str, any_version: bool) -> None:
    """Raises UserError for a vLLM that the plug-in has not been tried with, unless that is asked for."""
    if any_version or version == SUPPORTED or version.startswith(f"{SUPPORTED}."):
        return
    raise UserError(
        f"vLLM {version} has not been tried with this plug-in, which knows {SUPPORTED}; install that one, or set "
        f'{{"{KEY}": {{"any_version": true}}}} in --additional-config to try it all the same.'
    )
