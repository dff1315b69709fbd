"""An engine at another pace: a slower or faster chip, or the same one on another day."""

from __future__ import annotations

from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.step_time import COEFFICIENTS


def at_pace(profile: EngineProfile, pace: float) -> EngineProfile:
    """The engine whose iterations take `pace` times as long."""
    return profile.replace(**{name: pace * float(profile.values[name]) for name in (*COEFFICIENTS, "host_s")})
